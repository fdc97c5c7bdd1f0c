"""Evaluations of a sweep's rows over seeds -> means, differences paired by seed, what replaced thoughts cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np

from thinkmid.errors import UserError
from thinkmid.eval.stats import clustered
from thinkmid.mini import world

GROUPS = {"all": world.SETS, "in distribution": tuple(world.STEPS), "held out": tuple(world.HELD_OUT)}
WHEN = {"before": "", "after": "+rlpt"}  # RLPT


def collect(homes: dict[int, Path], rows: dict[str, str], controls: dict[str, str], probed: Sequence[str]) -> dict:
    """{"seeds", "rows": label -> {"before", "after"}, "differences", "thoughts"}, plain values for a JSON file.

    rows, controls: name of a folder -> label; rows in the order that is claimed. Means over the sets of a group, each
    set of equal weight; lists and dicts over seeds in the order of homes.
    """
    labels = rows | controls
    cells = {
        label: {when: cell(homes, name + suffix) for when, suffix in WHEN.items()} for name, label in labels.items()
    }
    order = list(rows.values())
    against = [rows["think"], *controls.values()]
    pairs = [*pairwise(order), *((label, order[-1]) for label in against if label != order[-2])]
    return {
        "seeds": list(homes),
        "rows": cells,
        "differences": [
            {"less": a, "more": b, "when": when} | difference(cells[a][when]["mean"], cells[b][when]["mean"])
            for when in WHEN
            for a, b in pairs
        ],
        "times": {when: times(cells[order[0]]["after"]["mean"], cells[order[-1]][when]["mean"]) for when in WHEN},
        "thoughts": {labels[name]: conditions(homes, name) for name in probed},
    }


def cell(homes: dict[int, Path], row: str) -> dict:
    def told(results: dict) -> dict:
        return {s: {key: float(results["sets"][s][key]) for key in ("mean", "mean_think")} for s in world.SETS}

    found = {seed: read(home / "eval" / row / "results.json", told) for seed, home in homes.items()}
    means = {
        name: {seed: fmean(sets[s]["mean"] for s in group) for seed, sets in found.items()}
        for name, group in GROUPS.items()
    }
    return {
        "mean": means["all"],
        "groups": means,
        "sets": {s: [sets[s]["mean"] for sets in found.values()] for s in world.SETS},
        "thinking": [fmean(sets[s]["mean_think"] for s in world.SETS) for sets in found.values()],
    }


def difference(less: dict[int, float], more: dict[int, float]) -> dict:
    """How much more, paired by seed: a mean and its 95 % interval (Student's t over seeds), null for one seed."""
    each = np.array([more[seed] - less[seed] for seed in less])
    found = asdict(clustered(each))
    low, high = (found[key] if len(each) > 1 else None for key in ("low", "high"))
    return {"mean": found["mean"], "low": low, "high": high, "each": each.tolist()}


def times(base: dict[int, float], best: dict[int, float]) -> list[float]:
    """The full pipeline's accuracy over that of the base model after RLPT, by seed."""
    return [best[seed] / base[seed] for seed in base]


def conditions(homes: dict[int, Path], row: str) -> dict[str, list[float]]:
    """Accuracy with its own thought, none, an idle one, another question's: mean over the sets, by seed."""

    def told(results: dict) -> dict[str, float]:
        return {name: float(each["mean"]) for name, each in results["mean"]["conditions"].items()}

    found = [read(home / "eval" / row / "thoughts.json", told) for home in homes.values()]
    return {name: [each[name] for each in found] for name in found[0]}


def read(path: Path, told: Callable[[dict], dict]) -> dict:
    """What an evaluation told. UserError if its file does not."""
    try:
        return told(json.loads(path.read_bytes()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error!r}); without it the same command evaluates again") from None


def markdown(found: dict) -> str:
    """Three tables: accuracies with every seed, differences with intervals, thoughts replaced."""
    lines = [
        "| mean of all sets | before RLPT | by seed | after RLPT | by seed | thinking |",
        "|---|---|---|---|---|---|",
    ]
    for label, cells in found["rows"].items():
        parts = []
        for when in WHEN:
            means = list(cells[when]["mean"].values())
            parts += [f"**{fmean(means):.3f}**", " ".join(f"{m:.3f}".lstrip("0") for m in means)]
        thinking = " / ".join(f"{fmean(cells[when]['thinking']):.0f}" for when in WHEN)
        lines.append(f"| {label} | " + " | ".join(parts) + f" | {thinking} |")
    lines += ["", "| | in distribution, before / after | held out, before / after |", "|---|---|---|"]
    for label, cells in found["rows"].items():
        groups = (" / ".join(f"{fmean(cells[w]['groups'][g].values()):.3f}" for w in WHEN) for g in list(GROUPS)[1:])
        lines.append(f"| {label} | " + " | ".join(groups) + " |")
    lines += [
        "",
        "| difference, paired by seed | RLPT | mean | 95 % interval | seeds above 0 |",
        "|---|---|---|---|---|",
    ]
    for d in found["differences"]:
        interval = "one seed" if d["low"] is None else f"{d['low']:+.3f} to {d['high']:+.3f}"
        above = f"{sum(x > 0 for x in d['each'])} of {len(d['each'])}"
        lines.append(f"| {d['more']} over {d['less']} | {d['when']} | {d['mean']:+.3f} | {interval} | {above} |")
    names = list(next(iter(found["thoughts"].values())))
    lines += ["", "| thoughts replaced, before RLPT | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for label, by_name in found["thoughts"].items():
        lines.append(f"| {label} | " + " | ".join(f"{fmean(by_name[name]):.3f}" for name in names) + " |")
    return "\n".join(lines) + "\n"
