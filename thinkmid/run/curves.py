"""One page of curves from metrics.jsonl: thin the steps as they were, bold their moving average."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thinkmid.errors import UserError, plain
from thinkmid.files import is_number, read_rows
from thinkmid.run.log import PHASES

Curve = tuple[np.ndarray, np.ndarray]  # steps (n,), values (n,): float64, finite, n > 0
Columns = dict[str, Curve]  # of metrics.jsonl, by name


class Panel(NamedTuple):
    title: str
    unit: str  # of the y axis
    names: tuple[tuple[str, str], ...]  # (column, label at the end of its line)
    scale: str = "linear"
    noisy: bool = True  # gets a moving average
    baseline: str = ""  # column whose first value is drawn as a dashed line, where one run is drawn


REWARD = (("reward", "reward"), ("verdict", "judge"), ("prefix_match", "prefix"), ("val_reward", "held out"))
LENGTH = (("thinking_tokens", "thinking"), ("val_thinking_tokens", "held out"))
JUDGE = (
    ("judge_asked", "asked"),
    ("judge_cached", "cached"),
    ("judge_decided", "by rule"),
    ("judge_failed", "failed"),
    ("judge_given_up", "given up"),
)
LOSSES = (("loss", "train"), ("val_loss", "validation"), ("val_loss_text", "text"), ("val_loss_thought", "thoughts"))
ENTROPY = Panel("Entropy", "nats per token", (("entropy", "entropy"),))
TIME = Panel("Time", "seconds per step", (("step_s", "step"),))
RL = (
    Panel("Reward", "mean per rollout", REWARD, baseline="preflight_reward"),
    Panel("Thinking length", "tokens per rollout", LENGTH, baseline="preflight_thinking_tokens"),
    Panel("Dead groups", "% of groups", (("dead_share", "dead"),)),
    ENTROPY,
    Panel("Sampler-trainer gap", "|Δ log-prob| per token", (("logp_gap_max", "max"), ("logp_gap_mean", "mean")), "log"),
    TIME,
    Panel("Judge", "continuations", JUDGE),
    Panel("P(yes)", "mean of asked", (("judge_p_yes", "P(yes)"),)),
    Panel("Judge's known answers", "share right, worst kind", (("judge_canary", "right"),), noisy=False),
    Panel("Log-prob of the true suffix", "nats per token", (("likelihood", "after a thought"), ("gain", "gain"))),
    Panel("Next-token loss", "nats per token", (("next_token_loss", "true suffix"),)),
)
SFT = (
    Panel("Loss", "nats per token", LOSSES),
    Panel("Gradient norm", "before clipping", (("grad_norm", "norm"),), "log"),
    Panel("Learning rate", "", (("lr", "lr"),), noisy=False),
    ENTROPY,
    Panel("Throughput", "tokens per second", (("tokens_per_s", "tokens/s"),)),
    TIME,
)
# logged for readers of metrics.jsonl; any other column that is in no panel gets one of its own if it ever changes
UNDRAWN = re.compile(
    r"(val|probe|preflight|dead|ratio)_.*|.*_s|reward_(std|failed)|(trained|trunk|generated|suffix)_tokens|tokens|groups|"
    r"dead_groups|unclosed|kl|sampler_kl|clip_fraction|grad_norm|lr|packing_efficiency|prefix_saving|skipped"
)
MAX_PANELS = 18
COLOURS = ("#2a6f97", "#d1603d", "#4f9d69", "#7b5ea7", "#b8901f", "#5f6b76", "#b5446e", "#2f4858")
GREY = "#6b7280"
STYLE = Path(__file__).with_name("curves.mplstyle")


def draw(folder: Path, out: Path) -> Path:
    """Draw a run as the picture `out`. UserError where there is nothing to draw."""
    return paint({plain(folder.resolve().name): columns(folder)}, out)


def paint(runs: dict[str, Columns], out: Path, titles: Sequence[str] = ()) -> Path:
    """Draw the columns of named runs over one another, with `titles` only these panels. UserError as in draw."""
    panels = [panel for panel in _panels(runs) if not titles or panel.title in titles]
    with figure_for(out) as figure:
        for panel, axis in zip(panels, _grid(figure, len(panels)), strict=True):
            _draw_panel(axis, panel, runs)
        _head(figure, runs)
    return out


def paint_each(runs: dict[str, Columns], folder: Path, stem: str, titles: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """Each panel of paint() as a picture of its own, folder/STEM-PANEL.svg, with its title. As wide as a phone, so that
    its letters are legible there."""
    out = []
    for panel in _panels(runs):
        if not titles or panel.title in titles:
            path = folder / f"{stem}-{re.sub(r'[^a-z0-9]+', '-', panel.title.lower())[:60]}.svg"
            with figure_for(path) as figure:
                figure.set_size_inches(3.9, 2.5 if len(runs) == 1 else 2.5 + 0.2 * len(runs))
                _draw_panel(figure.add_subplot(), panel, runs)
                if len(runs) > 1:
                    figure.legend(*_legend(runs), loc="outside upper left", frameon=False)
            out.append((panel.title, path))
    return out


@contextmanager
def figure_for(out: Path) -> Iterator[Any]:
    """An empty figure in our style, in the end written as `out`. UserError: no matplotlib, or it cannot be written."""
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context(fname=STYLE):
        figure = matplotlib.figure.Figure(layout="constrained", facecolor="white")
        yield figure
        try:
            figure.savefig(out, dpi=150)
        except OSError as error:
            raise UserError(f"{out}: cannot write it: {error.strerror}") from None


def columns(folder: Path) -> Columns:
    """Curves of the numbers in a run's metrics.jsonl. A null is no point.

    `dead_share` is added, in per cent; from events.jsonl `preflight_reward` and `preflight_thinking_tokens`, at step 0:
    those of the held-out prompts before the first step.
    """
    path = folder / "metrics.jsonl"
    points: dict[str, list[tuple[float, float]]] = {}
    rows = [row for row in read_rows(path) if is_number(row.get("step"))]
    for row in rows:
        if is_number(row.get("dead_groups")):
            row["dead_share"] = 100 * row["dead_groups"]
        for name, value in row.items():
            if name != "step" and is_number(value):
                points.setdefault(name, []).append((row["step"], value))
    if not points:
        raise UserError(f"{path}: " + ("no numbers to draw" if rows else "no rows yet"))
    if "reward" in points:
        points.pop("loss", None)  # of a policy: no likelihood, and nothing to compare with one
    for name, value in _preflight(path.with_name("events.jsonl")).items():
        points[name] = [(0, value)]
    return {name: tuple(np.array(pairs, dtype=np.float64).T) for name, pairs in points.items()}


def _preflight(events: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in read_rows(events) if events.exists() else ():
        if row.get("kind") == "gate":
            found |= {f"preflight_{key}": row[key] for key in ("reward", "thinking_tokens") if is_number(row.get(key))}
    return found


def smooth(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Moving average of n points over about a twentieth of them, w, where it is whole: both (n - w + 1,)."""
    window = window_of(len(values))
    # NOTE: differences of a running sum would carry the rounding of one spike through the rest of the run
    return steps[window // 2 : len(steps) - window // 2], np.convolve(values, np.full(window, 1 / window), "valid")


def window_of(num_points: int) -> int:
    """Points in the moving average, an odd number: 1, that is none, for curves too short to smooth."""
    return 1 if num_points < 40 else max(5, num_points // 20 | 1)


def _panels(runs: dict[str, Columns]) -> list[Panel]:
    present = dict.fromkeys(name for run in runs.values() for name in run)
    is_rl, is_sft = "reward" in present, any("reward" not in run for run in runs.values())
    panels = dict.fromkeys([*(RL if is_rl else ()), *(SFT if is_sft else ())])
    found = [panel for panel in panels if present.keys() & dict(panel.names).keys()]
    known = {name for panel in panels for name, _ in panel.names}
    changes = [name for name in present if len({y for run in runs.values() if name in run for y in run[name][1]}) > 1]
    own = [name for name in changes if name not in known and not UNDRAWN.fullmatch(name)]
    own = own or ([] if found else list(present))
    return (found + [Panel(plain(name).replace("_", " "), "", ((name, name),)) for name in own])[:MAX_PANELS]


class End(NamedTuple):
    """Where a line ends, in data coordinates, and its name."""

    x: float
    y: float
    label: str
    colour: str


def _grid(figure: Any, num: int) -> list[Any]:
    """Axes in reading order, three in a row; the first takes the places that would stay empty in its row."""
    width = num if num < 3 else 2 if num == 4 else 3
    height = -(-num // width)
    figure.set_size_inches(4.4 * max(width, 2), 0.8 + 2.6 * height)
    grid, wide = figure.add_gridspec(height, width), height * width - num
    places = [grid[0, : 1 + wide]] + [grid[i // width, i % width] for i in range(1 + wide, height * width)]
    return [figure.add_subplot(place) for place in places]


def _draw_panel(axis: Any, panel: Panel, runs: dict[str, Columns]) -> None:
    alone = len(runs) == 1
    ends: list[End] = []
    for i, run in enumerate(runs.values()):
        phases = [name for name in PHASES if name + "_s" in run]
        if alone and panel == TIME and phases:
            ends += _stack(axis, run, phases)
            continue
        shown = [(name, label) for name, label in panel.names if name in run]
        for j, (name, label) in enumerate(shown):
            colour, dash = (COLOURS[j], "-") if alone else (COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[j])
            end = _line(axis, run[name], panel, colour, dash)
            if end is not None and len(shown) > 1 and label not in [end.label for end in ends]:
                ends.append(End(*end, label, colour if alone else GREY))
        if alone and panel.baseline in run:
            height, colour = run[panel.baseline][1][0], COLOURS[max(len(shown) - 1, 0)]  # of the held-out curve
            axis.axhline(height, color=colour, linewidth=1.2, linestyle="--")
            ends.append(End(1, height, "at start", colour))
    axis.set(title=panel.title, ylabel=panel.unit)
    if axis.get_subplotspec().is_last_row():
        axis.set_xlabel("step")
    axis.margins(x=0.01)
    if panel.unit.startswith("%"):
        axis.set_ylim(bottom=0)
    _ticks(axis)
    _end_labels(axis, ends)


def _line(axis: Any, curve: Curve, panel: Panel, colour: str, dash: str) -> tuple[float, float] | None:
    """Draw one curve; where its bold line ends, None if nothing of it can be shown."""
    steps, values = curve
    if panel.scale == "log":
        steps, values = steps[values > 0], values[values > 0]  # an exact zero has no place on a log axis
        axis.set_yscale("log")
    if not len(steps):
        return None
    bold_steps, bold = smooth(steps, values) if panel.noisy else (steps, values)
    if len(bold) < len(values):
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    marker = "o" if window_of(len(values)) == 1 else ""  # few points: show that they are points
    axis.plot(bold_steps, bold, dash, color=colour, linewidth=1.8, marker=marker, markersize=3)
    return steps[-1], bold[-1]


def _stack(axis: Any, run: Columns, phases: list[str]) -> list[End]:
    """Seconds by phase, one upon the other, and above them what no phase accounts for. Returns the labels' places."""
    steps = np.unique(np.concatenate([run[name + "_s"][0] for name in phases]))
    heights = {name: _at(run[name + "_s"], steps) for name in phases}
    if "step_s" in run:
        heights["other"] = np.maximum(_at(run["step_s"], steps) - sum(heights.values()), 0)
    bold = np.array([smooth(steps, height)[1] for height in heights.values()])
    colours = [*COLOURS[: len(phases)], "#d5d9de"]
    axis.stackplot(smooth(steps, steps)[0], bold, colors=colours, linewidth=0.6, edgecolor="white")
    axis.set_ylim(0, 1.05 * bold.sum(0).max() or 1)
    axis.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    middles = np.cumsum(bold[:, -1]) - bold[:, -1] / 2
    # a label beside an area too thin to be seen would name another one
    seen = bold.max(1) >= 0.02 * bold.sum(0).max()
    labels = zip(middles, heights, [*colours[: len(phases)], GREY], strict=False)
    return [End(steps[-1], y, name, colour) for (y, name, colour), is_seen in zip(labels, seen, strict=True) if is_seen]


def _at(curve: Curve, steps: np.ndarray) -> np.ndarray:
    values = np.zeros(len(steps))  # a phase that a step did not have took no time
    inside = np.isin(curve[0], steps)
    values[np.searchsorted(steps, curve[0][inside])] = curve[1][inside]
    return values


def _ticks(axis: Any) -> None:
    axis.locator_params(axis="x", nbins=6, integer=True, min_n_ticks=1)
    axis.xaxis.set_major_formatter(_tick_text)
    axis.yaxis.set_major_formatter(_tick_text)
    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        axis.locator_params(axis="y", subs=(1,) if high / low > 50 else (1, 2, 5))
        axis.minorticks_off()
    else:
        axis.locator_params(axis="y", nbins=5)


def _tick_text(value: float, _: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _end_labels(axis: Any, ends: list[End]) -> None:
    """Name lines where they end, in their colours, pushed apart where they would touch."""
    axis.get_ylim()  # settles the limits, which matplotlib puts off; transData is stale before
    to_axes = axis.transData + axis.transAxes.inverted()
    places = sorted((to_axes.transform((end.x, end.y))[1], end.label, end.colour) for end in ends)
    at, gap = [y for y, _, _ in places], 0.08  # a line of text is about 0.08 of a panel
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + gap)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], 1 - gap * (len(at) - 1 - i))
    for y, (_, text, colour) in zip(at, places, strict=True):
        axis.annotate(
            text, (1, y), (5, 0), xycoords="axes fraction", textcoords="offset points", color=colour, va="center"
        )


def _head(figure: Any, runs: dict[str, Columns]) -> None:
    steps = max((curve[0] for run in runs.values() for curve in run.values()), key=len)
    about = f"steps {steps[0]:,.0f} to {steps[-1]:,.0f}"
    if window_of(len(steps)) > 1:
        about += "    thin: each step, bold: moving average"
        about += f" of {window_of(len(steps))}" if len(runs) == 1 else ""
    if len(runs) == 1 and "val_reward" in next(iter(runs.values())):
        about += "    held out: the same prompts each time"
        about += ", dashed: before the first step" if "preflight_reward" in next(iter(runs.values())) else ""
    figure.supxlabel(about, x=0.995, ha="right", fontsize=8, color=GREY)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), x=0.008, ha="left", fontsize=14, fontweight="bold", color="#1f2937")
        return
    shown = {"loc": "outside upper left", "ncols": min(len(runs), 4), "frameon": False, "fontsize": 11}
    figure.legend(*_legend(runs), **shown)


def _legend(runs: dict[str, Columns]) -> tuple[list[Any], list[str]]:
    """A line in each run's colour, and their names."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2.5) for i in range(len(runs))], list(runs)
