"""Forward-only measurements: held-out loss, and whether thoughts are predictable enough for RLMT to start."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch

from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.data.prompts import split
from thinkmid.data.source import read_documents
from thinkmid.model.attention import attend_pack
from thinkmid.train.loss import logprobs

# what a worked-out thought consists of, and what must be predicted well before RL can sharpen it
PARTS = {
    "label": re.compile(r"\w+(?=:)"),
    "operand": re.compile(r"(?<=[+\-*/] )\d+"),
    "result": re.compile(r"(?<== )\d+"),
}
ENOUGH = 0.75  # of labels and operands; runs of the miniature that began below it gained little


@torch.no_grad()
def validation_loss(model, sequences, packed, ranks) -> dict[str, float]:
    """Nats per token over held-out (tokens, is thought) sequences: all, text, thought. Collective."""
    units = []
    for i, (tokens, thought) in enumerate(sequences):
        reply = replace(Reply.text(tokens[1:], 1.0), pg_w=thought[1:].astype(np.float32))
        units.append(Unit(name=str(i), prefix=tokens[:1], replies=[reply]))
    sums = {name: torch.zeros((), dtype=torch.float64) for name in ("all", "num", "thought", "num_thought")}
    for batch in packed(units):
        pack = make_pack(batch, ranks.device)
        nll = -logprobs(model, pack).double()
        sums["all"] += nll.sum().cpu()
        sums["num"] += len(nll)
        sums["thought"] += (nll * pack.pg_w).sum().cpu()  # here the stream marks the tokens of thoughts
        sums["num_thought"] += pack.pg_w.sum().cpu()
    s = ranks.sum(sums)
    out = {"val_loss": s["all"] / s["num"]}
    if s["num_thought"]:
        out["val_loss_thought"] = s["thought"] / s["num_thought"]
        out["val_loss_text"] = (s["all"] - s["thought"]) / (s["num"] - s["num_thought"])
    return out


def read_thoughts(paths, tokenizer, max_len) -> list[Unit]:
    """The first max_len tokens of each document, labels, operands and results of its thoughts marked."""
    return [unit for doc in read_documents(paths) if (unit := _marked(doc, tokenizer, max_len)) is not None]


@torch.no_grad()
def thought_accuracy(model, units: list[Unit], packed, ranks) -> dict[str, float]:
    """Share of labels, operands and results in the thoughts of read_thoughts that the model puts first, teacher-forced.

    A part that no thought has is left out.
    """
    sums = {f"{kind}_{part}": torch.zeros((), dtype=torch.float64) for kind in ("hits", "num") for part in PARTS}
    for batch in packed(units):
        pack = make_pack(batch, ranks.device)
        head = lambda hidden, weight: (hidden @ weight.T).argmax(-1) == pack.targets  # noqa: B023, E731
        hit = model(pack.tokens, pack.positions, attend_pack(pack), rows=pack.rows, head=head).cpu()
        for k, part in enumerate(PARTS, start=1):
            mine = pack.pg_w.cpu() == k
            sums[f"hits_{part}"] += hit[mine].sum()
            sums[f"num_{part}"] += mine.sum()
    s = ranks.sum(sums)
    return {part: s[f"hits_{part}"] / s[f"num_{part}"] for part in PARTS if s[f"num_{part}"]}


def advice(probed: dict[str, float]) -> str:
    line = "probe, teacher-forced accuracy in thoughts: " + ", ".join(f"{k} {v:.2f}" for k, v in probed.items())
    if not probed:
        return "probe: no thought in these documents has labels, operands or results"
    weak = [k for k in ("label", "operand") if probed.get(k, 1.0) < ENOUGH]
    if weak:
        return f"{line}. {' and '.join(weak)} below {ENOUGH}: RLMT would learn slowly from here; train longer first"
    return f"{line}. RLMT is worth starting"


def _marked(doc, tokenizer, max_len) -> Unit | None:
    """The document with the part of each token in the stream pg_w: 1, 2, 3 for PARTS, 0 elsewhere."""
    tokens, marks = [], []
    for is_thought, piece in split(doc):
        ids, _ = tokenizer.encode_woven([(is_thought, piece)])
        mark = np.zeros(len(ids), np.float32)
        if is_thought:
            ends = np.cumsum([len(tokenizer.pieces[i]) for i in ids])
            lead = len(tokenizer.decode(tokenizer.open_ids).encode())
            for k, pattern in enumerate(PARTS.values(), start=1):
                for m in pattern.finditer(piece):
                    # the token that holds the last character of the match
                    mark[np.searchsorted(ends, lead + len(piece[: m.end()].encode()))] = k
        tokens += ids
        marks.append(mark)
    if len(tokens) < 2:
        return None
    reply = replace(Reply.text(tokens[1:max_len], 1.0), pg_w=np.concatenate(marks)[1:max_len])
    return Unit(name=doc.id, prefix=np.array(tokens[:1]), replies=[reply])
