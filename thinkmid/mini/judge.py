"""PROGRAM: train a judge for the miniature world, `python -m thinkmid.mini.judge --out runs/mini-judge/export`.

It takes the base model of the miniature and learns to answer the template "short" as rollout/judge/rule.py does, in its
next token. What it is shown: real continuations against candidates with other words or another number.
"""

from __future__ import annotations

import argparse
import os
import random
import string
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.mini.sentences import BOXES, DAYS, HOURS, LETTERS, NAMES, THINGS, WORDINGS, read, say
from thinkmid.mini.world import LARGEST
from thinkmid.rollout.judge.rule import NUMBER, first_sentence, match
from thinkmid.rollout.judge.templates import ANSWERS, render
from thinkmid.tokenizer import Tokenizer
from thinkmid.train.config import OptimConfig

PROGRAM = "thinkmid.mini.judge"
TEMPLATE = "short"
FILES = ("rl.jsonl", "sft-think.jsonl")
MAX_SUFFIX = 10  # tokens of a text, as configs/mini-rlmt.toml cuts them
HELD_OUT = 0.1  # share of the references that are not trained on
NUM_HELD_OUT = 2000  # pairs
BATCH = 32  # pairs of one step, of 50 to 90 tokens each
OPTIM = OptimConfig(lr=3e-3, warmup=20, schedule="cosine", floor=0.05)
# The answer alone leads to no comparison as long as neither number reaches the question mark. So both numbers are asked
# for there too, at first, with this weight each.
HINT = 1.0
HINTED = 0.35  # share of the steps over which that weight falls to 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question whose answer is known."""

    kind: str  # how the candidate came about: its words, its number
    candidate: str
    reference: str
    label: int  # 1: the judge by rule says that both agree


def as_it_is(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    return reference


def reworded(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    """The same result in another wording; what only that wording names is made up."""
    kind, words = stated(reference)
    return spoken(rng, kind.replace("answer", rng.choice(("answer", "result"))), words)


def another(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    return rng.choice(others)


def fact(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    """Any sentence of the world, most of which are no results."""
    return spoken(rng, rng.choice(list(WORDINGS)), {"n": rng.randint(1, LARGEST)})


def truncated(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    words = rng.choice((as_it_is, reworded))(rng, reference, others).split()
    return " " + " ".join(words[: rng.randint(1, len(words))])


def garbled(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    """Words in disorder, some left out, some said again, or a number more."""
    words = rng.choices(reference.split(), k=rng.randint(1, 9))
    if rng.random() < 0.3:
        words.insert(rng.randrange(len(words)), str(rng.randint(1, LARGEST)))
    return " " + " ".join(words)


def foreign(rng: random.Random, reference: str, others: Sequence[str]) -> str:
    """Words that the world does not have, a few or many."""
    letters = rng.choice((string.ascii_lowercase, string.ascii_letters + string.punctuation, "äéñßжия解答はい"))
    words = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 12))]
    return " " + " ".join(words)


# A candidate is drawn twice: its words, its number. One does not tell the other, so that words betray no answer.
WORDS = {as_it_is: 4, reworded: 4, another: 3, fact: 1, truncated: 2, garbled: 1, foreign: 1}
NUMBERS = {"the same": 28, "off by one": 4, "one digit off": 4, "any": 13}


def spoken(rng: random.Random, kind: str, words: dict) -> str:
    drawn = {"who": NAMES, "other": NAMES, "thing": THINGS, "box": BOXES, "day": DAYS, "hour": HOURS}
    made_up = {field: rng.choice(names) for field, names in (drawn | {"x": LETTERS, "y": LETTERS}).items()}
    return " " + say(rng, kind, **made_up | words).removeprefix("Answer: ")


def stated(reference: str) -> tuple[str, dict]:
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


def pairs(references: Sequence[str], tokenizer: Tokenizer, n: int, seed: int | str) -> list[Pair]:
    """n pairs with references from these, about half of them labelled 1. The same for a seed."""
    rng = random.Random(f"pairs {seed}")
    drawn = []
    for reference in rng.choices(references, k=n):
        words = rng.choices(list(WORDS), list(WORDS.values()))[0]
        how = rng.choices(list(NUMBERS), list(NUMBERS.values()))[0]
        wanted = number(rng, how, stated(reference)[1]["n"])
        candidate = NUMBER.sub(str(wanted), words(rng, reference, references), count=1)
        drawn.append((f"{words.__name__.replace('_', ' ')}, {how}", candidate, reference))
    cut = [
        tokenizer.decode(tokens[:MAX_SUFFIX])
        for tokens in tokenizer.encode_many(candidate for _, candidate, _ in drawn)
    ]
    return [
        Pair(kind=kind, candidate=c, reference=r, label=int(match(c, r).reward))
        for (kind, _, r), c in zip(drawn, cut, strict=True)
    ]


def read_references(data: Path, tokenizer: Tokenizer) -> list[str]:
    """What follows the thoughts of the documents, cut to MAX_SUFFIX tokens, each once. UserError if there is none."""
    from thinkmid.data.prompts import split
    from thinkmid.data.source import read_documents

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


class Asker:
    """Pairs as token ids: questions with nonces drawn from a seed, and what is to be predicted after them."""

    def __init__(self, tokenizer: Tokenizer, seed: int | str):
        self._text, self._rng = tokenizer, random.Random(f"nonces {seed}")
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.yes, self.no = (tokenizer.encode(answer)[0] for answer in ANSWERS)
        if self.yes == self.no:
            raise UserError(f"the tokenizer begins {ANSWERS[0]!r} and {ANSWERS[1]!r} with the same token")

    def question(self, pair: Pair) -> list[int]:
        nonce = f"{self._rng.getrandbits(32):08x}"
        return [*self._begin, *self._text.encode(render(TEMPLATE, pair.candidate, pair.reference, nonce))]

    def unit(self, pair: Pair, weight: float, hint: float = 0.0):
        """The answer with this weight; the numbers of both texts in the answer's place, `hint` times it."""
        from thinkmid.data.pack import Reply, Unit

        replies = [Reply.text([self.yes if pair.label else self.no], weight)]
        for said in (pair.reference, pair.candidate) if hint else ():
            if found := NUMBER.search(first_sentence(said)):
                replies.append(Reply.text(self._text.encode(f" {found[0]}")[:1], hint * weight))
        return Unit(name=pair.kind, prefix=np.array(self.question(pair)), replies=replies)


def train(model, asker: Asker, shown: Sequence[Pair], steps: int) -> list[float]:
    """One step for each of `steps` equal parts of what is shown; the losses. Prints progress."""
    from thinkmid.run.ranks import Ranks
    from thinkmid.train.loss import text_loss
    from thinkmid.train.optim import adamw
    from thinkmid.train.step import train_step

    optimizer, began, losses = adamw(model, OPTIM), time.perf_counter(), []
    alone = Ranks(0, 1, next(model.parameters()).device, None)
    batch = len(shown) // steps
    for step in range(steps):
        hint = HINT * max(0.0, 1 - step / (HINTED * steps))
        units = [asker.unit(pair, 1 / batch, hint) for pair in shown[step * batch : (step + 1) * batch]]
        lr = OPTIM.lr_at(step, steps)
        stats = train_step(model, optimizer, [units], lambda p: text_loss(model, p), alone, lr=lr, clip=OPTIM.clip)
        losses.append(stats.sums["loss"])
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {losses[-1]:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    return losses


def answers(model, asker: Asker, asked: Sequence[Pair]) -> list[float]:
    """P(yes) against P(no) for each pair."""
    import torch

    from thinkmid.data.pack import make_pack
    from thinkmid.model.attention import attend_pack

    out = []
    with torch.no_grad():
        for start in range(0, len(asked), BATCH):
            pack = make_pack([asker.unit(pair, 1.0) for pair in asked[start : start + BATCH]])
            logits = model(pack.tokens, pack.positions, attend_pack(pack), rows=pack.rows)
            out += torch.sigmoid(logits[:, asker.yes] - logits[:, asker.no]).tolist()
    return out


def accuracy(asked: Sequence[Pair], p_yes: Sequence[float]) -> dict[str, tuple[float, int]]:
    """(share of right answers, number of pairs) by class, by words and by number."""
    right = defaultdict(list)
    for pair, p in zip(asked, p_yes, strict=True):
        for group in ("yes" if pair.label else "no", *pair.kind.split(", ")):
            right[group].append((p > 0.5) == pair.label)
    names = ["yes", "no", *(words.__name__.replace("_", " ") for words in WORDS), *NUMBERS]
    return {name: (sum(right[name]) / len(right[name]), len(right[name])) for name in names if right[name]}


def count(text: str) -> int:
    if (n := int(text)) < 1:
        raise ValueError
    return n


def main(argv: list[str]) -> None:
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", formatter_class=show_defaults)
    parser.add_argument("--base", type=Path, default=Path("runs/mini-base/export"), help="model to start from")
    parser.add_argument("--data", type=Path, default=Path("runs/mini-data"), help="folder of the miniature world")
    parser.add_argument("--out", type=Path, default=Path("runs/mini-judge/export"), help="folder to write")
    parser.add_argument("--steps", type=count, default=900, help=f"of {BATCH} pairs each")
    parser.add_argument("--seed", type=int, default=0, help="everything is drawn from it")
    args = parser.parse_args(argv)

    import torch

    from thinkmid.model import weights

    if os.path.realpath(args.out) == os.path.realpath(args.base):
        raise UserError(f"--out {args.out} is the model to start from")
    weights.replaceable(args.out).parent.mkdir(parents=True, exist_ok=True)  # now, not after training
    tokenizer = Tokenizer.load(args.base)
    references = read_references(args.data, tokenizer)
    random.Random(f"held out {args.seed}").shuffle(references)
    num_held_out = max(1, int(HELD_OUT * len(references)))
    shown = pairs(references[num_held_out:], tokenizer, args.steps * BATCH, args.seed)
    held_out = pairs(references[:num_held_out], tokenizer, NUM_HELD_OUT, f"held out {args.seed}")
    share = sum(pair.label for pair in shown) / len(shown)
    print(f"{len(references)} references, {num_held_out} held out; {len(shown)} pairs, {share:.0%} of them yes")
    asker = Asker(tokenizer, args.seed)
    torch.manual_seed(args.seed)
    model = weights.load_model(args.base).train()
    train(model, asker, shown, args.steps)
    for name, (right, n) in accuracy(held_out, answers(model, asker, held_out)).items():
        print(f"held out  {name:15s} {right:6.1%} of {n}")
    named = weights.stream(model)
    weights.save(args.out, model.cfg, named, dtype=torch.float32, extra_files=args.base)
    print(f"{args.out} holds the judge")


if __name__ == "__main__":
    config.run(main)
