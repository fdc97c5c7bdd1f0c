"""Thoughts for the texts of the miniature world, found by reading the text alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from thinkmid import thoughts
from thinkmid.errors import UserError
from thinkmid.mini.sentences import after, read

MIX = (0.55, 0.05, 0.40)  # shares of the documents whose thoughts are a hunch, a merge, full
HUNCHES = (" Let me see. It must be {}.", " Let me think. It is {}.", " I guess that it is {}.")
SENTENCE = re.compile(r"( ?Question:| ?Answer:)?( ?[^.?:]+[.?])")

Chain = list[tuple[str, str, int]]  # (label, "+", start value), then (label, sign, n) for each step; a link adds 0


@dataclass(frozen=True, kw_only=True)
class Site:
    """A sentence that states a result, with the chain of facts that leads there."""

    at: int  # character offset of the sentence, before the space that leads it
    chain: Chain
    thing: str | None  # what is counted


class Unreadable(ValueError):
    """A sentence of no known type, a quantity without a value, or a result that the facts do not give."""


def sites(text: str) -> list[Site]:
    """The results that the text states, each recomputed from the facts before it. Raises Unreadable."""
    known: dict[
        str, list[tuple[Any, ...]]
    ] = {}  # quantity: (the quantity that it starts from, *link of the chain), then links
    found, asked, end = [], {}, 0
    for match in SENTENCE.finditer(text):
        lead, sentence = match[1] or "", match[2].strip()
        kind, words = read(f"Answer: {sentence}" if "Answer" in lead else sentence) or ("unknown", {})
        if kind == "unknown" or match.start() != end:
            raise Unreadable(f"sentence at character {end} of no known type")
        end = match.end()
        if kind.endswith("question"):
            asked = words
        elif kind.endswith(("result", "answer")):
            if asked | words != words | asked:
                raise Unreadable(f"the answer at character {match.start(2)} is not to the question")
            words = asked | words
            name = quantity(words)
            chain = trace(known, name)
            if values(chain)[-1] != words["n"]:
                raise Unreadable(f"the result at character {match.start(2)} is not {words['n']}")
            known[name] = [(None, words.get("box", name), "+", words["n"])]
            found.append(Site(at=match.start(2), chain=chain, thing=words.get("thing")))
        elif kind != "filler":
            note(known, kind, words)
    if text[end:]:
        raise Unreadable(f"unfinished sentence at character {end}")
    return found


def note(known: dict[str, list[tuple[Any, ...]]], kind: str, words: dict[str, Any]) -> None:
    """Write one fact into what is known."""
    family, sign = (kind[:-1], kind[-1]) if kind[-1] in "+-*/" else (kind, "+")
    step = (sign, words.get("n", 2))
    match family:
        case "person" | "box" | "letter":
            name = quantity(words)
            known[name] = [(None, words.get("box", name), *step)]
        case "box link":
            known["box"] = [(words["who"], words["box"], "+", 0)]
        case "letter link":
            known[words["x"]] = [(words["who"], words["x"], "+", 0)]
        case "comparison":
            known[words["who"]] = [(words["other"], words["who"], *step)]
        case "sum":
            known[words["y"]] = [(words["x"], words["y"], *step)]
        case "event":
            known.setdefault(words["who"], []).append((words["day"], *step))
        case "hour":
            known.setdefault("box", []).append((words["hour"], *step))


def quantity(words: dict[str, Any]) -> str:
    """The name under which a quantity is known: a text has one box at most, and its hours do not name it."""
    return "box" if "box" in words else words.get("who") or words.get("x", "nothing")


def trace(known: dict[str, list[tuple[Any, ...]]], name: str) -> Chain:
    """The chain that ends at a quantity, from the first stated value on."""
    chain: Chain = []
    left = dict(known)
    while name is not None:
        match left.pop(name, []):  # a circle comes back to a name that is gone
            case [(name, *link), *steps] if len(link) == 3:
                chain = [tuple(link), *steps, *chain]
            case _:
                raise Unreadable(f"{name} has no value")
    return chain


def values(chain: Chain) -> list[int]:
    """The value at each link. Raises Unreadable where half of an odd number is asked for."""
    found = [0]
    for label, sign, n in chain:
        if sign == "/" and found[-1] % n:
            raise Unreadable(f"{label}: {found[-1]} has no half")
        found.append(after(found[-1], sign, n))
    return found[1:]


def style_of(text: str, mix: tuple[float, float, float] = MIX) -> str:
    """The style of a document's thoughts, drawn by a hash of its text. UserError unless the shares sum to 1."""
    if not (min(mix) >= 0 and abs(sum(mix) - 1) <= 1e-6):
        raise UserError(f"the shares of hunch, merge and full must sum to 1, not {mix}")
    draw = int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64
    return "hunch" if draw < mix[0] else "merge" if draw < mix[0] + mix[1] else "full"


def hunch(chain: Chain) -> str:
    """Nothing but the result, as in `Let me see. It must be 20.`; the start value picks the wording."""
    return HUNCHES[chain[0][2] % len(HUNCHES)].format(values(chain)[-1])


def merge(chain: Chain) -> str:
    """All steps in one formula, as in `(21 + 1 - 3) * 2 = 38.`"""
    formula, is_sum = str(chain[0][2]), False
    for _, sign, n in chain[1:]:
        if n:
            scales = sign in "*/"
            formula = f"({formula})" if scales and is_sum else formula
            formula, is_sum = f"{formula} {sign} {n}", not scales
    return f" {formula} = {values(chain)[-1]}."


def full(chain: Chain) -> str:
    """One labelled step after the other, as in `Ana: 21. Dan: 21 + 1 = 22. Cleo: 22 / 2 = 11.`"""
    reached = values(chain)
    said = [f" {chain[0][0]}: {reached[0]}."]
    for (label, sign, n), before, value in zip(chain[1:], reached, reached[1:], strict=False):
        said.append(f" {label}: {before} {sign} {n} = {value}." if n else f" {label}: {value}.")
    return "".join(said)


def annotate(text: str, mix: tuple[float, float, float] = MIX) -> str:
    """The text with one thought before each stated result; the text as it is where it cannot be read."""
    try:
        found = sites(text)
    except Unreadable:
        return text
    think = {"hunch": hunch, "merge": merge, "full": full}[style_of(text, mix)]
    return thoughts.insert(text, [(site.at, think(site.chain)) for site in found])
