"""The miniature's sweep as HTML tables: rows before and after RLPT, their differences, replaced thoughts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from thinkmid.errors import UserError
from thinkmid.eval import stats
from thinkmid.files import read_json
from thinkmid.report.runs import number, section
from thinkmid.report.tables import NONE, PAPER, as_dict, as_list, figure, five_mean, table
from thinkmid.report.text import escape


def sweep(path: Path) -> str:
    """The sweep's rows before and after RLPT, each seed shown, over the paper's five-column means. UserError."""
    whole = read_json(path)
    rows = section(whole, "rows") or {label: cells for label, cells in whole.items() if "before" in as_dict(cells)}
    if not rows:
        raise UserError(f"{path}: no row with 'before' and 'after'")
    out = [
        (escape(label), *sweep_cells(cells, "before"), *sweep_cells(cells, "after")) for label, cells in rows.items()
    ]
    head = ["", "before RLPT", "by seed", "thinking", "after RLPT", "by seed", "thinking"]
    count = max(len(seeds(cells, when)) for cells in rows.values() for when in ("before", "after"))
    words = (
        "mean over the sets, its mean over seeds with the 95 % interval over seeds"
        if count > 1
        else "mean over the sets; one seed, so no interval over seeds"
    )
    more = differences(as_list(whole.get("differences"))) + thoughts(section(whole, "thoughts"))
    return f"<p>{escape(path)}: {words}.</p>" + table(head, out) + more + beside()


def sweep_cells(cells: Any, when: str) -> tuple[str, str, str]:
    means = seeds(cells, when)
    values = list(means.values())
    thinking = [v for v in as_list(section(cells, when).get("thinking")) if number(v) is not None]
    by_seed = " ".join(f'<span title="seed {escape(seed)}">{value:.3f}</span>' for seed, value in means.items())
    if len(values) > 1:
        e = stats.clustered(np.array(values))
        mean = f"<b>{e.mean:.3f}</b> <small>{e.low:.3f} to {e.high:.3f}</small>"
    else:
        mean = f"<b>{values[0]:.3f}</b>" if values else NONE
    return mean, by_seed or NONE, f"{sum(thinking) / len(thinking):.0f}" if thinking else NONE


def seeds(cells: Any, when: str) -> dict[str, float]:
    means = section(section(cells, when), "mean")
    return {seed: value for seed, mean in means.items() if (value := number(mean)) is not None}


def differences(found: list[Any]) -> str:
    """Paired by seed, with their intervals; "" where the table has none."""
    rows = []
    for d in map(as_dict, found):
        mean, low, high = (number(d.get(key)) for key in ("mean", "low", "high"))
        each = [v for value in as_list(d.get("each")) if (v := number(value)) is not None]
        interval = "one seed" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
        above = f"{sum(v > 0 for v in each)} of {len(each)}"
        names = f"{escape(d.get('more'))} <small>over</small> {escape(d.get('less'))}"
        rows.append((names, escape(d.get("when")), figure(mean, "{:+.3f}"), interval, above))
    words = "<p>Differences, paired by seed (a seed is another world: corpus, weights, questions, draws):</p>"
    return words + table(["", "RLPT", "mean", "95 % interval", "seeds above 0"], rows) if rows else ""


def thoughts(found: dict[str, Any]) -> str:
    """Accuracy where thoughts were replaced, means over seeds."""
    names = list(dict.fromkeys(name for by_name in found.values() for name in as_dict(by_name)))
    rows = []
    for label, by_name in found.items():
        values = [[v for value in as_list(as_dict(by_name).get(n)) if (v := number(value)) is not None] for n in names]
        rows.append((escape(label), *(figure(sum(v) / len(v) if v else None, "{:.3f}") for v in values)))
    words = "<p>Thoughts replaced before RLPT, the answer drawn again:</p>"
    return words + table(["", *map(escape, names)], rows) if rows else ""


def beside() -> str:
    """The paper's five-column means, in a table of its own: other models, other questions."""
    after = {row["name"]: five_mean(row["scores"]) for row in PAPER["table"][1]["rows"]}
    before = {row["name"]: five_mean(row["scores"]) for row in PAPER["table"][0]["rows"]}
    rows = [(escape(name), figure(before.get(name)), figure(after[name])) for name in after]
    return "<p>The paper's rows, Llama-3-8B, five-column means:</p>" + table(["", "before RLPT", "after RLPT"], rows)
