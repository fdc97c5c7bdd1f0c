"""The paper's rows in miniature, `python -m benchmarks.mini --seeds 0,1 --jobs 2`: every stage of every
row, before and after RLPT, evaluated on all sets. A stage begins as soon as those that it builds on are done.
Interrupted, the same command resumes. Ends with a table and picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
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
    longer_by: str = ""  # name of the RLMT run whose compute is added to the steps of SFT


def stages(home: Path, seed: int) -> Iterator[Stage]:
    """A stage comes after those that it builds on."""
    return Seed(home, seed).stages()


@dataclass(frozen=True)
class Seed:
    """Stages of one seed, with their files in its folder."""

    home: Path
    seed: int

    def stages(self) -> Iterator[Stage]:
        data, worked, longest = "data", "data-worked", f"rlmt-{RLMT_STEPS[-1]}"
        yield self.make(data)
        # a tokenizer that knows the signs of thoughts too
        texts = f"--fresh.tokenizer_data={self.files(data, 'general', 'sft-think')}"
        yield self.train("base", "base", "", data, f"--data.paths={self.files(data, 'general')}", texts)
        yield self.sft("raw", data, "sft-raw")
        yield self.sft("think", data, "sft-think")
        for steps in RLMT_STEPS:
            yield self.rlmt(f"rlmt-{steps}", "think", data, steps)
        longer = self.sft("think-long", data, "sft-think", "rl")
        yield replace(longer, needs=(*longer.needs, exported(longest)), longer_by=longest)
        yield self.make(worked, "--mix", "0", "0", "1")
        yield self.sft("worked", worked, "sft-think")
        yield self.rlmt("worked-rlmt", "worked", worked, RLMT_STEPS[1])
        for name in LABELS:
            path = f"--data.path={self.files(data, 'questions-train')}"
            yield self.train("rlpt", f"{name}+rlpt", name, data, path)
        for name in LABELS:
            yield self.evaluate(name, data)
            yield self.evaluate(f"{name}+rlpt", data)
        for name in PROBED:
            yield self.replace_thoughts(name, data)

    def make(self, data: str, *flags: str) -> Stage:
        command = ["thinkmid.mini.make", str(self.home / data), "--seed", str(self.seed), *flags]
        return Stage(name=data, command=command, needs=(), result=written(data))

    def sft(self, name: str, data: str, *files: str) -> Stage:
        flags = [f"--data.paths={self.files(data, *files)}", "--data.val_paths=", "--data.probe_paths="]
        return self.train("sft", name, "base", data, *flags)

    def rlmt(self, name: str, start: str, data: str, steps: int) -> Stage:
        flags = [f"--data.paths={self.files(data, 'rl')}", f"--run.steps={steps}"]
        return self.train("rlmt", name, start, data, *flags, "--data.val_paths=", "--data.val_every=0")

    def train(self, toml: str, name: str, start: str, data: str, *flags: str) -> Stage:
        """A run of configs/mini-TOML.toml from the model that another stage exported; without a start a fresh one."""
        program = "sft" if toml == "base" else toml
        own = [f"--run.folder={self.home / name}", f"--run.seed={self.seed}", "--run.rollouts_every=0"]
        if start:
            own.append(f"--model.folder={self.home / start / 'export'}")
        command = [f"thinkmid.train.{program}", f"configs/mini-{toml}.toml", *own, *flags]
        needs = (written(data), exported(start)) if start else (written(data),)
        return Stage(name=name, command=command, needs=needs, result=exported(name))

    def evaluate(self, name: str, data: str) -> Stage:
        sets = ",".join(f"{kind}:questions={self.files(data, f'questions-{kind}')}" for kind in world.SETS)
        folder, model = self.home / "eval" / name, self.home / name / "export"
        own = [f"--run.folder={folder}", f"--run.seed={self.seed}", f"--model.folder={model}"]
        own += ["--run.samples=2", "--run.ks=1"]
        command = ["thinkmid.eval.run", "configs/mini-eval.toml", *own, f"--data.sets={sets}"]
        needs = (written(data), exported(name))
        return Stage(name=f"run {name}", command=command, needs=needs, result=f"eval/{name}/results.json")

    def replace_thoughts(self, name: str, data: str) -> Stage:
        """Reads what an evaluation generated."""
        run = self.evaluate(name, data)
        command, needs = ["thinkmid.eval.thoughts", *run.command[1:]], (*run.needs, run.result)
        return Stage(name=f"thoughts {name}", command=command, needs=needs, result=f"eval/{name}/thoughts.json")

    def files(self, data: str, *names: str) -> str:
        return ",".join(f"{self.home / data / name}.jsonl" for name in names)


def exported(name: str) -> str:
    return f"{name}/export/thinkmid.json"


def written(data: str) -> str:
    return f"{data}/manifest.json"


def as_sft_steps(rlmt: Path) -> int:
    """SFT steps that cost what this RLMT run did, in passes of a token: one forward, two backward."""
    rows = read_rows(rlmt / "metrics.jsonl")
    try:
        passes: float = sum(row["groups"] * PREFIX + row["generated_tokens"] + 3 * row["trunk_tokens"] for row in rows)
        return round(passes / (3 * SFT_TOKENS))
    except (KeyError, TypeError) as error:
        raise UserError(f"{rlmt}/metrics.jsonl: not what RLMT wrote ({error!r})") from None


def run(homes: dict[int, Path], jobs: int) -> None:
    """All stages of all seeds that are not done yet, `jobs` at a time."""
    all_stages = [(seed, home, stage) for seed, home in homes.items() for stage in stages(home, seed)]
    todo = [(seed, home, stage) for seed, home, stage in all_stages if not (home / stage.result).exists()]
    running: set[Future[str]] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while todo or running:
            ready = [one for one in todo if all((one[1] / need).exists() for need in one[2].needs)]
            for one in ready[: jobs - len(running)]:
                todo.remove(one)
                running.add(pool.submit(work, *one))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for stage in done:
                print(f"{stage.result()}; {len(todo) + len(running)} of {len(all_stages)} to do", flush=True)


def work(seed: int, home: Path, stage: Stage) -> str:
    """Runs a stage to its end. Returns its line for the console: name and seconds."""
    home.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    command = [sys.executable, "-m", *stage.command]
    if stage.longer_by:
        command.append(f"--run.steps={SFT_STEPS + as_sft_steps(home / stage.longer_by)}")
    with (home / "log.txt").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode:
        raise UserError(f"{home}/log.txt: {stage.name} ended with code {done.returncode}; the same command resumes")
    return f"seed {seed}: {stage.name}, {time.monotonic() - began:.0f} s"


def seeds_of(words: str) -> list[int]:
    if not all(word.strip().isdecimal() and len(word) < 19 for word in words.split(",")):
        raise UserError(f"--seeds {words[:80]}: not whole numbers with commas between")
    return list(dict.fromkeys(map(int, words.split(","))))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mini", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="commas between; a seed decides corpus, weights, order and draws")
    at_a_time = "stages at a time, each on OMP_NUM_THREADS cores"
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 1025), metavar="JOBS", help=at_a_time)
    args = parser.parse_args(argv)
    if not Path("configs/mini-rlmt.toml").exists():
        raise UserError("configs/mini-rlmt.toml: no such file; the sweep runs from the project's folder")
    homes = {seed: args.out / f"seed-{seed}" for seed in seeds_of(args.seeds)}
    run(homes, args.jobs)

    from benchmarks import mini_figures as figures
    from benchmarks import mini_results as results

    found = results.collect(homes, ROWS, CONTROLS, PROBED)
    write_whole(args.out / "table.json", json.dumps(found, indent=1) + "\n")
    (args.out / "table.md").write_text(results.markdown(found))
    print(results.markdown(found))
    print(figures.draw(homes, found, ROWS, RLMT_STEPS, args.out))


if __name__ == "__main__":
    config.run(main)
