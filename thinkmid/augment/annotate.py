"""Annotation: documents are split, cut into chunks, and an annotator puts thoughts between their sentences.

python -m thinkmid.augment.annotate configs/mini-annotate.toml
python -m thinkmid.augment.annotate CONFIG.toml --shard 3/8       one of eight jobs; under torchrun each rank is one

The folder then holds sft-, rl- and heldout-think/ and -raw/, and sft-control/, for data.paths of SFT and RLMT, and
report.json and manifest.json. The same command goes on where a killed or interrupted run was; another number of jobs
may.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from thinkmid import config, thoughts
from thinkmid.augment import annotators, endpoint, shards, split, writer
from thinkmid.augment.annotators import Outcome
from thinkmid.augment.config import AnnotateConfig, decisive, settings, share
from thinkmid.augment.pool import through_pool
from thinkmid.augment.progress import Progress
from thinkmid.data import chat
from thinkmid.data.source import left_out, read_documents
from thinkmid.errors import UserError
from thinkmid.files import locked, read_json, write_whole
from thinkmid.run import identity
from thinkmid.run.interrupt import EXIT, Interrupt
from thinkmid.tokenizer import Tokenizer

RULES_BATCH = 64


class Piece(NamedTuple):
    """A chunk that is still to be done."""

    part: int
    place: shards.Chunk
    chunk: str


def main(argv: list[str]) -> int:
    prog = "python -m thinkmid.augment.annotate"
    cfg, dry_run = config.load(AnnotateConfig, argv, prog=prog, description=__doc__)
    if dry_run:
        return plan(cfg)
    tokenizer = Tokenizer.load(cfg.chunks.tokenizer)
    if not share(cfg.shard)[0]:
        for line in left_out([*cfg.data.paths, *cfg.split.evals]):
            print(line, flush=True)
    return {"rules": with_rules, "openai": with_endpoint, "engine": with_engine}[cfg.annotator.kind](cfg, tokenizer)


def plan(cfg: AnnotateConfig) -> int:
    """The configuration, and what an engine in process needs."""
    if cfg.annotator.kind != "engine":
        print(config.to_toml(cfg), end="")
        return 0
    from thinkmid.model import weights
    from thinkmid.plan import memory

    model_cfg = weights.read_config(cfg.writer.folder)
    longest_prompt = longest(cfg, model_cfg.max_positions) - cfg.writer.max_tokens
    return memory.dry_run_engine(cfg, model_cfg, cfg.writer.sampling, longest_prompt)


def longest(cfg: AnnotateConfig, max_positions: int) -> int:
    """Tokens of the longest prompt with its answer."""
    found = min(cfg.engine.max_len or writer.room(cfg.chunks.max_tokens, cfg.writer), max_positions)
    if found <= cfg.writer.max_tokens:
        raise UserError(f"writer.max_tokens {cfg.writer.max_tokens} leave no room for a prompt in {found} tokens")
    return found


def with_rules(cfg: AnnotateConfig, tokenizer: Tokenizer) -> int:
    interrupt, annotate = Interrupt(), partial(annotators.by_rules, cfg=cfg.annotator)
    stopped = lambda: interrupt.requested  # noqa: E731
    pool = {"batch": RULES_BATCH, "workers": 1, "stopped": stopped, "abort": lambda: None}
    return work(cfg, tokenizer, partial(through_pool, annotate=annotate, **pool), stopped=stopped)


def with_endpoint(cfg: AnnotateConfig, tokenizer: Tokenizer) -> int:
    interrupt, workers = Interrupt(), cfg.endpoint.workers
    stopped = lambda: interrupt.requested  # noqa: E731
    write = endpoint.Endpoint(cfg.endpoint, os.environ.get(cfg.endpoint.key_env, ""))
    annotate = partial(annotators.by_model, cfg=cfg.annotator, write=write)
    pool = {"batch": 1, "workers": workers, "stopped": stopped, "abort": write.close}
    try:
        return work(
            cfg, tokenizer, partial(through_pool, annotate=annotate, **pool), stopped=stopped, patience=2 * workers + 8,
            more=lambda: {"endpoint_failures": dict(write.failures)},
        )  # fmt: skip
    finally:
        write.close()


def with_engine(cfg: AnnotateConfig, tokenizer: Tokenizer) -> int:
    """Each rank its own engine, on its own accelerator."""
    from thinkmid.model import weights
    from thinkmid.rollout.engine.build import make_engine
    from thinkmid.rollout.engine.protocol import check_vllm
    from thinkmid.run.ranks import start_ranks

    folder, rows = Path(cfg.writer.folder), cfg.writer.max_batch
    if cfg.engine.kind == "vllm":
        check_vllm()
    model_cfg, theirs = weights.read_config(folder), Tokenizer.load(folder)
    ask = chat.Chat(folder, theirs, thinking=cfg.writer.thinking)
    max_len = longest(cfg, model_cfg.max_positions)
    interrupt, ranks = Interrupt(), start_ranks()
    known = identity.verified(folder, ranks)
    model = identity.of_model(folder, theirs, known) | {"chat template": ask.digest}
    begin(cfg, tokenizer, model)  # what is wrong with the data shows before an engine is made
    blind = writer.blind(theirs)
    engine = make_engine(cfg.engine, folder, model_cfg, blind, device=ranks.device, max_len=max_len, rows=rows)
    engine.load_weights(weights.stream_folder(folder, cfg.engine.dtype, known), 0)
    stopped = lambda: interrupt.requested  # noqa: E731
    write = writer.EngineWriter(
        engine=engine, tokenizer=theirs, chat=ask, max_len=max_len, annotator=cfg.annotator, config=cfg.writer
    )
    return work(cfg, tokenizer, partial(write, stopped=stopped), stopped=stopped, model=model)


def begin(cfg: AnnotateConfig, tokenizer: Tokenizer, model: dict[str, str]) -> split.Split:
    """The folder is this run's and its documents are split. UserError names what is wrong with either."""
    claim(cfg, tokenizer, model)
    return split.ensure(Path(cfg.run.folder), cfg.data.paths, cfg.split)


def work(
    cfg: AnnotateConfig,
    tokenizer: Tokenizer,
    through: Callable[[Iterator[Piece]], Iterable[tuple[Piece, Outcome]]],
    *,
    stopped: Callable[[], bool] = lambda: False,
    patience: int = 10,
    more: Callable[[], dict] = dict,
    model: dict[str, str] | None = None,
) -> int:
    """This job's parts. Returns the exit code.

    through: pieces with what became of them, as they come; once stopped() is true, those that still come. patience:
    chunks in a row that nobody answers, after which it ends. more() goes into report.json.
    model: hashes of the annotator's, by part, where it runs in this process.
    UserError if chunks are left because nobody answered, the same command goes on; or if none of the run was accepted.
    """
    folder, (job, jobs) = Path(cfg.run.folder), share(cfg.shard)
    parted = begin(cfg, tokenizer, model or {})
    progress = Progress(f"annotate {job}/{jobs}", parted.documents, cfg.run.progress_s)
    with ExitStack() as stack:
        journals, again = {}, fruitless(cfg, shards.merge(folder, cfg.run.parts))
        for part in range(job, cfg.run.parts, jobs):
            if again or not shards.is_whole(folder, part):
                journals[part] = shards.Journal(folder / "journal" / f"part-{part:04d}.jsonl", again=again)
                stack.callback(journals[part].close)
        placed: dict[int, list[shards.Placed]] = {part: [] for part in journals}
        pieces = todo(cfg, tokenizer, parted, journals, placed, progress) if journals else iter(())
        for piece, outcome in settled(through(pieces), folder, patience, stopped):
            progress.count(outcome)
            if row := as_row(piece.place, outcome):
                journals[piece.part].add(row)
            if progress.due():
                progress.say(progress.line())
                for journal in journals.values():
                    journal.sync()
            if progress.since_answer > patience:  # the endpoint is gone
                break
        complete = not stopped() and not progress.unanswered
        finish(cfg, journals, placed, tokenizer, complete)
    total = report(cfg, progress, more())
    if stopped():
        progress.say("stopped; the same command goes on")
        return EXIT
    if progress.unanswered:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(progress.unanswered.items()))
        said = f" ({progress.words})" if progress.words else ""
        raise UserError(f"{folder}: chunks without an answer: {reasons}{said}; the same command goes on")
    if fruitless(cfg, total):
        reasons = total.get("refused_by", {})
        why = max(reasons, key=reasons.get, default="")
        most = f"most often: {why} ({reasons[why]})" if why else "their documents are left out (split/manifest.json)"
        raise UserError(
            f"{folder}: none of {total.get('refused', 0)} chunks accepted, {most}; the same command begins again"
        )
    return 0


def fruitless(cfg: AnnotateConfig, total: dict) -> bool:
    """Everything is done and nothing was accepted: no output, and the same command asks for what was refused again."""
    return total["finished"] == cfg.run.parts and not total.get("accepted")


def settled(
    outcomes: Iterable[tuple[Piece, Outcome]], folder: Path, patience: int, stopped: Callable[[], bool]
) -> Iterator[tuple[Piece, Outcome]]:
    """Outcomes as they come, but those that an endpoint rejected wait until it is known whose fault that is.

    It is the chunk's, which counts as refused, if the endpoint answers about another one after it, or, of the last ones
    of a run, if any chunk of it was accepted. Else they failed, and are asked again by the next command; more than
    `patience` in a row end it.
    """
    held: list[tuple[Piece, Outcome]] = []
    for piece, outcome in outcomes:
        if outcome.rejected:
            held.append((piece, outcome))
            if len(held) > patience:
                break
            continue
        if outcome.calls and not outcome.failed:
            yield from held
            held = []
        yield piece, outcome
    chunks_fault = len(held) <= patience and not stopped() and shards.any_accepted(folder)
    for piece, outcome in held:
        yield piece, outcome if chunks_fault else replace(outcome, refused="", failed=outcome.refused)


def claim(cfg: AnnotateConfig, tokenizer: Tokenizer, model: dict[str, str]) -> None:
    """The folder is this run's. UserError: another program's; the first setting in which it is another run's; what of
    the annotator's model or of the tokenizer of chunks has another content."""
    folder = Path(cfg.run.folder)
    mine = {
        "run.parts": cfg.run.parts,
        "chunks.tokenizer": {"tokenizer": tokenizer.digest},
        "writer.model": model,
        **{f"{name}.{key}": value for name in decisive(cfg) for key, value in settings(cfg, name).items()},
    }
    mine = json.loads(json.dumps(mine))
    path, about = folder / "made-of.json", folder / "config.toml"
    if about.exists() and not path.exists():
        raise UserError(f"{folder}: holds the run of another program; name another run.folder")
    with locked(folder / ".lock"):
        if path.exists():
            other = read_json(path)
            differ = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
            if differ:
                was, now = other.get(differ[0]), mine.get(differ[0])
                begun = f"was begun with {differ[0]} = {was}, now {now}"
                if home := {"chunks.tokenizer": cfg.chunks.tokenizer, "writer.model": cfg.writer.folder}.get(differ[0]):
                    begun = f"was begun with another model or tokenizer (changed: {identity.changed(was, now, home)})"
                    begun = begun if was else "was begun by a version that did not know models by their content"
                raise UserError(f"{folder}: {begun}; name another run.folder")
        else:
            write_whole(path, json.dumps(mine, indent=1) + "\n")
        if not about.exists():
            config.save_run(folder, cfg, config.environment())


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
        placed[part].append(shards.Placed(key, doc.id, home := split.assign(doc.text, parted.cfg), len(chunks)))
        for number, chunk in enumerate(chunks):
            if (place := shards.Chunk(key, number)) in journals[part].done:
                continue
            if home != "control":
                yield Piece(part, place, chunk)
            elif chunk.strip() and not thoughts.TAG.search(chunk):  # SFT would take a tag for a thought
                journals[part].add({"key": key, "chunk": number, "raw": chunk})


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


def finish(cfg: AnnotateConfig, journals, placed, tokenizer: Tokenizer, complete: bool) -> None:
    """Publish the parts, or write down how far they are."""
    folder, with_control = Path(cfg.run.folder), cfg.split.control > 0
    for part, journal in journals.items():
        journal.sync()
        if complete:
            shards.publish(folder, part, placed[part], journal, tokenizer, with_control=with_control)
        else:
            shards.write_status(folder, part, {"finished": False, "counts": shards.tally(journal.rows())})


def report(cfg: AnnotateConfig, progress: Progress, more: dict) -> dict:
    """report.json over all parts so far, with this process's rates, and a few lines of it on the screen. Returns it."""
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
    if (control := total["control"]).get("rows"):
        missing = control["missing"]
        progress.say(
            f"control: {control['tokens']} raw tokens against {control['think_tokens']} annotated ones of SFT"
            + (f"; {missing} are missing: raise split.control ({cfg.split.control})" if missing else "")
        )
    return total


if __name__ == "__main__":
    config.run(main)
