"""What a rank holds when neighbours share one vLLM engine: its part of the work, slices of tensors."""

from __future__ import annotations

from torch import Tensor

from thinkmid.model.transformer import ModelConfig
from thinkmid.model.weights import EMBEDDING, HEAD
from thinkmid.run.ranks import Ranks

PADDING = 64  # vLLM fills a vocabulary up to a multiple of this, then splits it evenly


def places(num: int, ranks: Ranks, tp: int) -> list[int]:
    """Which of num items this rank's engine takes: engines in turn, the tp ranks that share one the same items."""
    return list(range(ranks.rank // tp, num, ranks.world // tp))


def leads(ranks: Ranks, tp: int) -> bool:
    """True on the first of the tp ranks that share an engine: it alone contributes what all of them hold."""
    return ranks.rank % tp == 0


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
