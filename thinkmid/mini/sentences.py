"""The sentence types of the miniature world: one table, used to write a sentence as well as to read it."""

from __future__ import annotations

import operator
import random
import re
from typing import Any

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo")
THINGS = ("coin", "book", "card", "pen", "shell", "stamp", "stone", "apple")  # written with an s unless there is 1
BOXES = ("box", "bag", "jar")
LETTERS = ("p", "q", "r", "s", "t", "u", "v", "w")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

# Every step either carries a key of its own (weekday, hour) before its number, or names what it starts from first:
# a small model finds the next step by reading forwards, and learns nothing from texts where it must count or look back.
# A kind that ends in + or - adds or takes away n, one that ends in * or / doubles or halves.
WORDINGS = {
    "person": ("{who} has {n} {thing}.", "{who} owns {n} {thing}.", "{who} starts with {n} {thing}."),
    "box": ("The {box} holds {n} {thing}.", "A {box} holds {n} {thing}.", "The {box} contains {n} {thing}."),
    "letter": ("Let {x} be {n}.", "We know that {x} is {n}.", "Suppose {x} is {n}."),
    "box link": ("The {box} holds as many {thing} as {who}.", "A {box} contains as many {thing} as {who} has."),
    "letter link": ("Let {x} be the number of {thing} {who} has.", "Let {x} count the {thing} {who} has."),
    "event+": (
        "On {day} {who} finds {n} more.", "On {day} {who} buys {n} more {thing}.",
        "On {day} {who} gets {n} from {other}.",
    ),
    "event-": (
        "On {day} {who} gives {n} to {other}.", "On {day} {who} loses {n} {thing}.", "On {day} {who} sells {n}.",
    ),
    "event*": (
        "On {day} {who} doubles them.", "On {day} {who} doubles the {thing}.", "On {day} {who} gets as many again.",
    ),
    "event/": (
        "On {day} {who} gives half to {other}.", "On {day} {who} loses half.",
        "On {day} {who} sells half of the {thing}.",
    ),
    "comparison+": (
        "Compared with {other}, {who} has {n} more {thing}.", "Compared with {other}, {who} owns {n} more.",
        "Next to {other}, {who} has {n} more.",
    ),
    "comparison-": (
        "Compared with {other}, {who} has {n} fewer {thing}.", "Compared with {other}, {who} owns {n} fewer.",
        "Next to {other}, {who} has {n} fewer.",
    ),
    "comparison*": (
        "Compared with {other}, {who} has twice as many {thing}.", "Compared with {other}, {who} owns twice as many.",
        "Next to {other}, {who} has twice as many.",
    ),
    "comparison/": (
        "Compared with {other}, {who} has half as many {thing}.", "Compared with {other}, {who} owns half as many.",
        "Next to {other}, {who} has half as many.",
    ),
    "hour+": (
        "At {hour} {who} puts in {n}.", "At {hour} {who} adds {n} {thing}.", "At {hour} {who} drops in {n} more.",
    ),
    "hour-": (
        "At {hour} {who} takes out {n}.", "At {hour} {who} removes {n} {thing}.", "At {hour} {who} picks out {n}.",
    ),
    "hour*": (
        "At {hour} {who} doubles it.", "At {hour} {who} doubles the {thing}.", "At {hour} {who} puts in as many again.",
    ),
    "hour/": (
        "At {hour} {who} takes out half.", "At {hour} {who} removes half of the {thing}.",
        "At {hour} {who} picks out half.",
    ),
    "sum+": ("Here {x} plus {n} makes {y}.", "Take {x} plus {n} to get {y}.", "We see that {x} plus {n} is {y}."),
    "sum-": ("Here {x} minus {n} makes {y}.", "Take {x} minus {n} to get {y}.", "We see that {x} minus {n} is {y}."),
    "sum*": ("Here {x} doubled makes {y}.", "Take {x} doubled to get {y}.", "We see that {x} doubled is {y}."),
    "sum/": ("Here {x} halved makes {y}.", "Take {x} halved to get {y}.", "We see that {x} halved is {y}."),
    "person result": (
        "So {who} has {n} {thing}.", "Now {who} has {n} {thing}.", "That means {who} has {n} {thing}.",
        "In the end {who} has {n} {thing}.",
    ),
    "box result": (
        "So the {box} holds {n} {thing}.", "Now the {box} contains {n} {thing}.",
        "In the end the {box} holds {n} {thing}.",
    ),
    "letter result": ("So {x} is {n}.", "That means {x} is {n}.", "In the end {x} must be {n}."),
    "person question": (
        "How many {thing} does {who} have?", "How many {thing} does {who} have now?",
        "How many {thing} does {who} own in the end?",
    ),
    "box question": (
        "How many {thing} does the {box} hold?", "How many {thing} are in the {box} now?",
        "How many {thing} are in the {box} in the end?",
    ),
    "letter question": ("What is {x}?", "What number is {x}?", "How much is {x}?"),
    "person answer": ("Answer: {who} has {n} {thing}.", "Answer: It is {n}."),
    "box answer": ("Answer: The {box} holds {n} {thing}.", "Answer: It is {n}."),
    "letter answer": ("Answer: It is {n}.", "Answer: {x} is {n}."),
    "filler": (
        "It rains all day.", "The sun is warm.", "A cat sleeps near the door.", "Birds sing in the tall trees.",
        "The wind is cold.", "A dog runs along the river.", "The street is quiet.", "Snow falls on the roof.",
        "The old clock is slow.", "Lunch is late today.", "Soft music plays in the hall.", "The moon is bright.",
    ),
}  # fmt: skip


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
