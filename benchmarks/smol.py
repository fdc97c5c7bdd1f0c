"""A real language model on real questions, `python -m benchmarks.smol --gsm8k FOLDER --svamp FILE`: SmolLM2-135M,
SFT on GSM8K's worked steps as thoughts (and without them, the control), RLMT, RLPT; then every model on held-out
questions of GSM8K and on SVAMP. --configs smol-gpu --largest 0 --questions 0 --most-steps 3: the whole sets, on one
GPU. Interrupted, the same command resumes.

With --largest only the rows are taken in which every step is one operation on whole numbers up to that: two cores have
no time to teach more. The folder data of runs/smol (or runs/smol-gpu) holds, one half of the training rows for SFT and
the other for RL:
sft-think.jsonl        {"id", "text"}: each row twice; question, all steps as thought, answer; and with the last step
                       alone as thought, the others in the text
sft-raw.jsonl          the same without the thoughts
rl.jsonl, heldout.jsonl  the second kind, for RLMT and for validation
questions-train.jsonl  {"question", "answer"} for RLPT: rows of at most --most-steps steps
questions-SET.jsonl    for evaluation, all or, drawn, --questions of them: GSM8K's test questions, SVAMP, and GSM8K's
                       followed by all steps but the last
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thinkmid import config, thoughts
from thinkmid.data import layouts
from thinkmid.errors import UserError
from thinkmid.eval import compare
from thinkmid.files import Row, read_rows, write_rows, write_whole

HELD_OUT = 32  # documents for validation
CALCULATOR = re.compile(r"<<([^<>]*)>>")  # notes of GSM8K's authors for a calculator: 48/2 = <<48/2=24>>24
OPERATION = re.compile(r"(\d+)[-+*/](\d+)=(\d+)")
MODELS = {
    "model": "SmolLM2-135M-Instruct", "sft-raw": "SFT(raw)", "sft-think": "SFT(think)", "rlmt": "SFT(think) + RLMT",
    "rlpt": "SFT(think) + RLMT + RLPT",
}  # fmt: skip
PAIRS = (("sft-raw", "model"), ("sft-think", "sft-raw"), ("rlmt", "sft-think"), ("rlpt", "rlmt"), ("rlpt", "model"))
SETS = ("last-step", "gsm8k", "svamp")


@dataclass(frozen=True)
class Worked:
    """A row of GSM8K."""

    id: str
    question: str
    steps: list[str]
    answer: str

    def text(self, in_text: int) -> str:
        """Question, the first steps, the others as a thought, the answer."""
        before = "\n".join([self.question, *self.steps[:in_text]])
        thought = "\n".join(self.steps[in_text:])
        return thoughts.insert(f"{before}\nThe answer is {self.answer}.", [(len(before), thought)])


def worked(path: Path, name: str, largest: int) -> Iterator[Worked]:
    """Rows of one of GSM8K's files, all with largest = 0, else those of small steps. UserError names what is no row."""
    for number, (where, row) in enumerate(layouts.file_rows(path)):
        gold = layouts.gsm8k(where, row)
        steps = row["answer"].rpartition("####")[0].strip().split("\n")
        if not largest or all(is_small(step, largest) for step in steps):
            plain = [CALCULATOR.sub("", step).strip() for step in steps]
            yield Worked(f"{name}-{number}", gold.question.strip(), plain, gold.gold)


def is_small(step: str, largest: int) -> bool:
    """Whether a step's calculator notes are one operation on whole numbers up to `largest`, its result one too."""
    notes = [OPERATION.fullmatch(note) for note in CALCULATOR.findall(step)]
    return len(notes) == 1 and notes[0] is not None and max(map(int, notes[0].groups())) <= largest


def make_data(args: argparse.Namespace, folder: Path) -> None:
    """Writes the files of the docstring. The manifest comes last."""
    rng = random.Random(args.seed)
    rows = list(worked(args.gsm8k / "train.jsonl", "train", args.largest))
    rng.shuffle(rows)
    half = len(rows) // 2
    sft, rl = rows[:half], rows[half:]
    texts = [{"id": f"{row.id}-{k}", "text": row.text(k)} for row in sft for k in {0, len(row.steps) - 1}]
    steps = [{"id": row.id, "text": row.text(len(row.steps) - 1)} for row in rl]
    easy = [asked(row, 0) for row in rl if few(row, args.most_steps)]
    write_rows(folder / "sft-think.jsonl", texts)
    write_rows(folder / "sft-raw.jsonl", [row | {"text": thoughts.strip(row["text"])} for row in texts])
    write_rows(folder / "rl.jsonl", steps[HELD_OUT:])
    write_rows(folder / "heldout.jsonl", steps[:HELD_OUT])
    write_rows(folder / "questions-train.jsonl", easy)
    tests = list(worked(args.gsm8k / "test.jsonl", "test", args.largest))
    others = [{"id": f"svamp-{i}", **row} for i, (_, row) in enumerate(layouts.file_rows(args.svamp))]
    sets = {"last-step": [asked(row, len(row.steps) - 1) for row in tests], "gsm8k": [asked(row, 0) for row in tests]}
    for name, questions in (sets | {"svamp": others}).items():
        drawn = rng.sample(questions, min(args.questions or len(questions), len(questions)))
        write_rows(folder / f"questions-{name}.jsonl", drawn)
    about = {"sft": len(texts), "rl": len(steps) - HELD_OUT, "rlpt": len(easy)}
    about |= {"largest": args.largest, "most_steps": args.most_steps, "seed": args.seed}
    write_rows(folder / "manifest.json", [about])
    print(f"{folder}: {about}")


def asked(row: Worked, in_text: int) -> Row:
    """The question of a row, the first steps after it."""
    return {"id": row.id, "question": "\n".join([row.question, *row.steps[:in_text]]), "answer": row.answer}


def few(row: Worked, most_steps: int) -> bool:
    """Whether a row takes at most so many steps, and its answer is a whole number."""
    return len(row.steps) <= most_steps and row.answer.lstrip("-").isdigit()


def stages(configs: str) -> Iterator[tuple[str, list[str], Path]]:
    """(name, arguments of python -m, the file that is there when it is done) in order."""
    home = Path("runs", configs)
    raw = [f"--run.folder={home / 'sft-raw'}", f"--data.paths={home / 'data/sft-raw.jsonl'}", "--data.val_paths="]
    for name, kind, flags in (
        ("sft-raw", "sft", raw),
        ("sft-think", "sft", []),
        ("rlmt", "rlmt", []),
        ("rlpt", "rlpt", []),
    ):
        command = [f"thinkmid.train.{kind}", f"configs/{configs}-{kind}.toml", *flags]
        yield name, command, home / name / "export" / "thinkmid.json"
    for name in MODELS:
        folder = home / "eval" / name
        model = home / name if name == "model" else home / name / "export"
        flags = [f"--run.folder={folder}", f"--model.folder={model}"]
        yield f"eval {name}", ["thinkmid.eval.run", f"configs/{configs}-eval.toml", *flags], folder / "results.json"


def run(configs: str, times: Path) -> None:
    """All stages that are not done yet, one after another; each one's seconds on the console and in a file."""
    for name, command, result in stages(configs):
        if result.exists():
            continue
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *command])
        if done.returncode or not result.exists():
            raise UserError(f"{name} ended with code {done.returncode}; the same command resumes")
        line = f"{name}: {time.monotonic() - began:.0f} s"
        with times.open("a", encoding="utf-8") as file:
            print(line, file=file)
        print(f"# {line}", flush=True)


def table(home: Path) -> str:
    """Accuracy of every model by set with 95 % intervals, differences paired by question, reward of RLMT and RLPT."""
    runs = {name: compare.read(home / "eval" / name) for name in MODELS}
    lines = [f"| model | {' | '.join(SETS)} | thinking tokens | unclosed |", "|---" * (len(SETS) + 3) + "|"]
    for name, words in MODELS.items():
        sets: Row = runs[name].results["sets"]
        cells = [f"{sets[s]['mean']:.3f} ({sets[s]['low']:.3f} to {sets[s]['high']:.3f})" for s in SETS]
        think, unclosed = (sum(sets[s][key] for s in SETS) / len(SETS) for key in ("mean_think", "unclosed"))
        lines.append(f"| {words} | {' | '.join(cells)} | {think:.0f} | {unclosed:.1%} |")
    lines += ["", f"| difference, paired by question | {' | '.join(SETS)} |", "|---" * (len(SETS) + 1) + "|"]
    for a, b in PAIRS:
        by_set = compare.against(runs[a], runs[b])["sets"]
        cells = [f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" for d in (by_set[s] for s in SETS)]
        lines.append(f"| {MODELS[a]} less {MODELS[b]} | {' | '.join(cells)} |")
    lines.append("")
    for name in ("rlmt", "rlpt"):
        rows = read_rows(home / name / "metrics.jsonl")
        part = max(1, len(rows) // 4)
        first, last = (sum(row["reward"] for row in some) / part for some in (rows[:part], rows[-part:]))
        lines.append(f"- reward of {name}: {first:.3f} -> {last:.3f} (first and last {part} of {len(rows)} steps)")
        before = [row["reward"] for row in read_rows(home / name / "events.jsonl") if row["kind"] == "gate"]
        if before and "val_reward" in rows[-1]:
            lines[-1] += f"; on {HELD_OUT} held-out prompts {before[0]:.3f} -> {rows[-1]['val_reward']:.3f}"
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    args = parse(argv)
    home = Path("runs", args.configs)
    if not (home / "model" / "config.json").exists():
        raise UserError(f"{home / 'model'}: no model; thinkmid gguf FILE {home / 'model'}")
    if not (home / "data" / "manifest.json").exists():
        make_data(args, home / "data")
    run(args.configs, home / "times.txt")
    found = table(home)
    write_whole(home / "table.md", found)
    print(found)
    trained = [str(home / name) for name in ("sft-raw", "sft-think", "rlmt", "rlpt")]
    page = ["thinkmid.report", *trained, str(home / "eval"), "--out", str(home / "report.html")]
    subprocess.run([sys.executable, "-m", *page], check=True)


def parse(argv: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smol", description=__doc__, formatter_class=form)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--svamp", type=Path, required=True, help="SVAMP's questions and answers, jsonl")
    parser.add_argument("--configs", choices=("smol", "smol-gpu"), default="smol", help="(default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="of each set, 0: all (default: %(default)s)")
    parser.add_argument("--largest", type=int, default=30, help="number in a step, 0: any (default: %(default)s)")
    parser.add_argument("--most-steps", type=int, default=2, help="of a question of RLPT (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    config.run(main)
