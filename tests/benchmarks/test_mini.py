"""The sweep: what builds on what, equal compute, and the arithmetic of its table."""

import json
import threading
from pathlib import Path

import pytest
from conftest import exit_code

from benchmarks import mini as sweep
from benchmarks import mini_results as results
from thinkmid.errors import UserError
from thinkmid.mini import world


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def a_step(**more) -> str:
    return json.dumps({"step": 1, "groups": 2, "generated_tokens": 3000, "trunk_tokens": 500} | more) + "\n"


@pytest.fixture
def home(tmp_path):
    write(tmp_path / f"rlmt-{sweep.RLMT_STEPS[-1]}" / "metrics.jsonl", a_step() + a_step(step=2, trunk_tokens=0))
    return tmp_path


def test_every_stage_waits_for_all_that_it_reads(home):
    made = {}  # folder: the file that says it is whole
    for stage in sweep.stages(home, 3):
        if stage.command[0] == "thinkmid.eval.thoughts":  # in the folder of an evaluation
            assert stage.result.replace("thoughts", "results") in stage.needs
            continue
        assert set(stage.needs) <= set(made.values())
        for word in stage.command:
            for part in word.partition("=")[2].split(","):
                path = part.rpartition("=")[2]
                if path.startswith(str(home)) and not word.startswith("--run.folder"):
                    below = Path(path).relative_to(home)
                    assert made[below.parts[0]] in stage.needs, (stage.name, path)
        made[stage.result if "eval" in stage.result else Path(stage.result).parts[0]] = stage.result
    assert {name + rlpt for name in sweep.LABELS for rlpt in ("", "+rlpt")} <= set(made)


def test_all_rows_get_the_same_post_training_and_the_same_questions(home):
    def but_for_names(command):
        return [word for word in command if not word.startswith(("--run.folder", "--model.folder"))]

    by_program = {}
    for stage in sweep.stages(home, 0):
        if stage.command[0] in ("thinkmid.train.rlpt", "thinkmid.eval.run"):
            by_program.setdefault(stage.command[0], []).append(but_for_names(stage.command))
    for program, commands in by_program.items():
        assert len(commands) == len(sweep.LABELS) * (2 if "eval" in program else 1)
        assert all(command == commands[0] for command in commands)


def test_the_longer_sft_costs_what_rlmt_did(home):
    # two steps: 2 prefixes and 3000 tokens forward each; 500 tokens forward and backward in one of them
    passes = 2 * (2 * sweep.PREFIX + 3000) + 3 * 500
    assert sweep.as_sft_steps(home / f"rlmt-{sweep.RLMT_STEPS[-1]}") == round(passes / (3 * sweep.SFT_TOKENS))


NO_SUCH = ["thinkmid.mini.no_such_program"]


def test_a_stage_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    first = sweep.Stage(name="data", command=NO_SUCH, needs=(), result="data/manifest.json")
    second = sweep.Stage(name="base", command=NO_SUCH, needs=(first.result,), result="base/export/thinkmid.json")
    monkeypatch.setattr(sweep, "stages", lambda home, seed: iter([first, second]))
    with pytest.raises(UserError, match=r"log.txt: data ended with code 1"):
        sweep.run({0: tmp_path / "seed-0"}, 2)
    assert "no_such_program" in (tmp_path / "seed-0" / "log.txt").read_text()


@pytest.mark.parametrize("jobs", [1, 2, 3, 8])
def test_stages_run_beside_one_another_but_never_before_what_they_need(tmp_path, monkeypatch, jobs):
    homes, turn, now, most, order = {0: tmp_path / "0", 1: tmp_path / "1"}, threading.Condition(), [], [], []
    stages = [(seed, home, stage) for seed, home in homes.items() for stage in sweep.stages(home, seed)]

    def as_many_as_can():
        ready = [stage for _, home, stage in stages if all((home / need).exists() for need in stage.needs)]
        done = [stage for _, home, stage in stages if (home / stage.result).exists()]
        return len(now) == min(jobs, len(ready) - len(done))

    def work(seed, home, stage):
        assert all((home / need).exists() for need in stage.needs)
        with turn:
            now.append(stage)
            most.append(len(now))
            turn.notify_all()
            turn.wait_for(as_many_as_can)  # no stage ends before all that may run beside it have begun
            write(home / stage.result, stage.name)
            now.remove(stage)
            order.append((seed, stage.name))
        return stage.name

    monkeypatch.setattr(sweep, "work", work)
    write(homes[0] / "data/manifest.json", "done before")
    expected = {(seed, stage.name) for seed, _, stage in stages}
    sweep.run(homes, jobs)
    assert max(most) == jobs
    assert len(order) == len(set(order))
    assert set(order) == expected - {(0, "data")}


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("--seeds", "0,x", "--seeds 0,x: not whole numbers with commas between"),
        ("--seeds", "9" * 5000, f"--seeds {'9' * 80}: not whole numbers with commas between"),
        ("--out", "README.md", "README.md/seed-0: Not a directory"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flag, value, line):
    assert exit_code(sweep, [flag, value]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("row", [{}, {"groups": "a", "generated_tokens": 1, "trunk_tokens": 1}])
def test_metrics_of_something_else_are_named(home, row):
    rlmt = home / f"rlmt-{sweep.RLMT_STEPS[-1]}"
    write(rlmt / "metrics.jsonl", json.dumps(row))
    with pytest.raises(UserError, match=f"{rlmt}/metrics.jsonl: not what RLMT wrote"):
        sweep.as_sft_steps(rlmt)


ACCURACY = {"base": (0.1, 0.2, 0.1), "think": (0.4, 0.5, 0.3), "rlmt": (0.5, 0.7, 0.6)}
LABELS = {"base": "base", "think": "SFT", "rlmt": "SFT + RLMT"}


@pytest.fixture
def homes(tmp_path):
    homes = {seed: tmp_path / f"seed-{seed}" for seed in range(3)}
    for name, means in ACCURACY.items():
        for home, mean in zip(homes.values(), means, strict=True):
            for rlpt in ("", "+rlpt"):
                # held-out sets lower by .07, the four others higher by as much in sum
                sets = {
                    s: {"mean": mean + (-0.07 if s in world.HELD_OUT else 0.0525), "mean_think": 9} for s in world.SETS
                }
                write(home / "eval" / (name + rlpt) / "results.json", {"sets": sets})
            by_condition = {c: {"mean": m} for c, m in (("own", mean), ("blank", mean / 2))}
            write(home / "eval" / name / "thoughts.json", {"mean": {"conditions": by_condition}})
    return homes


def test_differences_are_paired_by_seed(homes):
    found = results.collect(homes, LABELS, {}, ["rlmt"])
    (one,) = [d for d in found["differences"] if (d["less"], d["when"]) == ("SFT", "before")]
    assert one["each"] == pytest.approx([0.1, 0.2, 0.3])
    # mean .2, standard error .1 / sqrt(3), Student's t with two degrees of freedom: 4.303
    assert one["mean"] == pytest.approx(0.2)
    assert one["high"] - one["mean"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=0.02)
    assert found["times"]["after"] == pytest.approx([5, 3.5, 6])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"sets": {"1-step": {"mean": "a"}}}'])
@pytest.mark.parametrize("name", ["results.json", "thoughts.json"])
def test_an_evaluation_that_is_damaged_is_named(homes, name, content):
    write(homes[1] / "eval" / "rlmt" / name, content)
    with pytest.raises(UserError, match=f"{homes[1]}/eval/rlmt/{name}: damaged"):
        results.collect(homes, LABELS, {}, ["rlmt"])


def test_groups_of_sets_are_averaged_apart(homes):
    row = results.collect(homes, LABELS, {}, ["rlmt"])["rows"]["SFT"]["before"]
    assert list(row["mean"].values()) == pytest.approx([0.4, 0.5, 0.3])
    assert row["groups"]["held out"][1] == pytest.approx(0.43)
    assert row["groups"]["in distribution"][1] == pytest.approx(0.5525)


def test_one_seed_has_no_interval(homes):
    found = results.collect({0: homes[0]}, LABELS, {}, ["rlmt"])
    assert all(d["low"] is None and d["high"] is None for d in found["differences"])
    json.dumps(found, allow_nan=False)
    assert "one seed" in results.markdown(found)


def test_the_table_shows_every_seed_and_the_replaced_thoughts(homes):
    text = results.markdown(results.collect(homes, LABELS, {}, ["rlmt"]))
    assert "| SFT | **0.400** | .400 .500 .300 | **0.400** | .400 .500 .300 | 9 / 9 |" in text
    assert "| SFT + RLMT | 0.600 | 0.300 |" in text
