"""Which slice of a whole tensor a rank holds when several ranks share one vLLM engine."""

from __future__ import annotations

from torch import Tensor

from thinkmid.model.transformer import ModelConfig
from thinkmid.model.weights import EMBEDDING, HEAD

PADDING = 64  # vLLM fills a vocabulary up to a multiple of this, then splits it evenly


def vocab_rows(vocab: int, rank: int, tp: int) -> range:
    """The tokens whose rows of embedding and head lie on a rank; none where there is only padding."""
    rows = -(-vocab // PADDING) * PADDING // tp
    return range(min(rank * rows, vocab), min((rank + 1) * rows, vocab))


def part(cfg: ModelConfig, name: str, whole: Tensor, rank: int, tp: int) -> Tensor:
    """The view of a whole tensor that rank of tp holds, without padding; all of it for tp 1.

    name: Hugging Face's. Norms and the bias of o_proj, which rank 0 alone adds, are whole on every rank.
    """
    if name in (HEAD, EMBEDDING):
        rows = vocab_rows(cfg.vocab, rank, tp)
        return whole[rows.start : rows.stop]
    module, kind = name.split(".")[-2:]
    if module in ("q_proj", "gate_proj", "up_proj"):
        return whole.chunk(tp)[rank]
    if module in ("k_proj", "v_proj"):
        # fewer heads than ranks: neighbours hold the same one
        parts = min(tp, cfg.kv_heads)
        return whole.chunk(parts)[rank * parts // tp]
    if module in ("o_proj", "down_proj") and kind == "weight":
        return whole.chunk(tp, dim=1)[rank]
    return whole
