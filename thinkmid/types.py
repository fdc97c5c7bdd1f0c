"""Prompt, Request, Sample, Group, Pack: the only things that travel between folders, beside a Tally for the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# of a sample: one value per token, (n,)
STREAMS = {"tokens": np.int32, "logp": np.float32, "drawn": np.bool_, "versions": np.int32}
# metrics of one rank's part of a step: numbers add up over ranks, pairs (sum, count) become means
Tally = dict[str, float | tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the policy is given: token ids, and what only the reward may look at."""

    id: str  # stable over runs: seeds are derived from it
    tokens: list[int]  # ends with the opened think tag in RLMT
    meta: dict[str, Any] = field(default_factory=dict)  # JSON only; opaque to engines


@dataclass(frozen=True, kw_only=True)
class Written:
    """Tokens that the policy wrote after a prompt, and what is known of each: a sample, or the beginning of one."""

    tokens: NDArray[np.int32]  # (n,) generated tokens only
    logp: NDArray[np.float32]  # (n,) log-prob of each token at the sampling temperature, unfiltered
    drawn: NDArray[np.bool_]  # (n,) False where the token was forced
    versions: NDArray[np.int32]  # (n,) of the weights that drew each


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an engine is given: one sample to draw."""

    prompt: Prompt  # siblings are requests of one Prompt object: an engine reads it once
    seed: int  # 64 bits; a draw depends on this and the token's number alone
    key: tuple[int, ...] = ()  # the caller's own, opaque to engines: prompt and sibling of a group
    written: Written | None = None  # the sample's first tokens: continued, not drawn again


@dataclass(frozen=True, kw_only=True)
class Sample(Written):
    """All that the policy wrote after a prompt."""

    # "eos", "stop" (a stop text outside thoughts, complete in the last token), "suffix" (N tokens after the tag, or the
    # budget without a thought), "unclosed" (thought budget spent) or "reclosed" (second tag)
    finish: str
    num_think: int  # tokens before the predicted suffix, closing tag included; all of them if it never came


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt and its G siblings."""

    prompt: Prompt
    samples: list[Sample]
    rewards: list[float] = field(default_factory=list)  # filled by a reward function, same order; NaN: no verdict
    whys: list[str] = field(default_factory=list)  # the reason of each reward, for people


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What one forward takes: several segments in one row, no batch axis, shared prefixes stored once.

    Segment s holds the query rows cu_q[s]:cu_q[s+1] and attends to the key rows kv_rows[cu_k[s]:cu_k[s+1]],
    bottom-right aligned and causal: its last query sees its last key. Without kv_rows, keys are the queries' own rows.
    Numbers that decide what is launched are counted on the host, so that no forward or backward waits for the device.
    """

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, a response continues its prefix's positions
    cu_q: torch.Tensor  # (S+1,) int32
    cu_k: torch.Tensor  # (S+1,) int32
    max_q: int  # queries of the longest segment
    max_k: int  # keys of the longest segment
    kv_rows: torch.Tensor | None = None  # (Tk,) int64
    kv_order: torch.Tensor | None = None  # (Tk,) int64, places in kv_rows, stably sorted by the row there; with kv_rows
    kv_readers: torch.Tensor | None = None  # (T,) int64, how often each row stands in kv_rows; with kv_rows
    rows: torch.Tensor  # (R,) int64, positions whose hidden state predicts a token that carries loss
    targets: torch.Tensor  # (R,) int64
    ce_w: torch.Tensor  # (R,) float32, weight of -logp; the step's denominator is in it
    pg_w: torch.Tensor  # (R,) float32, weight of the policy term; the step's denominator is in it
    adv: torch.Tensor  # (R,) float32
    logp_old: torch.Tensor  # (R,) float32, the sampler's
    reply: torch.Tensor  # (R,) int64, which of the replies with such rows it belongs to, from 0
    ce_at: torch.Tensor | None = None  # int64, places in the streams where ce_w is not 0; None: everywhere
    pg_at: torch.Tensor | None = None  # int64, places in the streams where pg_w is not 0; None: everywhere
    owner: list[str]  # ids of the prompts or documents inside, to name them when something breaks
