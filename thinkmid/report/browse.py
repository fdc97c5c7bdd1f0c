"""Samples for people to read: a spread of a run's groups, small enough to stand in the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from thinkmid.data import questions
from thinkmid.eval.generations import stored
from thinkmid.files import read_rows
from thinkmid.report.runs import Evaluation, Run, Training, number, section
from thinkmid.report.tables import as_list, plain_name
from thinkmid.report.text import cut, visible
from thinkmid.thoughts import CLOSE

PER_STEP = 4  # groups of a step, where a run has more than are shown
HIDDEN = questions.WITHHELD


def gather(runs: Sequence[Run], limit: int, show_gpqa: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups of at most `limit` per run, ready for JSON, and lines about the runs: what part of each is here, or why
    nothing is. Texts of GPQA are withheld unless `show_gpqa`."""
    groups: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}  # what is said of several runs is said once
    for run in runs if limit else ():
        reader = evaluation if isinstance(run, Evaluation) else rollouts if run.kind != "sft" else None
        if reader:
            found, note = reader(run, limit, show_gpqa)
            groups += [{"run": visible(run.folder), **group} for group in found]
            notes.setdefault(note, []).append(str(run.folder))
    return groups, [f"{', '.join(folders)}: {note}" for note, folders in notes.items()]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, the first and the last among them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


# Rollouts of RL.


def rollouts(run: Training, limit: int, show_gpqa: bool) -> tuple[list[dict], str]:
    files = sorted((run.folder / "rollouts").glob("step-*.jsonl"))
    if not files:
        return [], "no rollouts kept"
    steps = spread(files, max(1, limit // PER_STEP) if len(files) > 1 else 1)
    each = max(1, limit // len(steps))
    hide = not show_gpqa and is_gpqa(*section(run.config, "data").values(), *map(first_id, steps))
    out, whole = [], 0
    for path in steps:
        groups = [list(rows) for _, rows in groupby(read_rows(path), key=lambda row: str(row.get("prompt_id")))]
        whole += len(groups)
        step = path.stem.removeprefix("step-").lstrip("0") or "0"
        out += [rollout_group(rows, f"step {visible(step)}", hide) for rows in spread(groups, each)]
    note = f"{len(out)} of {whole} groups of {len(steps)} of {len(files)} steps, evenly spaced"
    return out, note + ("; texts withheld" if hide else "")


def first_id(path: Path) -> Any:
    return next((row.get("prompt_id") for row in read_rows(path)), None)


def rollout_group(rows: Sequence[dict], where: str, hide: bool) -> dict[str, Any]:
    words: Callable[[Any], str] = (lambda text: HIDDEN) if hide else shown
    first = rows[0]
    reference = first.get("reference")
    return {
        "where": where,
        "id": visible(first.get("prompt_id", ""))[:200],
        "prompt": words(first.get("prompt")),
        "reference": None if reference is None else words(reference),
        "gold": None,
        "samples": [rollout(row, words) for row in rows],
    }


def rollout(row: dict, words: Callable[[Any], str]) -> dict[str, Any]:
    why = words(section(row, "verdict").get("why"))
    return sample(row, words(row.get("thought")), words(row.get("suffix")), row.get("reward"), why)


def sample(row: dict, thought: str, text: str, reward: Any, why: str) -> dict[str, Any]:
    return {
        "thought": thought,
        "text": text,
        "reward": number(reward),
        "why": why,
        "finish": visible(row.get("finish", ""))[:40],
        "tokens": number(row.get("tokens")),
        "thinking": number(row.get("thinking_tokens", row.get("num_think"))),
    }


def shown(text: Any) -> str:
    return "" if text is None else cut(text)


def is_gpqa(*names: Any) -> bool:
    """Whether a set's name, layout, path or a question's id says that it is GPQA."""
    return any("gpqa" in plain_name(str(name)) for name in names)


# Generations of evaluations.


def evaluation(run: Evaluation, limit: int, show_gpqa: bool) -> tuple[list[dict], str]:
    out: list[dict] = []
    notes: dict[str, list[str]] = {}
    for name in run.sets:
        rows = stored(run.folder / "generations", name)
        found, note = of_set(run, name, rows, max(1, limit // len(run.sets)), show_gpqa)
        out += found
        notes.setdefault(note, []).append(name)
    return out, "; ".join(f"{', '.join(names)}: {note}" for note, names in notes.items())


def of_set(run: Evaluation, name: str, rows: list[dict], limit: int, show_gpqa: bool) -> tuple[list[dict], str]:
    if not rows:
        return [], "no generations kept"
    groups = [list(each) for _, each in groupby(rows, key=lambda row: row["id"])]
    layout, path = where_from(run, name)
    hide = not show_gpqa and is_gpqa(name, layout, path, rows[0]["id"])
    questions, note = ({}, "") if hide else asked(layout, path)
    graded = verdicts(run.folder / "graded" / f"{name}.jsonl")
    chosen = spread(groups, limit)
    out = [generation_group(each, visible(name), questions.get(each[0]["id"]), graded, hide) for each in chosen]
    words = f"{len(chosen)} of {len(groups)} questions each, evenly spaced"
    return out, words + ("; texts withheld, as the authors of GPQA ask" if hide else note)


def where_from(run: Evaluation, name: str) -> tuple[str, str]:
    """Layout and path of a set as the run's config.toml has them, ("", "") if it has not."""
    for entry in as_list(section(run.config, "data").get("sets")):
        head, _, path = str(entry).partition("=")
        if head.partition(":")[0] == name:
            return head.rpartition(":")[2], path
    return "", ""


def asked(layout: str, path: str) -> tuple[dict[str, questions.Question], str]:
    """Questions by id, and what to say if there are none."""
    if not layout:
        return {}, ", their text not shown: the run has no config.toml that names their file"
    try:
        return {q.id: q for q in questions.load(layout, path).questions}, ""
    except ValueError as error:
        return {}, f", their text not shown: {error}"


def verdicts(path: Path) -> dict[tuple[str, str], dict]:
    rows: Iterator[dict] = iter(read_rows(path) if path.exists() else [])
    return {(str(row.get("question")), str(row.get("sample"))): row for row in rows}


def generation_group(
    rows: Sequence[dict], where: str, question: questions.Question | None, graded: dict, hide: bool
) -> dict[str, Any]:
    out = {"where": where, "id": visible(rows[0]["id"])[:200], "reference": None}
    out["prompt"] = HIDDEN if hide else cut(questions.posed(question).text) if question else ""
    out["gold"] = cut(question.gold) if question and not hide else None
    out["samples"] = [generation(row, graded.get((row["id"], str(row["sample"])), {}), hide) for row in rows]
    return out


def generation(row: dict, verdict: dict, hide: bool) -> dict[str, Any]:
    thought, closed, answer = str(row.get("text", "")).rpartition(CLOSE)
    if not closed and verdict.get("unclosed"):
        thought, answer = answer, ""
    found = verdict.get("answer")
    why = "no grade" if not verdict else "no answer found" if found is None else f"answer read: {found}"
    texts = (HIDDEN, HIDDEN, HIDDEN) if hide else (cut(thought), cut(answer), cut(why))
    return sample(row, texts[0], texts[1], verdict.get("score"), texts[2])
