"""What the layers gain from compiled blocks, from recomputing cheap ops, from packs of twice the size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.measure.row import Row, free, peak_bytes, walls
from benchmarks.measure.sizes import Sizes
from benchmarks.measure.training import Trainer, groups_of, packs_of, units_of
from thinkmid.kernels import ref
from thinkmid.model import transformer
from thinkmid.model.transformer import Attend, Transformer
from thinkmid.run.ranks import start_ranks


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    ranks, cfg = start_ranks(), replace(sizes.wide, layers=sizes.depths[0])
    changes = {
        "eager": (lambda model: None, nullcontext),
        "cheap ops recomputed": (recompute_cheap_ops, nullcontext),
        "compiled blocks": (partial(compile_blocks, backend=sizes.compile_backend), formulas),
    }
    for name, (change, ops) in changes.items():
        with ops():
            yield from steps(name, Trainer(cfg, ranks, change=change), sizes, device)
        free(device)


def steps(name: str, trainer: Trainer, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Time and memory of whole steps, on one pack and on one of twice its tokens."""
    cfg = trainer.cfg
    for times in (1, 2):
        family = replace(sizes.pack, groups=times)
        packs = packs_of(units_of(groups_of(family, vocab=cfg.vocab)), cfg, times * sizes.pack_tokens)
        assert len(packs) == 1, f"{family.tokens()} tokens make {len(packs)} packs"
        what = f"{name}, {times} x {sizes.pack.tokens()} tokens"
        trainer.step(packs)
        trainer.step(packs)  # a second length may compile once more
        peak = peak_bytes(partial(trainer.step, packs), device)
        s, note = walls(partial(trainer.step, packs), device, sizes.repeats)
        yield Row(what=f"{what}: step", value=s, unit="s", note=note)
        if peak:
            yield Row(what=f"{what}: peak memory of tensors", value=peak, unit="B")


class Held:
    """One object for the attention of every pack, so that blocks are not compiled anew for each; it runs as it is."""

    attend: Attend

    @torch.compiler.disable
    def __call__(self, layer, q, k, v):
        return self.attend(layer, q, k, v)


def compile_blocks(model: Transformer, backend: str) -> None:
    """Each block in two graphs, before and behind the attention, the same for all blocks and lengths."""
    held, forward = Held(), model.forward

    def with_held(tokens, positions, attend, rows=None, head=F.linear):
        held.attend = attend
        return forward(tokens, positions, held, rows, head)

    model.forward = with_held
    for block in model.layers:
        block.self_attn.layer = 0  # of no use in training, and a number that differs would compile each block anew
        block.compile(backend=backend, dynamic=True)


@contextmanager
def formulas():
    """The model's ops as plain formulas, which the compiler fuses; it cannot look into our kernels."""
    ours = {name: getattr(transformer, name) for name in ("rms_norm", "apply_rope", "swiglu")}
    for name in ours:
        setattr(transformer, name, getattr(ref, name))
    try:
        yield
    finally:
        for name, op in ours.items():
            setattr(transformer, name, op)


def recompute_cheap_ops(model: Transformer) -> None:
    """Matrix products and attention are kept, norms, RoPE and SwiGLU run again in the backward."""
    for block in model.layers:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=kept_products
        )


def kept_products():
    return create_selective_checkpoint_contexts(policy)


def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    expensive = any(word in str(op) for word in ("aten.mm", "aten.addmm", "attention", "attn", "flash"))
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
