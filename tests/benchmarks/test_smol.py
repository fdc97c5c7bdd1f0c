import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import smol
from thinkmid import config, thoughts
from thinkmid.eval.config import EvalConfig
from thinkmid.eval.summary import Graded, summarise
from thinkmid.files import read_rows, write_rows
from thinkmid.train.config import RLMTConfig, RLPTConfig, SFTConfig

ROOT = Path(__file__).parents[2]
SECTIONS = {"sft": SFTConfig, "rlmt": RLMTConfig, "rlpt": RLPTConfig, "eval": EvalConfig}


def row(i):
    """A row as GSM8K's authors write it: i + 1 eggs, a step for each of i % 3 + 1."""
    steps = "\n".join(f"Step {k} of {i}: {k}+1 = <<{k}+1={k + 1}>>{k + 1}." for k in range(i % 3 + 1))
    return {"question": f"How many eggs has hen {i}?", "answer": f"{steps}\n#### {i + 1},000"}


@pytest.fixture
def made(tmp_path):
    for name, rows in (("train", 90), ("test", 7)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(rows)))
    (tmp_path / "svamp.jsonl").write_text('{"question": "2 and 3?", "answer": "5"}\n')
    flags = [
        "--gsm8k",
        str(tmp_path),
        "--svamp",
        str(tmp_path / "svamp.jsonl"),
        "--questions",
        "4",
        "--most-steps",
        "2",
    ]
    smol.make_data(smol.parse(flags), tmp_path / "data")
    return {path.stem: read_rows(path) for path in (tmp_path / "data").glob("*.jsonl")}


def test_worked_steps_become_the_thought_or_all_but_the_last_stay_text():
    worked = smol.Worked("a", "How many?", ["One.", "Two.", "Three."], "3")
    assert worked.text(0) == "How many?<think>One.\nTwo.\nThree.</think>\nThe answer is 3."
    assert worked.text(2) == "How many?\nOne.\nTwo.<think>Three.</think>\nThe answer is 3."


def test_what_is_written_comes_from_disjoint_halves_and_holds_no_calculator(made):
    hens = {name: set(re.findall(r"hen (\d+)", json.dumps(rows))) for name, rows in made.items()}
    assert len(hens["sft-think"]) == 45
    assert hens["sft-think"].isdisjoint(hens["rl"] | hens["heldout"] | hens["questions-train"])
    assert hens["rl"].isdisjoint(hens["heldout"])
    assert len(hens["rl"] | hens["heldout"]) == 45
    assert "<<" not in json.dumps(made)
    stripped = [r | {"text": thoughts.strip(r["text"])} for r in made["sft-think"]]
    assert made["sft-raw"] == stripped


def test_questions_of_rlpt_are_short_and_those_of_evaluation_are_the_test_rows(made):
    assert {int(r["id"].split("-")[1]) % 3 for r in made["questions-train"]} == {0, 1}
    answers = {row(i)["question"]: f"{i + 1}000" for i in range(7)}
    assert len(made["questions-gsm8k"]) == 4
    assert all(answers[r["question"]] == r["answer"] for r in made["questions-gsm8k"])
    assert [r["answer"] for r in made["questions-svamp"]] == ["5"]
    for r in made["questions-last-step"]:
        question, *steps = r["question"].split("\n")
        assert len(steps) == int(r["id"].split("-")[1]) % 3
        assert answers[question] == r["answer"]


@pytest.mark.parametrize("configs", ["smol", "smol-gpu"])
def test_each_stage_begins_from_what_an_earlier_one_leaves(configs, monkeypatch):
    monkeypatch.chdir(ROOT)
    there = {f"runs/{configs}/model"}
    for name, (module, path, *flags), result in smol.stages(configs):
        kind = path.rpartition("-")[2].removesuffix(".toml")
        cfg, _ = config.load(SECTIONS[kind], [path, *flags], prog=module, description="")
        assert cfg.model.folder in there, name
        assert Path(cfg.run.folder) in result.parents
        there.add(str(result.parent))
        folder = tomllib.loads((ROOT / path).read_text())["run"]["folder"]
        assert folder.startswith(f"runs/{configs}/")


def test_the_table_holds_accuracies_differences_and_rewards(tmp_path):
    for right, name in enumerate(smol.MODELS):
        sets = {}
        for group in smol.SETS:
            same = {"sample": 0, "answer": "1", "truncated": False, "num_think": 9 + right}
            rows = [Graded(question=f"{group}-{i}", score=float(i < right), **same) for i in range(10)]
            write_rows(tmp_path / "eval" / name / "graded" / f"{group}.jsonl", map(asdict, rows))
            sets[group] = summarise(rows, ks=[1])
        (tmp_path / "eval" / name / "results.json").write_text(json.dumps({"sets": sets}))
    for name in ("rlmt", "rlpt"):
        write_rows(tmp_path / name / "metrics.jsonl", [{"step": i, "reward": i / 8} for i in range(8)])
        write_rows(tmp_path / name / "events.jsonl", [{"kind": "start"}, {"kind": "gate", "reward": 0.1}])
    validated = [{"step": i, "reward": i / 8, "val_reward": 0.3} for i in range(8)]
    write_rows(tmp_path / "rlmt" / "metrics.jsonl", validated)
    said = smol.table(tmp_path).split("\n")
    assert [line.split(" (")[0] for line in said[2:7]] == [
        f"| {words} | 0.{right}00" for right, words in enumerate(smol.MODELS.values())
    ]
    assert said[6].endswith(" | 13 | 0.0% |")
    differences = [re.findall(r"([+-]\d\.\d+) \(", line) for line in said if " less " in line]
    assert differences == [["+0.100"] * 3] * 4 + [["+0.400"] * 3]
    assert said[-3].startswith("- reward of rlmt")
    assert said[-3].endswith("; on 32 held-out prompts 0.100 -> 0.300")
    assert "- reward of rlpt: 0.062 -> 0.812 (first and last 2 of 8 steps)" in said


@pytest.mark.parametrize(
    ("step", "is_small"),
    [
        ("Half: 24/2 = <<24/2=12>>12.", True),
        ("30-1=<<30-1=29>>29", True),
        ("31-1=<<31-1=30>>30", False),  # a number above 30
        ("16*2=<<16*2=32>>32", False),  # a result above 30
        ("So 1+1+1 = <<1+1+1=3>>3", False),  # two operations
        ("2*.5 = <<2*.5=1>>1", False),  # not whole
        ("1+1=<<1+1=2>>2 and 2+2=<<2+2=4>>4", False),  # two notes
        ("It is 3.", False),
    ],
)
def test_a_small_step_is_one_operation_on_whole_numbers_up_to_a_limit(step, is_small):
    assert smol.is_small(step, 30) is is_small
