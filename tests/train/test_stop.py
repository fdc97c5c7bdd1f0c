"""A run that stops in mid-step saves what it has, and the same command goes on."""

import hashlib
import json
import math
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import exit_code, join_ranks, spawn
from safetensors.numpy import load_file
from world import rlmt_flags, sft_flags

from thinkmid.data.sequences import read_sequences
from thinkmid.errors import UserError
from thinkmid.model import weights
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.run import checkpoint
from thinkmid.run.interrupt import Interrupt
from thinkmid.run.log import Log
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import metrics, rl, rlmt, sft, supervised
from thinkmid.train.optim import Offload
from thinkmid.train.rollouts import STEPS_BETWEEN_POLLS, rollouts
from thinkmid.types import Prompt


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, sft_flags(folder)) == 0
    return folder


@pytest.fixture
def engine_states(monkeypatch):
    """What the engine did each time Adam's moments came back to the device."""
    engines, seen, restore = [], [], Offload.restore

    def make(*args, **options):
        engines.append(make_engine(*args, **options))
        return engines[-1]

    def noted(self):
        if self.is_offloaded:
            seen.append(engines[-1]._phases.state)
        restore(self)

    monkeypatch.setattr(rl, "make_engine", make)
    monkeypatch.setattr(Offload, "restore", noted)
    return seen


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder):
    return [row["step"] for row in rows_of(folder)]


def refuses(monkeypatch):
    def _run(self, *args):
        raise UserError("a prompt is too long")

    monkeypatch.setattr(NativeEngine, "_run", _run)
    return 2


def disagrees(monkeypatch):
    monkeypatch.setattr(weight_sync, "difference", lambda *_: "spoilt")
    return 2


def is_asked_to_stop(monkeypatch):
    run = NativeEngine._run

    def _run(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from run(self, *args)

    monkeypatch.setattr(NativeEngine, "_run", _run)
    return 75


def has_no_verdicts(monkeypatch):
    """When the engine sleeps already."""
    monkeypatch.setattr(rl, "refuse_unjudged", refuses_all)
    return 2


def refuses_all(*_):
    raise UserError("no verdict")


@pytest.mark.parametrize("stops", [refuses, disagrees, is_asked_to_stop, has_no_verdicts], ids=lambda f: f.__name__)
def test_the_engine_sleeps_before_the_moments_come_back_and_the_run_goes_on(home, engine_states, monkeypatch, stops):
    flags = [*rlmt_flags(home, stops.__name__, steps=3), "--optim.offload", "true", "--engine.check-every", "1"]
    assert exit_code(rlmt, [*flags, "--run.steps", "1"]) == 0
    with monkeypatch.context() as spoilt:
        code = stops(spoilt)
        assert exit_code(rlmt, flags) == code
    assert steps(home / stops.__name__) == [1]
    assert exit_code(rlmt, flags) == 0
    assert steps(home / stops.__name__) == [1, 2, 3]
    # once a step, and where the run stopped
    assert engine_states == ["asleep"] * 4


def test_going_on_reads_a_checkpoint_once_and_the_weights_before_it_not_at_all(home, monkeypatch):
    flags = [*rlmt_flags(home, "twice", steps=2), "--reward.scorer", "ema", "--reward.gain", "1"]
    assert exit_code(rlmt, flags) == 0
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    monkeypatch.setattr(weights, "load_into", lambda *_: pytest.fail("weights were read"))
    assert exit_code(rlmt, [*flags, "--run.steps", "4"]) == 0
    assert steps(home / "twice") == [1, 2, 3, 4]
    found = [f"{home}/twice/checkpoints/step-000002/{name}" for name in ("rank-00000.safetensors", "state.json")]
    assert [str(path) for path in read if "checkpoints" in str(path)] == found


def test_an_engine_without_room_for_the_longest_prompt_is_refused_before_anything_starts(home, capsys, monkeypatch):
    monkeypatch.setattr(rl, "check_vllm", lambda: None)
    flags = [*rlmt_flags(home, "short"), "--engine.kind", "vllm", "--engine.max-len", "22"]
    assert exit_code(rlmt, flags) == 2
    assert "engine.max_len 22: a prompt of 13 tokens + " in capsys.readouterr().err
    assert [path.name for path in (home / "short").glob("[!.]*")] == ["store"]


# a stop while the trainer works


@pytest.fixture(scope="module")
def programs(home):
    """Module, flags of three steps of several packs each, the module that holds the loss function, its name."""
    packs = ["--batch.pack_tokens", "80", "--loss.entropy", "0.01", "--run.save-every", "0"]  # no group is dead
    rl_flags = [*rlmt_flags(home, "", steps=3)[:1], *packs]
    sft_flags = [str(home / "sft.toml"), "--run.steps", "3", "--data.pack-tokens", "64", "--run.save-every", "0"]
    return {"rlmt": (rlmt, rl_flags, rl, "policy_loss"), "sft": (sft, sft_flags, supervised, "text_loss")}


def left(folder):
    """What a run leaves, clocks aside."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]
    return rows, (folder / "export" / "model.safetensors").read_bytes()


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def signal_in(monkeypatch, module, name, folder, is_time=lambda packs, options: False):
    """Packs that the loss function has seen, each with the steps that were done; SIGTERM once is_time(them, ...)."""
    packs, work, sent = [], getattr(module, name), []

    def counted(*args, **options):
        packs.append(len(steps(folder)) if (folder / "metrics.jsonl").exists() else 0)
        if not sent and is_time(packs, options):
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return packs


@pytest.mark.parametrize("which", ["rlmt", "sft"])
def test_a_stop_between_two_packs_drops_the_step_and_costs_nothing_else(home, programs, monkeypatch, which):
    program, flags, module, name = programs[which]
    alone, stopped = home / f"{which}-alone", home / f"{which}-stopped"
    with monkeypatch.context() as patch:
        packs = signal_in(patch, module, name, alone)
        assert exit_code(program, [*flags, "--run.folder", str(alone)]) == 0
    assert min(packs.count(step) for step in range(3)) > 2
    flags = [*flags, "--run.folder", str(stopped)]
    with monkeypatch.context() as patch:
        seen = signal_in(patch, module, name, stopped, lambda packs, _: packs.count(1) == 2)
        assert exit_code(program, flags) == 75
    assert seen == packs[: packs.index(1) + 2]
    assert (steps(stopped), saved(stopped)) == ([1], ["step-000001"])
    assert exit_code(program, flags) == 0
    assert left(stopped) == left(alone)


def test_a_stop_after_the_first_of_two_updates_ends_with_the_step_and_before_any_other_work(
    home, programs, monkeypatch
):
    program, flags, module, name = programs["rlmt"]
    flags = [*flags, "--batch.updates", "2", "--data.val-paths", str(home / "corpus.jsonl"), "--data.val-every", "2"]
    alone, stopped, calls = home / "updates-alone", home / "updates-stopped", []
    with monkeypatch.context() as patch:
        packs = signal_in(patch, module, name, alone)
        assert exit_code(program, [*flags, "--run.folder", str(alone)]) == 0
    flags = [*flags, "--run.folder", str(stopped)]
    with monkeypatch.context() as patch:
        second = lambda packs, options: packs[-1] == 1 and not options["first_update"]  # noqa: E731
        seen = signal_in(patch, module, name, stopped, second)
        for method in ("load_weights", "generate"):
            patch.setattr(NativeEngine, method, noted(getattr(NativeEngine, method), calls))
        assert exit_code(program, flags) == 75
    assert seen == [step for step in packs if step < 2]
    assert calls == ["load_weights", "generate"] * 3  # of the look at the held-out prompts and of two steps
    # the row of step 2 waits for the look that belongs into it
    assert (steps(stopped), saved(stopped)) == ([1], ["step-000002"])
    assert exit_code(program, flags) == 0
    assert "val_reward" in left(stopped)[0][1]
    assert left(stopped) == left(alone)


def test_a_look_that_a_signal_cuts_twice_is_made_by_the_run_that_resumes(home, monkeypatch):
    flags = [*rlmt_flags(home, "", steps=3)[:1], "--optim.offload", "true", "--run.save-every", "1"]
    flags += ["--data.val-paths", str(home / "corpus.jsonl"), "--data.val-every", "2"]
    alone, stopped, calls = home / "look-alone", home / "look-stopped", []
    assert exit_code(rlmt, [*flags, "--run.folder", str(alone)]) == 0
    generate = NativeEngine.generate

    def cut(self, *args, **options):
        calls.append(None)
        if len(calls) in (4, 5):  # after the gate and two steps, then at once
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *args, **options)

    monkeypatch.setattr(NativeEngine, "generate", cut)
    flags += ["--run.folder", str(stopped)]
    for _ in range(2):
        assert exit_code(rlmt, flags) == 75
        assert (steps(stopped), saved(stopped)) == ([1], ["step-000001", "step-000002"])
    assert exit_code(rlmt, flags) == 0
    assert left(stopped) == left(alone)
    assert {"val_reward"} <= left(stopped)[0][1].keys()
    names = [sorted(path.name for path in (folder / "rollouts").iterdir()) for folder in (stopped, alone)]
    assert names[0] == names[1]


def test_a_look_that_was_made_up_for_is_not_made_again(home, monkeypatch):
    flags = [*rlmt_flags(home, "made-up", steps=3), "--run.save-every", "3"]
    flags += ["--data.val-paths", str(home / "corpus.jsonl"), "--data.val-every", "2"]
    generate, calls = NativeEngine.generate, []

    def cut(self, *args, **options):
        calls.append(None)
        if len(calls) in (4, 6):  # in the look after step 2; resumed, that look is done, in step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *args, **options)

    monkeypatch.setattr(NativeEngine, "generate", cut)
    assert [exit_code(rlmt, flags) for _ in range(3)] == [75, 75, 0]
    assert len(calls) == 8  # step 3 again, and the look after it
    assert ["val_reward" in row for row in rows_of(home / "made-up")] == [False, True, True]


def test_a_mistake_in_the_first_look_saves_nothing_and_may_be_corrected(home, monkeypatch):
    flags = [*rlmt_flags(home, "first-look", steps=2), "--data.val-paths", str(home / "corpus.jsonl")]
    with monkeypatch.context() as patch:
        code = refuses(patch)
        assert exit_code(rlmt, flags) == code
    assert not list((home / "first-look").glob("checkpoints/step-*"))
    assert exit_code(rlmt, [*flags, "--sampling.max-batch", "7"]) == 0


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_a_step_of_which_an_update_was_applied_is_not_saved_as_one_that_was_not(home, monkeypatch, broken):
    """One broken update more than may be: the state before the step is saved only if it is still there."""
    train_step, calls = rl.train_step, []

    def spoilt(*args, **options):
        calls.append(None)
        stats = train_step(*args, **options)
        # of step 2; what was applied is applied
        return replace(stats, broken=["x"]) if len(calls) - 3 in broken else stats

    monkeypatch.setattr(rl, "train_step", spoilt)
    name = f"partly-{len(broken)}{broken[0]}"
    flags = [
        *rlmt_flags(home, name, steps=3),
        "--batch.updates",
        "2",
        "--optim.max-skipped",
        "0",
        "--run.save-every",
        "3",
    ]
    assert exit_code(rlmt, flags) == 2
    saved_steps = [path.name for path in (home / name).glob("checkpoints/step-*")]
    assert saved_steps == (["step-000001"] if broken == (0, 1) else [])


def test_words_that_nobody_reads_any_more_cost_no_stop(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    stop = Interrupt()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


# a reward that is gone


def test_a_reward_that_turns_zero_is_noted_once_over_a_restart_too(home, monkeypatch, capsys):
    rewards, describe = [math.nan, 0.5, 0.0, math.nan, 0.0, 0.0, 0.0, 0.2, 0.0], metrics.describe
    given = iter(rewards)
    monkeypatch.setattr(rl, "ZEROS", 3)
    monkeypatch.setattr(metrics, "describe", lambda groups: describe(groups) | {"reward": next(given)})
    for num in (5, len(rewards)):
        assert exit_code(rlmt, rlmt_flags(home, "collapse", steps=num)) == 0
    events = [json.loads(line) for line in (home / "collapse" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "reward_collapsed"] == [6]
    said = [line for line in capsys.readouterr().out.splitlines() if "every reward" in line]
    assert said == ["warning: step 6: every reward of the last 3 steps is 0, and earlier ones were not"]


def noted(method, calls):
    def wrapped(*args, **options):
        calls.append(method.__name__)
        return method(*args, **options)

    return wrapped


# a stop while ranks that share an engine draw


class Steps:
    """An engine whose generation takes so many steps."""

    def __init__(self, num, at, interrupt):
        self.num, self.at, self.interrupt, self.done = num, at, interrupt, 0

    def generate(self, requests, sampling):
        while self.done < self.num:
            self.done += 1
            self.interrupt.requested |= self.done == self.at
            yield [] if self.done < self.num else [(request, "sample") for request in requests]


def draws(rank, world, folder):
    join_ranks(rank, world, folder)
    ranks, interrupt = start_ranks(2), SimpleNamespace(requested=False)
    # the engine of ranks 0 and 1 takes more steps than that of ranks 2 and 3; rank 1 gets the signal in the 20th
    engine = Steps(100 if rank < 2 else 37, 20 if rank == 1 else -1, interrupt)
    quiet = SimpleNamespace(beat=lambda: None, progress=lambda *_: None)
    run = SimpleNamespace(ranks=ranks, interrupt=interrupt, watch=quiet, log=quiet)
    part = SimpleNamespace
    cfg = part(run=part(seed=0), batch=part(siblings=2), drawn=None, engine=part(tensor_parallel=2))
    groups, _ = rollouts(run, engine, [Prompt(id="p", tokens=[1])], cfg, 0)
    found = {"steps": engine.done, "whole": groups is not None, "saves": ranks.any(groups is None)}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world", [2, 4])
def test_neighbours_that_share_an_engine_stop_at_the_same_step_and_other_engines_go_on(tmp_path, world):
    spawn(draws, world, world, tmp_path)
    found = [json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for rank in range(world)]
    assert found[0] == found[1]
    assert 20 <= found[0]["steps"] <= 20 + STEPS_BETWEEN_POLLS
    assert not found[0]["whole"]
    assert found[2:] == [{"steps": 37, "whole": True, "saves": True}] * (world - 2)
    assert all(f["saves"] for f in found)


# what the console says


def test_a_run_begins_with_what_it_is_and_a_stop_ends_with_what_is_saved(home, capsys, monkeypatch):
    flags = [*rlmt_flags(home, "said", steps=3), "--run.save-every", "0", "--loss.entropy", "0.01"]
    with monkeypatch.context() as patch:
        signal_in(patch, rl, "policy_loss", home / "said", lambda packs, _: packs.count(1) == 1)
        assert exit_code(rlmt, flags) == 75
    lines = capsys.readouterr().out.splitlines()
    num = sum(math.prod(tensor.shape) for tensor in load_file(home / "sft/export/model.safetensors").values())
    # 24 documents with a thought each, 3 steps of 5
    assert lines[0] == (
        f"RLMT of {home}/sft/export: {num:,} parameters, float32 on cpu, 1 rank; 24 prompts of at most 13 tokens, "
        "5 x 4 a step; 3 steps = 0.625 epochs, from step 0"
    )
    assert lines[-1] == "stopped: saved step 2; the same command resumes"
    assert exit_code(rlmt, flags) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("3 steps = 0.625 epochs, from step 2")


def test_bf16_on_a_cpu_without_its_units_is_said(home, capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    flags = [*rlmt_flags(home, "half", steps=1), "--model.dtype", "bfloat16", "--engine.check-every", "0"]
    assert exit_code(rlmt, flags) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "bf16 units" in line]
    assert [line.split(": ")[1] for line in said] == ["model.dtype bfloat16"]


def test_sft_begins_with_its_documents_tokens_and_epochs(home, capsys):
    flags = [*sft_flags(home), "--run.steps=0", "--data.epochs=2", "--run.folder", f"{home}/headline"]
    assert exit_code(sft, flags) == 0
    (first,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SFT of ")]
    tokenizer = Tokenizer.load(home / "sft/export")
    lengths = [len(tokens) for tokens, _ in read_sequences([f"{home}/corpus.jsonl"], tokenizer, 64)]
    epochs = len(rows_of(home / "headline")) * 256 / sum(lengths)
    assert f"; 24 documents, {sum(lengths):,} tokens, at most 256 a step; " in first
    assert f"{epochs:.3g} epochs, from step 0" in first


def test_a_stop_that_could_save_nothing_does_not_claim_to(home, capsys, monkeypatch):
    def full(*_, **__):
        raise checkpoint.CheckpointError("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    signal_in(monkeypatch, rl, "policy_loss", home / "full", lambda packs, _: len(packs) == 1)
    assert exit_code(rlmt, [*rlmt_flags(home, "full", steps=3), "--loss.entropy", "0.01"]) == 75
    assert capsys.readouterr().out.splitlines()[-1] == "stopped: nothing is saved; the same command resumes"


@pytest.mark.parametrize("which", ["rlmt", "sft"])
def test_checkpoints_by_the_clock_change_nothing_but_where_a_killed_run_resumes(home, programs, monkeypatch, which):
    program, flags, *_ = programs[which]
    alone, timed, minutes = home / f"{which}-unsaved", home / f"{which}-timed", ["--run.save-minutes", "10"]
    assert exit_code(program, [*flags, "--run.folder", str(alone)]) == 0
    real, save, saves = time.monotonic, checkpoint.save, []

    def late():
        # six minutes a step: the first checkpoint is due after two
        return real() + 360 * (len(rows_of(timed)) if (timed / "metrics.jsonl").exists() else 0)

    def noted(root, step, *args, **options):
        saves.append(step)
        return save(root, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", late)
        patch.setattr(checkpoint, "save", noted)
        assert exit_code(program, [*flags, *minutes, "--run.folder", str(timed)]) == 0
    assert saves == [2, 3]  # and the last
    assert left(timed) == left(alone)


def test_the_phase_on_the_console_is_the_one_in_the_watch_file(home, monkeypatch):
    seen, phase = [], Log.phase

    def noted(self, name):
        phase(self, name)
        seen.append(name)

    monkeypatch.setattr(Log, "phase", noted)
    flags = [*rlmt_flags(home, "phases", steps=2), "--data.val-paths", str(home / "corpus.jsonl")]
    assert exit_code(rlmt, flags) == 0
    step = ["sync", "rollout", "reward", "train"]
    assert seen == [*(f"validation: {name}" for name in step[:3]), *step, *step, "save", "export"]
