"""Samples for people to read: a spread of a run's groups, small enough to stand in the page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from thinkmid.data import questions
from thinkmid.eval.generations import stored
from thinkmid.files import Row, read_rows
from thinkmid.report.paper import plain_name
from thinkmid.report.runs import Evaluation, Run, Training, items, number, section
from thinkmid.report.text import cut, visible
from thinkmid.thoughts import CLOSE

PER_STEP = 4  # groups of a step, where a run has more than are shown

Group = dict[str, Any]  # what page.js shows: run, where, id, prompt, reference, gold, samples
T = TypeVar("T")


def gather(runs: Sequence[Run], limit: int, show_gpqa: bool) -> tuple[list[Group], list[str]]:
    """Groups of at most `limit` per run, ready for JSON, and notes: which part of each run is here, or why nothing is.

    Texts of GPQA are withheld unless `show_gpqa`.
    """
    groups: list[Group] = []
    notes: dict[str, list[str]] = {}  # a note that several runs share stands once
    for run in runs if limit else ():
        if isinstance(run, Evaluation):
            found, note = of_evaluation(run, limit, show_gpqa)
        elif run.kind != "sft":
            found, note = of_training(run, limit, show_gpqa)
        else:
            continue
        groups += [{"run": visible(run.folder), **group} for group in found]
        notes.setdefault(note, []).append(str(run.folder))
    return groups, joined(notes)


def joined(notes: dict[str, list[str]]) -> list[str]:
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, the first and the last among them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def is_gpqa(*names: Any) -> bool:
    """Whether a set's name, layout, path or a question's id names GPQA."""
    return any("gpqa" in plain_name(str(name)) for name in names)


def text(value: Any, hide: bool) -> str:
    return questions.WITHHELD if hide else "" if value is None else cut(value)


# Rollouts of RL.


def of_training(run: Training, limit: int, show_gpqa: bool) -> tuple[list[Group], str]:
    files = sorted((run.folder / "rollouts").glob("step-*.jsonl"))
    if not files:
        return [], "no rollouts kept"
    steps = spread(files, max(1, limit // PER_STEP) if len(files) > 1 else 1)
    hide = not show_gpqa and is_gpqa(*section(run.config, "data").values(), *map(first_id, steps))
    out, total = [], 0
    for path in steps:
        rows = [row | {"prompt_id": str(row.get("prompt_id", ""))} for row in read_rows(path)]
        groups = [list(group) for _, group in groupby(rows, itemgetter("prompt_id"))]
        total += len(groups)
        step = path.stem.removeprefix("step-").lstrip("0") or "0"
        chosen = spread(groups, max(1, limit // len(steps)))
        out += [rollout_group(group, f"step {visible(step)}", hide) for group in chosen]
    note = f"{len(out)} of {total} groups of {len(steps)} of {len(files)} steps, evenly spaced"
    return out, note + ("; texts withheld" if hide else "")


def first_id(path: Path) -> Any:
    return next((row.get("prompt_id") for row in read_rows(path)), None)


def rollout_group(rows: Sequence[Row], where: str, hide: bool) -> Group:
    first = rows[0]
    reference = first.get("reference")
    return {
        "where": where,
        "id": visible(first["prompt_id"])[:200],
        "prompt": text(first.get("prompt"), hide),
        "reference": None if reference is None else text(reference, hide),
        "gold": None,
        "samples": [rollout(row, hide) for row in rows],
    }


def rollout(row: Row, hide: bool) -> Row:
    thought, suffix, why = row.get("thought"), row.get("suffix"), section(row, "verdict").get("why")
    texts = {"thought": text(thought, hide), "text": text(suffix, hide), "why": text(why, hide)}
    return texts | {"reward": number(row.get("reward"))} | about(row)


def about(row: Row) -> Row:
    return {
        "finish": visible(row.get("finish", ""))[:40],
        "tokens": number(row.get("tokens")),
        "thinking": number(row.get("thinking_tokens", row.get("num_think"))),
    }


# Generations of evaluations.


def of_evaluation(run: Evaluation, limit: int, show_gpqa: bool) -> tuple[list[Group], str]:
    out: list[Group] = []
    notes: dict[str, list[str]] = {}
    for name in run.sets:
        found, note = of_set(run, name, max(1, limit // len(run.sets)), show_gpqa)
        out += found
        notes.setdefault(note, []).append(name)
    return out, "; ".join(joined(notes))


def of_set(run: Evaluation, name: str, limit: int, show_gpqa: bool) -> tuple[list[Group], str]:
    rows = stored(run.folder / "generations", name)
    if not rows:
        return [], "no generations kept"
    groups = [list(each) for _, each in groupby(rows, itemgetter("id"))]
    layout, path = where_from(run, name)
    hide = not show_gpqa and is_gpqa(name, layout, path, rows[0]["id"])
    known, missing = ({}, "") if hide else asked(layout, path)
    graded = verdicts(run.folder / "graded" / f"{name}.jsonl")
    chosen = spread(groups, limit)
    out = [generation_group(each, visible(name), known.get(each[0]["id"]), graded, hide) for each in chosen]
    note = f"{len(chosen)} of {len(groups)} questions each, evenly spaced"
    return out, note + ("; texts withheld, as the authors of GPQA ask" if hide else missing)


def where_from(run: Evaluation, name: str) -> tuple[str, str]:
    """Layout and path of a set as the run's config.toml has them, ("", "") if it has not."""
    for entry in items(section(run.config, "data").get("sets")):
        head, _, path = str(entry).partition("=")
        if head.partition(":")[0] == name:
            return head.rpartition(":")[2], path
    return "", ""


def asked(layout: str, path: str) -> tuple[dict[str, questions.Question], str]:
    """Questions by id, and the end of the note where there are none."""
    if not layout:
        return {}, ", their text not shown: the run has no config.toml that names their file"
    try:
        return {q.id: q for q in questions.load(layout, path).questions}, ""
    except ValueError as error:
        return {}, f", their text not shown: {error}"


def verdicts(path: Path) -> dict[tuple[str, str], Row]:
    rows = read_rows(path) if path.exists() else []
    return {(str(row.get("question")), str(row.get("sample"))): row for row in rows}


def generation_group(
    rows: Sequence[Row], where: str, question: questions.Question | None, graded: dict[tuple[str, str], Row], hide: bool
) -> Group:
    return {
        "where": where,
        "id": visible(rows[0]["id"])[:200],
        "prompt": text(questions.posed(question).text if question else None, hide),
        "reference": None,
        "gold": cut(question.gold) if question and not hide else None,
        "samples": [generation(row, graded.get((row["id"], str(row["sample"])), {}), hide) for row in rows],
    }


def generation(row: Row, verdict: Row, hide: bool) -> Row:
    thought, closed, answer = str(row.get("text", "")).rpartition(CLOSE)
    if not closed and verdict.get("unclosed"):
        thought, answer = answer, ""
    found = verdict.get("answer")
    why = "no grade" if not verdict else "no answer found" if found is None else f"answer read: {found}"
    texts = {"thought": text(thought, hide), "text": text(answer, hide), "why": text(why, hide)}
    return texts | {"reward": number(verdict.get("score"))} | about(row)
