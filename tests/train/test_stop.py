"""A run that stops in mid-step saves what it has, and the same command goes on."""

import hashlib
import json
import os
import signal

import pytest
from conftest import exit_code
from world import rlmt_flags, sft_flags

from thinkmid.errors import UserError
from thinkmid.model import weights
from thinkmid.rollout import sync
from thinkmid.rollout.engine import make_engine
from thinkmid.rollout.native import NativeEngine
from thinkmid.train import rl, rlmt, sft
from thinkmid.train.optim import Offload


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, sft_flags(folder)) == 0
    return folder


@pytest.fixture
def engine_states(monkeypatch):
    """What the engine did each time Adam's moments came back to the device."""
    engines, seen, back = [], [], Offload.back

    def make(*args, **options):
        engines.append(make_engine(*args, **options))
        return engines[-1]

    def noted(self):
        if self.is_away:
            seen.append(engines[-1]._phases.state)
        back(self)

    monkeypatch.setattr(rl, "make_engine", make)
    monkeypatch.setattr(Offload, "back", noted)
    return seen


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refuses(monkeypatch):
    def _run(self, *args):
        raise UserError("a prompt is too long")

    monkeypatch.setattr(NativeEngine, "_run", _run)
    return 2


def disagrees(monkeypatch):
    monkeypatch.setattr(sync, "difference", lambda *_: "spoilt")
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
