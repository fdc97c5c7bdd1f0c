"""A 1B model in whole RL training steps: prefixes shared and not, mostly dead groups, and a padded loop beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.measure.row import Row, peak_bytes, spread, wall_s
from benchmarks.measure.sizes import Sizes
from benchmarks.measure.training import Trainer, groups_of, packs_of, units_of
from thinkmid.data.pack import duplicated
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.model.weights import hf_name
from thinkmid.run.ranks import Ranks, start_ranks
from thinkmid.train import advantage
from thinkmid.train.config import LossConfig, OptimConfig
from thinkmid.train.optim import adamw

SHARED, UNSHARED, DEAD = "shared prefixes", "prefixes of each reply", "three of four groups dead"
PADDED = "padded batches, logits kept"
WRONG = 0.05  # of the gradient's norm: what bf16 may make of another order of sums


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    ranks, cfg, family = start_ranks(), sizes.small, sizes.rl
    trainer = Trainer(cfg, ranks)
    units = units_of(groups_of(family, vocab=cfg.vocab))
    few = units_of(groups_of(family, vocab=cfg.vocab, live=max(1, family.groups // 4)))
    copies = [part for unit in units for part in duplicated(unit)]
    steps: dict[str, Callable[[], float]] = {
        name: partial(trained, trainer, packs_of(given, cfg, sizes.rl_pack_tokens))
        for name, given in ((SHARED, units), (UNSHARED, copies), (DEAD, few))
    }
    # the same weights so far: whoever computes another gradient is not to be timed
    norm, unshared = steps[SHARED](), steps[UNSHARED]()
    yield Row(what=f"{UNSHARED} over {SHARED}: gradient norm", value=unshared / norm, unit="1")
    if not abs(unshared / norm - 1) < WRONG:
        raise ValueError(f"the gradient norm of {UNSHARED!r} is {unshared / norm:.4f} of that of {SHARED!r}")
    try:
        padded = Padded(cfg, sizes, ranks, trainer.model)
        ratio, problem = padded.step() / norm, "another gradient than ours: not timed"
    except Exception as error:  # the rival's own failure is a finding, and ours are worth having
        ratio, problem = float("nan"), f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if abs(ratio - 1) < WRONG:
        steps[PADDED] = padded.step
        yield Row(what=f"{PADDED} over {SHARED}: gradient norm", value=ratio, unit="1")
    else:
        yield Row(what=f"{PADDED} over {SHARED}: gradient norm", value=None, unit="1", note=f"{ratio:.4f}; {problem}")
    seconds = interleaved(steps, device, sizes.repeats)
    for name, found in seconds.items():
        yield Row(what=f"{name}: step", value=statistics.median(found), unit="s", note=spread(found))
    for name in [name for name in seconds if name != SHARED]:
        pairs = zip(seconds[name], seconds[SHARED], strict=True)
        yield Row(what=f"{name} over {SHARED}", value=statistics.median(a / b for a, b in pairs), unit="1")
    for name, step in steps.items():
        if peak := peak_bytes(step, device):
            yield Row(what=f"{name}: peak memory of tensors", value=peak, unit="B", note="with the other's weights")


def trained(trainer: Trainer, packs) -> float:
    """One step; the gradient's norm."""
    return trainer.step(packs).grad_norm


def interleaved(steps, device: torch.device, rounds: int, most_s: float = 25.0) -> dict[str, list[float]]:
    """Seconds by contender and round, one round for warming up; they take turns. No new round begins after most_s."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    began = time.monotonic()
    for r in range(rounds + 1):
        if r > 1 and time.monotonic() - began > most_s:
            break
        for name, step in steps.items():
            s = wall_s(step, device)
            if r:
                found[name].append(s)
    return found


class Padded:
    """One optimiser step as a competent user writes it with transformers: batches of whole sequences, logits of the
    replies alone, bf16 with fp32 master weights by the same FSDP2 and the same AdamW. All replies are of one length, so
    that nothing is padded: its best case."""

    def __init__(self, cfg: ModelConfig, sizes: Sizes, ranks: Ranks, like: Transformer):
        from transformers import LlamaConfig, LlamaForCausalLM

        theirs = LlamaConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, intermediate_size=cfg.ffn,
            rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied, max_position_embeddings=cfg.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, use_cache=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        with ranks.device:
            self.model = LlamaForCausalLM(theirs)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
        fully_shard(self.model, mesh=ranks.mesh, mp_policy=policy)
        theirs = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, p in like.named_parameters():
                theirs[hf_name(name)].to_local().copy_(p.to_local())
        self.optimizer = adamw(self.model, OptimConfig(lr=1e-6))
        self.micro, self.reply, self.device = sizes.micro_batch, sizes.rl.reply, ranks.device
        groups = groups_of(sizes.rl, vocab=cfg.vocab)
        self.tokens = torch.tensor(np.array([[*g.prompt.tokens, *s.tokens] for g in groups for s in g.samples]))
        self.logp_old = torch.tensor(np.array([s.logp for g in groups for s in g.samples]))  # (N, R)
        self.adv = torch.tensor([a for g in groups for a in advantage.advantages(g.rewards, "dr_grpo")])
        self.denom, self.cap = float(self.logp_old.numel()), LossConfig(denom=1).is_cap

    def step(self) -> float:
        """The norm of its gradient, before clipping."""
        for at in range(0, len(self.tokens), self.micro):
            tokens, old, adv = (
                x[at : at + self.micro].to(self.device) for x in (self.tokens, self.logp_old, self.adv.float())
            )
            logits = self.model(input_ids=tokens, logits_to_keep=self.reply + 1).logits[:, :-1]  # (n, R, V)
            targets = tokens[:, -self.reply :]
            logp = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            weight = (logp.detach() - old).exp().clamp(max=self.cap)  # trainer over sampler, truncated
            (-(weight * adv[:, None] * logp).sum() / self.denom).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).full_tensor().item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
