"""Rows of question files in their public layouts -> question, gold answer and its kind."""

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from thinkmid.data.source import ROWS, data_files, json_kind, lines, read_rows
from thinkmid.errors import UserError

Kind = Literal["number", "expr", "tuple", "set", "interval", "choice"]

NUMBER = re.compile(r"(?=.*\d)[-+−]?(\\?\$)?(\d+|\d{1,3}(,(\\!\s?)?\d{3})+)?(\.\d+)?")
OLYMPIAD_KINDS: dict[str, Kind] = {
    "Numerical": "number", "Expression": "expr", "Equation": "expr", "Tuple": "tuple", "Interval": "interval",
}  # fmt: skip
# DAPO-Math ships every question inside this instruction; ours comes from a template
DAPO_HEAD = re.compile(r"\s*Solve the following math problem step by step\..*?is the answer to the problem\.\s+", re.S)
DAPO_TAIL = re.compile(r'\s*Remember to put your answer on its own line after "Answer:"\.?\s*$')
GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


class Fields(NamedTuple):
    """One row, whatever its layout."""

    question: str
    gold: str  # for a choice, the text of the right option
    kind: Kind
    meta: dict[str, Any] = {}  # noqa: RUF012 - never written to
    wrong: tuple[str, ...] = ()  # the other options of a choice
    own_id: str | None = None


def file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a .jsonl (also .gz, .zst), .parquet, .json or .csv file, or of a folder of .jsonl or .parquet.

    where is "file:line", or "file:row" in parquet and json. UserError names file and row.
    """
    if os.path.isfile(path) and path.suffix.lower() == ".csv":
        yield from csv_rows(path)
    elif os.path.isfile(path) and path.suffix.lower() == ".json":
        yield from json_list(path)
    else:
        yield from read_rows(data_files(path, ROWS))


def csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells may hold line breaks; where names the line on which a row begins."""
    header: list[str] = []
    start = 1
    reader = csv.reader(text_lines(file), strict=True)
    try:
        for cells in reader:
            where, start = f"{file}:{start}", reader.line_num + 1
            if not header:
                header = cells
            elif cells and len(cells) != len(header):
                raise UserError(f"{where}: a row of {len(cells)} cells under a header of {len(header)}")
            elif cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{start}: not CSV ({error})") from error


def text_lines(file: Path) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: not UTF-8 ({error})") from error


def json_list(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(b"".join(lines(file)).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); one object in each line is .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"{file}: must be a list of rows, not {json_kind(rows)}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: a row must be an object, not {json_kind(row)}")
        yield f"{file}:{number}", row


def gsm8k(where: str, row: dict[str, Any]) -> Fields:
    """question; answer: a rationale that ends with "#### 1,234"."""
    _, mark, gold = text(where, row, "answer").rpartition("####")
    gold = gold.strip().replace(",", "")
    if not mark or not gold:
        raise UserError(f'{where}: "answer" does not end with "#### " and a number')
    return Fields(text(where, row, "question"), gold, kind_of(gold))


def problem(where: str, row: dict[str, Any]) -> Fields:
    """MATH-500, AMC23: problem or question; answer in LaTeX or as a float, 27.0 is 27; unique_id or id if there."""
    gold, meta = answer(where, row, "answer"), kept(row, "subject", "level", "url")
    return Fields(text(where, row, "problem", "question"), gold, kind_of(gold), meta, own_id=own_id(where, row))


def olympiad(where: str, row: dict[str, Any]) -> Fields:
    """question or problem, final_answer or answer: a list, its members joined by commas; context comes first."""
    name = "final_answer" if row.get("final_answer") is not None else "answer"
    value = row.get(name)
    golds = value if isinstance(value, list) and value else [value]
    gold = ",".join(answer(where, row | {name: member}, name) for member in golds)
    question = text(where, row, "question", "problem")
    if isinstance(row.get("context"), str) and row["context"].strip():
        question = f"{row['context'].strip()}\n{question}"
    kind = OLYMPIAD_KINDS.get(str(row.get("answer_type"))) or kind_of(gold)
    if len(golds) > 1 or row.get("is_multiple_answer"):
        kind = "set"
    meta = kept(row, "subfield", "unit", "answer_type") | ({"tolerance": row["error"]} if row.get("error") else {})
    return Fields(question, gold, kind, meta, own_id=own_id(where, row))


def gpqa(where: str, row: dict[str, Any]) -> Fields:
    """Columns by name: Question, Correct Answer, Incorrect Answer 1 to 3."""
    right, *wrong = (answer(where, row, name) for name in GPQA_OPTIONS)
    meta = {"domain": row["High-level domain"]} if isinstance(row.get("High-level domain"), str) else {}
    own = row.get("Record ID")
    return Fields(text(where, row, "Question"), right, "choice", meta, tuple(wrong), own if own else None)


def dapo(where: str, row: dict[str, Any]) -> Fields:
    """prompt: a text, or messages of which one is the user's; the gold in reward_model.ground_truth, solution, label.

    The instruction that DAPO-Math puts around every question is taken off.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        asked = [message for message in prompt if isinstance(message, dict) and message.get("role") == "user"]
        if len(asked) != 1:
            raise UserError(f'{where}: "prompt" must hold one message of the user, not {len(asked)}')
        row = row | {"prompt": asked[0].get("content")}
    question = text(where, row, "prompt", "problem", "question")
    question = DAPO_TAIL.sub("", question[head.end() :] if (head := DAPO_HEAD.match(question)) else question).strip()
    if not question:
        raise UserError(f'{where}: "prompt" holds nothing but its instruction')
    nested = row.get("reward_model")
    truth = nested.get("ground_truth") if isinstance(nested, dict) else None
    gold = answer(where, row | {"ground_truth": truth}, "ground_truth", "solution", "label", "answer")
    return Fields(question, gold, kind_of(gold))


def own(where: str, row: dict[str, Any]) -> Fields:
    """A user's rows: question, answer (a string or a number), and id if there; other plain fields are kept."""
    gold = answer(where, row, "answer")
    rest = [name for name, value in row.items() if isinstance(value, str | int | float)]
    meta = kept(row, *(name for name in rest if name not in ("question", "answer", "id")))
    return Fields(text(where, row, "question"), gold, kind_of(gold), meta, own_id=own_id(where, row))


def text(where: str, row: dict[str, Any], *names: str) -> str:
    """The first of these fields that is there, stripped. UserError: none is, blank, or not a string."""
    name = first(where, row, names)
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f'{where}: "{name}" must be a string, not {json_kind(value)}')
    if not value.strip():
        raise UserError(f'{where}: "{name}" is blank')
    return value.strip()


def answer(where: str, row: dict[str, Any], *names: str) -> str:
    """As text, and numbers too: 27.0 is "27"."""
    name = first(where, row, names)
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(where, row, name)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise UserError(f'{where}: "{name}" is {value}')
    return str(int(value)) if value == int(value) else repr(value)


def first(where: str, row: dict[str, Any], names: Sequence[str]) -> str:
    """The first of these names that the row has a value for. UserError: none."""
    for name in names:
        if row.get(name) is not None:
            return name
    wanted = " or ".join(f'"{name}"' for name in names)
    raise UserError(f"{where}: no {wanted} in this row; it has {', '.join(map(str, row)) or 'nothing'}")


def own_id(where: str, row: dict[str, Any]) -> str | None:
    for name in ("unique_id", "id"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise UserError(f'{where}: "{name}" must be a string or an integer, not {json_kind(value)}')
        if value is not None and value != "":
            return str(value)
    return None


def kept(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names if row.get(name) is not None}


def kind_of(gold: str) -> Kind:
    """A guess by form alone, where the file says nothing: "1,234" is a number, "1,2" a set, "(1,2)" a tuple."""
    bare = gold.strip().strip("$").replace("\\left", "").replace("\\right", "").replace(" ", "")
    if bare and NUMBER.fullmatch(bare):
        return "number"
    depths = list(accumulate((letter in "([{") - (letter in ")]}") for letter in bare))
    if any(letter == "," and not depth for letter, depth in zip(bare, depths, strict=True)):
        return "set"
    if bare[:1] in ("(", "[") and "," in bare and 0 not in depths[:-1]:
        return "interval" if bare[0] == "[" or bare.endswith("]") or "\\infty" in bare else "tuple"
    return "expr"
