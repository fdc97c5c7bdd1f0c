"""What a training step asks of the host, the device and the network, counted without a GPU.

    python -m benchmarks.counters [--json]

Host, device and FLOPs: train.step.train_step on benchmarks.fake_gpu. Network: the same step and weight_sync.push on
the CPU under FSDP2, with a process group that sends nothing. What a pack costs is a step of three packs less one of
two; what a layer costs, a pack through four less one through two. Bytes for Llama-3-8B come from a formula that agrees
with what is counted on small models.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.fake_gpu import CUDA, fake_gpu
from benchmarks.shapes import LLAMA3_8B, needed_flops
from benchmarks.step import make_groups
from thinkmid.data.pack import Reply, Unit, duplicated, make_pack, plan
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.rollout.engine import weight_sync
from thinkmid.run.ranks import Ranks
from thinkmid.train import advantage, fsdp
from thinkmid.train.config import LossConfig, OptimConfig
from thinkmid.train.loss import policy_loss
from thinkmid.train.optim import adamw
from thinkmid.train.step import train_step
from thinkmid.types import Pack

WORLDS = (8, 64)
LLAMA = LLAMA3_8B
SMALL = replace(LLAMA, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=176, vocab=640)
LOSS = LossConfig(denom=8)
LossOf = Callable[[Transformer, Pack], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone, without the table")
    args = parser.parse_args()
    tables = figures()
    if not args.json:
        print("\n".join(markdown(tables)))
    print(json.dumps({"benchmark": "counters", "torch": torch.__version__, **tables}))
    return 0


def figures() -> dict[str, dict[str, list[float]]]:
    """Three tables; a row has one figure, or one for each world."""
    return {"host and device": host_table(), "FLOPs": flop_table(), "network": network_table()}


def host_table() -> dict[str, list[float]]:
    at = host()
    return {
        "waits, a pack": [_total(at.pack, "wait")],
        "waits, a step besides its packs": [_total(at.step, "wait")],
        "copies from pinned memory, a pack": [at.pack["upload", "pinned"]],
        "copies from pageable memory, a pack": [at.pack["upload", "pageable"]],
        "kernels, a layer forward": [at.layer["kernel", "forward"]],
        "kernels, a layer backward": [at.layer["kernel", "backward"]],
        "kernels, a pack besides its layers": [_total(at.pack, "kernel") - 2 * _total(at.layer, "kernel")],
    }


def flop_table() -> dict[str, list[float]]:
    group, longest = blank_group(prefix=1024, siblings=8, reply=896), blank_group(prefix=1024, siblings=16, reply=1152)
    shared, unshared = flops(LLAMA, [group]), flops(LLAMA, duplicated(group))
    return {
        "8 replies of 896 to 1024 tokens, shared: executed / needed": [shared.ratio],
        "the same, unshared: executed / needed": [unshared.ratio],
        "unshared / shared, executed": [unshared.executed / shared.executed],
        "PFLOP executed, shared": [shared.executed / 1e15],
        "share of it that flash attention's backward recomputes": [shared.again / shared.executed],
        "16 replies of 1152 to 1024 tokens, packs of 8192: executed / needed": [flops(LLAMA, [longest]).ratio],
        "the same, packs of 10240: executed / needed": [flops(LLAMA, [longest], capacity=10240).ratio],
    }


def network_table() -> dict[str, list[float]]:
    worlds = [network_by_formula(LLAMA, world) for world in WORLDS]
    return {name: [w[name] for w in worlds] for name in worlds[0]}


def markdown(tables: dict[str, dict[str, list[float]]]) -> list[str]:
    """Lines of three tables; docs/h100.md holds them."""
    lines = []
    for title, rows in tables.items():
        heads = [f"{world} ranks" for world in WORLDS] if title == "network" else ["counted"]
        lines += [_row(title, heads), "|---" * (1 + len(heads)) + "|"]
        lines += [_row(name, [str(v) if isinstance(v, int) else f"{v:.3f}" for v in row]) for name, row in rows.items()]
    return lines


def _row(name, cells):
    return f"| {' | '.join([name, *cells])} |"


def on_policy(model: Transformer, pack: Pack):
    return policy_loss(model, pack, LOSS, temperature=1.0, first_update=True)


def small_units(num_groups: int, num_live: int | None = None) -> list[Unit]:
    """SMALL's groups of four siblings that live, by default all."""
    sizes = SimpleNamespace(groups=num_groups, siblings=4, prefix=8, reply=8)
    groups = make_groups(SMALL.vocab, sizes, num_groups if num_live is None else num_live)
    return advantage.units(groups, LOSS, 4)


# host and device


@dataclass(frozen=True)
class Host:
    """Counts of fake_gpu.Count, of a steady step."""

    layer: Counter  # one layer in a pack
    pack: Counter  # a pack through two layers
    step: Counter  # what a step does besides its packs


def host(loss_of: LossOf = on_policy) -> Host:
    shallow, deep = (by_pack(partial(device_counts, loss_of, layers)) for layers in (2, 4))
    layer = Counter({what: (n - shallow[0][what]) // 2 for what, n in deep[0].items()})
    return Host(layer, *shallow)


def by_pack(counts_of: Callable[[int], Counter]) -> tuple[Counter, Counter]:
    """Counts of one pack, and of a step besides its packs."""
    two, three = counts_of(2), counts_of(3)
    pack = Counter({what: n - two[what] for what, n in three.items()})
    return pack, Counter({what: n - 2 * pack[what] for what, n in two.items()})


def device_counts(loss_of: LossOf, layers: int, num_packs: int, beside: tuple[Unit, ...] = ()) -> Counter:
    """Counts of a steady step whose packs hold a group each, and of what is beside it."""
    cfg = replace(SMALL, layers=layers)
    batches = [[unit, *beside] for unit in small_units(num_packs)]
    with fake_gpu() as count:
        model = weights.build(cfg, "bfloat16", "meta")
        optimizer, ranks = adamw(model, OptimConfig(lr=1e-4)), Ranks(0, 1, CUDA, None)

        def loss_fn(pack):
            count.phase = "forward"
            out = loss_of(model, pack)
            count.phase = "backward"
            return out

        for packs in (batches[:1], batches):  # the first step fills caches
            count.seen.clear()
            train_step(model, optimizer, packs, loss_fn, ranks, lr=1e-4, clip=1.0)
    return count.seen


def _total(counts: Counter, kind: str) -> int:
    return sum(n for (k, _), n in counts.items() if k == kind)


# FLOPs


@dataclass(frozen=True)
class Flops:
    """A product of a query and a key counts two operations, causal pairs alone."""

    executed: float
    again: float  # of those, scores that flash attention's backward forms again: a fifth product beside its four
    needed: float

    @property
    def ratio(self) -> float:
        return (self.executed - self.again) / self.needed


def blank_group(*, prefix: int, siblings: int, reply: int) -> Unit:
    ones = np.ones(reply, np.float32)
    same = Reply(tokens=np.zeros(reply, np.int64), ce_w=0 * ones, pg_w=ones, adv=ones, logp_old=-ones)
    return Unit(name="", prefix=np.zeros(prefix, np.int64), replies=[same] * siblings)


def flops(cfg: ModelConfig, units: list[Unit], *, capacity: int = 8192, checkpointing: bool = False) -> Flops:
    """Counts of a step on units, packed."""
    executed = again = 0
    seen: dict[tuple[int, ...], int] = {}
    for batch in plan(units, capacity=capacity, ranks=1, pair_cost=0.0)[0]:
        pack = make_pack(batch)
        cu_q, cu_k = pack.cu_q.tolist(), pack.cu_k.tolist()
        pairs = _pairs(cu_q, cu_k)
        # packs of the same lengths run the same products
        lengths = (*cu_q, *cu_k)
        if lengths not in seen:
            seen[lengths] = _executed(cfg, batch, pairs, checkpointing)
        executed += seen[lengths]
        again += 2 * cfg.layers * cfg.heads * cfg.head_dim * pairs
    return Flops(executed, again, needed_flops(cfg, units))


def _executed(cfg, batch, pairs, checkpointing):
    with fake_gpu():
        model = weights.build(cfg, "bfloat16", "meta")
        model.checkpointing = checkpointing
        optimizer, ranks = adamw(model, OptimConfig(lr=1e-4)), Ranks(0, 1, CUDA, None)
        formulas = {
            torch.ops.aten.addmm: _addmm_flops,  # torch's own does not know out_dtype
            torch.ops.torch_attn._varlen_attn: partial(_attention_flops, products=2, pairs=pairs),
            torch.ops.torch_attn._varlen_attn_backward: partial(_attention_flops, products=5, pairs=pairs),
        }
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            train_step(model, optimizer, [batch], partial(on_policy, model), ranks, lr=1e-4, clip=1.0)
    return counter.get_total_flops()


def _addmm_flops(_, a, b, *args, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def _attention_flops(q, *args, products, pairs, **kwargs):
    return 2 * products * q[1] * q[2] * pairs


def _pairs(cu_q, cu_k):
    """Causal, aligned at the bottom right: the last query of a segment sees all of its keys."""
    spans = zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    return sum(k1 - k0 - (q1 - q0) + i + 1 for q0, q1, k0, k1 in spans for i in range(q1 - q0))


# network


class Wire(TorchDispatchMode):
    """Collectives by kind, and the bytes of the whole that is gathered, scattered or reduced."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come by next
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            kind = next((kind for kind in ("gather", "scatter", "reduce") if kind in name), name)
            whole = args[1] if kind == "scatter" else out if isinstance(out, torch.Tensor) else args[0]
            whole = whole[0] if isinstance(whole, list) else whole
            self.seen[kind] += 1
            self.seen[f"{kind} bytes"] += whole.nbytes
            if kind != "reduce":
                # what others would send: nothing was written, and a NaN would skip the update
                (args[0] if kind == "scatter" else whole).zero_()
        return out


class _Sink:
    """An engine that takes weights and keeps none."""

    def part(self, name, whole):
        return whole

    def load_weights(self, named, version):
        for _ in named:
            pass


def network(cfg: ModelConfig, world: int) -> dict[str, float]:
    """Counted on rank 0: what a pack, the rest of a step and a weight sync send."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        ranks = Ranks(0, world, torch.device("cpu"), init_device_mesh("cpu", (world,)))
        model = fsdp.shard(common.random_model(cfg), ranks, compute_dtype=torch.bfloat16)
        optimizer = adamw(model, OptimConfig(lr=1e-4))

        def counts_of(num_packs):
            batches = [[unit] for unit in small_units(num_packs)]
            with Wire() as wire:
                stats = train_step(model, optimizer, batches, partial(on_policy, model), ranks, lr=1e-4, clip=1.0)
            assert not stats.broken, stats.broken
            return wire.seen

        pack, step = by_pack(counts_of)
        with Wire() as wire:
            weight_sync.push(model, _Sink(), 1, torch.bfloat16)
    finally:
        dist.destroy_process_group()
    return _network(world, pack, step, wire.seen)


def network_by_formula(cfg: ModelConfig, world: int) -> dict[str, float]:
    """The same from shapes. A unit of FSDP is a block, the embedding, or the last norm with the head.

    Each is gathered in bf16 for the forward, blocks once more for the backward; gradients are scattered in fp32. A
    sync gathers each parameter once. Rows are padded to a multiple of the ranks.
    """
    shapes = {name: p.shape for name, p in weights.build(cfg, device="meta").named_parameters()}
    sizes = {name: -(-s[0] // world) * world * s[1:].numel() for name, s in shapes.items()}
    whole, blocks = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("layers."))
    pack = {
        "gather": cfg.layers + 2 + cfg.layers,
        "gather bytes": 2 * (whole + blocks),
        "scatter": cfg.layers + 2,
        "scatter bytes": 4 * whole,
    }
    step = Counter({"reduce": 3})  # the gradient's norm; sums and maxima to log, on the host
    return _network(world, pack, step, Counter({"gather": len(sizes), "gather bytes": 2 * whole}))


def _network(world, pack, step, push):
    share = (world - 1) / world  # a rank has its own part already
    return {
        "all-gathers, a pack": pack["gather"],
        "GB that a rank receives in them": share * 1e-9 * pack["gather bytes"],
        "reduce-scatters, a pack": pack["scatter"],
        "GB that a rank sends in them": share * 1e-9 * pack["scatter bytes"],
        "collectives, a step besides its packs": step["gather"] + step["scatter"] + step["reduce"],
        "all-gathers, a weight sync": push["gather"],
        "GB that a rank receives in a sync": share * 1e-9 * push["gather bytes"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
