"""Numbers as HTML tables: the paper's two with our rows beside them, our evaluations, our training runs."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from thinkmid.eval import stats
from thinkmid.report.chain import Unknown, chain
from thinkmid.report.runs import Evaluation, Run, Training, number
from thinkmid.report.text import escape

PAPER = tomllib.loads((Path(__file__).parent / "paper.toml").read_text(encoding="utf-8"))
NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: str = "") -> str:
    """Cells are HTML already; the first of each row is its name."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{classes}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figure(value: float | None, form: str = "{:.4f}") -> str:
    return NONE if value is None else form.format(value)


def with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None or low is None or high is None:
        return figure(mean)
    return f"{mean:.4f} <small>{low:.3f} to {high:.3f}</small>"


# The paper's tables.


def paper(evaluations: Sequence[Evaluation]) -> str:
    """Tables 8 and 9, each with our evaluations of that stage on any of the five benchmarks; table 10 folded."""
    ours = [(run, columns, stage(run)) for run in evaluations if (columns := benchmark_columns(run))]
    parts = [paper_table(t, [(run, c) for run, c, when in ours if when == t["stage"]]) for t in PAPER["table"]]
    base, sft, rlmt = PAPER["prose"]
    means = [five_mean(row["scores"]) for row in PAPER["table"][0]["rows"]]
    note = (
        f"<p>Averages here are means of the five columns. The averages that the paper's prose and the blog quote, "
        f"{base} (base), {sft} (SFT) and {rlmt} (RLMT), are other numbers: they seem to run over more benchmarks than "
        f"the table shows. The five-column means are {means[0]:.4f}, {means[2]:.4f} and {means[3]:.4f} or "
        f"{means[4]:.4f}. Figures of {escape(PAPER['source'])}, tables 8 to 10.</p>"
    )
    if not ours:
        note += "<p>None of the evaluations given here is on one of these benchmarks.</p>"
    return parts[0] + parts[1] + note + f"<details><summary>Table 10, another model</summary>{parts[2]}</details>"


def paper_table(t: dict[str, Any], ours: Sequence[tuple[Evaluation, dict[str, str]]]) -> str:
    rows = [
        (escape(row["name"]), row["tokens"], *map(figure, row["scores"]), f"<b>{five_mean(row['scores']):.4f}</b>")
        for row in t["rows"]
    ]
    for run, columns in ours:
        cells = [run.sets.get(columns.get(name, ""), {}) for name in PAPER["benchmarks"]]
        found = [mean_of(cell) for cell in cells]
        whole = estimate_of(cells) if None not in found else None
        all_five = f"<b>{with_interval(whole.mean, whole.low, whole.high)}</b>" if whole else NONE
        rows.append((f"ours: {escape(run.folder)}", NONE, *map(cell_text, cells), all_five))
    head = ["model", "tokens", *PAPER["benchmarks"], "five-column mean"]
    return f"<h3>Table {t['number']}: {escape(t['title'])}</h3>" + table(head, rows, "paper")


def five_mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def benchmark_columns(run: Evaluation) -> dict[str, str]:
    """Benchmark of the paper -> the run's set that goes by its name, "MATH500" or "math-500" alike."""
    own = {plain_name(name): name for name in run.sets}
    return {name: own[plain_name(name)] for name in PAPER["benchmarks"] if plain_name(name) in own}


def plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def stage(run: Evaluation) -> str:
    """Whether the last run behind the model was RLPT: "after"; "before" for any other, of unknown past among them."""
    try:
        runs = chain(run.model)
    except Unknown:
        return "before"
    return "after" if runs and runs[0].kind == "rlpt" else "before"


# Our evaluations.


def evaluations(runs: Sequence[Evaluation]) -> str:
    """A table for each: sets with interval, size and shares; their mean. Of several, one table of means comes first."""
    if len(runs) < 2:
        return "".join(map(evaluation, runs))
    names = list(dict.fromkeys(name for run in runs for name in run.sets))
    rows = [
        (escape(run.folder), *(figure(mean_of(run.sets.get(name, {}))) for name in names), mean_cell(run))
        for run in runs
    ]
    folded = (f"<details><summary>{escape(run.folder)}</summary>{evaluation(run)}</details>" for run in runs)
    return table(["run", *map(escape, names), "mean of its sets, 95 % interval"], rows) + "".join(folded)


def evaluation(run: Evaluation) -> str:
    about = run.results
    asked = [f"model {escape(run.model)}", f"template {escape(about.get('template', 'not said'))}"]
    asked += [form.format(value) for key, form in ABOUT.items() if (value := number(about.get(key))) is not None]
    rows = [(escape(name), cell_text(of), *set_cells(of)) for name, of in run.sets.items()]
    rows.append(("<b>mean of the sets</b>", mean_cell(run), *([""] * 6)))
    head = ["set", "accuracy, 95 % interval", "questions × samples", *SHARES.values(), "thinking, tokens"]
    return f"<h3>{escape(run.folder)}</h3><p>{', '.join(asked)}</p>" + table(head, rows)


ABOUT = {
    "samples": "{:.0f} samples of each question",
    "temperature": "temperature {:g}",
    "top_p": "top-p {:g}",
    "max_new": "at most {:.0f} new tokens",
}
SHARES = {"unparsed": "unparsed", "truncated": "truncated", "unclosed": "unclosed", "failed": "no verdict"}


def set_cells(of: dict[str, Any]) -> list[str]:
    size = [figure(number(of.get(key)), "{:.0f}") for key in ("num_questions", "num_samples")]
    shares = [figure(number(of.get(key)), "{:.1%}") for key in SHARES]
    return [" × ".join(size), *shares, figure(number(of.get("mean_think")), "{:,.0f}")]


def mean_cell(run: Evaluation) -> str:
    whole = estimate_of(run.sets.values())
    return f"<b>{whole.mean:.4f}</b> <small>{whole.low:.3f} to {whole.high:.3f}</small>" if whole else NONE


def mean_of(of: dict[str, Any]) -> float | None:
    return number(of.get("mean"))


def cell_text(of: dict[str, Any]) -> str:
    return with_interval(mean_of(of), number(of.get("low")), number(of.get("high")))


def estimate_of(sets: Iterable[dict[str, Any]]) -> stats.Estimate | None:
    """Mean of the sets, of equal weight, with its interval; None if one of them lacks a number."""
    found = []
    for of in sets:
        numbers = [number(of.get(key)) for key in ("mean", "se", "low", "high", "num_questions")]
        if None in numbers:
            return None
        mean, se, low, high, num = (value for value in numbers if value is not None)
        found.append(stats.Estimate(mean=mean, se=se, low=low, high=high, num_questions=int(num)))
    return stats.average(found) if found else None


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


# The runs.


def trainings(runs: Sequence[Run]) -> str:
    """One line for each training run: kind, start, steps, and the first and last tenth of what it is about."""
    rows = [training(run) for run in runs if isinstance(run, Training)]
    return table(["run", "kind", "from", "steps", "reward or loss", "thinking, tokens"], rows) if rows else ""


def training(run: Training) -> tuple[str, ...]:
    name = "loss" if run.kind == "sft" else "reward"
    steps = figure(number(run.rows[-1].get("step")), "{:.0f}") if run.rows else "no steps yet"
    start = run.start or ("fresh weights" if run.config else "not said")
    change = f"{name} {first_last(run, name, '{:.3f}')}"
    return (
        escape(run.folder),
        run.kind.upper(),
        escape(start),
        steps,
        change,
        first_last(run, "thinking_tokens", "{:.0f}"),
    )


def first_last(run: Training, column: str, form: str) -> str:
    values = [value for row in run.rows if (value := number(row.get(column))) is not None]
    if not values:
        return NONE
    tenth = max(1, len(values) // 10)
    means = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    return " → ".join(form.format(mean) for mean in means)
