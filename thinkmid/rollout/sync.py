"""Trainer -> engine: weights in place, version + 1, and proof that they arrived."""

from __future__ import annotations

import torch

from thinkmid.model import weights


def push(model, engine, version: int, dtype: torch.dtype) -> None:
    """Streams the trainer's weights into the engine, one FSDP unit at a time. Collective.

    RuntimeError names the first tensor whose checksum in the engine is not the trainer's.
    """
    sums = {}

    def stream():
        for name, tensor in weights.stream(model, dtype=dtype):
            sums[name] = checksum(tensor)
            yield name, tensor

    engine.load_weights(stream(), version)
    verify(engine, sums)


def verify(engine, sums: dict[str, int]) -> None:
    held = {name: checksum(tensor) for name, tensor in engine.named_weights()}
    for name in sums | held:
        if held.get(name) != sums.get(name):
            raise RuntimeError(f"after sync to version {engine.version} the engine's {name} is not the trainer's")


def checksum(tensor: torch.Tensor) -> int:
    """Sum of bit patterns, each weighted by its place, modulo 2^64: a swap, a stale slice or a flipped bit shows."""
    bits = tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits = bits.flatten().to(torch.int64)
    # odd numbers only: twice a flipped top bit of 64 would be 0
    place = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
    return int((bits * place).sum())
