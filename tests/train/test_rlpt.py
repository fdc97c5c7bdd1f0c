"""Questions through the loop: what is asked, what is rewarded, what a mistake earns."""

import json
import re
from dataclasses import replace

import pytest
from conftest import exit_code
from world import sft_flags

from thinkmid import config
from thinkmid.data.templates import TEMPLATES
from thinkmid.files import read_rows
from thinkmid.rollout.grade import reward
from thinkmid.train import rlpt, sft
from thinkmid.train.config import RLPTConfig

QUESTIONS = [
    {"id": f"q{i}", "question": f"Ana has {i} coins. Ben finds 1 more. So there are", "answer": str(i + 1)}
    for i in range(9)
]
CONFIG = """
[run]
steps = 2
[sampling]
max_think = 6
max_suffix = 6
force_close = true
[batch]
prompts = 4
siblings = 4
pack_tokens = 256
[loss]
denom = 12
[optim]
lr = 1e-2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, sft_flags(folder)) == 0
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "rlpt.toml").write_text(CONFIG)
    return folder


def flags(home, run, *more):
    where = [f"--model.folder={home}/sft/export", f"--data.path={home}/questions.jsonl", f"--run.folder={home}/{run}"]
    return [f"{home}/rlpt.toml", *where, "--data.template=plain-think", *more]


@pytest.mark.parametrize("kind", ["first-sentence", "math"])
def test_a_run_asks_the_questions_and_rewards_by_their_answers(home, kind):
    assert exit_code(rlpt, flags(home, kind, f"--verify.kind={kind}")) == 0
    rows = read_rows(home / kind / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["reward_failed"] == 0 and 0 <= row["reward"] <= 1 for row in rows)
    samples = read_rows(home / kind / "rollouts" / "step-000001.jsonl")
    assert len(samples) == 16
    asked = {q["id"]: q for q in QUESTIONS}
    for s in samples:
        assert s["prompt"] == f"Question: {asked[s['prompt_id']]['question']}\nAnswer:<think>"
        if kind == "first-sentence" and s["reward"]:
            assert asked[s["prompt_id"]]["answer"] in s["suffix"]
    if kind == "math":
        assert all("verify_exact" in row for row in rows)


def test_samples_end_with_the_token_that_completes_a_stop_text_of_the_template_or_ones_own(home, monkeypatch):
    monkeypatch.setitem(TEMPLATES, "plain", replace(TEMPLATES["plain"], stop=("1", "2")))
    given = []

    class Noting(reward.AnswerReward):
        def __init__(self, *args, **more):
            given.append(more["stops"])
            super().__init__(*args, **more)

    monkeypatch.setattr(reward, "AnswerReward", Noting)
    more = ['--sampling.stop=["3", " coins"]', "--sampling.max_suffix=30", "--run.steps=1", "--batch.pack_tokens=512"]
    assert exit_code(rlpt, flags(home, "stop", *more)) == 0
    samples = read_rows(home / "stop" / "rollouts" / "step-000001.jsonl")
    stopped = [s for s in samples if s["finish"] == "stop"]
    assert stopped
    for s in samples:
        assert (s["finish"] == "stop") == bool(re.search("[123]| coins", s["suffix"]))
        assert not re.search("([123]| coins).{4}", s["suffix"])
    assert {s["suffix"].strip()[-1] for s in stopped} & {"1", "2"}
    assert given == [("1", "2", "3", " coins")]


def test_the_templates_own_stop_texts_are_given_to_the_engine_unless_they_are_turned_off():
    where = ["--model.folder=m", "--data.path=q", "--run.folder=r", "--run.steps=1", "--loss.denom=1", "--optim.lr=1"]
    for more, stop in [
        (["--data.template=plain"], ("\nQuestion:",)),
        (["--data.template=plain", "--sampling.stop=Q:"], ("\nQuestion:", "Q:")),
        (["--data.template=plain", "--sampling.stop=Q:", "--data.template_stop=false"], ("Q:",)),
        (["--data.template=as-is"], ()),
    ]:
        cfg, _ = config.load(RLPTConfig, [*where, *more], prog="", description="")
        assert cfg.drawn == replace(cfg.sampling, stop=stop)


def test_questions_that_are_too_long_are_left_out_and_counted(home, capsys):
    long = {"id": "long", "question": "Ana has 1 coin. " * 40, "answer": "1"}
    (home / "more.jsonl").write_text("".join(json.dumps(q) + "\n" for q in [*QUESTIONS, long]))
    more = [f"--data.path={home}/more.jsonl", "--verify.kind=first-sentence", "--run.steps=1"]
    assert exit_code(rlpt, flags(home, "long", *more)) == 0
    assert "note: 1 of 10 questions exceed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("--data.task=dappo", "unknown task 'dappo'; did you mean 'dapo'?"),
        ("--data.template=plane-think", "unknown template 'plane-think'; did you mean 'plain-think'?"),
        ("--data.max_prompt=3", "no question fits into 3 tokens"),
        ("--verify.cpu_s=0", "cpu_s must be at least 0.01, got 0.0"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(home, capsys, flag, line):
    assert exit_code(rlpt, flags(home, "wrong", flag)) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (home / "wrong").exists()
