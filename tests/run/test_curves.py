"""Curves: the numbers that reach the picture, and the mistakes that are named."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from thinkmid.errors import UserError
from thinkmid.run import curves


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **row}) + "\n" for s, row in enumerate(rows)))
    return folder


def rl_rows(num, reward=0.3):
    noise = np.random.default_rng(0).normal(size=num)
    for s in range(num):
        yield {
            "reward": reward + 0.05 * noise[s],
            "thinking_tokens": 100.0 + s,
            "dead_groups": 0.25,
            "groups": 48,
            "entropy": 1.0,
            "logp_gap_mean": 1e-3,
            "logp_gap_max": 0.0 if s == 0 else 0.1,
            "rollout_s": 18.0,
            "train_s": 9.0,
            "save_s": 3.0 if s == 5 else 0.0,
            "step_s": 28.0,
            "loss": 0.01,
            "lr": 1e-6,
            "skipped": 0,
        }


def sft_rows(num):
    for s in range(num):
        row = {"loss": 4.0 - s / num, "lr": 1e-5, "grad_norm": 1.0, "tokens": 512, "tokens_per_s": 1e4, "step_s": 0.5}
        yield row | ({"val_loss": 4.1 - s / num, "val_loss_text": 4.5, "val_loss_thought": 3.0} if s % 10 == 9 else {})


def overlay(folders, out):
    return curves.paint({folder.name: curves.columns(folder) for folder in folders}, out)


@pytest.fixture
def page(monkeypatch):
    """page(folders, out): {title: axes} of what is drawn; the picture itself is written in the report's test alone."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, out, dpi: drawn.append(self))

    def draw(folders, out):
        overlay(folders, out) if isinstance(folders, list) else curves.draw(folders, out)
        return {axis.get_title(loc="left"): axis for axis in drawn[-1].axes}

    return draw


def bold(axis):
    return next(line for line in axis.lines if line.get_linewidth() > 1)


def test_an_rl_page_has_its_six_panels_and_shows_what_was_logged(tmp_path, page):
    rows = list(rl_rows(80))
    axes = page(write_run(tmp_path / "run", rows), tmp_path / "out.png")
    assert list(axes) == ["Reward", "Thinking length", "Dead groups", "Entropy", "Sampler-trainer gap", "Time"]
    np.testing.assert_allclose(axes["Reward"].lines[0].get_ydata(), [row["reward"] for row in rows])
    middle = bold(axes["Reward"])
    at = list(middle.get_xdata()).index(40)
    np.testing.assert_allclose(middle.get_ydata()[at], np.mean([row["reward"] for row in rows[38:43]]))
    np.testing.assert_allclose(bold(axes["Dead groups"]).get_ydata(), 25.0)
    assert {text.get_text() for text in axes["Time"].texts} == {"rollout", "train", "save", "other"}
    gap = axes["Sampler-trainer gap"]
    assert {text.get_text() for text in gap.texts} == {"mean", "max"}
    assert all((line.get_ydata() > 0).all() for line in gap.lines)  # a gap of exactly 0 has no place on a log axis


def test_held_out_prompts_before_the_first_step_are_a_dashed_line(tmp_path, page):
    rows = [row | {"val_reward": 0.5, "val_thinking_tokens": 90.0} for row in rl_rows(20)]
    runs = [write_run(tmp_path / name, rows) for name in "ab"]
    events = [{"kind": "start"}, {"kind": "gate", "reward": 0.25, "thinking_tokens": None, "unclosed": 0.0}]
    (runs[0] / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    axes = page(runs[0], tmp_path / "out.png")
    (dashed,) = [line for line in axes["Reward"].lines if line.get_linestyle() == "--"]
    (held_out,) = [line for line in axes["Reward"].lines if set(line.get_ydata()) == {0.5}]
    assert set(dashed.get_ydata()) == {0.25}
    assert dashed.get_color() == held_out.get_color()
    assert {text.get_text() for text in axes["Reward"].texts} == {"reward", "held out", "at start"}
    assert {text.get_text() for text in axes["Thinking length"].texts} == {"thinking", "held out"}
    assert len(axes["Reward"].lines) == len(page(runs[1], tmp_path / "out.png")["Reward"].lines) + 1


def test_the_time_panel_stacks_phases_up_to_the_whole_step(tmp_path, page):
    axis = page(write_run(tmp_path / "run", rl_rows(20)), tmp_path / "out.png")["Time"]
    areas = [area.get_paths()[0].vertices for area in axis.collections]
    assert [area[:, 1].max() for area in areas] == pytest.approx([18.0, 27.0, 30.0, 30.0])
    other = areas[-1]
    assert set(other[other[:, 0] == 4][:, 1]) == {27.0, 28.0}
    assert set(other[other[:, 0] == 5][:, 1]) == {30.0}  # its phases exceed its step_s: nothing is left, not less


def test_an_sft_page_shows_all_losses_and_what_else_was_logged(tmp_path, page):
    rows = [row | {"gsm8k": s / 100, "steady": 1} for s, row in enumerate(sft_rows(100))]
    axes = page(write_run(tmp_path / "run", rows), tmp_path / "out.png")
    assert list(axes) == ["Loss", "Gradient norm", "Learning rate", "Throughput", "Time", "gsm8k"]
    assert {text.get_text() for text in axes["Loss"].texts} == {"train", "validation", "text", "thoughts"}
    validation = next(line for line in axes["Loss"].lines if len(line.get_xdata()) == 10)
    np.testing.assert_allclose(validation.get_ydata(), [row["val_loss"] for row in rows if "val_loss" in row])


def test_labels_stand_at_line_ends_and_do_not_touch(tmp_path, page):
    rows = [{"loss": 5.0, "val_loss": 5.0, "val_loss_text": 5.001, "val_loss_thought": 1.0 + s} for s in range(3)]
    axis = page(write_run(tmp_path / "run", rows), tmp_path / "out.png")["Loss"]
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    low, high = axis.get_ylim()
    assert heights["thoughts"] == pytest.approx((3.0 - low) / (high - low))
    assert min(np.diff(sorted(heights.values()))) >= 0.0799
    assert max(heights.values()) <= 1


def test_null_text_and_unknown_columns_do_no_harm(tmp_path, page):
    rows = [
        {"reward": None, "entropy": 1.0},
        {"reward": 0.5, "note": "x", "$odd_name": 1},
        {"$odd_name": 2, "list": [1]},
    ]
    axes = page(write_run(tmp_path / "$run$", rows), tmp_path / "out.png")
    assert list(axes) == ["Reward", "Entropy", "$odd name"]
    np.testing.assert_array_equal(bold(axes["Reward"]).get_xydata(), [[1, 0.5]])


@pytest.mark.parametrize("num", [1, 2, 39, 40, 41, 399, 400])
def test_the_moving_average_is_the_mean_of_its_window(num):
    steps, values = np.arange(num) * 2.0, np.random.default_rng(1).normal(size=num)
    window = curves.window_of(num)
    at, means = curves.smooth(steps, values)
    assert window % 2 == 1
    np.testing.assert_allclose(means, [values[i : i + window].mean() for i in range(num - window + 1)])
    np.testing.assert_array_equal(at, [steps[i : i + window].mean() for i in range(num - window + 1)])


def test_one_spike_does_not_spoil_the_average_of_what_follows():
    values = np.ones(100)
    values[10] = 1e20
    np.testing.assert_allclose(curves.smooth(np.arange(100.0), values)[1][-50:], 1.0)


def test_an_overlay_draws_every_run_in_every_panel(tmp_path, page):
    runs = [write_run(tmp_path / "a", rl_rows(30, 0.2)), write_run(tmp_path / "b", rl_rows(50, 0.6))]
    axes = page(runs, tmp_path / "out.png")
    ends = {line.get_xdata()[-1] for line in axes["Time"].lines if line.get_alpha() != 0.3}
    assert sorted(text.get_text() for text in axes["Sampler-trainer gap"].texts) == ["max", "mean"]
    assert ends == {29, 47}  # the longer one is smoothed: its average ends half a window early
    legend = axes["Reward"].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_an_rl_loss_is_not_laid_over_an_sft_loss(tmp_path, page):
    runs = [write_run(tmp_path / "rl", rl_rows(10)), write_run(tmp_path / "sft", sft_rows(10))]
    axes = page(runs, tmp_path / "out.png")
    assert {"Reward", "Loss"} <= set(axes)
    assert min(min(line.get_ydata()) for line in axes["Loss"].lines) > 2


def test_a_picture_is_neither_blank_nor_black(tmp_path):
    runs = [write_run(tmp_path / "$a_{$", rl_rows(30)), write_run(tmp_path / "b", sft_rows(30))]
    for picture in (curves.draw(runs[0], tmp_path / "one.png"), overlay(runs, tmp_path / "two.png")):
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert 0.01 < (pixels.min(-1) < 0.9).mean() < 0.5


def test_panels_can_be_chosen(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, out, dpi: drawn.extend(self.axes))
    run = curves.columns(write_run(tmp_path / "run", rl_rows(30)))
    curves.paint({"run": run}, tmp_path / "out.png", ["Thinking length", "Reward"])
    assert [axis.get_title(loc="left") for axis in drawn] == ["Reward", "Thinking length"]
    np.testing.assert_array_equal(drawn[1].lines[0].get_ydata(), run["thinking_tokens"][1])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, ": no such file"),
        ("", ": no rows yet"),
        ('{"step": 0, "rew', ": no rows yet"),
        ('{"step": 0, "reward": null}\n', ": no numbers to draw"),
        ('{"step": 0, "rew\n{"step": 1, "reward": 1}\n', ":1: not a JSON object"),
    ],
)
def test_a_run_without_numbers_is_named(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError) as caught:
        curves.draw(tmp_path, tmp_path / "out.png")
    assert str(caught.value) == f"{tmp_path}/metrics.jsonl{complaint}"


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path / "run", rl_rows(3))
    with pytest.raises(UserError, match=r"no/curves.png: cannot write it: No such file or directory"):
        curves.draw(run, tmp_path / "no" / "curves.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", rl_rows(3))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError) as caught:
        curves.draw(run, tmp_path / "out.png")
    assert str(caught.value) == "drawing needs matplotlib: pip install matplotlib"
