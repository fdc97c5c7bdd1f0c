"""Insert-only: the model names places and thoughts. It never writes the text, so it cannot change it."""

import re

from thinkmid import sentences, thoughts
from thinkmid.augment.check import Refused, answer, normalise

ENTRY = re.compile(r"^@(\d{1,9})[ \t:]*(.*)$")


def places(chunk: str) -> list[int]:
    """Character offsets before which a thought may stand: 0, then every end of a sentence or line inside the text."""
    last = len(chunk.rstrip())
    first = len(chunk) - len(chunk.lstrip())
    return [0, *(end for end in sentences.ends(chunk) if first < end < last)]


def show(chunk: str) -> str:
    """The chunk with its places numbered from 1."""
    at = places(chunk)
    return "".join(f"⟦{k}⟧{chunk[a:b]}" for k, (a, b) in enumerate(zip(at, [*at[1:], len(chunk)], strict=True), 1))


def read(chunk: str, reply: str) -> str:
    """The chunk with the reply's thoughts. Refused by reason."""
    at, found, seen = places(chunk), [], set()
    for number, thought in entries(answer(reply)):
        if not 1 <= number <= len(at):
            raise Refused("no such place")
        if number in seen:
            raise Refused("two thoughts at one place")
        seen.add(number)
        found.append((at[number - 1], bare(thought)))
    return thoughts.insert(chunk, found)


def entries(body: str) -> list[tuple[int, str]]:
    """(number, thought) of an answer; a thought may take several lines."""
    found: list[tuple[int, list[str]]] = []
    for line in body.split("\n"):
        if entry := ENTRY.match(line.strip()):
            found.append((int(entry[1]), [entry[2]]))
        elif found:
            found[-1][1].append(line)
        elif line.strip():
            raise Refused("text before the first place")
    return [(number, "\n".join(lines).strip()) for number, lines in found]


def bare(thought: str) -> str:
    """A thought without the pair of tags that the model may have put around it."""
    match thoughts.split(normalise(thought)):
        case [(True, inner)]:
            return inner.strip()
        case [(False, inner)]:
            return inner
        case []:
            raise Refused("empty thought")
    raise Refused("tags inside a thought")
