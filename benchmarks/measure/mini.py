"""`make rlmt`'s three stages on this device with the embedded engine: the programs themselves, a few steps of each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure.row import Row
from benchmarks.measure.sizes import Sizes

STAGES = {"base": ("sft", "mini-base"), "SFT": ("sft", "mini-sft"), "RLMT": ("rlmt", "mini-rlmt")}
# a small world: a few steps do not see more of it
WORLD = {"general": 800, "documents": 800, "rl": 200, "heldout": 64, "questions": 8, "train-questions": 8}


def run(sizes: Sizes, device: torch.device, folder: Path) -> Iterator[Row]:
    home, root = (folder / "mini").resolve(), Path(__file__).parents[2]
    # the configurations' paths are relative to a folder runs/
    home.mkdir(parents=True, exist_ok=True)
    called(home, root, ["thinkmid.mini.make", "runs/mini-data", *(f"--{kind}={num}" for kind, num in WORLD.items())])
    for (stage, (program, name)), steps in zip(STAGES.items(), sizes.mini_steps, strict=True):
        flags = ["--run.fresh", "true", "--run.steps", str(steps), "--run.save_every", "0"]
        called(home, root, [f"thinkmid.train.{program}", str(root / "configs" / f"{name}.toml"), *flags])
        rows = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == steps, f"{name}: {len(rows)} of {steps} steps"
        s = statistics.median(row["step_s"] for row in rows[len(rows) // 2 :])
        more = "reward {reward:.3f}, gap {probe_gap_mean:.1e}" if "probe_gap_mean" in rows[0] else "loss {loss:.4f}"
        yield Row(what=f"{stage}: step", value=s, unit="s", note=more.format(**{**rows[0], **rows[-1]}))


def called(home: Path, root: Path, argv: list[str]) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", *argv], cwd=home, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:2])} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
