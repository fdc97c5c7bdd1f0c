"""Clocks and ceilings of this machine: product, copies, memory that is gone before the first tensor."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure.row import Row, median_s, settle
from benchmarks.measure.sizes import Sizes


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    if device.type == "cuda":
        torch.zeros((), device=device)
        free, total = torch.cuda.mem_get_info(device)
        yield Row(what="memory taken by the context", value=total - free, unit="B")
    n = sizes.square
    # random data: products of zeros run faster than any real ones
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield Row(what="product bf16", value=2 * n**3 / median_s(lambda: a @ b, device, sizes.repeats), unit="FLOP/s")
    if device.type == "cuda":
        yield from clocks(a, b, device)
    source = torch.ones(sizes.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied = median_s(lambda: target.copy_(source), device, sizes.repeats)
    yield Row(what="copy", value=2 * source.nbytes / copied, unit="B/s", note="bytes read and written")
    host = torch.ones(sizes.upload_bytes // 4)
    target = target[: len(host)]
    s = median_s(lambda: target.copy_(host), device, sizes.repeats)
    yield Row(what="host to device, pageable", value=host.nbytes / s, unit="B/s")
    if device.type == "cuda":
        host = host.pin_memory()
    s = median_s(lambda: target.copy_(host, non_blocking=True), device, sizes.repeats)
    yield Row(what="host to device, pinned", value=host.nbytes / s, unit="B/s")


def clocks(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> Iterator[Row]:
    """Of a card that is busy: read while half a second of products is under way."""
    seconds = median_s(lambda: a @ b, device, 3)
    for _ in range(int(0.5 / seconds)):
        a @ b
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
    settle(device)
    if found:
        sm, memory, draw, limit = (float(x) if x.strip()[:1].isdigit() else float("nan") for x in found[0].split(","))
        yield Row(what="SM clock under load", value=sm * 1e6, unit="Hz")
        yield Row(what="memory clock under load", value=memory * 1e6, unit="Hz")
        yield Row(what="power draw under load", value=draw, unit="W", note=f"limit {limit:.0f} W")
