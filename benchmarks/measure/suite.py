"""tests/gpu: kernels, ops, attention and head against fp64 on this device. On a CPU they are collected and skipped."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure.row import Row
from benchmarks.measure.sizes import Sizes

OUTCOMES = ("passed", "failed", "errors", "skipped")


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    # not this process: a kernel that spoils its CUDA context must not spoil ours
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "--no-header",
        "--tb=line",
        "-rfE",
        *workers(sizes.test_workers),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    with open(folder / "tests-gpu.txt", "w+", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env, check=False)
        log.seek(0)
        said = log.read()
    counts = {word.rstrip("s"): int(num) for num, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", said)}
    if not counts:
        raise RuntimeError(f"pytest gave no summary: {' '.join(said.split())[-300:]}")
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    for outcome in OUTCOMES:
        note = "; ".join(names[:20]) if outcome == "failed" else ""
        yield Row(what=f"tests {outcome}", value=counts.get(outcome.rstrip("s"), 0), unit="", note=note)


def workers(num: int) -> list[str]:
    """Kernels are compiled for every shape: several processes, where pytest-xdist is there."""
    return ["-n", str(num)] if num > 1 and importlib.util.find_spec("xdist") else []
