"""The sentences of the miniature world: one table of wordings, used to write a sentence as well as to read it."""

from __future__ import annotations

import operator
import random
import re
import tomllib
from pathlib import Path
from typing import Any

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo")
THINGS = ("coin", "book", "card", "pen", "shell", "stamp", "stone", "apple")  # written with an s unless there is 1
BOXES = ("box", "bag", "jar")
LETTERS = ("p", "q", "r", "s", "t", "u", "v", "w")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# sentences by kind
WORDINGS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("wordings.toml").read_text(encoding="utf-8"))


def after(value: int, sign: str, n: int) -> int:
    """The value after a step, as in 3 * 2; halves are rounded down. KeyError: another sign than + - * /."""
    result: int = OPERATORS[sign](value, n)
    return result


def say(rng: random.Random, kind: str, *, thing: str = "", n: int = 0, **words: str) -> str:
    """A sentence of that kind in one of its wordings; words that the wording does not use are ignored."""
    return rng.choice(WORDINGS[kind]).format(thing=thing if n == 1 else thing + "s", n=n, **words)


def read(sentence: str) -> tuple[str, dict[str, Any]] | None:
    """(kind, words) of a sentence, n as an int and the thing in the singular; None if no wording fits."""
    for kind, pattern in PATTERNS:
        if found := pattern.fullmatch(sentence):
            words: dict[str, Any] = found.groupdict()
            return kind, words | {"n": int(words["n"])} if "n" in words else words
    return None


def _pattern(wording: str) -> re.Pattern[str]:
    choices = {"who": NAMES, "other": NAMES, "box": BOXES, "day": DAYS, "hour": HOURS, "x": LETTERS, "y": LETTERS}
    options = {field: "|".join(words) for field, words in choices.items()} | {"n": "[0-9]{1,3}"}
    wording = wording.replace(".", r"\.").replace("?", r"\?").replace("{thing}", f"(?P<thing>{'|'.join(THINGS)})s?")
    return re.compile(re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{options[field[1]]})", wording))


PATTERNS = [(kind, _pattern(wording)) for kind, wordings in WORDINGS.items() for wording in wordings]
