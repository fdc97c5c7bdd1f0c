"""The page's pictures: curves of runs over one another, accuracy against what it cost."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from thinkmid.errors import UserError, plain
from thinkmid.eval.stats import Estimate
from thinkmid.report.chain import Cost, Unknown, chain, cost
from thinkmid.report.runs import Evaluation, Run, Training
from thinkmid.run import curves

ACCURACY = (
    "Mean over the sets with its 95 % interval. Mid-training tokens: those of SFT and those generated in RLMT; "
    "compute: 2 FLOP per weight and token forward, 6 per token trained on, RLPT's too where there was RLPT; "
    "prompts' prefill and a judge model are not counted, nor is what made the base model. "
)


THIN = "Thin: each step, bold: moving average; held out: the same prompts each time, dashed: before the first step."


class Picture(NamedTuple):
    """Figures of one panel each, under one title."""

    title: str
    caption: str
    paths: list[tuple[str, Path]]  # title and SVG file of each; none: the caption gives the reason
    folded: bool = False

    @property
    def figures(self) -> list[tuple[str, str]]:
        """Title and base64 of each."""
        return [(title, base64.b64encode(path.read_bytes()).decode()) for title, path in self.paths]


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluated model."""

    name: str  # of the run that its RLPT began from, or of its last run
    is_after: bool  # RLPT
    cost: Cost
    mean: Estimate


def draw_all(runs: Sequence[Run], folder: Path) -> list[Picture]:
    """Pictures of all runs, in `folder`; a kind of picture that no run belongs in is left out."""
    trainings = [run for run in runs if isinstance(run, Training)]
    rlmt, rlpt = ([run for run in trainings if run.kind == kind] for kind in ("rlmt", "rlpt"))
    over_rlmt = "Mean reward and thinking length over RLMT steps. " + THIN
    over_rlpt = "Mean reward over RLPT steps, by the run it began from. " + THIN
    evaluations = [run for run in runs if isinstance(run, Evaluation)]
    out = []
    if rlmt:
        out.append(overlay("RL mid-training", over_rlmt, rlmt, folder / "rlmt", ["Reward", "Thinking length"]))
    if rlpt:
        out.append(overlay("RL post-training by starting point", over_rlpt, rlpt, folder / "rlpt", ["Reward"]))
    if evaluations:
        out.append(accuracy(evaluations, folder))
    # the only training run is what the page is about
    return out + [own_curves(run, folder / f"run-{n}", len(trainings) > 1) for n, run in enumerate(trainings, start=1)]


def own_curves(run: Training, stem: Path, is_folded: bool) -> Picture:
    title = f"All curves of {run.folder}"
    try:
        own = {plain(run.folder.resolve().name): curves.columns(run.folder)}
        return Picture(title, THIN, curves.paint_each(own, stem.parent, stem.name), folded=is_folded)
    except UserError as error:
        return Picture(title, f"not shown: {error}", [], folded=is_folded)


def overlay(title: str, caption: str, runs: Sequence[Training], stem: Path, panels: Sequence[str]) -> Picture:
    """Runs over one another; runs of one name (seeds of a row) are averaged over the steps that all of them have."""
    named: dict[str, list[curves.Columns]] = {}
    for run in runs:
        try:
            named.setdefault(called(run), []).append(curves.columns(run.folder))
        except UserError:
            continue  # no steps yet, as the table of runs shows
    many = {f"{name} ({len(each)} runs)" if len(each) > 1 else name: mean(each) for name, each in named.items() if each}
    many = {name: columns for name, columns in many.items() if "reward" in columns}
    if not many:
        return Picture(title, "not shown: no such run with rewards", [])
    return Picture(title, caption, curves.paint_each(many, stem.parent, stem.name, panels))


def called(run: Training) -> str:
    """Name of a run on a picture: its folder's, for RLPT its starting point's."""
    return model_name(run.start) if run.kind == "rlpt" and run.start else plain(run.folder.resolve().name)


def model_name(model: str) -> str:
    """Name of the folder of a model, or of the run that exported it."""
    path = Path(model)
    return plain((path.parent if path.name == "export" else path).resolve().name)


def mean(runs: Sequence[curves.Columns]) -> curves.Columns:
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


def accuracy(runs: Sequence[Evaluation], folder: Path) -> Picture:
    """Mean over an evaluation's sets against mid-training tokens and against compute."""
    title, points, missing = "Accuracy against what it cost", [], []
    for run in runs:
        try:
            points.append(point(run))
        except Unknown as reason:
            missing.append(f"{run.folder} ({reason})")
    not_shown = "not shown: " + "; ".join(missing) if missing else ""
    if not points:
        return Picture(title, not_shown, [])
    if len({(p.cost, p.is_after) for p in points}) == 1:
        return Picture(title, "not shown: one model, so nothing to compare. " + not_shown, [])
    differ = len({tuple(run.sets) for run in runs}) > 1
    paths = []
    for of, label in (("tokens", "mid-training tokens"), ("flop", "compute after the base model, FLOP")):
        path = folder / f"accuracy-{of}.svg"
        with curves.figure_for(path) as figure:
            figure.set_size_inches(3.9, 3)
            axis = figure.add_subplot()
            draw_points(axis, points, f"cost.{of}", label)
            axis.set_ylabel("mean accuracy")
            axis.legend(frameon=False, loc="best")
        paths.append((f"accuracy against {label}", path))
    return Picture(title, ACCURACY + "The evaluations are not all on the same sets. " * differ + not_shown, paths)


def point(run: Evaluation) -> Point:
    if run.mean is None:
        raise Unknown("a set without a mean or an interval")
    runs = chain(run.model)
    name = called(runs[0]) if runs else model_name(run.model)
    is_after = bool(runs) and runs[0].kind == "rlpt"
    return Point(name=name, is_after=is_after, cost=cost(run.model, runs), mean=run.mean)


def draw_points(axis: Any, points: Sequence[Point], x: str, label: str) -> None:
    """x: attribute of a point."""
    x_of = attrgetter(x)
    for is_after, colour, words in ((False, curves.COLOURS[0], "before RLPT"), (True, curves.COLOURS[1], "after RLPT")):
        own = [p for p in points if p.is_after == is_after]
        if own:
            errors = [[p.mean.mean - p.mean.low for p in own], [p.mean.high - p.mean.mean for p in own]]
            style = {"fmt": "o", "markersize": 5, "capsize": 2, "linewidth": 1, "color": colour, "label": words}
            axis.errorbar([x_of(p) for p in own], [p.mean.mean for p in own], errors, **style)
    if len(points) <= 24:  # more labels would hide the points
        # one label for the runs of one name at one place: it stands at the highest
        highest = {(p.name, x_of(p)): p.mean.mean for p in sorted(points, key=attrgetter("mean.mean"))}
        for (name, at), height in highest.items():
            axis.annotate(name, (at, height), (6, 4), textcoords="offset points", fontsize=7.5, color=curves.GREY)
    axis.set_xlabel(label)
    axis.margins(x=0.12)
    axis.set_ylim(bottom=0)
