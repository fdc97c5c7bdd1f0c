"""Training data. Text is tokenised once by all ranks, and read from the run's folder by the run that resumes."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from thinkmid.data import prompts, questions, sequences, store
from thinkmid.data.conversations import Conversations
from thinkmid.data.source import Document, data_files, left_out, read_documents
from thinkmid.data.store import Store
from thinkmid.data.wording import Wording, in_letters
from thinkmid.errors import UserError
from thinkmid.files import digest
from thinkmid.run.config import RunConfig
from thinkmid.run.folder import LOCK, STORE, begun, hold, same_data
from thinkmid.run.interrupt import EXIT, Interrupt
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.train.config import RLMTConfig, RLMTData, RLPTData, SFTData
from thinkmid.types import Prompt

REPORT_S = 10  # between lines of progress

MakePrompts = Callable[[Iterable[Document]], Iterable[Prompt]]


def name_left_out(paths: Sequence[str], ranks: Ranks) -> None:
    """A line for each folder of which not every file is read. Collective."""
    for line in ranks.run_on_first(left_out, paths) or ():
        print(line, flush=True)


def stored_documents(
    data: SFTData,
    tokenizer: Tokenizer,
    run: RunConfig,
    ranks: Ranks,
    interrupt: Interrupt,
    chats: Conversations | None = None,
) -> Store:
    """Tokens of all documents. chats: how rows of messages are read; None: documents are texts. Collective."""
    encode = partial(sequences.records, tokenizer=tokenizer, chats=chats)
    read = chats.read if chats else partial(_read_texts, tokenizer=tokenizer, column=data.column)
    writing = _Writing(data, encode, "document of two tokens or more", run, ranks, interrupt, read)
    return writing.store({"tokens": tokenizer.digest} | (chats.decides if chats else {}))


def _read_texts(paths: Sequence[str], tokenizer: Tokenizer, column: str) -> Iterable[Document]:
    """The documents, with a line on the console for the first that spells a special token in letters."""
    warned = bool(int(os.environ.get("RANK", 0)))
    for doc in read_documents(paths, column):
        if not warned and (name := tokenizer.spelled(doc.text)):
            print(f"warning: {doc.where}: {in_letters(name)}", flush=True)
            warned = True
        yield doc


def _prompt_records(documents: Iterable[Document], make: MakePrompts) -> Iterable[tuple[bytes, tuple[int, int]]]:
    return prompts.records(make(documents))


def read_prompts(
    cfg: RLMTConfig, tokenizer: Tokenizer, max_prefix: int, ranks: Ranks, interrupt: Interrupt
) -> tuple[prompts.StoredPrompts, str, list[Prompt]]:
    """RLMT's prompts, their digest, and the held-out prompts. Collective."""
    data, seed = cfg.data, cfg.run.seed
    name_left_out([*data.paths, *data.val_paths], ranks)
    decides: dict[str, Any] = {"prompts": tokenizer.digest, "max_prefix": max_prefix, "prefix": data.prefix}
    if data.prefix == "thought":
        make: MakePrompts = partial(prompts.at_thoughts, tokenizer=tokenizer, max_prefix=max_prefix)
    else:
        decides |= {"length": data.length, "seed": seed}
        cut = partial(prompts.in_raw_text, where=data.prefix, length=data.length, seed=seed)
        make = partial(cut, tokenizer=tokenizer, max_prefix=max_prefix)
    held_out = ranks.run_on_all(_read_held_out, data, make) if data.val_paths else []
    what = f"prefix (data.prefix = {data.prefix!r})"
    read = partial(_read_texts, tokenizer=tokenizer, column=data.column)
    writing = _Writing(data, partial(_prompt_records, make=make), what, cfg.run, ranks, interrupt, read)
    stored = writing.store(decides)
    return prompts.StoredPrompts(stored), stored.digest, held_out


def _read_held_out(data: RLMTData, make: MakePrompts) -> list[Prompt]:
    """val_prompts prefixes spread evenly over the held-out text."""
    found = [prompt for block in store.blocks(read_documents(data.val_paths, data.column)) for prompt in make(block)]
    if not found:
        raise UserError(f"{', '.join(data.val_paths)}: no prefix (data.prefix = {data.prefix!r})")
    return found[:: max(1, len(found) // data.val_prompts)][: data.val_prompts]


def read_questions(data: RLPTData, wording: Wording, max_prompt: int) -> tuple[list[Prompt], list[str]]:
    """One prompt per question that fits, and lines about the others. UserError if none does."""
    loaded = questions.load(data.task, data.path)
    found = []
    for q in loaded.questions:
        posed, tokens = questions.posed(q), wording.tokens(q)
        if len(tokens) <= max_prompt:
            found.append(Prompt(id=q.id, tokens=tokens, meta={"gold": posed.gold, "question": posed.text}))
    if not found:
        raise UserError(f"{data.path}: no question fits into {max_prompt} tokens")
    notes = [*loaded.notes, *wording.notes(loaded.questions)]
    if left := len(loaded.questions) - len(found):
        notes.append(f"{left} of {len(loaded.questions)} questions exceed {max_prompt} tokens and are left out")
    return found, notes


@dataclass
class _Writing:
    """A store in a run's folder, written if it is not there yet."""

    data: SFTData | RLMTData
    encode: store.Encode
    what: str  # the data must have, for people
    run: RunConfig
    ranks: Ranks
    interrupt: Interrupt
    read: Callable[[Sequence[str]], Iterable[Document]]
    reported: float = field(default_factory=time.monotonic)  # when a line of progress was last printed

    @property
    def folder(self) -> Path:
        return Path(self.run.folder, STORE)

    def store(self, decides: dict[str, Any]) -> Store:
        """Collective. UserError: what is wrong with the data; then nothing is left behind."""
        ranks = self.ranks
        if self.data.column != "text":
            decides = decides | {"column": self.data.column}
        made_of = decides | {"files": ranks.run_on_all(self._files)}
        manifest = store.find(self.folder, made_of)
        if ranks.any(manifest is None):
            manifest = self._moved(made_of)
        if not ranks.any(manifest is None):
            assert manifest is not None
            return ranks.run_on_all(Store, self.folder, manifest)
        name = ranks.gather_bytes(secrets.token_hex(4).encode())[0].decode()
        made = ranks.run_on_first(self._hold)
        try:
            return self._made(name, made_of)
        except (UserError, SystemExit):
            ranks.run_on_first(self._clean, bool(made))
            raise

    def _made(self, name: str, made_of: dict[str, Any]) -> Store:
        """Written by all ranks and published. Collective; SystemExit where a stop was requested."""
        ranks = self.ranks
        ranks.run_on_all(self._write, name)
        if ranks.any(self.interrupt.requested):
            ranks.run_on_first(print, "stopped before the first step; the same command begins again", flush=True)
            raise SystemExit(EXIT)
        manifest = ranks.run_on_all(store.describe, self.folder, name, ranks.world, made_of)
        manifest["content"] = self._content(made_of["files"])
        written = ranks.run_on_all(Store, self.folder, manifest)
        ranks.run_on_first(self._publish, written, manifest)
        return written

    def _moved(self, made_of: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest of what the run began with, if all that changed since is where its files lie, or when they were
        touched. Made anew, prompts would be named after other paths, and drawn with other numbers. Collective."""
        before = store.whole(self.folder) if begun(self.run) else None
        if before is not None and before["made_of"] | {"files": made_of["files"]} != made_of:
            before = None
        if self.ranks.any(before is None) or before is None:
            return None
        if self._content(made_of["files"]) != before.get("content"):
            return None
        manifest = before | {"made_of": made_of}
        self.ranks.run_on_first(store.publish, self.folder, manifest)
        return manifest

    def _content(self, files: list[list[Any]]) -> list[str]:
        """A hash of every file, each read by one rank. Collective."""
        ranks = self.ranks
        mine = ranks.run_on_all(_hashes, [name for name, *_ in files[ranks.rank :: ranks.world]])
        shares = [json.loads(share) for share in ranks.gather_bytes(json.dumps(mine).encode())]
        return [shares[i % ranks.world][i // ranks.world] for i in range(len(files))]

    def _files(self) -> list[list[Any]]:
        """Path, bytes and times of the last changes of every file: of what is in it, which can be set, and of any."""
        stats = [(str(file), os.stat(file)) for path in self.data.paths for file in data_files(Path(path))]
        return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]

    def _hold(self) -> bool:
        """Whether the run's folder had to be made. What a killed run left goes: there may be no room for both."""
        made = not Path(self.run.folder).exists()
        hold(Path(self.run.folder))
        store.sweep(self.folder)
        return made

    def _write(self, name: str) -> None:
        fault = self.folder / f"{name}-fault"  # what stops one rank stops the others at their next block
        try:
            # on every rank: another node may not see yet what the first one made
            self.folder.mkdir(parents=True, exist_ok=True)
            where = (self.folder, name, self.ranks.rank, self.ranks.world)
            for counts in store.write(*where, self.read(self.data.paths), self.encode):
                if not self._continues(fault, *counts):
                    break
        except UserError:
            fault.touch()
            raise
        except OSError as error:
            with suppress(OSError):
                fault.touch()
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def _continues(self, fault: Path, num_documents: int, num_chars: int) -> bool:
        """After each block: reports progress, passes a request to stop on to the other ranks."""
        if self.ranks.rank == 0 and time.monotonic() - self.reported > REPORT_S:
            self.reported = time.monotonic()
            print(f"data: {num_documents:,} documents, {num_chars / 1e6:,.0f} M characters read", flush=True)
        if self.interrupt.requested:
            fault.touch()
        return not fault.exists()

    def _publish(self, written: Store, manifest: dict[str, Any]) -> None:
        """Unless there is nothing in it, or a run began with something else."""
        if not len(written):
            raise UserError(f"{', '.join(self.data.paths)}: no {self.what}")
        if begun(self.run) and (before := store.published(self.folder).get("digest")):
            same_data(before, written.digest, Path(self.run.folder))
        store.publish(self.folder, manifest)

    def _clean(self, made: bool) -> None:
        with suppress(OSError):
            store.sweep(self.folder)
            self.folder.rmdir()  # it does not remove what holds something
        if made:
            with suppress(OSError):
                Path(self.run.folder, LOCK).unlink()
                Path(self.run.folder).rmdir()


def _hashes(paths: list[str]) -> list[str]:
    return [digest(Path(path)) for path in paths]
