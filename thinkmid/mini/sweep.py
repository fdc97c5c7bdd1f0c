"""PROGRAM: the paper's rows in miniature, `python -m thinkmid.mini.sweep --seeds 0,1 --jobs 2`: every stage of every
row, before and after RLPT, evaluated on all sets. A stage begins as soon as those that it builds on are done.
Interrupted, the same command goes on. Ends with a table and picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.files import read_rows, write_whole
from thinkmid.mini import world

RLMT_STEPS = (100, 200, 400)
SFT_STEPS, SFT_TOKENS = 2000, 1024  # of configs/mini-sft.toml: steps, tokens of one
PREFIX = 76  # tokens of the longest prefix of RLMT
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
    """One program of a seed. Files lie under the seed's folder."""

    name: str
    command: list[str]  # arguments of python -m
    needs: tuple[str, ...]  # files that other stages leave
    result: str  # the file that is there when it is done
    later: Callable[[], list[str]] = list  # arguments that depend on what other stages did


def stages(home: Path, seed: int) -> Iterator[Stage]:
    """A stage comes after those that it builds on."""
    data, worked, longest = home / "data", home / "data-worked", f"rlmt-{RLMT_STEPS[-1]}"

    def train(program: str, toml: str, start: str, folder: Path, paths: str, name: str, *flags: str, after=(), **more):
        own = [f"--run.folder={home / name}", f"--run.seed={seed}", "--run.rollouts_every=0", f"--data.{paths}"]
        own += [f"--model.folder={home / start / 'export'}"] if start else []
        command = [f"thinkmid.train.{program}", f"configs/{toml}.toml", *own, *flags]
        needs = (written(folder), *([exported(start)] if start else []), *after)
        return Stage(name=name, command=command, needs=needs, result=exported(name), **more)

    def make(folder: Path, *flags: str) -> Stage:
        command = ["thinkmid.mini.make", str(folder), "--seed", str(seed), *flags]
        return Stage(name=folder.name, command=command, needs=(), result=written(folder))

    def sft(name: str, folder: Path, *files: str, **more) -> Stage:
        paths = "paths=" + ",".join(f"{folder}/{file}.jsonl" for file in files)
        unseen = ["--data.val_paths=", "--data.probe_paths="]
        return train("sft", "mini-sft", "base", folder, paths, name, *unseen, **more)

    def rlmt(name: str, start: str, steps: int, folder: Path) -> Stage:
        flags = [f"--run.steps={steps}", "--data.val_paths=", "--data.val_every=0"]
        return train("rlmt", "mini-rlmt", start, folder, f"paths={folder}/rl.jsonl", name, *flags)

    yield make(data)
    # a tokenizer that knows the signs of thoughts too
    texts = f"--fresh.tokenizer_data={data}/general.jsonl,{data}/sft-think.jsonl"
    yield train("sft", "mini-base", "", data, f"paths={data}/general.jsonl", "base", texts)
    yield sft("raw", data, "sft-raw")
    yield sft("think", data, "sft-think")
    for steps in RLMT_STEPS:
        yield rlmt(f"rlmt-{steps}", "think", steps, data)
    longer = lambda: [f"--run.steps={SFT_STEPS + as_sft_steps(home / longest)}"]  # noqa: E731
    yield sft("think-long", data, "sft-think", "rl", after=[exported(longest)], later=longer)
    yield make(worked, "--mix", "0", "0", "1")
    yield sft("worked", worked, "sft-think")
    yield rlmt("worked-rlmt", "worked", RLMT_STEPS[1], worked)
    for name in LABELS:
        yield train("rlpt", "mini-rlpt", name, data, f"path={data}/questions-train.jsonl", f"{name}+rlpt")
    for row in [row for name in LABELS for row in (name, f"{name}+rlpt")]:
        yield asked(home, "run", row, data, seed)
    for name in PROBED:
        yield asked(home, "thoughts", name, data, seed)


def asked(home: Path, program: str, row: str, data: Path, seed: int) -> Stage:
    sets = ",".join(f"{name}:questions={data}/questions-{name}.jsonl" for name in world.SETS)
    flags = [f"--model.folder={home / row / 'export'}", f"--data.sets={sets}", f"--run.seed={seed}"]
    flags += ["--run.samples=2", "--run.ks=1"]
    command = [f"thinkmid.eval.{program}", "configs/mini-eval.toml", f"--run.folder={home / 'eval' / row}", *flags]
    results, replaced = f"eval/{row}/results.json", f"eval/{row}/thoughts.json"
    after, result = {"run": ([], results), "thoughts": ([results], replaced)}[program]  # the latter reads generations
    needs = (written(data), exported(row), *after)
    return Stage(name=f"{program} {row}", command=command, needs=needs, result=result)


def exported(name: str) -> str:
    return f"{name}/export/thinkmid.json"


def written(folder: Path) -> str:
    return f"{folder.name}/manifest.json"


def as_sft_steps(rlmt: Path) -> int:
    """SFT steps that cost what this RLMT run did, in passes of a token: one forward, two backward."""
    rows = read_rows(rlmt / "metrics.jsonl")
    try:
        passes = sum(row["groups"] * PREFIX + row["generated_tokens"] + 3 * row["trunk_tokens"] for row in rows)
        return round(passes / (3 * SFT_TOKENS))
    except (KeyError, TypeError) as error:
        raise UserError(f"{rlmt}/metrics.jsonl: not what RLMT wrote ({error!r})") from None


def run(homes: dict[int, Path], jobs: int) -> None:
    """All stages of all seeds that are not done yet, `jobs` at a time."""
    all_stages = [(seed, home, stage) for seed, home in homes.items() for stage in stages(home, seed)]
    todo = [(seed, home, stage) for seed, home, stage in all_stages if not (home / stage.result).exists()]
    running: set[Future] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while todo or running:
            ready = [one for one in todo if all((one[1] / need).exists() for need in one[2].needs)]
            for one in ready[: jobs - len(running)]:
                todo.remove(one)
                running.add(pool.submit(work, *one))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for one in done:
                print(f"{one.result()}; {len(todo) + len(running)} of {len(all_stages)} to do", flush=True)


def work(seed: int, home: Path, stage: Stage) -> str:
    """Runs a stage to its end. Returns what it took, in words."""
    home.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (home / "log.txt").open("a") as log:
        command = [sys.executable, "-m", *stage.command, *stage.later()]
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(f"{home}/log.txt: {stage.name} ended with code {done.returncode}; the same command goes on")
    return f"seed {seed}: {stage.name}, {time.monotonic() - began:.0f} s"


def seeds_of(words: str) -> list[int]:
    if not all(word.strip().isdecimal() and len(word) < 19 for word in words.split(",")):
        raise UserError(f"--seeds {words[:80]}: not whole numbers with commas between")
    return list(dict.fromkeys(map(int, words.split(","))))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m thinkmid.mini.sweep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="commas between; a seed decides corpus, weights, order and draws")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        choices=range(1, 1025),
        metavar="JOBS",
        help="stages at a time, each on OMP_NUM_THREADS cores",
    )
    args = parser.parse_args(argv)
    if not Path("configs/mini-rlmt.toml").exists():
        raise UserError("configs/mini-rlmt.toml: no such file; the sweep runs from the project's folder")
    homes = {seed: args.out / f"seed-{seed}" for seed in seeds_of(args.seeds)}
    run(homes, args.jobs)

    from thinkmid.mini import figures, results

    found = results.collect(homes, ROWS, CONTROLS, PROBED)
    write_whole(args.out / "table.json", json.dumps(found, indent=1) + "\n")
    (args.out / "table.md").write_text(results.markdown(found))
    print(results.markdown(found))
    print(figures.draw(homes, found, ROWS, RLMT_STEPS, args.out))


if __name__ == "__main__":
    config.run(main)
