"""A sweep as one picture: accuracy by row and by length of RLMT, reward and thinking length of RLMT, reward of RLPT."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.mini_results import Table
from thinkmid.run.curves import COLOURS, GREY, columns, figure_for, smooth

BEFORE, AFTER = COLOURS[0], COLOURS[1]


def draw(homes: dict[int, Path], found: Table, rows: dict[str, str], lengths: tuple[int, ...], out: Path) -> Path:
    """found: results.collect. rows: folder's name -> label. lengths: steps of the RLMT runs named rlmt-STEPS."""
    path = out / "sweep.png"
    with figure_for(path) as figure:
        figure.set_size_inches(13, 11)
        top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))  # the labels of one leave the other its width
        by_row(top.add_subplot(), found["rows"])
        grid = bottom.add_gridspec(2, 4)
        by_length(bottom.add_subplot(grid[:, :2]), found["rows"], rows, lengths)
        longest = [home / f"rlmt-{lengths[-1]}" for home in homes.values()]
        over_steps(bottom.add_subplot(grid[0, 2]), longest, "reward", "RLMT: reward", "mean per rollout")
        over_steps(bottom.add_subplot(grid[0, 3]), longest, "thinking_tokens", "RLMT: thinking length", "tokens")
        starts = {label: [home / f"{name}+rlpt" for home in homes.values()] for name, label in rows.items()}
        by_start(bottom.add_subplot(grid[1, 2:]), starts)
    return path


def by_row(axis: Any, rows: dict[str, Any]) -> None:
    """Every seed a dot, their mean a bar."""
    for at, cells in enumerate(rows.values()):
        shown = []
        for when, colour, shift in (("before", BEFORE, -0.18), ("after", AFTER, 0.18)):
            means = list(cells[when]["mean"].values())
            axis.barh(at + shift, fmean(means), height=0.32, color=colour, alpha=0.35)
            axis.plot(means, [at + shift] * len(means), "o", color=colour, markersize=3.5)
            shown.append(f"{fmean(means):.3f}")
        axis.annotate("  ".join(shown), (1, at), (6, 0), ("axes fraction", "data"), "offset points", va="center")
    axis.annotate(
        "before   after", (1, -0.7), (6, 0), ("axes fraction", "data"), "offset points", va="center", color=GREY
    )
    axis.set(title="Accuracy, mean of all sets; a dot a seed", xlim=(0, 1), yticks=range(len(rows)))
    axis.set_yticklabels(list(rows))
    axis.tick_params(axis="y", labelcolor="#1f2937")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    for colour, label in ((BEFORE, "before RLPT"), (AFTER, "after RLPT")):
        axis.barh([0], [0], color=colour, alpha=0.6, label=label)
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def by_length(axis: Any, rows: dict[str, Any], names: dict[str, str], lengths: tuple[int, ...]) -> None:
    steps = (0, *lengths)
    cells = [rows[names[name]] for name in ("think", *(f"rlmt-{n}" for n in lengths))]
    for when, colour in (("before", BEFORE), ("after", AFTER)):
        by_seed = np.array([list(cell[when]["mean"].values()) for cell in cells])
        axis.plot(steps, by_seed, color=colour, linewidth=0.8, alpha=0.4)
        axis.plot(steps, by_seed.mean(1), "o-", color=colour, linewidth=2, label=f"{when} RLPT")
    axis.set(title="Accuracy by length of RLMT", xlabel="steps of RLMT", ylabel="mean of all sets", xticks=steps)
    axis.legend(frameon=False, loc="lower right")  # where the curves meet names at their ends would too


def over_steps(axis: Any, runs: list[Path], column: str, title: str, unit: str) -> None:
    for run in runs:
        axis.plot(*smooth(*columns(run)[column]), color=BEFORE, linewidth=1.2, alpha=0.7)
    axis.set(title=title, ylabel=unit, xlabel="steps; a line a seed")


def by_start(axis: Any, starts: dict[str, list[Path]]) -> None:
    for i, (label, runs) in enumerate(starts.items()):
        curves = [columns(run)["reward"] for run in runs]
        mean = np.mean([values for _, values in curves], axis=0)
        axis.plot(*smooth(curves[0][0], mean), color=COLOURS[i], linewidth=1.8, label=label)
    axis.set(
        title="RLPT: reward by starting point, mean of the seeds", xlabel="steps of RLPT", ylabel="mean per rollout"
    )
    axis.legend(frameon=False, fontsize=7.5, labelcolor=GREY, loc="upper left", bbox_to_anchor=(0, -0.25), ncols=2)
