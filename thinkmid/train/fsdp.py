"""FSDP2: how a model is sharded over the ranks."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from thinkmid.model.transformer import Transformer
from thinkmid.run.ranks import Ranks


def shard(model: Transformer, ranks: Ranks, *, compute_dtype: torch.dtype) -> Transformer:
    """FSDP2 in place: one group per block, tied weights in the root's. Master weights keep their dtype, gradients are
    summed over ranks, in fp32."""
    masters = {p.dtype for p in model.parameters()}  # two where adapters in fp32 stand beside frozen weights
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if masters != {compute_dtype} else None,
        reduce_dtype=torch.float32 if torch.float64 not in masters else None,
        cast_forward_inputs=False,  # cos and sin must stay fp32
    )
    for block in model.layers:
        fully_shard(block, mesh=ranks.mesh, mp_policy=policy)
    if not model.cfg.tied:
        fully_shard(model.embed_tokens, mesh=ranks.mesh, mp_policy=policy)
        model.embed_tokens.set_unshard_in_backward(False)  # its gradient does not depend on its weights
        fully_shard([model.norm, model.lm_head], mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)
    # FSDP2 averages by default: neither it nor the backend may divide. A single rank does not divide
    for module in (m for m in model.modules() if isinstance(m, FSDPModule) and ranks.world > 1):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model
