"""Trainer -> engine: weights in place, version + 1, and where the two differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from thinkmid.model import weights
from thinkmid.model.transformer import Transformer
from thinkmid.rollout.engine.protocol import Engine

Sums = dict[str, int]  # tensor name -> checksum of the part that this rank's engine holds
SLICE = 2**24  # numbers that are widened to 64 bits at a time


def push(model: Transformer, engine: Engine, version: int, dtype: torch.dtype, *, summed: bool = True) -> Sums:
    """Streams the trainer's weights into the engine, one gathered tensor at a time. Collective.

    Returns the checksums of what was sent, {} unless summed.
    """
    sums: Sums = {}
    stream = weights.stream(model, dtype=dtype)
    engine.load_weights(_summed(stream, engine, sums) if summed else stream, version)
    return sums


def _summed(named: Iterable[tuple[str, Tensor]], engine: Engine, sums: Sums) -> Iterator[tuple[str, Tensor]]:
    """The same pairs; their checksums enter sums on the way."""
    for name, tensor in named:
        sums[name] = checksum(engine.part(name, tensor))
        yield name, tensor


def checksums(model: Transformer, engine: Engine, dtype: torch.dtype) -> Sums:
    """Checksums of the trainer's weights as the engine should hold them. Collective."""
    return {name: checksum(engine.part(name, tensor)) for name, tensor in weights.stream(model, dtype=dtype)}


def difference(engine: Engine, sums: Sums, before: Sums) -> str:
    """What is wrong with the weights that the engine holds, by name; "" if they are those of sums.

    before: checksums of an older version, to know what is stale; may be empty. Each rank sees its own part.
    """
    held = {name: checksum(tensor) for name, tensor in engine.named_weights()}
    if unknown := sorted(sums.keys() ^ held.keys()):
        return f"{unknown[0]} is held by one of trainer and engine alone"
    wrong = [name for name in sums if held[name] != sums[name]]
    if not wrong:
        return ""
    changed = {name for name in sums if before.get(name) not in (None, sums[name])}
    stale = [name for name in wrong if held[name] == before.get(name)]
    if stale and set(stale) == changed:
        return "sync was skipped: the engine still holds all weights of the version before"
    if stale:
        return f"bucket {bucket(stale[0])} is stale: {_list(stale)} of the version before"
    owners = {value: name for name, value in sums.items()}
    if other := owners.get(held[wrong[0]]):
        return f"the engine holds {other} in the place of {wrong[0]}: fused parts are in another order"
    tensor = next(t for name, t in engine.named_weights() if name == wrong[0])
    if tensor.ndim == 2 and checksum(tensor.T) == sums[wrong[0]]:
        return f"{wrong[0]} is transposed in the engine"
    return f"bucket {bucket(wrong[0])} is damaged: {_list(wrong)}"


def bucket(name: str) -> str:
    """The decoder block that a tensor belongs to, or its module: model.layers.3, lm_head."""
    parts = name.split(".")
    return ".".join(parts[:3]) if "layers" in parts else name.rpartition(".")[0]


def _list(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def checksum(tensor: torch.Tensor) -> int:
    """Sum of bit patterns, each weighted by its place, modulo 2^64: a swap, a stale slice or a flipped bit shows."""
    bits = tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits = bits.flatten()
    total = 0
    for start in range(0, len(bits), SLICE):
        part = bits[start : start + SLICE].to(torch.int64)
        # odd numbers only: twice a flipped top bit of 64 would be 0
        place = torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=bits.device)
        total += int((part * place).sum())
    return total % 2**64
