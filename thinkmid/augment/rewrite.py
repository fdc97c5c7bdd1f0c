"""Rewrite-and-verify: the model returns the text with thoughts in it; where they stand is taken, its text never is."""

from itertools import pairwise

from thinkmid import thoughts
from thinkmid.augment.check import Refused, answer, normalise

SPACELESS = "\u2e80"  # from here on, scripts that put no spaces between words


def show(chunk: str) -> str:
    return chunk.strip()


def read(chunk: str, reply: str) -> str:
    """The chunk with the reply's thoughts, each right after the same visible character as in the reply.

    Models lose and add white space around tags, so that is not compared; it comes from the chunk like all the rest.
    The chunk must hold no action tags. Refused by reason: any other difference is "altered text".
    """
    pieces = thoughts.split(normalise(answer(reply)))
    if visible("".join(piece for is_thought, piece in pieces if not is_thought)) != visible(chunk):
        raise Refused("altered text")
    ends = [0, *(i + 1 for i, letter in enumerate(chunk) if not letter.isspace())]
    placed, passed = [], 0
    for is_thought, piece in pieces:
        if is_thought:
            placed.append((ends[passed], piece.strip()))
        else:
            passed += len(visible(piece))
    if any(a == b for (a, _), (b, _) in pairwise(placed)):
        raise Refused("two thoughts at one place")
    if any(inside_word(chunk, at) for at, _ in placed):
        raise Refused("inside a word")
    return thoughts.insert(chunk, placed)


def visible(text: str) -> str:
    return "".join(text.split())


def inside_word(text: str, at: int) -> bool:
    around = text[at - 1 : at + 1] if at else ""
    return len(around) == 2 and around.isalnum() and around[1] < SPACELESS
