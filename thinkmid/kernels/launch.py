"""Which path an op takes, chosen from device, dtype and what is installed, and the modules behind the paths."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def has(module: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(module) is not None


def attention_path(q: Tensor) -> str:
    """ "sdpa" on CPU and for fp32 and fp64; on a GPU "flash-attn-3" (Hopper alone) or "flash-attn" where that is
    installed, else "torch-varlen"."""
    # the kernels of all three take 16 bits alone
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if has("flash_attn_interface") and torch.cuda.get_device_capability(q.device)[0] == 9:
        return "flash-attn-3"
    return "flash-attn" if has("flash_attn") else "torch-varlen"


def has_cpp() -> bool:
    """Whether csrc was built; without a compiler the torch twins do its work, slower."""
    return has("thinkmid._csrc")


def row_path(x: Tensor) -> str:
    """ "triton" on a GPU but for fp64, "cpp" for fp32 on the CPU where csrc was built, else "torch"."""
    if x.is_cuda:
        return "torch" if x.dtype == torch.float64 else "triton"
    return "cpp" if x.dtype == torch.float32 and x.device.type == "cpu" and has_cpp() else "torch"


def op_path(x: Tensor) -> str:
    """row_path for the model's ops: "torch" also under a compiler, which fuses the formula itself."""
    return "torch" if torch.compiler.is_compiling() or x.dtype == torch.float64 else row_path(x)


def paths(device: torch.device) -> dict[str, str]:
    """The paths of attention and of the row ops on a device, in words, for logs and the run folder."""
    half, full = (attention_path(torch.empty(0, dtype=t, device=device)) for t in (torch.bfloat16, torch.float32))
    attention = half if half == full else f"{half}, in fp32 {full}"
    rows = row_path(torch.empty(0, device=device))
    if rows == "cpp":
        rows = f"cpp, {cpp().isa()}"
    return {"attention": attention, "rows": rows}


def slow_dtypes(device: torch.device, dtypes: Mapping[str, str]) -> list[str]:
    """A line for each dtype, by its key in the config, that this device computes far slower than fp32."""
    has_bf16 = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = [key for key, dtype in dtypes.items() if dtype == "bfloat16" and not has_bf16]
    # measured on AVX2: a step of SmolLM2-135M takes 96 to 106 s instead of 8
    return [
        f"{key} bfloat16: this CPU has no bf16 units and takes some ten times as long; --{key} float32" for key in slow
    ]


def cpp() -> Any:
    """csrc, compiled. Imported when a path needs it, as are the Triton modules: neither need be there."""
    return importlib.import_module("thinkmid._csrc")


def triton(name: str) -> Any:
    """The module of Triton kernels of that name in thinkmid.kernels.gpu."""
    return importlib.import_module(f"thinkmid.kernels.gpu.{name}")


def address(x: Tensor | None) -> int:
    """Pointer to x for csrc, 0 for None. The caller keeps x alive."""
    return 0 if x is None else x.data_ptr()
