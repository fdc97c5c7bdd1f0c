"""Reference continuation of each prompt as tokens, placed after a thought or directly after the prefix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from thinkmid.data.pack import Reply, Unit
from thinkmid.thoughts import CLOSE
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Group, Prompt, Sample


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The true suffix of one prompt.

    Where no text stands before the opened tag, nothing predicts the first token without a thought: it moves to
    `before`, and neither way is measured on it.
    """

    name: str  # the prompt's id
    before: np.ndarray  # (p,) int64, at least one: the prompt as raw text, its opened tag stripped
    tag: np.ndarray  # the opened tag's tokens
    lead: np.ndarray  # (0,) or (1,): tokens of the suffix that lie in `before`
    targets: np.ndarray  # (n,) int64, the tokens that are predicted

    def unit(self, replies: list[Reply]) -> Unit:
        """Replies as an engine draws them, after the opened tag."""
        head = [self.tag] if len(self.lead) else [self.before, self.tag]
        return Unit(name=self.name, prefix=np.concatenate(head), replies=replies)

    def beside(self, unit: Unit | None, text: Reply) -> list[Unit]:
        """The unit with the true suffix as a further reply, one that does not see the tag; raw text is stored once.

        unit: this prompt's with replies after the tag, or None. text: the targets, with their weight.
        """
        if not len(self.targets):
            return [unit] if unit else []
        alone = Unit(name=self.name, prefix=self.before, replies=[text])
        if unit is None:
            return [alone]
        if len(self.lead):
            return [unit, alone]
        return [replace(alone, replies=[*(_after(self.tag, r) for r in unit.replies), text])]


def references(prompts: list[Prompt], tokenizer: Tokenizer, max_suffix: int) -> list[Reference]:
    """The reference of each RLMT prompt, cut to max_suffix tokens of its own encoding, as the judge's are."""
    suffixes = tokenizer.encode_many(p.meta["reference"] for p in prompts)
    return [
        _reference(p, np.array(ids[:max_suffix], np.int64), tokenizer) for p, ids in zip(prompts, suffixes, strict=True)
    ]


def _reference(prompt: Prompt, suffix: np.ndarray, tokenizer: Tokenizer) -> Reference:
    tokens, tag = np.array(prompt.tokens, np.int64), np.array(tokenizer.open_ids, np.int64)
    before = tokens[: len(tokens) - len(tag)]
    assert np.array_equal(tokens[len(before) :], tag), f"{prompt.id} does not end with the opened tag"
    lead = suffix[: not len(before)]
    return Reference(
        name=prompt.id, before=before if len(before) else lead, tag=tag, lead=lead, targets=suffix[len(lead) :]
    )


def next_token_units(
    units: list[Unit], groups: list[Group], tokenizer: Tokenizer, max_suffix: int, weight: float
) -> list[Unit]:
    """An update's units with the true suffix of every group, dead ones included, as raw text.

    Its loss is weight times the mean over all suffix tokens of the update. Raw text and not an empty thought: it keeps
    what the model could do before, whereas an empty thought would teach it not to think.
    """
    suffixes = references([g.prompt for g in groups], tokenizer, max_suffix)
    num = max(1, sum(len(t.targets) for t in suffixes))
    waiting: dict[str, list[Unit]] = {}
    for unit in units:
        waiting.setdefault(unit.name, []).append(unit)
    # a prompt that was drawn twice has two units, either of which will do
    mine = [waiting[t.name].pop() if waiting.get(t.name) else None for t in suffixes]
    pairs = zip(suffixes, mine, strict=True)
    return [part for t, unit in pairs for part in t.beside(unit, Reply.text(t.targets, weight / num))]


def begins_true(sample: Sample, reference: list[int], tokenizer: Tokenizer, num_tokens: int) -> bool:
    """Do continuation and reference agree byte by byte up to a place where a token ends in both, at least num_tokens
    tokens into the reference, or at its end if it is shorter? Not without exactly one closing tag (RPT, 2506.08007)."""
    pieces = [tokenizer.pieces[i] if i < len(tokenizer.pieces) else b"" for i in sample.tokens]
    written, tag = b"".join(pieces), CLOSE.encode()
    if written.count(tag) != 1:
        return False
    start = written.find(tag) + len(tag)
    ours, true = {end - start for end in _ends(pieces)}, [tokenizer.pieces[i] for i in reference]
    ends, want = _ends(true), b"".join(true)
    ends = ends[num_tokens - 1 :] or ends[-1:]
    return any(end in ours and written[start : start + end] == want[:end] for end in ends)


def _ends(pieces: list[bytes]) -> list[int]:
    return list(accumulate(map(len, pieces)))


def _after(tag: np.ndarray, reply: Reply) -> Reply:
    """The reply with the tag in front, which carries no loss."""
    zeros = np.zeros(len(tag), np.float32)
    return replace(
        reply,
        tokens=np.concatenate([tag, reply.tokens]),
        ce_w=np.concatenate([zeros, reply.ce_w]),
        pg_w=np.concatenate([zeros, reply.pg_w]),
        adv=np.concatenate([zeros, reply.adv]),
        logp_old=np.concatenate([zeros, reply.logp_old]),
    )
