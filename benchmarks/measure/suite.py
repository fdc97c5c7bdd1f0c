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

OUTCOMES = ("passed", "failed", "error", "skipped")
# a line of pytest -v, alone or from a worker of pytest-xdist
LINE = re.compile(r"(?:(?P<test>tests/gpu/.+?) )?(?P<outcome>PASSED|FAILED|ERROR|SKIPPED)(?: (?P<of>tests/gpu/.+))?")


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    # not this process: a kernel that spoils its CUDA context must not spoil ours
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-o", "addopts=", "-v", "--tb=short"]
    log = folder / "tests-gpu.txt"
    note = ""
    with log.open("w", encoding="utf-8") as file:
        try:
            env = os.environ | {"OMP_NUM_THREADS": "2"}
            flags = workers(sizes.test_workers)
            subprocess.run([*command, *flags], stdout=file, stderr=file, env=env, check=False, timeout=sizes.tests_s)
        except subprocess.TimeoutExpired:
            note = f"stopped after {sizes.tests_s:.0f} s"
    found = outcomes(log.read_text(encoding="utf-8"))
    if not found:
        raise RuntimeError(f"no test ran: {' '.join(log.read_text(encoding='utf-8').split())[-300:]}")
    for outcome in OUTCOMES:
        tests = [test for test, how in found.items() if how == outcome]
        names = "; ".join(tests[:20]) if outcome in ("failed", "error") else note
        yield Row(what=f"tests: {outcome}", value=len(tests), unit="", note=names)


def outcomes(said: str) -> dict[str, str]:
    """Test -> what became of it, as far as pytest came."""
    found = {}
    for match in filter(None, map(LINE.search, said.splitlines())):
        if test := match["of"] or match["test"]:
            found[test.split(" - ")[0]] = match["outcome"].lower()
    return found


def workers(num: int) -> list[str]:
    """Kernels are compiled for every shape: several processes, where pytest-xdist is there."""
    return ["-n", str(num)] if num > 1 and importlib.util.find_spec("xdist") else []
