"""PROGRAM: the paper's rows in miniature, `python -m thinkmid.mini.sweep --seeds 0,1`: all stages, each starting point
before and after RLPT, evaluated on the five sets. Interrupted, the same command goes on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError

SETS = ("1-step", "2-step", "3-step", "4-step", "held-out-a")
LABELS = {
    "base": "base",
    "raw": "SFT(raw)",
    "think": "SFT(think)",
    "rlmt-short": "SFT(think) + RLMT, 60 steps",
    "rlmt": "SFT(think) + RLMT, 170 steps",
}


def stages(home: Path, seed: int) -> dict[str, tuple[list[str], str]]:
    """Name -> (command, file that is there when it is done), in the order in which they build on one another."""
    data, sets = home / "data", [f"{name}:questions={home}/data/questions-{name}.jsonl" for name in SETS]

    def train(program, toml, name, start, *flags, paths=""):
        flags = [*flags, *([f"--data.paths={paths}"] if paths else [])]
        own = [f"--run.folder={home / name}", f"--run.seed={seed}"]
        own += [f"--model.folder={home / start / 'export'}"] if start else []
        return [f"thinkmid.train.{program}", f"configs/{toml}.toml", *own, *flags], f"{name}/export/thinkmid.json"

    quiet = ["--data.val_paths=", "--data.probe_paths="]
    texts = f"--fresh.tokenizer_data={data}/general.jsonl,{data}/sft-think.jsonl"
    out = {
        "data": (["thinkmid.mini.make", str(data), "--seed", str(seed)], "data/manifest.json"),
        "base": train("sft", "mini-base", "base", "", texts, paths=f"{data}/general.jsonl"),
        "raw": train("sft", "mini-sft", "raw", "base", *quiet, paths=f"{data}/sft-raw.jsonl"),
        "think": train("sft", "mini-sft", "think", "base", *quiet, paths=f"{data}/sft-think.jsonl"),
    }
    for name, steps in (("rlmt-short", 60), ("rlmt", 170)):
        flags = [f"--run.steps={steps}", "--run.rollouts_every=0"]
        out[name] = train("rlmt", "mini-rlmt", name, "think", *flags, paths=f"{data}/rl.jsonl")
    for name in LABELS:
        flags = [f"--data.path={data}/questions-train.jsonl", "--run.rollouts_every=0"]
        out[f"{name}+rlpt"] = train("rlpt", "mini-rlpt", f"{name}+rlpt", name, *flags)
    for name in [row for label in LABELS for row in (label, f"{label}+rlpt")]:
        flags = [f"--model.folder={home / name / 'export'}", f"--data.sets={','.join(sets)}", f"--run.seed={seed}"]
        command = ["thinkmid.eval.run", "configs/mini-eval.toml", f"--run.folder={home / 'eval' / name}", *flags]
        out[f"eval {name}"] = command, f"eval/{name}/results.json"
    return out


def run(home: Path, seed: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    for name, (command, result) in stages(home, seed).items():
        if (home / result).exists():
            continue
        began = time.monotonic()
        print(f"seed {seed}: {name} ...", end="", flush=True)
        with (home / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, "-m", *command], stdout=log, stderr=log, env=os.environ)
        if done.returncode:
            raise UserError(f"{home}/log.txt: {name} ended with code {done.returncode}; the same command goes on")
        print(f" {time.monotonic() - began:.0f} s", flush=True)


def table(homes: dict[int, Path]) -> dict[str, dict]:
    """Row -> before and after RLPT: means over the sets, by seed."""
    rows = {}
    for name, label in LABELS.items():
        cells = {}
        for when, row in (("before", name), ("after", f"{name}+rlpt")):
            found = {
                seed: json.loads((home / "eval" / row / "results.json").read_text()) for seed, home in homes.items()
            }
            cells[when] = {
                "mean": {seed: r["mean"] for seed, r in found.items()},
                "sets": {s: [r["sets"][s]["mean"] for r in found.values()] for s in SETS},
                "thinking": [sum(r["sets"][s]["mean_think"] for s in SETS) / len(SETS) for r in found.values()],
            }
        rows[label] = cells
    return rows


def show(rows: dict[str, dict]) -> str:
    """A Markdown table; the mean over seeds, each seed behind it."""
    lines = ["| | before RLPT | by seed | after RLPT | by seed |", "|---|---|---|---|---|"]
    for label, cells in rows.items():
        parts = []
        for when in ("before", "after"):
            means = list(cells[when]["mean"].values())
            parts += [f"**{sum(means) / len(means):.3f}**", " ".join(f"{m:.3f}" for m in means)]
        lines.append(f"| {label} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m thinkmid.mini.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--seeds", default="0", help="commas between; a seed decides corpus, weights, order and draws")
    args = parser.parse_args(argv)
    homes = {int(seed): args.out / f"seed-{int(seed)}" for seed in args.seeds.split(",")}
    for seed, home in homes.items():
        run(home, seed)
    rows = table(homes)
    (args.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(show(rows))


if __name__ == "__main__":
    config.run(main)
