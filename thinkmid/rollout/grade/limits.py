"""Answers that algebra might never come back from."""

from __future__ import annotations

import re

DEEPEST = 32  # braces and brackets in one another
LARGEST_EXPONENT = 20_000
LARGEST_FACTORIAL = 3_000
MOST_LOGS = 6  # math-verify, issue 63: logs in logs take all memory


def refused(text: str) -> str | None:
    """Why a normal answer is not given to algebra, which might take for ever with it; None if it is."""
    if re.search(r"\d{1000}", text):
        return "huge number"
    if depth(text) > DEEPEST:
        return "nested too deeply"
    if any(len(n) > 9 or int(n) > LARGEST_FACTORIAL for n in re.findall(r"(\d+)\s*!", text)):
        return "huge factorial"
    if re.search(r"(?:[)}!]|\^\s*\d+)\s*!", text):
        return "factorial of an expression"
    if len(re.findall(r"\\(?:log|ln|lg)(?![A-Za-z])|\b(?:log|ln)\b", text)) > MOST_LOGS:
        return "too many logarithms"
    return "exponent tower" if any(map(towers, exponents(text.replace("**", "^")))) else None


def depth(text: str) -> int:
    deepest = now = 0
    for c in text:
        now += (c in "({[") - (c in ")}]")
        deepest = max(deepest, now)
    return deepest


def exponents(text: str) -> list[str]:
    """What stands right of each ^: a group, or what is written without a break."""
    found = []
    for match in re.finditer(r"\^\s*", text):
        at = match.end()
        if text[at : at + 1] in ("{", "("):
            found.append(text[at + 1 : closing(text, at)])
        else:
            found.append(re.match(r"[-+]?(?:\\?\w+|.)?(?:\s*\^\s*\S*)?", text[at:], re.DOTALL)[0])
    return found


def closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` closes; the end of the text if it does not."""
    now = 0
    for i in range(at, len(text)):
        now += (text[i] in "({[") - (text[i] in ")}]")
        if now == 0:
            return i
    return len(text)


def towers(exponent: str) -> bool:
    """An exponent that makes a power too large to write down."""
    power = re.fullmatch(r"\s*(\d{1,3})\s*\^\s*\{?\s*(\d{1,2})\s*\}?\s*", exponent)
    if power:
        return int(power[1]) ** int(power[2]) > LARGEST_EXPONENT
    if any(len(n) > 9 or int(n) > LARGEST_EXPONENT for n in re.findall(r"\d+", exponent)):
        return True
    powers = exponent.count("^") - len(re.findall(r"\^\s*\\circ", exponent))
    names = re.sub(r"\\[a-zA-Z]+", "", exponent)
    return powers > 1 or (powers == 1 and not re.search(r"[a-zA-Z]", names))
