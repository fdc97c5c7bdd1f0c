"""Packed attention of groups: keys of a prefix shared or stored for each reply, every path that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.measure.row import Row, free, median_s, peak_bytes
from benchmarks.measure.sizes import Family, Sizes
from benchmarks.measure.training import groups_of, units_of
from thinkmid.data.pack import duplicated, make_pack
from thinkmid.model.attention import attend_pack
from thinkmid.types import Pack

SHARED, COPIED = "shared keys", "keys of each reply"


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    for family in sizes.attention:
        yield from errors(family, sizes, device)
        for layout, pack in packs(family, device).items():
            for path in paths(device):
                yield from times(f"{family.label} {layout}, {path}", path, pack, sizes, device)


def paths(device: torch.device) -> list[str]:
    """impl of attend_pack; the torch path also without a fixed order of sums."""
    if device.type != "cuda":
        return ["sdpa"]
    installed = {"flash-attn-3": "flash_attn_interface", "flash-attn": "flash_attn"}
    found = [impl for impl, module in installed.items() if importlib.util.find_spec(module)]
    return [*found, "torch-varlen", "torch-varlen, any order", "sdpa"]


def packs(family: Family, device: torch.device) -> dict[str, Pack]:
    units = units_of(groups_of(family, vocab=100))
    copies = [part for unit in units for part in duplicated(unit)]
    return {SHARED: make_pack(units, device), COPIED: make_pack(copies, device)}


def attention_of(pack: Pack, path: str) -> Callable:
    impl, _, order = path.partition(", ")
    return attend_pack(pack, impl=impl, deterministic=order != "any order")


def inputs(pack: Pack, sizes: Sizes, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, bf16."""
    heads, kv_heads, size = sizes.heads
    rng = torch.Generator(device).manual_seed(0)
    shapes = [(len(pack.tokens), n, size) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (torch.randn(s, device=device, dtype=torch.bfloat16, generator=rng) for s in shapes)
    return [*(x.requires_grad_() for x in (q, k, v)), do]


def times(name: str, path: str, pack: Pack, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    q, k, v, do = inputs(pack, sizes, device)
    attend = attention_of(pack, path)

    def both():
        return torch.autograd.grad(attend(0, q, k, v), (q, k, v), do)

    try:
        with torch.no_grad():
            yield Row(
                what=f"{name}: forward", value=median_s(lambda: attend(0, q, k, v), device, sizes.repeats), unit="s"
            )
        peak = peak_bytes(both, device)
        s = median_s(both, device, sizes.repeats)
    except torch.OutOfMemoryError:
        free(device)
        yield Row(what=f"{name}: forward and backward", value=None, unit="s", note="out of memory")
        return
    yield Row(what=f"{name}: forward and backward", value=s, unit="s", note=f"peak {peak / 1e9:.2f} GB")


def errors(family: Family, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Of output and gradients in bf16 against fp64, over those of sdpa in bf16: at most about 2 is no worse."""
    pack = packs(family, device)[SHARED]
    q, k, v, do = inputs(pack, sizes, device)
    kv_heads = k.shape[1]
    few = [q[:, : q.shape[1] // kv_heads], k[:, :1], v[:, :1], do[:, : q.shape[1] // kv_heads]]  # one key head

    def results(path, dtype):
        a, b, c = (x.detach().to(dtype).requires_grad_() for x in few[:3])
        out = attention_of(pack, path)(0, a, b, c)
        return [out.detach(), *torch.autograd.grad(out, (a, b, c), few[3].to(dtype))]

    exact = results("sdpa", torch.float64)
    plain = [(x.double() - y).norm() for x, y in zip(results("sdpa", torch.bfloat16), exact, strict=True)]
    for path in paths(device):
        if path == "sdpa" and device.type == "cuda":
            continue
        ours = [(x.double() - y).norm() for x, y in zip(results(path, torch.bfloat16), exact, strict=True)]
        worst = max(float(mine / theirs) for mine, theirs in zip(ours, plain, strict=True))
        yield Row(what=f"{family.label} {path}: error over sdpa's", value=worst, unit="1")
