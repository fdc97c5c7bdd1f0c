"""The page's pictures: curves of runs over one another, accuracy against what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thinkmid.errors import UserError, plain
from thinkmid.report.chain import Cost, Unknown, chain, cost
from thinkmid.report.runs import Evaluation, Run, Training
from thinkmid.report.tables import estimate_of
from thinkmid.run import curves


class Picture(NamedTuple):
    title: str
    caption: str
    path: Path | None  # None: it could not be drawn, and the caption says why
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluated model."""

    name: str  # of the run that its RLPT began from, or of its last run
    is_after: bool  # RLPT
    cost: Cost
    mean: float
    low: float
    high: float


def draw_all(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Pictures of all runs, in `folder`; each training run's own curves also go into its folder, as curves.png."""
    trainings = [run for run in runs if isinstance(run, Training)]
    out = [
        overlay(
            *("RL mid-training", [run for run in trainings if run.kind == "rlmt"], folder / "rlmt.png"),
            *(("Reward", "Thinking length"), "Mean reward and thinking length over RLMT steps."),
        ),
        overlay(
            *("RL post-training by starting point", [run for run in trainings if run.kind == "rlpt"]),
            *(folder / "rlpt.png", ("Reward",), "Mean reward over RLPT steps, by the run it began from."),
        ),
        accuracy([run for run in runs if isinstance(run, Evaluation)], folder / "accuracy.png"),
    ]
    for run in trainings:
        own = run.folder / "curves.png"
        try:
            out.append(Picture(f"All curves of {run.folder}", str(own), curves.draw(run.folder, own), folded=True))
        except UserError as error:
            out.append(Picture(f"All curves of {run.folder}", f"not shown: {error}", None, folded=True))
    return out


def overlay(title: str, runs: Sequence[Training], path: Path, panels: Sequence[str], caption: str) -> Picture:
    """Runs over one another, runs of one name averaged over the steps that all of them have: seeds of one row."""
    named: dict[str, list[dict[str, curves.Curve]]] = {}
    for run in runs:
        try:
            named.setdefault(called(run), []).append(curves.columns(run.folder))
        except UserError:
            continue  # no steps yet: the table of runs says so
    many = {f"{name} ({len(each)} runs)" if len(each) > 1 else name: mean(each) for name, each in named.items() if each}
    many = {name: columns for name, columns in many.items() if "reward" in columns}
    if not many:
        return Picture(title, "not shown: no such run with rewards", None)
    return Picture(title, caption, curves.paint(many, path, panels))


def called(run: Training) -> str:
    """A run on a picture: its own name, of RLPT its starting point's."""
    start = Path(run.start)
    own = (start.parent if start.name == "export" else start) if run.kind == "rlpt" and run.start else run.folder
    return plain(own.resolve().name)


def mean(runs: Sequence[dict[str, curves.Curve]]) -> dict[str, curves.Curve]:
    """Columns that all runs have, at the steps that all have, averaged over runs."""
    out = {}
    for name in runs[0]:
        if all(name in run for run in runs):
            steps = runs[0][name][0]
            for run in runs[1:]:
                steps = np.intersect1d(steps, run[name][0])
            if len(steps):
                out[name] = steps, np.mean([run[name][1][np.isin(run[name][0], steps)] for run in runs], axis=0)
    return out


def accuracy(runs: Sequence[Evaluation], path: Path) -> Picture:
    """Mean over an evaluation's sets against mid-training tokens and against compute."""
    title, points, missing = "Accuracy against what it cost", [], []
    for run in runs:
        try:
            points.append(point(run))
        except Unknown as why:
            missing.append(f"{run.folder} ({why})")
    words = "not shown: " + "; ".join(missing) if missing else ""
    if not points:
        return Picture(title, words or "not shown: no evaluation run given", None)
    caption = (
        "Mean over the sets with its 95 % interval. Mid-training tokens: those of SFT and those generated in RLMT; "
        "compute: 2 FLOP per weight and token forward, 6 per token trained on, RLPT's too where there was RLPT; "
        "prompts' prefill and a judge model are not counted, nor is what made the base model. "
    )
    sets = {tuple(run.sets) for run in runs}
    caption += "The evaluations are not all on the same sets. " if len(sets) > 1 else ""
    with curves.figure_for(path) as figure:
        figure.set_size_inches(11, 4.2)
        axes = figure.subplots(1, 2, sharey=True)
        draw_points(axes[0], points, [p.cost.tokens for p in points], "mid-training tokens")
        draw_points(axes[1], points, [p.cost.flop for p in points], "compute after the base model, FLOP")
        axes[0].set_ylabel("mean accuracy")
        axes[0].legend(frameon=False, loc="best")
    return Picture(title, caption + words, path)


def point(run: Evaluation) -> Point:
    whole = estimate_of(run.sets.values())
    if whole is None:
        raise Unknown("a set without a mean or an interval")
    runs = chain(run.model)
    is_after = bool(runs) and runs[0].kind == "rlpt"
    name = called(runs[0]) if runs else plain(folder_name(run.model))
    return Point(
        name=name, is_after=is_after, cost=cost(run.model, runs), mean=whole.mean, low=whole.low, high=whole.high
    )


def folder_name(model: str) -> str:
    path = Path(model)
    return (path.parent if path.name == "export" else path).resolve().name


def draw_points(axis: Any, points: Sequence[Point], xs: Sequence[float], label: str) -> None:
    for is_after, colour, words in ((False, curves.COLOURS[0], "before RLPT"), (True, curves.COLOURS[1], "after RLPT")):
        own = [(x, p) for x, p in zip(xs, points, strict=True) if p.is_after == is_after]
        if own:
            middle = [p.mean for _, p in own]
            errors = [[p.mean - p.low for _, p in own], [p.high - p.mean for _, p in own]]
            style = {"fmt": "o", "markersize": 5, "capsize": 2, "linewidth": 1, "color": colour, "label": words}
            axis.errorbar([x for x, _ in own], middle, errors, **style)
    if len(points) <= 24:  # more labels would hide the points
        highest = {(p.name, x): (x, p.mean) for x, p in sorted(zip(xs, points, strict=True), key=lambda xp: xp[1].mean)}
        for (name, _), place in highest.items():
            axis.annotate(name, place, (6, 4), textcoords="offset points", fontsize=7.5, color=curves.GREY)
    axis.set_xlabel(label)
    axis.margins(x=0.12)
    axis.set_ylim(bottom=0)
