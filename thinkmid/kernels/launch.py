"""Which path an op takes. Chosen from the device and what is installed; said once, stored with the run."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def attention_path(device: torch.device) -> str:
    """ "sdpa" on CPU, "flash-attn" on a GPU where that package is installed, else "torch-varlen"."""
    if device.type == "cpu":
        return "sdpa"
    return "flash-attn" if importlib.util.find_spec("flash_attn") else "torch-varlen"
