"""One pack -> its share of the step's loss, and sums to log."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from thinkmid.kernels import fused_linear_dr_grpo, linear_cross_entropy, linear_logprob
from thinkmid.kernels.policy import Metrics
from thinkmid.model.attention import attend_pack
from thinkmid.model.lora import Base
from thinkmid.model.transformer import Transformer
from thinkmid.train.config import LossConfig
from thinkmid.types import Pack

Sums = dict[str, torch.Tensor]  # to log
Head = Callable[[torch.Tensor, torch.Tensor], Any]  # (hidden rows, the head's weight) -> its result


def logprobs(model: Transformer | Base, pack: Pack, temperature: float = 1.0) -> torch.Tensor:
    """logp (R,) fp32 of the pack's targets, through the model's own head."""
    head = partial(linear_logprob, targets=pack.targets, temperature=temperature, wait=False)
    logp: torch.Tensor = _through(model, pack, head)
    return logp


def text_loss(model: Transformer, pack: Pack) -> tuple[torch.Tensor, Sums]:
    """Next-token loss: sum of ce_w * -logp."""
    # a pack holds rows with loss alone
    head = partial(linear_cross_entropy, targets=pack.targets, row_weights=pack.ce_w, denom=1, wait=False)
    return _through(model, pack, head)[0], {}


def policy_loss(
    model: Transformer,
    pack: Pack,
    cfg: LossConfig,
    *,
    temperature: float,
    first_update: bool,
    reference: Transformer | Base | None = None,
) -> tuple[torch.Tensor, Sums]:
    """DrGRPO on one pack, and next-token loss where ce_w is not 0. With one update per rollout the ratio is 1 and the
    sampler's gap is an importance weight; later updates clip the ratio to the sampler itself, which needs no pass over
    old weights."""
    adv, by_token = pack.adv, first_update and cfg.is_cap and cfg.is_level == "token"
    if first_update and cfg.is_level == "sequence":
        adv = adv * sequence_weights(model, pack, temperature, cfg.is_cap)
    head = partial(
        fused_linear_dr_grpo,
        targets=pack.targets,
        advantages=adv,
        # the weights hold the estimator and the one denominator of the whole step
        mask=pack.pg_w,
        denom=1,
        temperature=temperature,
        old_logp=None if first_update else pack.logp_old,
        sampler_logp=pack.logp_old if by_token else None,
        is_cap=cfg.is_cap if by_token else None,
        ref_logp=_frozen_logprobs(reference, pack, temperature),
        beta=cfg.kl,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        entropy_coef=cfg.entropy,
        return_entropy=True,
        # groups without advantage are not in the pack; the others are measured whole
        live=pack.pg_at,
        wait=False,
    )
    ce = partial(
        linear_cross_entropy, targets=pack.targets, row_weights=pack.ce_w, denom=1, live=pack.ce_at, wait=False
    )
    both = partial(_both, policy=head, text=ce if cfg.next_token else None)
    (loss, metrics, logp, _), text = _through(model, pack, both)
    sums = _sums(metrics, logp, pack)
    return loss + text, sums | ({"next_token": text.detach() / cfg.next_token} if cfg.next_token else {})


@torch.no_grad()
def _frozen_logprobs(reference: Transformer | Base | None, pack: Pack, temperature: float) -> torch.Tensor | None:
    return None if reference is None else logprobs(reference, pack, temperature)


def _sums(metrics: Metrics, logp: torch.Tensor, pack: Pack) -> Sums:
    sums = metrics._asdict()
    sums["tokens"] = sums.pop("rows")
    sums["clipped"] = sums.pop("clipped_low") + sums.pop("clipped_high")
    gap = torch.where(pack.pg_w != 0, logp - pack.logp_old, 0)
    # the estimator r - 1 - log r of KL(sampler || trainer)
    sums |= {"gap": gap.abs().sum(), "sampler_kl": (gap.expm1() - gap).sum()}
    return sums | {"gap_max": gap.abs().max() if len(gap) else gap.sum()}


@torch.no_grad()
def sequence_weights(model: Transformer, pack: Pack, temperature: float, cap: float) -> torch.Tensor:
    """(R,) trainer/sampler ratio of each row's whole reply, truncated: less biased than the token's weight, noisier."""
    gap = torch.where(pack.pg_w != 0, logprobs(model, pack, temperature) - pack.logp_old, 0)
    total = torch.zeros_like(gap).index_add(0, pack.reply, gap)  # no more replies than rows
    return total.exp().clamp(max=cap)[pack.reply]


def _both(hidden: torch.Tensor, weight: torch.Tensor, policy: Head, text: Head | None) -> tuple[Any, Any]:
    """Each head leaves the other's rows out before its products."""
    return policy(hidden, weight), text(hidden, weight)[0] if text else 0


def _through(model: Transformer | Base, pack: Pack, head: Head) -> Any:
    attend = attend_pack(pack, deterministic=model.deterministic)
    return model(pack.tokens, pack.positions, attend, rows=pack.rows, head=head)
