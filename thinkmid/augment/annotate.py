"""Annotation: documents are split, cut into chunks, and an annotator puts thoughts between their sentences.

python -m thinkmid.augment.annotate configs/mini-annotate.toml
python -m thinkmid.augment.annotate CONFIG.toml --shard 3/8       one of eight jobs; under torchrun each rank is one

The folder then holds sft-think/, sft-raw/, rl-think/, rl-raw/, heldout-think/, heldout-raw/ for data.paths of SFT and
RLMT, report.json and manifest.json. The same command goes on where a killed or interrupted run was; another number of
jobs may. An engine in process is any function from prompts to texts: work() takes it through annotators.from_write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from thinkmid import config
from thinkmid.augment import annotators, endpoint, shards, split
from thinkmid.augment.annotators import AnnotatorConfig, Outcome
from thinkmid.augment.endpoint import EndpointConfig
from thinkmid.augment.pool import through_pool
from thinkmid.augment.progress import Progress
from thinkmid.augment.split import SplitConfig
from thinkmid.data.source import read_documents
from thinkmid.errors import UserError
from thinkmid.log import write_whole
from thinkmid.text import Text
from thinkmid.train.interrupt import EXIT, Interrupt

RULES_BATCH = 64
FREE = ("url", "key_env", "workers", "timeout_s", "retries", "pause_s", "price_prompt", "price_written")  # of endpoint


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the output goes."""

    folder: str  # everything the run writes; the same command resumes what is there
    parts: int = 16  # files of each kind; at least as many as jobs
    progress_s: float = 30.0  # between lines of progress

    def __post_init__(self):
        if not 1 <= self.parts <= 9999:
            raise ValueError(f"parts must lie in 1..9999, got {self.parts}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is annotated."""

    paths: tuple[str, ...]  # jsonl, parquet, txt files or folders

    def __post_init__(self):
        if not self.paths:
            raise ValueError("paths is empty; --data.paths FILE or FOLDER")


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """How documents are cut."""

    tokenizer: str  # Hugging Face folder of the model to be trained: its tokens are counted
    max_tokens: int = 2048  # L: of a chunk, without thoughts; cut at paragraph or sentence ends

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Annotation."""

    shard: str = ""  # i/n: this job takes the parts i, i+n, ...; empty: RANK and WORLD_SIZE, or everything
    run: RunConfig
    data: DataConfig
    chunks: ChunkConfig
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self):
        _, jobs = share(self.shard)
        if jobs > self.run.parts:
            raise ValueError(f"{jobs} jobs for {self.run.parts} parts: raise run.parts")
        for name in ("url", "model"):
            if self.annotator.kind == "openai" and not getattr(self.endpoint, name):
                raise ValueError(f"annotator.kind 'openai' needs endpoint.{name}")


def share(shard: str) -> tuple[int, int]:
    """(job, jobs) from "i/n", else from torchrun's environment."""
    told = shard or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    first, slash, second = told.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"shard must be i/n with i in 0..n-1, got {told!r}")
    return int(first), int(second)


class Piece(NamedTuple):
    """A chunk that is still to be done."""

    part: int
    place: shards.Chunk
    chunk: str


def main(argv: list[str]) -> int:
    prog = "python -m thinkmid.augment.annotate"
    cfg, dry_run = config.load(AnnotateConfig, argv, prog=prog, description=__doc__)
    if dry_run:
        print(config.to_toml(cfg), end="")
        return 0
    interrupt, text = Interrupt(), Text.load(cfg.chunks.tokenizer)
    if cfg.annotator.kind == "rules":
        by_rules = partial(annotators.by_rules, cfg=cfg.annotator)
        return work(cfg, text, by_rules, batch=RULES_BATCH, stopped=lambda: interrupt.requested)
    write = endpoint.Endpoint(cfg.endpoint, os.environ.get(cfg.endpoint.key_env, ""))
    by_model = partial(annotators.by_model, cfg=cfg.annotator, write=write)
    try:
        workers = cfg.endpoint.workers
        return work(
            cfg, text, by_model, workers=workers, stopped=lambda: interrupt.requested, abort=write.close,
            more=lambda: {"endpoint_failures": dict(write.failures)},
        )  # fmt: skip
    finally:
        write.close()


def work(
    cfg: AnnotateConfig,
    text: Text,
    annotate: Callable[[list[str]], list[Outcome]],
    *,
    batch: int = 1,
    workers: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    abort: Callable[[], None] = lambda: None,
    more: Callable[[], dict] = dict,
) -> int:
    """This job's parts, `batch` chunks a call, `workers` calls at a time. Returns the exit code.

    Once stopped() is true no more calls begin, and abort() is to end those that run. more() goes into report.json.
    UserError if chunks are left because nobody answered: the same command goes on.
    """
    folder, (job, jobs) = Path(cfg.run.folder), share(cfg.shard)
    claim(cfg)
    parted = split.ensure(folder, cfg.data.paths, cfg.split)
    progress = Progress(f"annotate {job}/{jobs}", parted.documents, cfg.run.progress_s)
    with ExitStack() as stack:
        journals = {}
        for part in range(job, cfg.run.parts, jobs):
            if not shards.is_whole(folder, part):
                journals[part] = shards.Journal(folder / "journal" / f"part-{part:04d}.jsonl")
                stack.callback(journals[part].close)
        placed: dict[int, list[shards.Placed]] = {part: [] for part in journals}
        pieces = todo(cfg, text, parted, journals, placed, progress) if journals else iter(())
        for piece, outcome in through_pool(pieces, annotate, batch, workers, stopped, abort):
            progress.count(outcome)
            if row := as_row(piece.place, outcome):
                journals[piece.part].add(row)
            if progress.due():
                progress.say(progress.line())
                for journal in journals.values():
                    journal.sync()
            if progress.since_answer > 2 * workers + 8:  # the endpoint is gone
                break
        complete = not stopped() and not progress.unanswered
        finish(folder, journals, placed, text, complete)
    report(cfg, progress, more())
    if stopped():
        progress.say("stopped; the same command goes on")
        return EXIT
    if progress.unanswered:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(progress.unanswered.items()))
        raise UserError(f"{cfg.run.folder}: chunks without an answer: {reasons}; the same command goes on")
    return 0


def claim(cfg: AnnotateConfig) -> None:
    """The folder is this run's. UserError names the first setting in which it is another's."""
    folder = Path(cfg.run.folder)
    mine = {
        "chunks.tokenizer.json": shards.digest(Path(cfg.chunks.tokenizer) / "tokenizer.json"),
        "run.parts": cfg.run.parts,
        **{f"{name}.{key}": value for name in decisive(cfg) for key, value in vars(getattr(cfg, name)).items()},
    }
    mine = json.loads(json.dumps({key: value for key, value in mine.items() if key not in free()}))
    with split.locked(folder / ".lock"):
        path = folder / "made-of.json"
        if path.exists():
            other = json.loads(path.read_bytes())
            differ = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
            if differ:
                was, now = other.get(differ[0]), mine.get(differ[0])
                raise UserError(f"{folder}: was begun with {differ[0]} = {was}, now {now}; name another run.folder")
        else:
            config.save_run(folder, cfg, config.environment())
            write_whole(path, json.dumps(mine, indent=1) + "\n")


def decisive(cfg: AnnotateConfig) -> list[str]:
    """Sections that the output depends on."""
    return ["data", "chunks", "annotator", "split", *(["endpoint"] if cfg.annotator.kind == "openai" else [])]


def free() -> set[str]:
    """Settings in these that it does not depend on."""
    return {f"endpoint.{name}" for name in FREE} | {"chunks.tokenizer", "annotator.retries"}


def todo(cfg, text, parted: split.Split, journals, placed, progress: Progress) -> Iterator[Piece]:
    """Chunks of this job's documents that no journal holds; `placed` gets every document as it passes."""
    seen = set()
    for doc in read_documents(cfg.data.paths):
        progress.documents += 1
        key = split.key(doc.text)
        part = shards.part_of(key, cfg.run.parts)
        if part not in journals or key in parted.dropped or key in seen:
            continue
        seen.add(key)
        chunks = text.chunks(doc.text, cfg.chunks.max_tokens)
        placed[part].append(shards.Placed(key, doc.id, split.assign(doc.text, parted.cfg), len(chunks)))
        for number, chunk in enumerate(chunks):
            if (place := shards.Chunk(key, number)) not in journals[part].done:
                yield Piece(part, place, chunk)


def as_row(place: shards.Chunk, outcome: Outcome) -> dict | None:
    """What the journal holds about a chunk; None if nobody answered and nothing was spent."""
    row = {"key": place.key, "chunk": place.number}
    if outcome.failed and not outcome.calls:
        return None
    if outcome.failed:
        row |= {"failed": outcome.failed}
    elif outcome.text is None:
        row |= {"refused": outcome.refused, "said": outcome.said}
    else:
        row |= {"text": outcome.text}
    costs = {name: getattr(outcome, name) for name in ("calls", "prompt_tokens", "written_tokens")}
    return row | {name: n for name, n in costs.items() if n} | ({"retried": outcome.retried} if outcome.retried else {})


def finish(folder: Path, journals, placed, text: Text, complete: bool) -> None:
    """Publish the parts, or write down how far they are."""
    for part, journal in journals.items():
        journal.sync()
        if complete:
            shards.publish(folder, part, placed[part], journal, text)
        else:
            shards.write_status(folder, part, {"finished": False, "counts": shards.tally(journal.rows())})


def report(cfg: AnnotateConfig, progress: Progress, more: dict) -> None:
    """report.json over all parts so far, with this process's rates, and a few lines of it on the screen."""
    total = shards.merge(Path(cfg.run.folder), cfg.run.parts)
    prices = {"prompt_tokens": cfg.endpoint.price_prompt, "written_tokens": cfg.endpoint.price_written}
    total["cost"] = round(sum(total.get(name, 0) * price / 1e6 for name, price in prices.items()), 4)
    total["last_run"] = progress.row() | more
    write_whole(Path(cfg.run.folder) / "report.json", json.dumps(total, indent=1) + "\n")
    progress.say(progress.line())
    reasons = ", ".join(f"{reason} {n}" for reason, n in total.get("refused_by", {}).items())
    progress.say(
        f"{total['finished']} of {cfg.run.parts} parts finished: {total.get('accepted', 0)} chunks accepted, "
        f"{total.get('refused', 0)} refused{f' ({reasons})' if reasons else ''}, {total.get('calls', 0)} calls"
    )
    for name, sizes in total["splits"].items():
        progress.say(
            f"{name}: {sizes['rows']} rows, {sizes['thoughts']} thoughts, "
            f"{sizes['think_tokens']} tokens with thoughts, {sizes['raw_tokens']} without"
        )


if __name__ == "__main__":
    config.run(main)
