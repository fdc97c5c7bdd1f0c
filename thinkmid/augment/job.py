"""One job of an annotation run: its chunks go to an annotator, their outcomes into journals, whole parts to files."""

import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from thinkmid import thoughts
from thinkmid.augment import shards, split
from thinkmid.augment.annotators import Outcome
from thinkmid.augment.claim import claim
from thinkmid.augment.config import AnnotateConfig, share
from thinkmid.augment.progress import Progress
from thinkmid.augment.shards import Piece
from thinkmid.data.source import left_out, read_documents
from thinkmid.errors import UserError
from thinkmid.files import write_json
from thinkmid.run import progress
from thinkmid.run.interrupt import EXIT, Interrupt
from thinkmid.tokenizer import Tokenizer

RESUMES = "the same command resumes"


class Annotator(Protocol):
    """Whoever writes the thoughts."""

    model: dict[str, str]  # hashes of a model in this process, by part; {} for others
    failures: Counter[str]  # tries that failed, by reason
    patience: int  # chunks in a row without a response after which a job ends

    def outcomes(self, pieces: Iterator[Piece]) -> Generator[tuple[Piece, Outcome]]:
        """Pieces with what became of them, as they come; once interrupted, those that still come."""


def run(cfg: AnnotateConfig, annotator: Annotator, interrupt: Interrupt) -> int:
    """Annotate this job's parts. Returns the exit code.

    UserError: a mistake in data or folder; chunks without a response, for which the same command asks again; none of
    the run's chunks was accepted.
    """
    if not share(cfg.shard)[0]:
        for line in left_out([*cfg.data.paths, *cfg.split.evals]):
            print(line, flush=True)
    with ExitStack() as stack:
        job = Job(cfg, annotator, interrupt, stack)
        outcomes = stack.enter_context(closing(annotator.outcomes(job.pieces())))
        for piece, outcome in job.settled(outcomes):
            job.record(piece, outcome)
            if job.progress.since_answer > annotator.patience:  # the endpoint is gone
                break
        job.publish()
        total = job.report()
    return job.result(total)


class Job:
    """The parts of a run that this process works on."""

    def __init__(self, cfg: AnnotateConfig, annotator: Annotator, interrupt: Interrupt, stack: ExitStack):
        """Claims the folder, splits the documents, opens the journals, which the stack closes. UserError names what is
        wrong with any."""
        self.cfg, self.folder, self._annotator, self._interrupt = cfg, Path(cfg.run.folder), annotator, interrupt
        self._tokenizer = Tokenizer.load(cfg.chunks.tokenizer)
        claim(cfg, self._tokenizer, annotator.model)
        self._split = split.ensure(self.folder, cfg.data.paths, cfg.split, cfg.data.column)
        job, jobs = share(cfg.shard)
        self.progress = Progress(f"annotate {job}/{jobs}", self._split.documents, cfg.run.progress_s)
        # ranks share a console, jobs of a cluster do not
        rank, every_s = int(os.environ.get("RANK", "0")), cfg.run.progress_s
        bar = progress.Progress(self.progress.title, self.progress.total, "documents", rank=rank, every_s=every_s)
        self._bar = stack.enter_context(bar)
        self._journals: dict[int, shards.Journal] = {}
        again = self._is_fruitless(shards.merge(self.folder, cfg.run.parts))
        for part in range(job, cfg.run.parts, jobs):
            if again or not shards.is_whole(self.folder, part):
                journal = shards.Journal(self.folder / "journal" / f"part-{part:04d}.jsonl", again=again)
                self._journals[part] = stack.enter_context(closing(journal))
        self._placed: dict[int, list[shards.Placed]] = {part: [] for part in self._journals}

    def pieces(self) -> Iterator[Piece]:
        """Chunks that no journal holds, in source order. Notes every document of these parts as it passes."""
        seen = set()
        for doc in read_documents(self.cfg.data.paths, self.cfg.data.column) if self._journals else ():
            self.progress.documents += 1
            key = split.key(doc.text)
            part = shards.part_of(key, self.cfg.run.parts)
            if part not in self._journals or key in self._split.dropped or key in seen:
                continue
            seen.add(key)
            chunks = self._tokenizer.chunks(doc.text, self.cfg.chunks.max_tokens)
            home = split.assign(doc.text, self.cfg.split)
            self._placed[part].append(shards.Placed(key, doc.id, home, len(chunks)))
            for number, chunk in enumerate(chunks):
                place = shards.Chunk(key, number)
                if place in self._journals[part].done:
                    continue
                if home != "control":
                    yield Piece(part, place, chunk)
                elif chunk.strip() and not thoughts.TAG.search(chunk):  # SFT would take a tag for a thought
                    self._journals[part].add({"key": key, "chunk": number, "raw": chunk})

    def settled(self, outcomes: Iterable[tuple[Piece, Outcome]]) -> Iterator[tuple[Piece, Outcome]]:
        """Outcomes as they come; those that an endpoint rejected are held until it is known whose fault that is.

        It is the chunk's, which counts as refused, if the endpoint answers about another one after it, or, at the end
        of a run, if any chunk of it was accepted. Else they failed, and the next command asks for them again. More held
        ones than the annotator has patience for end the run.
        """
        patience, held = self._annotator.patience, list[tuple[Piece, Outcome]]()
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
        chunks_fault = len(held) <= patience and not self._interrupt.requested and shards.any_accepted(self.folder)
        for piece, outcome in held:
            yield piece, outcome if chunks_fault else replace(outcome, refused="", failed=outcome.refused)

    def record(self, piece: Piece, outcome: Outcome) -> None:
        """Write an outcome down, and show how far the job is."""
        self.progress.count(outcome)
        if row := as_row(piece.place, outcome):
            self._journals[piece.part].add(row)
        self._bar.at(self.progress.documents, self.progress.counts())
        if self.progress.due():
            for journal in self._journals.values():
                journal.sync()

    def publish(self) -> None:
        """Publish the parts, or write down how far they are."""
        complete = not self._interrupt.requested and not self.progress.unanswered
        control = self.cfg.split.control > 0
        for part, journal in self._journals.items():
            journal.sync()
            if complete:
                shards.publish(self.folder, part, self._placed[part], journal, self._tokenizer, with_control=control)
            else:
                shards.write_status(self.folder, part, {"finished": False, "counts": shards.tally(journal.rows())})

    def report(self) -> dict[str, Any]:
        """Write report.json over all parts so far, with this process's rates, and print a summary. Returns it."""
        total = shards.merge(self.folder, self.cfg.run.parts)
        endpoint = self.cfg.endpoint
        prices = {"prompt_tokens": endpoint.price_prompt, "written_tokens": endpoint.price_written}
        total["cost"] = round(sum(total.get(name, 0) * price / 1e6 for name, price in prices.items()), 4)
        total["left_out"] = self._split.left_out
        total["last_run"] = self.progress.row() | {"endpoint_failures": dict(self._annotator.failures)}
        write_json(self.folder / "report.json", total)
        for line in [self.progress.line(), *summary(self.cfg, total)]:
            self.progress.say(line)
        return total

    def result(self, total: dict[str, Any]) -> int:
        """The exit code. UserError: chunks without a response, or none accepted. total: from report()."""
        if self._interrupt.requested:
            self.progress.say(f"stopped; {RESUMES}")
            return EXIT
        if unanswered := self.progress.unanswered:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(unanswered.items()))
            words = f" ({self.progress.words})" if self.progress.words else ""
            raise UserError(f"{self.folder}: chunks without a response: {reasons}{words}; {RESUMES}")
        if self._is_fruitless(total):
            most = "their documents are left out (split/manifest.json)"
            if refused := total.get("refused_by"):
                reason, num = max(refused.items(), key=itemgetter(1))
                most = f"most often: {reason} ({num})"
            none = f"{self.folder}: none of {total.get('refused', 0)} chunks accepted"
            raise UserError(f"{none}, {most}; the same command asks again")
        return 0

    def _is_fruitless(self, total: dict[str, Any]) -> bool:
        """Everything is done and nothing was accepted: there is no output, and refused chunks are asked for again."""
        return total["finished"] == self.cfg.run.parts and not total.get("accepted")


def as_row(place: shards.Chunk, outcome: Outcome) -> dict[str, Any] | None:
    """What the journal holds about a chunk; None if there was no response and nothing was spent."""
    if outcome.failed and not outcome.calls:
        return None
    row: dict[str, Any] = {"key": place.key, "chunk": place.number}
    if outcome.failed:
        row["failed"] = outcome.failed
    elif outcome.text is None:
        row |= {"refused": outcome.refused, "said": outcome.said}
    else:
        row["text"] = outcome.text
    costs = ("calls", "prompt_tokens", "written_tokens", "retried")
    return row | {name: cost for name in costs if (cost := getattr(outcome, name))}


def summary(cfg: AnnotateConfig, total: dict[str, Any]) -> Iterator[str]:
    """The closing lines: what the run has come to so far."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in total.get("refused_by", {}).items())
    yield (
        f"{total['finished']} of {cfg.run.parts} parts finished: {total.get('accepted', 0)} chunks accepted, "
        f"{total.get('refused', 0)} refused{f' ({reasons})' if reasons else ''}, {total.get('calls', 0)} calls"
    )
    for reason, documents in total["left_out"].items():
        names = ", ".join(documents["first"]) + (", ..." if documents["count"] > len(documents["first"]) else "")
        yield f"documents left out, {reason}: {documents['count']} ({names})"
    for name, sizes in total["splits"].items():
        yield (
            f"{name}: {sizes['rows']} rows, {sizes['thoughts']} thoughts, "
            f"{sizes['think_tokens']} tokens with thoughts, {sizes['raw_tokens']} without"
        )
    if cfg.split.control and (control := total["control"]).get("rows"):
        missing = f"; {control['missing']} are missing: raise split.control ({cfg.split.control})"
        yield (
            f"control: {control['tokens']} raw tokens against {control['think_tokens']} annotated ones of SFT"
            f"{missing if control['missing'] else ''}"
        )
