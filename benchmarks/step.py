"""Training step: prefix once per group against once per reply, and what skipped dead groups save on top.

    python -m benchmarks.step --json

Forward, backward and AdamW through train.step.train_step in one process. The unshared contender runs the same kernels
on the same replies, packed as densely, with each prefix repeated for each reply (data.pack.duplicated).
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import common
from thinkmid.data.pack import duplicated, plan
from thinkmid.plan.memory import pair_cost
from thinkmid.run.ranks import start_ranks
from thinkmid.train import advantage
from thinkmid.train.config import OptimConfig
from thinkmid.train.loss import LossConfig, policy_loss
from thinkmid.train.optim import adamw
from thinkmid.train.step import train_step
from thinkmid.types import Group, Prompt, Sample

REWARDS = (0.0, 1.0)  # taken in turn by the siblings of a live group


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--siblings", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--reply", type=int, default=128)
    parser.add_argument("--pack", type=int, default=4096, help="tokens of one forward")
    args = parser.parse_args()
    cfg = common.shape(args.layers, args.width)
    model, ranks = common.random_model(cfg), start_ranks()
    optimizer = adamw(model, OptimConfig(lr=1e-4))
    loss = LossConfig(denom=args.reply)

    def units_of(num_live):
        return advantage.units(make_groups(cfg.vocab, args, num_live), loss, args.siblings)

    def packs_of(units):
        return plan(units, capacity=args.pack, ranks=1, pair_cost=pair_cost(cfg))[0]

    def step(packs, lr=1e-4):
        return train_step(
            model, optimizer, packs, lambda pack: policy_loss(model, pack, loss, temperature=1.0, first_update=True),
            ranks, lr=lr, clip=1.0,
        )  # fmt: skip

    live, few = units_of(args.groups), units_of(max(1, args.groups // 4))
    copies = [part for unit in live for part in duplicated(unit)]
    shared, unshared, mostly_dead = packs_of(live), packs_of(copies), packs_of(few)
    ours, theirs = step(shared, lr=0.0), step(unshared, lr=0.0)
    if not np.allclose(
        [ours.grad_norm, ours.sums["loss"]], [theirs.grad_norm, theirs.sums["loss"]], rtol=1e-4, atol=1e-6
    ):
        numbers = [f"{x.grad_norm} {x.sums['loss']}" for x in (ours, theirs)]
        return common.refuse(f"gradient norm and loss are {numbers[0]} shared, {numbers[1]} unshared")

    seconds = common.interleave(
        {
            "shared": lambda: step(shared),
            "unshared": lambda: step(unshared),
            "shared, three of four groups dead": lambda: step(mostly_dead),
        },
        args.rounds,
    )
    rows = {"shared": sum(u.length for u in live), "unshared": sum(u.length for u in copies)}
    # two products in the backward for each in the forward; the head's scores are formed again there
    floor = 3 * common.gemms_s(cfg, rows["shared"], 0) + 4 * common.gemms_s(
        cfg, 0, args.groups * args.siblings * args.reply
    )
    sharing = common.ratio(seconds["unshared"], seconds["shared"])
    skipping = common.ratio(seconds["shared"], seconds["shared, three of four groups dead"])
    lines = [
        f"  floor of shared (matrix products)  {floor:8.3f} s",
        f"  sharing prefixes: {sharing['median']:.2f} times ({sharing['low']:.2f} to {sharing['high']:.2f}); target 2; "
        f"rows {rows['unshared']} / {rows['shared']} = {rows['unshared'] / rows['shared']:.2f}",
        f"  skipping dead groups: {skipping['median']:.2f} times more "
        f"({skipping['low']:.2f} to {skipping['high']:.2f}); target 2.5",
    ]
    title = (
        f"step  L={cfg.layers} D={cfg.width} V={cfg.vocab} fp32  {args.groups} groups, prefix {args.prefix}, "
        f"{args.siblings} siblings of {args.reply}"
    )
    result = {"floor_s": floor, "rows": rows, "sharing": sharing, "skipping": skipping, "targets": [2, 2.5]}
    common.report(title, seconds, lines, result, only_json=args.json)
    return 0


def make_groups(vocab, args, num_live) -> list[Group]:
    """The same tokens for every num_live; only rewards decide which groups are dead."""
    rng = np.random.default_rng(0)
    groups = []
    for p in range(args.groups):
        samples = [
            Sample(
                tokens=rng.integers(vocab, size=args.reply).astype(np.int32),
                logp=np.full(args.reply, -np.log(vocab), np.float32),
                drawn=np.ones(args.reply, bool),
                finish="suffix",
                num_think=args.reply,
                versions=np.zeros(args.reply, np.int32),
            )
            for _ in range(args.siblings)
        ]
        rewards = [REWARDS[g % 2] if p < num_live else 0.0 for g in range(args.siblings)]
        prompt = Prompt(id=str(p), tokens=rng.integers(vocab, size=args.prefix).tolist())
        groups.append(Group(prompt=prompt, samples=samples, rewards=rewards))
    return groups


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
