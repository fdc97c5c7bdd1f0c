"""Forward-only measurements: held-out loss, and whether thoughts are predictable enough for RLMT to start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.data.prompts import split
from thinkmid.data.sequences import with_loss
from thinkmid.data.source import read_documents
from thinkmid.model.attention import attend_pack
from thinkmid.model.transformer import Transformer
from thinkmid.tokenizer import Tokenizer
from thinkmid.train.loss import logprobs
from thinkmid.train.packing import Packing

ENOUGH = 0.75  # accuracy of required parts; RLMT runs that began below it gained little


@torch.no_grad()
def validation_loss(
    model: Transformer, sequences: Sequence[tuple[np.ndarray, np.ndarray]], packing: Packing
) -> dict[str, float]:
    """Nats per token over held-out (tokens, is thought) sequences: all, text, thought. Collective."""
    units = [_unit(str(i), tokens, is_thought) for i, (tokens, is_thought) in enumerate(sequences)]
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("all", "num", "thought", "num_thought")}
    for batch in packing.mine(units):
        pack = make_pack(batch, packing.ranks.device)
        nll = -logprobs(model, pack).double()
        is_thought = pack.ce_w - 1
        sums["all"] += nll.sum().cpu()
        sums["num"] += len(nll)
        sums["thought"] += (nll * is_thought).sum().cpu()
        sums["num_thought"] += is_thought.sum().cpu()
    s = packing.ranks.sum(sums)
    out = {"val_loss": s["all"] / s["num"]}
    if s["num_thought"]:
        out["val_loss_thought"] = s["thought"] / s["num_thought"]
        out["val_loss_text"] = (s["all"] - s["thought"]) / (s["num"] - s["num_thought"])
    return out


def read_thoughts(
    paths: Sequence[str], tokenizer: Tokenizer, max_len: int, parts: dict[str, re.Pattern[str]], column: str = "text"
) -> list[Unit]:
    """The first max_len tokens of each document of two or more; those of its thoughts that parts match are marked with
    the part's place, counted from 1."""
    units, lead = [], len(tokenizer.decode(tokenizer.open_ids).encode())
    for doc in read_documents(paths, column):
        tokens, marks = [], [np.zeros(0, np.float32)]
        for is_thought, piece in split(doc):
            [[ids]] = tokenizer.encode_pieces([[(is_thought, piece)]])
            mark = np.zeros(len(ids), np.float32)
            if is_thought:
                ends = np.cumsum([len(tokenizer.pieces[i]) for i in ids])
                for k, pattern in enumerate(parts.values(), start=1):
                    for m in pattern.finditer(piece):
                        # the token that holds the last character of the match
                        mark[np.searchsorted(ends, lead + len(piece[: m.end()].encode()))] = k
            tokens += ids
            marks.append(mark)
        if len(tokens) > 1:
            units.append(_unit(doc.id, np.array(tokens[:max_len]), np.concatenate(marks)[:max_len]))
    return units


@torch.no_grad()
def thought_accuracy(
    model: Transformer, units: list[Unit], packing: Packing, parts: dict[str, re.Pattern[str]]
) -> dict[str, float]:
    """Share of the marked tokens of read_thoughts that the model puts first, by part, teacher-forced. Collective.

    A part that no thought has is left out.
    """
    sums = {f"{kind}_{part}": torch.zeros((), dtype=torch.float64) for kind in ("hits", "num") for part in parts}
    for batch in packing.mine(units):
        pack = make_pack(batch, packing.ranks.device)
        head = partial(_is_first, targets=pack.targets)
        hit = model(pack.tokens, pack.positions, attend_pack(pack), rows=pack.rows, head=head).cpu()
        marks = pack.ce_w.cpu() - 1
        for k, part in enumerate(parts, start=1):
            sums[f"hits_{part}"] += hit[marks == k].sum()
            sums[f"num_{part}"] += (marks == k).sum()
    s = packing.ranks.sum(sums)
    return {part: s[f"hits_{part}"] / s[f"num_{part}"] for part in parts if s[f"num_{part}"]}


def advice(accuracy: dict[str, float]) -> str:
    """One line: is RLMT worth starting? A part whose name ends in "?" is not required."""
    shares = ", ".join(f"{name.removesuffix('?')} {share:.2f}" for name, share in accuracy.items())
    line = f"probe, teacher-forced accuracy in thoughts: {shares}"
    if not accuracy:
        return "probe: no thought in these documents matches data.probe_parts"
    weak = [name for name, share in accuracy.items() if share < ENOUGH and not name.endswith("?")]
    if weak:
        return f"{line}. {' and '.join(weak)} below {ENOUGH}: RLMT would learn slowly from here; train longer first"
    return f"{line}. RLMT is worth starting"


def _unit(name: str, tokens: np.ndarray, marks: np.ndarray) -> Unit:
    """The text, each token's mark in its weight: 1 and the mark; 0 for those without loss."""
    ids, has_loss = with_loss(tokens)
    return Unit(name=name, prefix=ids[:1], replies=[Reply.text(ids[1:], (1 + marks[1:]) * has_loss[1:])])


def _is_first(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).argmax(-1) == targets
