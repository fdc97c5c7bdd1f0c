"""AdamW and its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, fused; moments and master weights in fp32."""

    lr: float  # peak learning rate
    warmup: int = 0  # steps of linear warm-up
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up, over the steps that remain
    floor: float = 0.1  # last learning rate as a share of the peak; not for "constant"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0  # on matrices only
    clip: float = 1.0  # gradient norm
    offload: bool = False  # moments wait in host memory while the engine samples: room for KV cache, two copies a step
    max_skipped: int = 5  # non-finite updates in a row before the run stops

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        for name in ("warmup", "floor", "weight_decay", "clip", "max_skipped"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of update number `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, num_steps - self.warmup))
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]
        return self.lr if self.schedule == "constant" else self.lr * (self.floor + (1 - self.floor) * shape)


def adamw(model: torch.nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """The optimiser with its state in place from the start, so that a checkpoint has somewhere to load into."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=tuple(cfg.betas), fused=True)
    for p in model.parameters():
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


class Offload:
    """Adam's moments wait in host memory while somebody else needs the device's. Twice their bytes move in a step."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        import torch
        from torch.distributed.tensor import DTensor

        wholes = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        self._locals = [x.to_local() if isinstance(x, DTensor) else x for x in wholes]
        self._pinned = any(x.is_cuda for x in self._locals)
        self._wait = torch.cuda.synchronize if self._pinned else lambda: None
        self._hosts: list[torch.Tensor] = []  # made when first needed, then kept: pinning takes time
        self.is_away = False

    def away(self) -> None:
        """To the host. The tensors stay, without memory, until they are back."""
        import torch

        if not self.is_away:
            self._hosts = self._hosts or [
                torch.empty_like(x, device="cpu", pin_memory=self._pinned) for x in self._locals
            ]
            for local, host in zip(self._locals, self._hosts, strict=True):
                host.copy_(local, non_blocking=True)
            self._wait()
            for local in self._locals:
                local.untyped_storage().resize_(0)
            self.is_away = True

    def back(self) -> None:
        """Before a step or a checkpoint."""
        if self.is_away:
            for local, host in zip(self._locals, self._hosts, strict=True):
                local.untyped_storage().resize_(host.nbytes)
                local.copy_(host, non_blocking=True)
            self._wait()
            self.is_away = False


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything of model and optimiser that a checkpoint holds, by name; the tensors themselves, not copies."""
    from thinkmid.model import weights

    weights.reshard(model)
    out = {}
    for name, p in model.named_parameters():
        out[f"model.{name}"] = p.detach()
        out |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return out
