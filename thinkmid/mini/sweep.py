"""PROGRAM: the paper's rows in miniature, `python -m thinkmid.mini.sweep --seeds 0,1 --jobs 2`: every stage of every
row, before and after RLPT, evaluated on all sets. Interrupted, the same command goes on. Ends with a table and picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.log import read_rows, write_whole
from thinkmid.mini import world

RLMT_STEPS = (60, 170, 400)
SFT_STEPS, SFT_TOKENS = 1700, 1024  # of configs/mini-sft.toml: steps, tokens of one
PREFIX = 73  # tokens of the longest prefix of RLMT
ROWS = {
    "base": "base",
    "raw": "SFT(raw)",
    "think": "SFT(think)",
    **{f"rlmt-{n}": f"SFT(think) + RLMT, {n} steps" for n in RLMT_STEPS},
}
CONTROLS = {
    "think-long": f"control: SFT(think), longer by the compute of {RLMT_STEPS[-1]} steps of RLMT",
    "worked": "control: SFT(think), every thought worked through",
    "worked-rlmt": f"control: the same + RLMT, {RLMT_STEPS[1]} steps",
}
LABELS = ROWS | CONTROLS
PROBED = ("think", f"rlmt-{RLMT_STEPS[-1]}")  # whose thoughts are replaced


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    command: list[str]  # arguments of python -m
    result: str  # the file, under the seed's folder, that is there when it is done


def stages(home: Path, seed: int) -> Iterator[Stage]:
    """In the order in which they build on one another; each is made when those before it are done."""
    data, worked = home / "data", home / "data-worked"

    def train(program: str, toml: str, name: str, start: str, paths: str, *flags: str) -> Stage:
        own = [f"--run.folder={home / name}", f"--run.seed={seed}", "--run.rollouts_every=0", f"--data.{paths}"]
        own += [f"--model.folder={home / start / 'export'}"] if start else []
        command = [f"thinkmid.train.{program}", f"configs/{toml}.toml", *own, *flags]
        return Stage(name=name, command=command, result=f"{name}/export/thinkmid.json")

    def make(folder: Path, *flags: str) -> Stage:
        command = ["thinkmid.mini.make", str(folder), "--seed", str(seed), *flags]
        return Stage(name=folder.name, command=command, result=f"{folder.name}/manifest.json")

    def sft(name: str, paths: str, *flags: str) -> Stage:
        return train(
            "sft", "mini-sft", name, "base", f"paths={paths}", "--data.val_paths=", "--data.probe_paths=", *flags
        )

    def rlmt(name: str, start: str, steps: int, folder: Path) -> Stage:
        flags = [f"--run.steps={steps}", "--data.val_paths=", "--data.val_every=0"]
        return train("rlmt", "mini-rlmt", name, start, f"paths={folder}/rl.jsonl", *flags)

    yield make(data)
    # a tokenizer that knows the signs of thoughts too
    texts = f"--fresh.tokenizer_data={data}/general.jsonl,{data}/sft-think.jsonl"
    yield train("sft", "mini-base", "base", "", f"paths={data}/general.jsonl", texts)
    yield sft("raw", f"{data}/sft-raw.jsonl")
    yield sft("think", f"{data}/sft-think.jsonl")
    for steps in RLMT_STEPS:
        yield rlmt(f"rlmt-{steps}", "think", steps, data)
    longer = SFT_STEPS + as_sft_steps(home / f"rlmt-{RLMT_STEPS[-1]}")
    yield sft("think-long", f"{data}/sft-think.jsonl,{data}/rl.jsonl", f"--run.steps={longer}")
    yield make(worked, "--mix", "0", "0", "1")
    yield sft("worked", f"{worked}/sft-think.jsonl")
    yield rlmt("worked-rlmt", "worked", RLMT_STEPS[1], worked)
    for name in LABELS:
        yield train("rlpt", "mini-rlpt", f"{name}+rlpt", name, f"path={data}/questions-train.jsonl")
    for row in [row for name in LABELS for row in (name, f"{name}+rlpt")]:
        yield asked(home, "run", row, data, seed)
    for name in PROBED:
        yield asked(home, "thoughts", name, data, seed)


def asked(home: Path, program: str, row: str, data: Path, seed: int) -> Stage:
    sets = ",".join(f"{name}:questions={data}/questions-{name}.jsonl" for name in world.SETS)
    flags = [f"--model.folder={home / row / 'export'}", f"--data.sets={sets}", f"--run.seed={seed}", "--run.samples=2"]
    command = [f"thinkmid.eval.{program}", "configs/mini-eval.toml", f"--run.folder={home / 'eval' / row}", *flags]
    result = {"run": "results.json", "thoughts": "thoughts.json"}[program]
    return Stage(name=f"{program} {row}", command=command, result=f"eval/{row}/{result}")


def as_sft_steps(rlmt: Path) -> int:
    """SFT steps that cost what this RLMT run did, in passes of a token: one forward, two backward."""
    rows = read_rows(rlmt / "metrics.jsonl")
    passes = sum(row["groups"] * PREFIX + row["generated_tokens"] + 3 * row["trunk_tokens"] for row in rows)
    return round(passes / (3 * SFT_TOKENS))


def run(home: Path, seed: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    for stage in stages(home, seed):
        if (home / stage.result).exists():
            continue
        began = time.monotonic()
        with (home / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, "-m", *stage.command], stdout=log, stderr=log, env=os.environ)
        if done.returncode:
            raise UserError(f"{home}/log.txt: {stage.name} ended with code {done.returncode}; the same command goes on")
        print(f"seed {seed}: {stage.name}, {time.monotonic() - began:.0f} s", flush=True)


def seeds_of(words: str) -> list[int]:
    if not all(word.strip().isdecimal() for word in words.split(",")):
        raise UserError(f"--seeds {words}: not whole numbers with commas between")
    return list(dict.fromkeys(map(int, words.split(","))))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m thinkmid.mini.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="commas between; a seed decides corpus, weights, order and draws")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        choices=range(1, 65),
        metavar="JOBS",
        help="seeds at a time; set OMP_NUM_THREADS to share the cores",
    )
    args = parser.parse_args(argv)
    if not Path("configs/mini-rlmt.toml").exists():
        raise UserError("configs/mini-rlmt.toml: no such file; the sweep runs from the project's folder")
    homes = {seed: args.out / f"seed-{seed}" for seed in seeds_of(args.seeds)}
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(run, home, seed) for seed, home in homes.items()]:
            done.result()

    from thinkmid.mini import figures, results

    found = results.collect(homes, ROWS, CONTROLS, PROBED)
    write_whole(args.out / "table.json", json.dumps(found, indent=1) + "\n")
    (args.out / "table.md").write_text(results.markdown(found))
    print(results.markdown(found))
    print(figures.draw(homes, found, ROWS, RLMT_STEPS, args.out))


if __name__ == "__main__":
    config.run(main)
