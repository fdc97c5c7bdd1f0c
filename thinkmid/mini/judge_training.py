"""Train the miniature's judge on pairs with known answers, and measure it on others."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.errors import UserError
from thinkmid.mini.pairs import NUMBERS, WORDS, Pair
from thinkmid.model.attention import attend_pack
from thinkmid.model.transformer import Transformer
from thinkmid.rollout.judge.rule import NUMBER, first_sentence
from thinkmid.rollout.judge.templates import ANSWERS, render
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.train.config import OptimConfig
from thinkmid.train.loss import text_loss
from thinkmid.train.optim import adamw
from thinkmid.train.step import train_step

TEMPLATE = "short"
NUM_ASKED = 32  # pairs of one forward without gradient
OPTIM = OptimConfig(lr=3e-3, warmup=20, schedule="cosine", floor=0.05)
# The answer alone leads to no comparison as long as neither number reaches the question mark. So both numbers are asked
# for there too, at first, with this weight each.
HINT = 1.0
HINTED = 0.35  # share of the steps over which that weight falls to 0


class Encoder:
    """Pairs as token ids: questions with nonces drawn from a seed, and what is to be predicted after them."""

    def __init__(self, tokenizer: Tokenizer, seed: int | str):
        self._tokenizer, self._rng = tokenizer, random.Random(f"nonces {seed}")
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.yes, self.no = (tokenizer.encode(answer)[0] for answer in ANSWERS)
        if self.yes == self.no:
            raise UserError(f"the tokenizer begins {ANSWERS[0]!r} and {ANSWERS[1]!r} with the same token")

    def unit(self, pair: Pair, weight: float, hint: float = 0.0) -> Unit:
        """The answer with this weight; the numbers of both texts in the answer's place, `hint` times it."""
        nonce = f"{self._rng.getrandbits(32):08x}"
        question = self._tokenizer.encode(render(TEMPLATE, pair.candidate, pair.reference, nonce))
        replies = [Reply.text([self.yes if pair.label else self.no], weight)]
        for text in (pair.reference, pair.candidate) if hint else ():
            if found := NUMBER.search(first_sentence(text)):
                replies.append(Reply.text(self._tokenizer.encode(f" {found[0]}")[:1], hint * weight))
        return Unit(name=pair.kind, prefix=np.array([*self._begin, *question]), replies=replies)


def train(model: Transformer, encoder: Encoder, pairs: Sequence[Pair], steps: int) -> None:
    """One step for each of `steps` equal parts of the pairs. Prints progress."""
    optimizer, began = adamw(model, OPTIM), time.perf_counter()
    alone = Ranks(0, 1, next(model.parameters()).device, None)  # type: ignore[arg-type]  # one process uses no mesh
    batch = len(pairs) // steps
    for step in range(steps):
        hint = HINT * max(0.0, 1 - step / (HINTED * steps))
        units = [encoder.unit(pair, 1 / batch, hint) for pair in pairs[step * batch : (step + 1) * batch]]
        lr = OPTIM.lr_at(step, steps)
        stats = train_step(model, optimizer, [units], partial(text_loss, model), alone, lr=lr, clip=OPTIM.clip)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}/{steps}  loss {stats.sums['loss']:.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def answers(model: Transformer, encoder: Encoder, pairs: Sequence[Pair]) -> list[float]:
    """P(yes) against P(no) for each pair."""
    out: list[float] = []
    for start in range(0, len(pairs), NUM_ASKED):
        pack = make_pack([encoder.unit(pair, 1.0) for pair in pairs[start : start + NUM_ASKED]])
        logits = model(pack.tokens, pack.positions, attend_pack(pack), rows=pack.rows)
        out += torch.sigmoid(logits[:, encoder.yes] - logits[:, encoder.no]).tolist()
    return out


def accuracy(pairs: Sequence[Pair], p_yes: Sequence[float]) -> dict[str, tuple[float, int]]:
    """(share of right answers, number of pairs) by class, by words and by number."""
    right = defaultdict(list)
    for pair, p in zip(pairs, p_yes, strict=True):
        for group in ("yes" if pair.label else "no", *pair.kind.split(", ")):
            right[group].append((p > 0.5) == pair.label)
    names = ["yes", "no", *WORDS, *NUMBERS]
    return {name: (sum(right[name]) / len(right[name]), len(right[name])) for name in names if right[name]}
