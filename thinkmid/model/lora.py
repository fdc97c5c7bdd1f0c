"""LoRA (Hu et al., 2106.09685): small trained factors beside frozen projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkmid.model.init import ModelSection
from thinkmid.model.transformer import Transformer


class LoRALinear(nn.Module):
    """A frozen projection W (out, in) with trained factors A (r, in), B (out, r): y = x W^T + bias + scale x A^T B^T.

    x (T, in) -> (T, out). The factors are fp32, fp64 beside fp64; FSDP2 rounds them to the dtype of the products.
    """

    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = frozen.weight, frozen.bias
        wide = torch.promote_types(frozen.weight.dtype, torch.float32)
        self.lora_a = nn.Parameter(torch.empty(rank, frozen.in_features, dtype=wide))
        self.lora_b = nn.Parameter(torch.empty(frozen.out_features, rank, dtype=wide))
        self.scale, self.is_on = scale, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        # in place: nothing has saved y
        return y.addmm_(x @ self.lora_a.T, self.lora_b.T, alpha=self.scale) if self.is_on else y

    def merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """W + scale B A (out, in) in the factors' dtype, from whole tensors."""
        return (b @ a).mul_(self.scale).add_(weight)


class Base(nn.Module):
    """A model whose adapters are off during the forward: the weights that training began with, without a copy."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.cfg, self.deterministic = model, model.cfg, model.deterministic

    def forward(self, *given: Any, **options: Any) -> Any:
        modules = adapted(self.model)
        try:
            for module in modules.values():
                module.is_on = False
            return self.model(*given, **options)
        finally:
            for module in modules.values():
                module.is_on = True


def attach(model: Transformer, section: ModelSection) -> None:
    """Freezes every parameter, and gives each projection of section.lora_targets an uninitialised adapter."""
    model.requires_grad_(False)
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if name in section.lora_targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, section.lora_rank, section.lora_alpha / section.lora_rank))


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Projections with adapters by their path, such as layers.0.mlp.up_proj."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """named_parameters() without those of adapters: the tensors of the model's folder."""
    for name, p in model.named_parameters():
        if not name.endswith((".lora_a", ".lora_b")):
            yield name, p
