"""Thoughts inside a text: pure strings, nothing of the text is ever changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from operator import itemgetter

from thinkmid.errors import UserError

OPEN = "<think>"
CLOSE = "</think>"
TAG = re.compile(f"({OPEN}|{CLOSE})")


def insert(text: str, thoughts: list[tuple[int, str]]) -> str:
    """The text with each thought, tags around it, before the character at its offset (0..len(text)).

    Thoughts at one offset keep their order. UserError if the text or a thought holds a tag, or an offset lies outside.
    """
    if found := TAG.search(text):
        raise UserError(f"the text itself contains {found[0]} at character {found.start()}")
    pieces, end = [], 0
    for at, thought in sorted(thoughts, key=itemgetter(0)):
        if not 0 <= at <= len(text):
            raise UserError(f"a thought at character {at} lies outside a text of {len(text)}")
        if found := TAG.search(thought):
            raise UserError(f"the thought at character {at} contains {found[0]}")
        pieces += [text[end:at], OPEN, thought, CLOSE]
        end = at
    return "".join([*pieces, text[end:]])


def split(woven: str) -> list[tuple[bool, str]]:
    """(is_thought, piece) in order, tags and empty text left out. UserError on a nested, unclosed or stray tag."""
    parts = TAG.split(woven)  # text, tag, thought, tag, text, ...
    for i, tag in enumerate(parts[1::2]):
        if tag != (OPEN, CLOSE)[i % 2]:
            where = len("".join(parts[: 2 * i + 1]))
            fault = f"{OPEN} inside a thought" if i % 2 else f"{CLOSE} without {OPEN}"
            raise UserError(f"{fault} at character {where}")
    if len(parts) % 4 == 3:
        raise UserError(f"{OPEN} is never closed at character {len(''.join(parts[:-2]))}")
    pieces = [(i % 2 == 1, piece) for i, piece in enumerate(parts[::2])]
    return [(is_thought, piece) for is_thought, piece in pieces if is_thought or piece]


def before_stop(text: str, stops: Sequence[str], *, is_open: bool = False) -> str:
    """The text up to the first stop text outside its thoughts, the first to be complete; all of it without one.

    is_open: it begins inside a thought.
    """
    start = 0
    while stops:
        if is_open:
            if (close := text.find(CLOSE, start)) < 0:
                break
            start = close + len(CLOSE)
        tag = text.find(OPEN, start)
        # what ends with the tag itself is complete too late
        limit = len(text) if tag < 0 else tag + len(OPEN) - 1
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start, limit)) >= 0]
        if found or tag < 0:
            return text[: min(found)[1]] if found else text
        start, is_open = tag + len(OPEN), True
    return text


def strip(woven: str) -> str:
    """The text without its thoughts: strip(insert(text, thoughts)) == text. Errors as in split."""
    return "".join(piece for is_thought, piece in split(woven) if not is_thought)
