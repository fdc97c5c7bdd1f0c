"""Which path an op takes. Chosen from the device and what is installed; said once, stored with the run."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def attention_path(device: torch.device) -> str:
    """ "sdpa" on CPU, "flash-attn" on a GPU where that package is installed, else "torch-varlen"."""
    if device.type == "cpu":
        return "sdpa"
    return "flash-attn" if importlib.util.find_spec("flash_attn") else "torch-varlen"


@cache
def has_cpp() -> bool:
    """Whether csrc was built; without a compiler the torch twins do its work, slower."""
    return importlib.util.find_spec("thinkmid._csrc") is not None


def row_path(x: Tensor) -> str:
    """ "triton" on a GPU, "cpp" for fp32 on the CPU where csrc was built, else "torch"."""
    if x.is_cuda:
        return "triton"
    return "cpp" if x.dtype == torch.float32 and x.device.type == "cpu" and has_cpp() else "torch"


def paths(device: torch.device) -> dict[str, str]:
    """What runs on a device, for the record."""
    rows = row_path(torch.empty(0, device=device))
    if rows == "cpp":
        from thinkmid import _csrc

        rows = f"cpp, {_csrc.isa()}"
    return {"attention": attention_path(device), "rows": rows}


def address(x: Tensor | None) -> int:
    """For csrc, which takes plain pointers; 0 stands for None. The caller keeps x alive."""
    return 0 if x is None else x.data_ptr()
