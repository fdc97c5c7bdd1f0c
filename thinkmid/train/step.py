"""Packs -> one optimiser step. The only file with a backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from thinkmid.data.pack import Unit, make_pack
from thinkmid.model import weights
from thinkmid.model.transformer import Transformer
from thinkmid.run.interrupt import Interrupt, Stopped
from thinkmid.run.ranks import Ranks
from thinkmid.types import Pack

# a pack in, its share of the loss and sums to log out
LossFn = Callable[[Pack], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """One update, on every rank the same."""

    grad_norm: float  # before clipping
    sums: dict[str, float] = field(default_factory=dict)  # over the tokens of all ranks
    broken: list[str] = field(default_factory=list)  # why the update was skipped: names of samples, or the gradient


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: list[list[Unit]],
    loss_fn: LossFn,
    ranks: Ranks,
    *,
    lr: float,
    clip: float,
    interrupt: Interrupt | None = None,
) -> Stats:
    """Forward and backward over this rank's batches, then one update. Collective: every rank brings as many batches.

    Weights in the units carry the step's denominator, so losses are summed, never averaged. Without any batch the
    optimiser still steps, on zero gradients. A non-finite loss or gradient skips the update on all ranks. Gradients
    are none between steps. interrupt: polled before every batch; Stopped where one rank was asked to stop, with nothing
    changed.
    """
    sums: dict[str, torch.Tensor] = {}
    losses: list[tuple[torch.Tensor, list[str]]] = []
    packs = (make_pack(units, ranks.device) for units in batches)
    pack = next(packs, None)
    while pack is not None:
        if interrupt and ranks.any(interrupt.requested):
            optimizer.zero_grad(set_to_none=True)
            raise Stopped
        loss, more = loss_fn(pack)
        # the next pack is built here, while the head, whose products take longest, still waits in the device's queue;
        # after the backward only short kernels would be left in it, and the next forward would come late
        ahead = next(packs, None)
        loss.backward()
        losses.append((loss.detach(), pack.owner))
        _add(sums, more | {"loss": loss.detach()})
        pack = ahead
    # the optimiser's parameters, not the model's: those may be whole copies that a forward left behind
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    # the norm, the same on all ranks, is read together with the sums: the host waits for the device once
    read = ranks.sum(sums | {"grad_norm_max": _clip(params, clip)})
    grad_norm, broken = read.pop("grad_norm_max"), []
    if math.isfinite(grad_norm) and math.isfinite(read.get("loss", 0.0)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        # what a forward without a backward left whole holds the old weights
        weights.reshard(model)
    else:
        broken = _owners_of_broken(losses, ranks) or ["the gradient, though every loss is finite"]
    optimizer.zero_grad(set_to_none=True)
    return Stats(grad_norm=grad_norm, sums=read, broken=broken)


def _owners_of_broken(losses: list[tuple[torch.Tensor, list[str]]], ranks: Ranks) -> list[str]:
    """Names of what lies in packs whose loss is not finite, over all ranks."""
    mine = [name for loss, owner in losses if not torch.isfinite(loss) for name in owner]
    return b"".join(ranks.gather_bytes("\n".join([*mine, ""]).encode())).decode().splitlines()


def _clip(params: list[nn.Parameter], clip: float) -> torch.Tensor:
    """Clips the gradient in place; the norm it had, 0-d. 0 does not clip. A norm that is not finite spoils the
    gradient; the caller, who reads it, drops that."""
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if clip:
        nn.utils.clip_grads_with_norm_(params, clip, norm)
    return norm


def _add(sums: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    for name, value in more.items():
        if name not in sums:
            sums[name] = value
        else:
            sums[name] = torch.maximum(sums[name], value) if name.endswith("_max") else sums[name] + value
