"""Questions for the miniature's judge with known answers: real continuations against candidates with other words or
another number."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkmid.data.prompts import split
from thinkmid.data.source import read_documents
from thinkmid.errors import UserError
from thinkmid.mini.sentences import BOXES, DAYS, HOURS, LETTERS, NAMES, THINGS, WORDINGS, read, say
from thinkmid.mini.world import LARGEST
from thinkmid.rollout.judge.rule import NUMBER, first_sentence, match
from thinkmid.tokenizer import Tokenizer

FILES = ("rl.jsonl", "sft-think.jsonl")
MAX_SUFFIX = 10  # tokens of a text, as configs/mini-rlmt.toml cuts them


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question whose answer is known."""

    kind: str  # how the candidate came about: its words, its number
    candidate: str
    reference: str
    label: int  # 1: they agree by rollout/judge/rule.py


# A candidate is drawn twice: its words, its number. One does not tell the other, so that words betray no answer.
WORDS = {"as it is": 4, "reworded": 4, "another": 3, "fact": 1, "truncated": 2, "garbled": 1, "foreign": 1}
NUMBERS = {"the same": 28, "off by one": 4, "one digit off": 4, "any": 13}
ALPHABETS = (string.ascii_lowercase, string.ascii_letters + string.punctuation, "äéñßжия解答はい")


def worded(rng: random.Random, how: str, reference: str, others: Sequence[str]) -> str:
    """A sentence of the kind `how`, one of WORDS."""
    if how == "reworded":  # the same result in another wording; what only that wording names is made up
        kind, words = stated(reference)
        return spoken(rng, kind.replace("answer", rng.choice(("answer", "result"))), words)
    if how == "another":
        return rng.choice(others)
    if how == "fact":  # any sentence of the world, most of which are no results
        return spoken(rng, rng.choice(list(WORDINGS)), {"n": rng.randint(1, LARGEST)})
    if how == "truncated":
        cut = worded(rng, rng.choice(("as it is", "reworded")), reference, others).split()
        return " " + " ".join(cut[: rng.randint(1, len(cut))])
    if how == "garbled":  # words in disorder, some left out, some repeated, or a number more
        garbled = rng.choices(reference.split(), k=rng.randint(1, 9))
        if rng.random() < 0.3:
            garbled.insert(rng.randrange(len(garbled)), str(rng.randint(1, LARGEST)))
        return " " + " ".join(garbled)
    if how == "foreign":  # words that the world does not have, a few or many
        letters = rng.choice(ALPHABETS)
        foreign = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 12))]
        return " " + " ".join(foreign)
    return reference


def spoken(rng: random.Random, kind: str, words: dict[str, Any]) -> str:
    drawn = {"who": NAMES, "other": NAMES, "thing": THINGS, "box": BOXES, "day": DAYS, "hour": HOURS}
    made_up = {field: rng.choice(names) for field, names in (drawn | {"x": LETTERS, "y": LETTERS}).items()}
    return " " + say(rng, kind, **made_up | words).removeprefix("Answer: ")


def stated(reference: str) -> tuple[str, dict[str, Any]]:
    """(kind, words) of the result that a reference begins with; ("", {}) if it states none."""
    sentence = first_sentence(reference)
    kind, words = read(f"Answer: {sentence}") or read(sentence) or ("", {})
    return (kind, words) if kind.endswith(("answer", "result")) else ("", {})


def number(rng: random.Random, how: str, n: int) -> int:
    if how == "off by one":
        return max(0, n + rng.choice((-1, 1)))
    if how == "one digit off":
        digits, drawn = str(n), rng.choice(string.digits)
        at = rng.randrange(len(digits))
        before, after = digits[:at], digits[at + 1 :]
        return int(rng.choice([before + drawn + after, before + drawn + digits[at:], before + after or drawn]))
    return rng.randint(1, LARGEST) if how == "any" else n


def draw_pairs(references: Sequence[str], tokenizer: Tokenizer, n: int, seed: int | str) -> list[Pair]:
    """n pairs with references from these, about half of them labelled 1. The same for a seed."""
    rng = random.Random(f"pairs {seed}")
    drawn = rng.choices(references, k=n)
    kinds, candidates = [], []
    for reference in drawn:
        words = rng.choices(list(WORDS), list(WORDS.values()))[0]
        how = rng.choices(list(NUMBERS), list(NUMBERS.values()))[0]
        wanted = number(rng, how, stated(reference)[1]["n"])
        kinds.append(f"{words}, {how}")
        candidates.append(NUMBER.sub(str(wanted), worded(rng, words, reference, references), count=1))
    cut = [tokenizer.decode(tokens[:MAX_SUFFIX]) for tokens in tokenizer.encode_many(candidates)]
    return [
        Pair(kind=kind, candidate=c, reference=r, label=int(match(c, r).reward))
        for kind, r, c in zip(kinds, drawn, cut, strict=True)
    ]


def read_references(data: Path, tokenizer: Tokenizer) -> list[str]:
    """What follows the thoughts of the documents, cut to MAX_SUFFIX tokens, each once. UserError if there is none."""
    rests: dict[str, None] = {}
    for doc in read_documents([data / name for name in FILES]):
        pieces = split(doc)
        for k, (is_thought, _) in enumerate(pieces):
            if is_thought:
                rests["".join(piece for thought, piece in pieces[k:] if not thought)] = None
    cut = dict.fromkeys(tokenizer.decode(tokens[:MAX_SUFFIX]) for tokens in tokenizer.encode_many(rests))
    found = [reference for reference in cut if stated(reference)[0]]
    if len(found) < 2:
        raise UserError(f"{data}: no thought with a result of the miniature world after it")
    return found
