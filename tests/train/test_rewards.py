"""Rewards without a judge, the next-token loss and the look at held-out prefixes, as a user runs them."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import exit_code
from later import Ready
from safetensors.torch import load_file
from world import rlmt_flags, sft_flags

from thinkmid.data.prompts import at_thoughts
from thinkmid.data.source import read_documents
from thinkmid.model.weights import load_model, read_config
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import rlmt, rlpt, sft
from thinkmid.train.config import RewardConfig
from thinkmid.train.likelihood import Scores
from thinkmid.types import Group, Sample


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus and a model that has learnt what its thoughts are good for."""
    folder = tmp_path_factory.mktemp("home")
    wide = ["--run.steps", "150", "--fresh.width", "32", "--fresh.ffn", "64", "--optim.warmup", "10"]
    assert exit_code(sft, [*sft_flags(folder), *wide]) == 0
    return folder


def run(home, name, *flags, steps=4):
    assert exit_code(rlmt, [*rlmt_flags(home, name, steps), *flags]) == 0
    return metrics(home / name)


def metrics(folder):
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if not re.search("_s$", k)} for row in rows]


def rollouts(folder, step):
    return [json.loads(line) for line in (folder / f"rollouts/step-{step:06d}.jsonl").read_text().splitlines()]


def tensors(folder, step):
    return load_file(folder / f"checkpoints/step-{step:06d}/rank-00000.safetensors")


GAIN = ["--reward.judge", "0", "--reward.gain", "1", "--sampling.max-think", "16", "--sampling.max-suffix", "8"]
EMA = ["--reward.scorer", "ema", "--reward.baseline", "frozen", "--reward.decay", "0.75"]


def test_a_run_without_a_judges_weight_makes_none_and_asks_nobody(home, monkeypatch):
    for name in ("ask.make_ask", "reward.make_reward", "ask.read_judge"):
        monkeypatch.setattr(f"thinkmid.rollout.judge.{name}", lambda *_, **__: pytest.fail("a judge was made"))
    rows = run(home, "nobody", *GAIN, "--judge.kind", "swap", "--judge.folder", "nowhere")
    assert all(row["reward_failed"] == 0 for row in rows)
    for row in rows:
        samples = rollouts(home / "nobody", row["step"])
        # what rollouts tell stays a real number; the metric is of thoughts that closed
        assert all(s["verdict"]["value"] == s["reward"] for s in samples)
        gains = [s["reward"] for s in samples if s["thinking_tokens"] < s["tokens"]]
        assert np.mean(gains) == pytest.approx(row["gain"])
        assert any(gain % 1 for gain in gains)


def test_the_judges_verdict_alone_runs_no_scoring(home, monkeypatch):
    monkeypatch.setattr("thinkmid.train.likelihood.logprobs", lambda *_: pytest.fail("a forward"))
    assert not {"likelihood", "gain", "verdict", "prefix_match"} & run(home, "judged")[0].keys()


def test_a_thought_that_holds_the_answer_gains_more_than_a_blank_one(home):
    text, model = Tokenizer.load(home / "sft/export"), load_model(home / "sft/export")
    groups = []
    for prompt in at_thoughts(read_documents([home / "corpus.jsonl"]), text, max_prefix=100):
        total = re.search(r"are (\d+) coins", prompt.meta["reference"])[1]
        n, k = re.findall(r"\d+", text.decode(prompt.tokens))
        samples = [written(text, thought) for thought in (f" {n} + {k} = {total}.</think>", " </think>")]
        groups.append(Group(prompt=prompt, samples=samples, rewards=[0, 0], whys=["", ""]))
    alone = Ranks(0, 1, torch.device("cpu"), None)
    job = SimpleNamespace(model=model, frozen=None, ema=None, tokenizer=text, ranks=alone)
    sampling, batch = SimpleNamespace(max_suffix=8), SimpleNamespace(pack_tokens=4096)
    scores = Scores(job, SimpleNamespace(reward=RewardConfig(judge=0, gain=1), sampling=sampling, batch=batch))
    gains = np.array([g.rewards for g in scores(groups)[0]])
    assert (gains[:, 0] > gains[:, 1]).all()
    assert (gains[:, 0] - gains[:, 1]).mean() > 1  # nats a token


def written(text, words):
    ids = np.array(text.encode(words), np.int32)
    zeros = np.zeros(len(ids), np.float32)
    return Sample(
        tokens=ids, logp=zeros, drawn=zeros == 0, finish="suffix", num_think=len(ids), versions=zeros.astype(np.int32)
    )


def test_the_moving_average_follows_the_weights(home):
    run(home, "followed", *GAIN, *EMA, "--run.save-every", "1", "--run.keep", "4", steps=3)
    start = load_file(home / "sft/export/model.safetensors")
    saved = [tensors(home / "followed", step) for step in (1, 2, 3)]
    names = [name.removeprefix("ema.") for name in saved[0] if name.startswith("ema.")]
    assert len(names) == len(start)
    for name in names:
        average = start[name if name == "lm_head.weight" else f"model.{name}"].double()
        for step in saved:
            average = 0.75 * average + 0.25 * step[f"model.{name}"].double()
            torch.testing.assert_close(step[f"ema.{name}"].double(), average, rtol=1e-6, atol=1e-7)
    assert not torch.equal(saved[2]["ema.embed_tokens.weight"], saved[2]["model.embed_tokens.weight"])


def test_a_run_scored_by_a_moving_average_goes_on_bit_by_bit(home):
    flags = [*GAIN, *EMA, "--loss.next-token", "0.1"]
    whole = run(home, "whole", *flags, steps=4)
    assert len({row["gain"] for row in whole}) == 4
    run(home, "parts", *flags, steps=2)
    assert run(home, "parts", *flags, steps=4) == whole
    ours, theirs = tensors(home / "parts", 4), tensors(home / "whole", 4)
    assert ours.keys() == theirs.keys() >= {"ema.norm.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_next_token_loss_lowers_the_loss_of_the_true_suffix(home):
    rows = run(home, "text", "--loss.next-token", "1", "--reward.judge", "0", "--reward.prefix", "1", steps=12)
    assert rows[-1]["next_token_loss"] < 0.8 * rows[0]["next_token_loss"]
    assert all(0 <= row["prefix_match"] <= 1 for row in rows)


def test_a_look_at_held_out_prefixes_comes_before_the_first_step_and_changes_none(home, capsys):
    flags = ["--data.val-paths", str(home / "corpus.jsonl"), "--data.val-prompts", "6", "--data.val-every", "2"]
    alone = run(home, "alone", steps=3)
    assert run(home, "looked", *flags, steps=0) == []
    said = capsys.readouterr().out
    assert "preflight, 6 held-out prompts: reward" in said
    looked = run(home, "looked", *flags, steps=3)
    events = map(json.loads, (home / "looked/events.jsonl").read_text().splitlines())
    seen = next(e for e in events if e["kind"] == "gate")
    assert f"reward {seen['reward']:.3f}, dead groups {seen['dead_groups']:.0%}" in said
    assert seen["groups"] == 6
    # every second step, and the last
    assert [row.get("val_groups") for row in looked] == [None, 6, 6]
    assert [{k: v for k, v in row.items() if not k.startswith("val_")} for row in looked] == alone


class Credulous:
    """A model that finds all questions likely."""

    def __call__(self, prompt):
        return Ready(0.9)

    def close(self):
        pass


def test_the_judges_metrics_are_of_the_step_and_not_of_the_look_before_it(home, monkeypatch):
    monkeypatch.setattr("thinkmid.rollout.judge.reward.make_ask", lambda *_: Credulous())
    flags = ["--judge.kind", "policy", "--judge.canary-every", "0"]
    looks = ["--data.val-paths", str(home / "corpus.jsonl"), "--data.val-prompts", "6", "--data.val-every", "1"]
    alone, looked = run(home, "asked", *flags, steps=2), run(home, "asked-looked", *flags, *looks, steps=2)
    assert [row["judge_asked"] + row["judge_decided"] + row["judge_cached"] for row in alone] == [20, 20]
    assert [{k: v for k, v in row.items() if not k.startswith("val_")} for row in looked] == alone


def test_a_judge_that_fails_its_examination_stops_the_step_after_the_look_and_the_run_is_saved(home, monkeypatch):
    monkeypatch.setattr("thinkmid.rollout.judge.reward.make_ask", lambda *_: Credulous())
    flags = [*rlmt_flags(home, "gullible"), "--judge.kind", "policy", "--data.val-paths", str(home / "corpus.jsonl")]
    assert exit_code(rlmt, flags) == 2
    kinds = [json.loads(line)["kind"] for line in (home / "gullible/events.jsonl").read_text().splitlines()]
    assert kinds == ["start", "gate", "save"]


def test_the_gate_warns_where_no_thought_closes_and_says_so_once(home, capsys):
    flags = ["--data.val-paths", str(home / "corpus.jsonl"), "--sampling.force-close", "false"]
    run(home, "open", *flags, "--sampling.max-think", "2", steps=1)
    said = capsys.readouterr().out
    assert said.count("100% of the thoughts do not close") == 1
    assert said.index("preflight, ") < said.index("do not close") < said.index("step 1/1")


@pytest.mark.parametrize(
    ("program", "flags", "named"),
    [
        (rlmt, ["--reward.judge", "0"], "nothing is rewarded"),
        (rlmt, ["--reward.gain", "-1"], "gain must be at least 0"),
        (rlmt, ["--reward.decay", "1"], "decay"),
        (rlmt, ["--reward.gain", "1", "--sampling.max-suffix", "0"], "reward.gain needs sampling.max_suffix"),
        (rlmt, ["--loss.next-token", "1", "--sampling.max-suffix", "0"], "loss.next_token needs sampling.max_suffix"),
        (rlmt, ["--reward.prefix", "1", "--reward.prefix-tokens", "9"], "prefix_tokens 9"),
        (rlmt, ["--data.val-paths", "nowhere.jsonl"], "nowhere.jsonl"),
        (rlpt, ["--loss.next-token", "1", "--data.path", "x", "--run.steps", "1"], "loss.next_token"),
    ],
)
def test_a_wrong_value_is_named(home, capsys, program, flags, named):
    config = rlmt_flags(home, "wrong")
    if program is rlpt:
        config = ["--run.folder", "x", "--model.folder", "x", "--loss.denom", "1", "--optim.lr", "1"]
    assert exit_code(program, [*config, *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (home / "wrong").exists()


def test_the_plan_counts_copies_of_the_weights(home, capsys):
    assert exit_code(rlmt, [*rlmt_flags(home, "dry"), *GAIN, *EMA, "--dry-run"]) == 0
    said = capsys.readouterr().out
    sizes = {line.split("  ")[-1]: line.split()[1:3] for line in said.splitlines() if "master weights" in line}
    names = ("master weights (fp32 shard)", "master weights of copies (fp32 shards), their heads")
    (one, unit), (two, unit_of_two) = (sizes[name] for name in names)
    assert unit == unit_of_two == "KB"
    shape = read_config(home / "sft" / "export")
    head = 4 * shape.vocab * shape.width / 1000  # that a forward without a backward leaves gathered
    assert float(two) == pytest.approx(2 * (float(one) + head), rel=0.05)
