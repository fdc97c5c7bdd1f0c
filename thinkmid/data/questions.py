"""Sets of questions from local files: evaluation sets and questions for RL, checked against the public copies."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from thinkmid.data import layouts
from thinkmid.data.layouts import Fields, Kind
from thinkmid.data.source import ROWS, left_out
from thinkmid.errors import UserError, unknown
from thinkmid.thoughts import CLOSE, OPEN

NAME = re.compile(r"\w[\w.+ -]{0,59}")  # names of sets, which become names of files
LETTERS = "ABCDEFGHIJ"
WITHHELD = "(text withheld)"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question and its answer. posed() gives its text with the options."""

    id: str  # the same in every layout, order and run
    question: str  # without options
    gold: str  # for a choice, the letter of the right option as posed for sample 0
    kind: Kind
    meta: dict[str, Any] = field(default_factory=dict)  # JSON only; "where" is file and row, "options" in base order


@dataclass(frozen=True)
class Task:
    """How a set is read, and what is known of its public copies."""

    fields: Callable[[str, dict[str, Any]], Fields]
    known: dict[int, str] = field(default_factory=dict)  # number of questions -> how sha256 begins, "" if not known
    repeated: bool = False  # its file is known to hold questions many times


TASKS = {
    "gsm8k": Task(layouts.gsm8k, {1319: "924da90d7f8e3f0d"}),
    "gsm8k-train": Task(layouts.gsm8k, {7473: "1e6fb5b18f98ee26"}),
    "math500": Task(layouts.problem, {500: "2295afa3b299b1be"}),
    "amc23": Task(layouts.problem, {40: "06f4a0ca39c607bb"}),
    "olympiadbench": Task(layouts.olympiad, {675: "1a2c78906715450e", 674: ""}),
    "gpqa-diamond": Task(layouts.gpqa, {198: ""}),
    "dapo": Task(layouts.dapo, repeated=True),
    "questions": Task(layouts.own),  # a user's {"question", "answer"}
}


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """A set of questions as it was read."""

    questions: list[Question]
    sha256: str  # hash of questions and answers, independent of layout, order and white space
    notes: list[str]  # one line each: what is not as in the public copies, files of a folder that are not read


def load(name: str, path: str | Path, *, strict: bool = False) -> QuestionSet:
    """The questions of a file (or a folder of .jsonl or .parquet shards) in any public layout of the task.

    Repeated questions are dropped, contradicting ones too. UserError names file and row: a row that cannot be used,
    an id that two questions have, an unknown task, no question at all; with strict, whatever would be a note.
    """
    if name not in TASKS:
        raise UserError(unknown("task", name, TASKS))
    rows, notes = sift(name, Path(path))
    unread = left_out([path], ROWS)
    if not rows:
        raise UserError("; ".join([f"{path}: no question", *unread]))
    questions = [question for question, _ in rows]
    sha256 = sha(*sorted(line for _, line in rows))
    notes += compared(name, path, len(questions), sha256)
    if strict and notes:
        raise UserError(notes[0])
    return QuestionSet(questions=questions, sha256=sha256, notes=[*notes, *unread])


def sift(name: str, path: Path) -> tuple[list[tuple[Question, str]], list[str]]:
    """(question, its content in one line) of the rows, without what is repeated or contradicting; notes on these."""
    seen: dict[str, tuple[Question, str]] = {}
    contradicting: dict[str, str] = {}
    task, num_repeated = TASKS[name], 0
    for where, row in layouts.file_rows(path):
        fields = task.fields(where, row)
        question, line = as_question(name, where, fields), f"{digest(fields)} {squeeze(fields.gold)}"
        first, first_line = seen.setdefault(question.id, (question, line))
        if first_line.split()[0] != line.split()[0]:
            raise UserError(f"{where}: id '{question.id}' stands also at {first.meta['where']}")
        if first_line != line:
            contradicting.setdefault(question.id, f"{where}: another answer than at {first.meta['where']}; left out")
        elif first is not question:
            num_repeated += 1
    notes = list(contradicting.values())
    if num_repeated and not task.repeated:
        notes.append(f"{path}: {num_repeated} repeated rows left out")
    return [pair for id, pair in seen.items() if id not in contradicting], notes


def as_question(name: str, where: str, fields: Fields) -> Question:
    texts = (fields.question, fields.gold, *fields.wrong)
    if tag := next((tag for tag in (OPEN, CLOSE) if any(tag in text for text in texts)), None):
        raise UserError(f"{where}: the question or its answer contains {tag}")
    meta, gold = fields.meta | {"where": where}, fields.gold
    if fields.kind == "choice":
        if gold in fields.wrong:
            raise UserError(f"{where}: a wrong option is the right one")
        # by content, not by a generator's state or the file's order: the same in every run and after any filtering
        options = sorted((gold, *fields.wrong), key=lambda option: sha(squeeze(fields.question), squeeze(option)))
        meta, gold = meta | {"options": options}, LETTERS[options.index(gold)]
    key = digest(fields)[:12]
    id = fields.own_id if name == "questions" and fields.own_id else f"{name}-{key}"
    if fields.own_id and id != fields.own_id:
        meta["own_id"] = fields.own_id
    return Question(id=id, question=fields.question, gold=gold, kind=fields.kind, meta=meta)


class Posed(NamedTuple):
    """A question as it is put for one sample."""

    text: str  # a choice's options follow the question, "A. ..." one on each line
    gold: str


def posed(question: Question, sample: int = 0) -> Posed:
    """The question as put for the sample-th sample.

    A choice's options rotate: over n samples, n options, each letter is right equally often for every question, so that
    a taste for a letter neither helps nor harms.
    """
    if question.kind != "choice":
        return Posed(question.question, question.gold)
    options, turn = question.meta["options"], sample % len(question.meta["options"])
    turned = options[turn:] + options[:turn]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, turned, strict=False))
    gold = LETTERS[(LETTERS.index(question.gold) - turn) % len(options)]
    return Posed(f"{question.question}\n\n{listed}", gold)


def base_answer(question: Question, sample: int, answer: str) -> str:
    """An answer as if for sample 0: letters of a choice turned back, so that samples can be compared and may vote."""
    if question.kind != "choice" or len(answer) != 1 or answer not in LETTERS[: len(question.meta["options"])]:
        return answer
    n = len(question.meta["options"])
    return LETTERS[(LETTERS.index(answer) + sample % n) % n]


def compared(name: str, path: str | Path, count: int, sha256: str) -> list[str]:
    """Notes where these questions differ from the public copies."""
    known = TASKS[name].known
    if known and count not in known:
        return [f"{path}: {count} questions; {name} has {' or '.join(map(str, known))}"]
    if known and not sha256.startswith(known[count]):
        return [f"{path}: content sha256 {sha256[:16]} is not that of the public {name}, {known[count]}"]
    return []


def digest(fields: Fields) -> str:
    """Hash of question and options; the right option counts as one among the others."""
    options = sorted(map(squeeze, (fields.gold, *fields.wrong))) if fields.kind == "choice" else []
    return sha(squeeze(fields.question), *options)


def sha(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", errors="surrogatepass")).hexdigest()


def squeeze(text: str) -> str:
    return " ".join(text.split())
