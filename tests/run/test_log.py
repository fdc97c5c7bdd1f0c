"""Log: metrics.jsonl stays readable and in order through crashes and resumes, and no text steers a terminal."""

import json
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from terminal import on_terminal

from thinkmid.errors import UserError, plain
from thinkmid.files import read_rows, write_whole
from thinkmid.run import log
from thinkmid.run.log import Log

NASTY = "[bold]loud[/bold] \x1b[31mred\x1b[0m \x9b2J bell\a back\b over\rwrite \u202eoverride \ud800 [link=x]y[/link]"


def steps_of(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_each_row_is_on_disk_before_the_next_step(tmp_path):
    with Log(tmp_path) as run:
        for step in range(3):
            run.write(step, {"reward": step / 2})
            run.event("save", step=step)
            rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
            assert rows[-1] == {"step": step, "reward": step / 2}
            assert len((tmp_path / "events.jsonl").read_text().splitlines()) == step + 1


def test_numbers_of_any_library_are_written_and_what_is_not_finite_is_null(tmp_path):
    row = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.nan, "d": -np.inf, "e": torch.tensor([1.0, np.nan])}
    with Log(tmp_path) as run:
        run.write(0, row)
        run.event("skip", why=float("nan"))
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": 0.5, "b": 2, "c": None, "d": None, "e": [1.0, None]}
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize("torn", ["", '{"step": 8, "rew', "\0\0\0", "8", '{"step": 8, "text": "\udce2'])
def test_a_resumed_log_is_the_log_of_an_uninterrupted_run(tmp_path, torn):
    with Log(tmp_path / "whole") as run:
        for step in range(1, 11):
            run.write(step, {"reward": 0.1 * step})
    with Log(tmp_path / "cut") as run:
        for step in range(1, 8):
            run.write(step, {"reward": 0.1 * step})
        run.event("start")
    with open(tmp_path / "cut" / "metrics.jsonl", "a", errors="surrogateescape") as file:
        file.write(torn)
    with Log(tmp_path / "cut", start_step=5) as run:
        assert steps_of(tmp_path / "cut") == [1, 2, 3, 4, 5]
        for step in range(6, 11):
            run.write(step, {"reward": 0.1 * step})
        run.event("end")
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert [row["kind"] for row in read_rows(tmp_path / "cut" / "events.jsonl")] == ["start", "end"]


def test_a_fresh_log_forgets_the_old_metrics(tmp_path):
    with Log(tmp_path) as run:
        run.write(1, {})
    Log(tmp_path).close()
    assert steps_of(tmp_path) == []


def test_a_complete_last_line_counts_even_without_its_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    with Log(tmp_path, start_step=2) as run:
        run.write(2, {})
    assert steps_of(tmp_path) == [0, 1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert str(caught.value) == f"{path}:3: not a JSON object"


@pytest.mark.parametrize("step", ["a", None])
def test_a_step_that_is_no_number_is_named(tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
    with pytest.raises(UserError, match=rf"{tmp_path}/metrics.jsonl: step {json.dumps(step)} is no number"):
        Log(tmp_path, start_step=2)


def test_other_ranks_leave_no_trace(tmp_path, capsys):
    with Log(tmp_path / "run", rank=1, trackers=("wandb",)) as run:
        run.write(0, {"reward": 1.0})
        run.event("save")
        run.rollouts(0, [{"a": 1}])
        run.phase("rollout")
        run.progress(1, 2)
        run.say("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_rollouts_come_back_as_they_were(tmp_path):
    rows = [{"thought": "a\u2028b\nc", "tokens": np.arange(3), "logp": np.array([0.5, np.nan])}, {"thought": "思考"}]
    with Log(tmp_path) as run:
        run.rollouts(40, rows)
        run.rollouts(41, [{"thought": "lone \ud800 surrogate"}])
    assert read_rows(tmp_path / "rollouts" / "step-000040.jsonl") == [
        {"thought": "a\u2028b\nc", "tokens": [0, 1, 2], "logp": [0.5, None]},
        {"thought": "思考"},
    ]
    assert read_rows(tmp_path / "rollouts" / "step-000041.jsonl") == [{"thought": "lone \ud800 surrogate"}]
    assert "思考" in (tmp_path / "rollouts" / "step-000040.jsonl").read_text()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, call):
    write_whole(tmp_path / "a", "old")

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_pipes_get_one_plain_line_per_step(tmp_path, capsys):
    row = {"reward": 0.1234, "thinking_tokens": 181.7, "entropy": 1.5, "dead_groups": 0.19, "groups": 64, "kl": 9.0}
    with Log(tmp_path, num_steps=200) as run:
        for step in range(2):
            run.phase("rollout")
            run.progress(3, 64)
            run.write(step, {**row, "tokens_per_s": 12345.6, "rollout_s": 18.24, "sync_s": 0.0, "train_s": 9.0})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    seen = (
        "step 1/200  reward 0.123  thinking 182  entropy 1.500  dead 19%  tok/s 12,346  rollout 18.2 s, train 9.0 s  "
    )
    assert lines[1].startswith(seen)
    assert lines[1].endswith(" left")


def test_what_is_shown_is_the_phase_that_began_last_and_its_own_count(tmp_path, capsys):
    with Log(tmp_path) as run:
        for phase, done in (("rollout", 3), ("train", 1), ("validation: rollout", 2)):
            run.phase(phase)
            run.progress(done - 1, 4)  # too early for a line
            run.screen.next_print = 0.0
            run.progress(done, 4)
        run.phase("export")
    assert capsys.readouterr().out == "  rollout 3/4\n  train 1/4\n  validation: rollout 2/4\n"


def test_a_null_metric_is_not_shown_and_does_no_harm(tmp_path, capsys):
    with Log(tmp_path) as run:
        run.write(0, {"reward": float("nan"), "loss": 1.0, "rollout_s": None})
    assert capsys.readouterr().out == "step 0  loss 1.0000\n"


def test_the_time_left_follows_the_pace_of_the_last_steps(monkeypatch):
    clock = iter([0.0] + [1000.0 + 30 * k for k in range(100)])  # a slow start, then 30 s a step
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = log._Pace(100)
    told = [pace.step(step) for step in range(1, 101)]
    assert (told[0], told[39], told[98], told[99]) == ("27 h 30 min left", "30 min left", "30 s left", "")


def test_model_text_reaches_the_screen_without_control_characters_and_without_markup(tmp_path, capsys):
    with Log(tmp_path) as run:
        run.say(f"sample \x1b[2J\n{NASTY}\tand\nmore")
    shown = capsys.readouterr().out
    assert "[bold]loud[/bold] [31mred[0m 2J bell back overwrite override  [link=x]y[/link]\tand\nmore\n" in shown
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]


def test_plain_keeps_what_people_write():
    assert plain("naïve 思考 👩‍🔬 שלום\t\n") == "naïve 思考 👩‍🔬 שלום\t\n"


def test_a_terminal_gets_a_live_table_and_its_cursor_back(tmp_path):
    """In a real pseudo-terminal; the program ends by an error, without closing its log."""
    program = f"""
from thinkmid.run.log import Log
run = Log({str(tmp_path)!r}, num_steps=200)
run.phase("rollout")
run.progress(128, 512)
run.write(40, dict(reward=0.125, thinking_tokens=182.0, rollout_s=18.2))
run.say({NASTY!r})
run.screen.live.refresh()
raise SystemExit(3)
"""
    text = on_terminal(program, code=3)
    for words in ("step 40/200", "reward", "0.125", "182", "rollout 128/512", "rollout 18.2 s", "[bold]loud[/bold]"):
        assert words in text
    assert "\x1b[31m" not in text
    assert "\x9b" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def fake_tracker(calls):
    """A module with the two calls that wandb and trackio share."""

    def init(*, project, name, config=None, resume="never", dir=None, id=None):
        calls.append(("init", name, config, resume, id))
        return SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("end"))

    return SimpleNamespace(init=init)


def test_trackers_get_the_numbers_of_each_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "trackio", fake_tracker(calls))
    with Log(tmp_path / "run", trackers=("trackio",), config={"lr": 1}) as run:
        run.write(3, {"reward": 0.5, "note": "text", "loss": float("nan")})
    assert calls == [("init", "run", {"lr": 1}, "never", None), (3, {"reward": 0.5}), "end"]


def test_a_resumed_run_is_the_same_run_to_wandb_and_a_fresh_one_is_not(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_tracker(calls))
    for start in (0, 5, 0):
        Log(tmp_path, start_step=start, trackers=("wandb",)).close()
    (*_, how1, id1), (*_, how2, id2), (*_, how3, id3) = (call for call in calls if call != "end")
    assert (how1, how2, how3) == ("never", "allow", "never")
    assert id1 == id2 != id3


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError) as caught:
        Log(tmp_path, trackers=(name,))
    assert str(caught.value) == f"tracker '{name}' is not installed: pip install {name}"
