"""Evaluations of a sweep's rows over seeds -> means, differences paired by seed, accuracy with replaced thoughts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from thinkmid.errors import UserError
from thinkmid.eval.stats import clustered
from thinkmid.mini import world

GROUPS = {"all": world.SETS, "in distribution": tuple(world.STEPS), "held out": tuple(world.HELD_OUT)}
WHEN = {"before": "", "after": "+rlpt"}  # RLPT

Table = dict[str, Any]


def collect(homes: dict[int, Path], rows: dict[str, str], controls: dict[str, str], probed: Sequence[str]) -> Table:
    """{"seeds", "rows": label -> {"before", "after"}, "differences", "times", "thoughts"}, values of a JSON file.

    rows, controls: name of a folder -> label; rows in the order that is claimed. Means over the sets of a group, each
    set of equal weight; lists and dicts over seeds in the order of homes. UserError: an evaluation's file is damaged.
    """
    labels = rows | controls
    cells = {
        label: {when: cell(homes, name + suffix) for when, suffix in WHEN.items()} for name, label in labels.items()
    }
    order = list(rows.values())
    against = [rows["think"], *controls.values()]
    pairs = [*pairwise(order), *((label, order[-1]) for label in against if label != order[-2])]
    base, best = cells[order[0]]["after"]["mean"], cells[order[-1]]
    return {
        "seeds": list(homes),
        "rows": cells,
        "differences": [
            {"less": a, "more": b, "when": when} | difference(cells[a][when]["mean"], cells[b][when]["mean"])
            for when in WHEN
            for a, b in pairs
        ],
        # the full pipeline's accuracy over that of the base model after RLPT, by seed
        "times": {when: [best[when]["mean"][seed] / base[seed] for seed in homes] for when in WHEN},
        "thoughts": {labels[name]: conditions(homes, name) for name in probed},
    }


def cell(homes: dict[int, Path], row: str) -> Table:
    accuracy, length = {}, {}  # seed -> set -> mean
    for seed, home in homes.items():
        with evaluation(home / "eval" / row / "results.json") as results:
            accuracy[seed] = {s: float(results["sets"][s]["mean"]) for s in world.SETS}
            length[seed] = {s: float(results["sets"][s]["mean_think"]) for s in world.SETS}
    means = {name: {seed: fmean(accuracy[seed][s] for s in group) for seed in homes} for name, group in GROUPS.items()}
    return {
        "mean": means["all"],
        "groups": means,
        "sets": {s: [accuracy[seed][s] for seed in homes] for s in world.SETS},
        "thinking": [fmean(length[seed].values()) for seed in homes],
    }


def difference(less: dict[int, float], more: dict[int, float]) -> Table:
    """How much more, paired by seed: a mean and its 95 % interval (Student's t over seeds), null for one seed."""
    each = np.array([more[seed] - less[seed] for seed in less])
    found = asdict(clustered(each))
    low, high = (found[key] if len(each) > 1 else None for key in ("low", "high"))
    return {"mean": found["mean"], "low": low, "high": high, "each": each.tolist()}


def conditions(homes: dict[int, Path], row: str) -> dict[str, list[float]]:
    """Accuracy with its own thought, none, an idle one, another question's: mean over the sets, by seed."""
    found: dict[str, list[float]] = {}
    for home in homes.values():
        with evaluation(home / "eval" / row / "thoughts.json") as results:
            for name, each in results["mean"]["conditions"].items():
                found.setdefault(name, []).append(float(each["mean"]))
    return found


@contextmanager
def evaluation(path: Path) -> Iterator[Any]:
    """What is in the file of an evaluation. UserError if something that is looked up in it is missing."""
    try:
        yield json.loads(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error!r}); without it the same command evaluates again") from None


def markdown(found: Table) -> str:
    """Tables: accuracies with every seed, accuracies by group, differences with intervals, thoughts replaced."""
    rows, groups = found["rows"].items(), list(GROUPS)[1:]
    names = list(next(iter(found["thoughts"].values())))
    head = ["mean of all sets", "before RLPT", "by seed", "after RLPT", "by seed", "thinking"]
    lines = [*table(head, [[label, *accuracies(cells)] for label, cells in rows]), ""]
    head = ["", *(f"{group}, before / after" for group in groups)]
    lines += [*table(head, [[label, *(both(cells, group) for group in groups)] for label, cells in rows]), ""]
    head = ["difference, paired by seed", "RLPT", "mean", "95 % interval", "seeds above 0"]
    lines += [*table(head, map(paired, found["differences"])), ""]
    thoughts = [[label, *(f"{fmean(own[n]):.3f}" for n in names)] for label, own in found["thoughts"].items()]
    return "\n".join([*lines, *table(["thoughts replaced, before RLPT", *names], thoughts), ""])


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    first, *rest = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return [first.replace("|  |", "| |"), "|---" * len(head) + "|", *rest]


def accuracies(cells: Table) -> list[str]:
    parts = []
    for when in WHEN:
        means = list(cells[when]["mean"].values())
        parts += [f"**{fmean(means):.3f}**", " ".join(f"{m:.3f}".lstrip("0") for m in means)]
    return [*parts, " / ".join(f"{fmean(cells[when]['thinking']):.0f}" for when in WHEN)]


def both(cells: Table, group: str) -> str:
    return " / ".join(f"{fmean(cells[when]['groups'][group].values()):.3f}" for when in WHEN)


def paired(d: Table) -> list[str]:
    interval = "one seed" if d["low"] is None else f"{d['low']:+.3f} to {d['high']:+.3f}"
    above = f"{sum(x > 0 for x in d['each'])} of {len(d['each'])}"
    return [f"{d['more']} over {d['less']}", d["when"], f"{d['mean']:+.3f}", interval, above]
