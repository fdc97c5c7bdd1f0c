"""RLMT's step of a 1B shape with the embedded engine: sync, generation, training; trainer against engine in bf16."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import collect
from benchmarks.measure.row import Row, median_s, wall_s
from benchmarks.measure.sizes import Sizes
from benchmarks.measure.training import Trainer, groups_of, packs_of, units_of
from thinkmid.data.pack import make_pack
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import Sampling, seed
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train.loss import logprobs


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    trainer, family = Trainer(sizes.small, start_ranks()), sizes.rollout
    engine = NativeEngine(sizes.small, tokenizer(), dtype="bfloat16", device=device)
    # weights of noise never close a thought: the tag is forced
    suffix = family.reply // 4
    sampling = Sampling(
        max_think=family.reply - suffix, max_suffix=suffix, force_close=True, max_batch=family.groups * family.siblings
    )
    prompts = [g.prompt for g in groups_of(family, vocab=sizes.small.vocab)]
    seconds: dict[str, list[float]] = {"sync": [], "generation": [], "training": []}
    tokens = steps = 0
    for step in range(sizes.rollout_steps + 1):
        found = {}

        def push(step=step):
            engine.wake_weights()
            weight_sync.push(trainer.model, engine, step, torch.bfloat16, summed=False)
            engine.wake_cache()

        def generate(step=step, found=found):
            seeds_P_G = [[seed(0, step, p.id, g) for g in range(family.siblings)] for p in prompts]
            found["groups"] = collect(engine, prompts, seeds_P_G, sampling)

        def train(found=found):
            groups = [replace(g, rewards=[float(i % 2) for i in range(len(g.samples))]) for g in found["groups"]]
            trainer.step(packs_of(units_of(groups), sizes.small, sizes.rl_pack_tokens))

        engine.sleep()
        taken = {"sync": wall_s(push, device), "generation": wall_s(generate, device)}
        gap = gaps(trainer, found["groups"][:2], sizes)
        taken["training"] = wall_s(train, device)
        lengths = [len(s.tokens) for g in found["groups"] for s in g.samples]
        if step:  # the first one compiles and finds memory
            for name, s in taken.items():
                seconds[name].append(s)
            tokens, steps = sum(lengths), max(lengths)
    for name, found in seconds.items():
        yield Row(what=name, value=statistics.median(found), unit="s", note=f"{min(found):.3f} to {max(found):.3f}")
    generation = statistics.median(seconds["generation"])
    yield Row(what="tokens generated a second", value=tokens / generation, unit="1/s")
    yield Row(what="a step of decoding", value=generation / steps, unit="s", note="prefill within")
    yield Row(what="mean |trainer - engine|", value=float(np.abs(gap).mean()), unit="nats")
    yield Row(what="largest |trainer - engine|", value=float(np.abs(gap).max()), unit="nats")
    copied = [torch.empty_like(p) for p in engine._params.values()]
    pairs = list(zip(copied, engine._params.values(), strict=True))
    s = median_s(lambda: [a.copy_(b) for a, b in pairs], device, sizes.repeats)
    yield Row(what="a copy of the engine's weights", value=s, unit="s")


@torch.no_grad()
def gaps(trainer: Trainer, groups, sizes: Sizes) -> np.ndarray:
    """Trainer minus engine in nats, of the drawn tokens of a few groups."""
    rewarded = [replace(g, rewards=[float(i % 2) for i in range(len(g.samples))]) for g in groups]
    out = []
    for units in packs_of(units_of(rewarded), sizes.small, sizes.rl_pack_tokens):
        pack = make_pack(units, trainer.ranks.device)
        gap = logprobs(trainer.model, pack) - pack.logp_old
        out.append(gap[pack.pg_w != 0].float().cpu().numpy())
    return np.concatenate(out)


def tokenizer() -> Tokenizer:
    """One that knows the tags; ids beyond it are noise like the weights."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a b c"], 260, Path(folder))
        return Tokenizer.load(folder)
