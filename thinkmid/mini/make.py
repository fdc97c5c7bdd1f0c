"""Write the miniature world into a folder, `python -m thinkmid.mini.make OUT --seed 0`.

general.jsonl          {"id", "text"}           for the base model
sft-think.jsonl        {"id", "text", "style"}  with thoughts, for SFT
sft-raw.jsonl          {"id", "text"}           the same documents without thoughts, then more: as many words
rl.jsonl               {"id", "text", "style"}  with thoughts, for RLMT; every result takes three steps or more
heldout.jsonl          {"id", "text", "style"}  with thoughts, for validation
questions-train.jsonl  {"id", "question", "answer", "set"}  for RLPT
questions-<set>.jsonl  the same, for evaluation: 1-step ... 4-step, held-out-a ... held-out-c
manifest.json          arguments, rows, words and sha256 of every file, and what was left out

No text stands in two files (but for sft-raw). What an evaluation question asks for, facts and quantity, in whatever
wording, is the result of no text and of no other question.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.files import digest, read_json
from thinkmid.mini import world
from thinkmid.mini.annotator import MIX, annotate, sites, style_of

PROGRAM = "thinkmid.mini.make"
WORD = re.compile(r"</?think>|\w+|[^\w\s]")
ENDLESS = sys.maxsize
RL_STEPS = 3
SIZES = {
    "general": (8000, "texts for the base model"),
    "documents": (26000, "documents for SFT"),
    "rl": (3600, "documents for RLMT"),
    "heldout": (400, "documents for validation"),
    "questions": (200, "questions in each evaluation set"),
    "train_questions": (2000, "questions for RLPT"),
}
# an edit of these files makes another world
DECIDING = ("annotator.py", "make.py", "sentences.py", "wordings.toml", "world.py")

Row = dict[str, Any]  # of a jsonl file
Result = tuple[tuple[tuple[str, str, int], ...], str | None]  # chain of facts and the thing counted


class Sieve:
    """Rows that are new: no text twice, and nothing that an evaluation question asks for."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.reserved: set[Result] = set()
        self.removed = Counter(duplicates=0, leaks=0)

    def reserve(self, kind: str, seed: str, n: int) -> list[Row]:
        """n evaluation questions, no two of which ask for the same. UserError if there are not so many."""
        rows: list[Row] = []
        for row in world.questions(kind, seed, 10 * n + 1000):
            if len(rows) == n:
                break
            if self.reserved.isdisjoint(results(row)):
                self.reserved |= results(row)
                rows.append(row)
        if len(rows) < n:
            raise UserError(f"--questions {n} is too many: the set {kind} gave only {len(rows)} different ones")
        return rows

    def new(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if content(row) in self.seen:
                self.removed["duplicates"] += 1
            elif not self.reserved.isdisjoint(results(row)):
                self.removed["leaks"] += 1
            else:
                self.seen.add(content(row))
                yield row

    def take(self, rows: Iterable[Row], n: int) -> list[Row]:
        return list(islice(self.new(rows), n))


def content(row: Row) -> str:
    """The text of a row; a question is followed by its answer, so that it states a result as a document does."""
    return str(row["text"]) if "text" in row else f"{row['question']} It is {row['answer']}."


def results(row: Row) -> set[Result]:
    """What the row states or asks for: the facts that lead to each result and the thing counted, in no wording."""
    return {(tuple(site.chain), site.thing) for site in sites(content(row))}


def num_words(rows: list[Row]) -> int:
    return sum(len(WORD.findall(row.get("text") or row["question"])) for row in rows)


def is_hard(row: Row) -> bool:
    """Every result takes RL_STEPS or more: a first guess is seldom right, so that a worked-out thought pays."""
    return all(len(site.chain) > RL_STEPS for site in sites(content(row)))


def thinking(rows: list[Row], mix: tuple[float, float, float]) -> list[Row]:
    """The documents with thoughts, and in which style. The sieve has seen to it that the annotator reads them all."""
    return [{"text": annotate(row["text"], mix), "style": style_of(row["text"], mix)} for row in rows]


def tables(args: Row) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The rows of every file by its name, and how many were removed for which reason."""
    seed, mix, sieve = args["seed"], args["mix"], Sieve()
    out = {f"questions-{kind}": sieve.reserve(kind, f"{seed} evaluation", args["questions"]) for kind in world.SETS}
    train = world.questions("train", f"{seed} train", ENDLESS)
    out["questions-train"] = sieve.take(train, args["train_questions"])
    out["heldout"] = thinking(sieve.take(world.documents(f"{seed} heldout", ENDLESS), args["heldout"]), mix)
    hard = filter(is_hard, world.documents(f"{seed} rl", ENDLESS))
    out["rl"] = thinking(sieve.take(hard, args["rl"]), mix)
    raw = sieve.take(world.documents(f"{seed} sft", ENDLESS), args["documents"])
    out["sft-think"] = thinking(raw, mix)
    missing = num_words(out["sft-think"]) - num_words(raw)
    more = sieve.new(world.documents(f"{seed} raw", ENDLESS))
    while missing > 0:
        raw.append(next(more))
        missing -= num_words(raw[-1:])
    out["sft-raw"] = raw
    out["general"] = sieve.take(world.general(f"{seed} general", ENDLESS), args["general"])
    return out, dict(sieve.removed)


def write(folder: Path, wanted: Row) -> Row:
    """All files, the manifest last. Returns the manifest: what was wanted, and what came of it."""
    out, removed = tables(wanted["arguments"])
    files = {}
    for name, rows in out.items():
        split, path = name.removeprefix("questions-"), folder / f"{name}.jsonl"
        lines = [json.dumps({"id": ""} | row | {"id": f"{split}-{i}"}) + "\n" for i, row in enumerate(rows)]
        path.write_text("".join(lines))
        files[path.name] = {"rows": len(rows), "words": num_words(rows), "sha256": digest(path)}
        if styles := Counter(row["style"] for row in rows if "style" in row):
            files[path.name]["styles"] = dict(sorted(styles.items()))
    manifest = wanted | {"files": files, "removed": removed}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def found(out: Path) -> Row:
    """The manifest of a folder that this program wrote, {} if there is none. UserError if the folder is another's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    try:
        manifest = read_json(out / "manifest.json")
    except UserError:
        manifest = {}
    if manifest.get("program") != PROGRAM or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{out} exists and was not written by {PROGRAM}; name another folder")
    return manifest


def is_whole(out: Path, manifest: Row) -> bool:
    """Whether manifest and files are as they were written."""
    try:
        summary(out, manifest)
        return all(digest(out / name) == file["sha256"] for name, file in manifest["files"].items())
    except (OSError, LookupError, TypeError, AttributeError):  # a file is gone, or the manifest was edited
        return False


def summary(out: Path, manifest: Row) -> list[str]:
    lines = [f"{out / name}  {file['rows']} rows, {file['words']} words" for name, file in manifest["files"].items()]
    return [*lines, "removed: " + ", ".join(f"{n} {reason}" for reason, n in manifest["removed"].items())]


def make(out: Path, args: Row) -> Row:
    """The miniature world in folder out, whole or absent. Returns its manifest; an equal one is left as it is."""
    code = "".join(digest(Path(__file__).with_name(name)) for name in DECIDING)
    wanted = {"program": PROGRAM, "arguments": args, "code": sha256(code.encode()).hexdigest()}
    out = Path(os.path.realpath(out))  # where a link leads to
    manifest = found(out)
    if manifest and manifest | wanted == manifest and is_whole(out, manifest):
        return manifest
    ours = {"manifest.json", *manifest.get("files", ())}
    if foreign := {path.name for path in out.glob("*")} - ours:
        raise UserError(f"{out}: holds {min(foreign)}, which {PROGRAM} did not write; name another folder")
    new, old = (out.with_name(f".{out.name}.{end}") for end in ("new", "old"))
    try:
        for left in (new, old):  # by a call that was killed
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        manifest = write(new, wanted)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return manifest


def main(argv: list[str]) -> None:
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", formatter_class=show_defaults)
    parser.add_argument("out", type=Path, help="folder to write; one that this program wrote before is replaced")
    parser.add_argument("--seed", type=int, default=0, help="everything is drawn from it")
    for name, (size, words) in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=words)
    shares = "shares of the documents whose thoughts only guess, put all steps in one sum, work through every step"
    names = ("HUNCH", "MERGE", "FULL")
    parser.add_argument("--mix", type=float, nargs=3, default=list(MIX), metavar=names, help=shares)
    args = vars(parser.parse_args(argv))
    for name in SIZES:
        if args[name] < 0:
            raise UserError(f"--{name.replace('_', '-')}: expected 0 or more, got {args[name]}")
    out = args.pop("out")
    print("\n".join(summary(out, make(out, args))))


if __name__ == "__main__":
    config.run(main)
