"""AdamW, what a checkpoint holds of it, and a place for its moments while the engine samples."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from thinkmid.model import weights
from thinkmid.model.transformer import Transformer
from thinkmid.train.config import OptimConfig


def adamw(model: torch.nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """The optimiser with its state in place from the start, so that a checkpoint has somewhere to load into."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), fused=True)
    for p in trained:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


class Offload:
    """Adam's moments wait in host memory while the engine needs the device's. Twice their bytes move in a step."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        wholes = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        self._locals = [x.to_local() if isinstance(x, DTensor) else x for x in wholes]
        self._pinned = any(x.is_cuda for x in self._locals)
        self._hosts: list[torch.Tensor] = []  # made when first needed, then kept: pinning takes time
        self.is_offloaded = False

    def offload(self) -> None:
        """To the host. The tensors stay, without memory, until they are restored."""
        if not self.is_offloaded:
            self._hosts = self._hosts or [
                torch.empty_like(x, device="cpu", pin_memory=self._pinned) for x in self._locals
            ]
            for local, host in zip(self._locals, self._hosts, strict=True):
                host.copy_(local, non_blocking=True)
            self._synchronize()
            for local in self._locals:
                local.untyped_storage().resize_(0)
            self.is_offloaded = True

    def restore(self) -> None:
        """Back to the device, before a step or a checkpoint."""
        if self.is_offloaded:
            for local, host in zip(self._locals, self._hosts, strict=True):
                local.untyped_storage().resize_(host.nbytes)
                local.copy_(host, non_blocking=True)
            self._synchronize()
            self.is_offloaded = False

    def _synchronize(self) -> None:
        if self._pinned:
            torch.cuda.synchronize()


def state_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything of model and optimiser that a checkpoint holds, by name; the tensors themselves, not copies. Frozen
    weights are in the folder that the run started from."""
    weights.reshard(model)
    out = {}
    for name, p in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        out[f"model.{name}"] = p.detach()
        out |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    return out
