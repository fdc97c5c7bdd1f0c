"""Limits of what is given to algebra: answers that it might never come back from are refused."""

from __future__ import annotations

import re
from itertools import accumulate

LARGEST_DEPTH = 32  # braces and brackets in one another
LARGEST_EXPONENT = 20_000
LARGEST_FACTORIAL = 3_000
MOST_LOGS = 6  # math-verify, issue 63: logs in logs take all memory
UNBROKEN = re.compile(r"[-+]?(?:\\?\w+|.)?(?:\s*\^\s*\S*)?", re.DOTALL)


def refused(text: str) -> str | None:
    """Why a normal answer is not given to algebra, which might take for ever with it; None if it is."""
    if re.search(r"\d{1000}", text):
        return "huge number"
    if depth(text) > LARGEST_DEPTH:
        return "nested too deeply"
    if any(len(n) > 9 or int(n) > LARGEST_FACTORIAL for n in re.findall(r"(\d+)\s*!", text)):
        return "huge factorial"
    if re.search(r"(?:[)}!]|\^\s*\d+)\s*!", text):
        return "factorial of an expression"
    if len(re.findall(r"\\(?:log|ln|lg)(?![A-Za-z])|\b(?:log|ln)\b", text)) > MOST_LOGS:
        return "too many logarithms"
    return "exponent tower" if any(map(towers, exponents(text.replace("**", "^")))) else None


def depth(text: str) -> int:
    """Most brackets that are open at a time."""
    return max(accumulate(map(step, text)), default=0)


def step(c: str) -> int:
    """How a character changes the number of open brackets."""
    return (c in "({[") - (c in ")}]")


def exponents(text: str) -> list[str]:
    """What stands right of each ^: a group, or what is written without a break."""
    found = []
    for match in re.finditer(r"\^\s*", text):
        at = match.end()
        if text[at : at + 1] in ("{", "("):
            found.append(text[at + 1 : closing(text, at)])
        elif run := UNBROKEN.match(text, at):  # always: it may be empty
            found.append(run[0])
    return found


def closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` closes; the end of the text if it does not."""
    open_brackets = accumulate(map(step, text[at:]))
    return next((at + i for i, now in enumerate(open_brackets) if now == 0), len(text))


def towers(exponent: str) -> bool:
    """An exponent that makes a power too large to write down."""
    power = re.fullmatch(r"\s*(\d{1,3})\s*\^\s*\{?\s*(\d{1,2})\s*\}?\s*", exponent)
    if power:
        return bool(int(power[1]) ** int(power[2]) > LARGEST_EXPONENT)
    if any(len(n) > 9 or int(n) > LARGEST_EXPONENT for n in re.findall(r"\d+", exponent)):
        return True
    powers = exponent.count("^") - len(re.findall(r"\^\s*\\circ", exponent))
    names = re.sub(r"\\[a-zA-Z]+", "", exponent)
    return powers > 1 or (powers == 1 and not re.search(r"[a-zA-Z]", names))
