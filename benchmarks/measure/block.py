"""The 8B's block at full width, a few layers of it, in whole training steps on a pack of 8,192 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure.row import Row, free, median_s, peak_bytes, walls
from benchmarks.measure.sizes import Sizes
from benchmarks.measure.training import Trainer, groups_of, packs_of, units_of
from benchmarks.shapes import needed_flops
from thinkmid.run.ranks import start_ranks


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    ranks, seconds, updates = start_ranks(), {}, {}
    for layers in sizes.depths:
        cfg = replace(sizes.wide, layers=layers)
        trainer = Trainer(cfg, ranks)
        units = units_of(groups_of(sizes.pack, vocab=cfg.vocab))
        packs = packs_of(units, cfg, sizes.pack_tokens)
        assert len(packs) == 1, f"{sizes.pack.tokens()} tokens make {len(packs)} packs"
        name = f"{layers} layers"
        trainer.step(packs)  # kernels are compiled, memory is found
        peak = peak_bytes(partial(trainer.step, packs), device)
        seconds[layers], note = walls(partial(trainer.step, packs), device, sizes.repeats)
        yield Row(what=f"{name}: step", value=seconds[layers], unit="s", note=note)
        flops = needed_flops(cfg, units)
        yield Row(what=f"{name}: FLOPs needed a second", value=flops / seconds[layers], unit="FLOP/s")
        yield Row(what=f"{name}: tokens a second", value=sizes.pack.tokens() / seconds[layers], unit="1/s")
        if peak:
            yield Row(what=f"{name}: peak memory of tensors", value=peak, unit="B")
        updates[layers] = median_s(partial(update, trainer), device, sizes.repeats)
        yield Row(what=f"{name}: AdamW alone", value=updates[layers], unit="s")
        del trainer
        free(device)
    few, many = sizes.depths
    slope, slope_update = ((x[many] - x[few]) / (many - few) for x in (seconds, updates))
    yield Row(what="a layer more: step", value=slope, unit="s")
    layers = sizes.wide.layers
    whole = seconds[few] + (layers - few) * slope
    all_updates = updates[few] + (layers - few) * slope_update
    note = f"straight line through {few} and {many} layers; AdamW on an eighth of the weights; no communication"
    yield Row(what=f"{layers} layers on 8 ranks, a pack", value=whole - all_updates * 7 / 8, unit="s", note=note)


def update(trainer: Trainer) -> None:
    """AdamW on gradients of zero."""
    for p in trainer.model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
