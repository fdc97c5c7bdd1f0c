"""What the row kernels read and write, one value for each row: plain tensors, the same for every path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")
Rows = slice | Tensor  # which rows: a slice, or their index (n,) int64


def pick(x: Tensor | None, rows: Rows) -> Tensor | None:
    """x[rows] of an optional stream."""
    return None if x is None else x[rows]


class Scores(NamedTuple):
    """What stands between hidden @ weight.T and the logits s: s = softcap(z + bias) / temperature."""

    temperature: Tensor | None = None  # (c,), of the statistics' dtype
    bias: Tensor | None = None  # (V,), likewise
    softcap: float | None = None  # softcap(x) = softcap * tanh(x / softcap)

    def at(self, rows: Rows) -> Scores:
        """The same of some rows."""
        return self._replace(temperature=pick(self.temperature, rows))


class Stats(NamedTuple):
    """Statistics of each row, (c,) each, in nats; None where not asked for."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor | None

    def at(self, rows: Rows) -> Stats:
        """The same of some rows."""
        return Stats(self.logp[rows], pick(self.entropy, rows), pick(self.lse, rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """All that decides a row's loss and coefficient but its log-prob. Tensors (R,), contiguous, of logp's dtype."""

    adv: Tensor
    old_logp: Tensor | None = None  # None: the row's own log-prob, detached, so that the ratio is exactly 1
    sampler_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    mask: Tensor | None = None
    denom: float
    clip_low: float = 0.2
    clip_high: float = 0.2
    is_cap: float | None = None  # None: no cap
    dual_clip: float | None = None  # None: no bound
    beta: float = 0.0
    entropy_coef: float = 0.0

    def at(self, rows: Rows) -> Policy:
        """The same of some rows."""
        old, sampler, ref, mask = (pick(x, rows) for x in self.streams[1:])
        return replace(self, adv=self.adv[rows], old_logp=old, sampler_logp=sampler, ref_logp=ref, mask=mask)

    @property
    def streams(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """In the order in which the kernels read them."""
        return self.adv, self.old_logp, self.sampler_logp, self.ref_logp, self.mask

    @property
    def scalars(self) -> list[float]:
        """In the order in which the kernels read them."""
        cap, dual_clip = (INF if x is None else x for x in (self.is_cap, self.dual_clip))
        bounds = (1 / self.denom, self.clip_low, self.clip_high, cap, dual_clip)
        return [float(x) for x in (*bounds, self.beta, self.entropy_coef, 0)]

    def for_device(self) -> DevicePolicy:
        """What the Triton kernels take: numbers travel in a tensor, so that no kernel is compiled for each value."""
        return DevicePolicy(*self.streams, on_device(self.adv.device, *self.scalars), bool(self.entropy_coef))


class DevicePolicy(NamedTuple):
    """A Policy as the Triton kernels take it."""

    adv: Tensor
    old_logp: Tensor | None
    sampler_logp: Tensor | None
    ref_logp: Tensor | None
    mask: Tensor | None
    scalars: Tensor  # (8,) fp32
    has_entropy_grad: bool


@lru_cache(maxsize=16)
def on_device(device: torch.device, *scalars: float) -> Tensor:
    """Numbers as an fp32 tensor, kept: a copy to the device for each chunk of each step would wait for it."""
    return torch.tensor(scalars, dtype=torch.float32, device=device)
