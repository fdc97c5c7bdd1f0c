"""What a run learns from, stored in its folder: tokenised once by all ranks, and found there by a run that goes on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkmid.data import prompts, sequences, store
from thinkmid.data.source import Document, data_files, left_out, read_documents
from thinkmid.errors import UserError
from thinkmid.run.config import RunConfig
from thinkmid.run.folder import LOCK, STORE, begun, hold, same_data
from thinkmid.run.interrupt import EXIT, Interrupt
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt

TELL_S = 10  # between lines of progress


def name_left_out(paths: Sequence[str], ranks: Ranks) -> None:
    """A line for each folder of which not every file is read. Collective."""
    for line in ranks.agree(lambda: [] if ranks.rank else left_out(paths)):
        print(line, flush=True)


def stored_sequences(
    paths, tokenizer: Tokenizer, max_len: int, run: RunConfig, ranks: Ranks, interrupt: Interrupt
) -> tuple[sequences.Sequences, str]:
    """Token sequences of all documents, and a digest of them. Collective."""
    encode = lambda documents: sequences.records(documents, tokenizer)  # noqa: E731
    what = "document of two tokens or more"
    found = _Writing(paths, encode, {"tokens": tokenizer.digest}, run, ranks, interrupt, what).store()
    return sequences.Sequences(found, max_len), found.digest


def stored_prompts(
    paths,
    make: Callable[[Iterable[Document]], Iterable[Prompt]],
    decides: dict[str, Any],
    run: RunConfig,
    ranks: Ranks,
    interrupt: Interrupt,
) -> tuple[prompts.StoredPrompts, str]:
    """The prompts that make() makes of all documents, and a digest of them. Collective.

    decides: what prompts come out, beside the documents.
    """
    encode = lambda documents: prompts.records(make(documents))  # noqa: E731
    what = f"prefix (data.prefix = {decides['prefix']!r})"
    found = _Writing(paths, encode, decides, run, ranks, interrupt, what).store()
    return prompts.StoredPrompts(found), found.digest


@dataclass
class _Writing:
    """A store in a run's folder, written if it is not there yet."""

    paths: Sequence[str]
    encode: store.Encode
    decides: dict[str, Any]
    run: RunConfig
    ranks: Ranks
    interrupt: Interrupt
    what: str  # the data must have, for people
    told: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.run.folder, STORE)

    def store(self) -> store.Store:
        """Collective. UserError: what is wrong with the data; then nothing is left behind."""
        ranks = self.ranks
        made_of = self.decides | {"files": ranks.agree(self._files)}
        found = store.find(self.folder, made_of)
        if ranks.any(found is None):
            found = self._moved(made_of)
        if not ranks.any(found is None):
            return ranks.agree(lambda: store.Store(self.folder, found))
        name = ranks.gather_bytes(secrets.token_hex(4).encode())[0].decode()
        made = self._first(self._hold)
        try:
            ranks.agree(lambda: self._write(name))
            if ranks.any(self.interrupt.requested):
                self._first(lambda: print("stopped before the first step; the same command begins again", flush=True))
                raise SystemExit(EXIT)
            manifest = ranks.agree(lambda: store.describe(self.folder, name, ranks.world, made_of))
            manifest["content"] = self._content(made_of["files"])
            found = ranks.agree(lambda: store.Store(self.folder, manifest))
            self._first(lambda: self._publish(found, manifest))
        except (UserError, SystemExit):
            self._first(lambda: self._clean(made))
            raise
        return found

    def _moved(self, made_of: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest of what the run began with, if all that changed since is where its files lie, or when they were
        touched. Made anew, prompts would be named after other paths, and drawn with other numbers. Collective."""
        before = store.whole(self.folder) if begun(self.run) else None
        elsewhere = before is not None and before["made_of"] | {"files": made_of["files"]} == made_of
        if self.ranks.any(not elsewhere) or self._content(made_of["files"]) != before.get("content"):
            return None
        manifest = before | {"made_of": made_of}
        self._first(lambda: store.publish(self.folder, manifest))
        return manifest

    def _content(self, files: list) -> list[str]:
        """A hash of every file, each read by one rank. Collective."""
        ranks = self.ranks
        mine = ranks.agree(lambda: [_hash(name) for name, *_ in files[ranks.rank :: ranks.world]])
        shares = [json.loads(share) for share in ranks.gather_bytes(json.dumps(mine).encode())]
        return [shares[i % ranks.world][i // ranks.world] for i in range(len(files))]

    def _first(self, work: Callable[[], Any]) -> Any:
        return self.ranks.agree(lambda: work() if self.ranks.rank == 0 else None)

    def _files(self) -> list:
        """Path, bytes and times of the last changes of every file: of what is in it, which can be set, and of any."""
        stats = [(str(file), os.stat(file)) for path in self.paths for file in data_files(Path(path))]
        return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]

    def _hold(self) -> bool:
        """Whether the run's folder had to be made. What a killed run left goes: there may be no room for both."""
        made = not Path(self.run.folder).exists()
        hold(Path(self.run.folder))
        store.sweep(self.folder)
        return made

    def _write(self, name: str) -> None:
        fault = self.folder / f"{name}-fault"  # what stops one rank stops the others at their next block

        def go_on(num_documents: int, num_chars: int) -> bool:
            if self.ranks.rank == 0 and time.monotonic() - self.told > TELL_S:
                self.told = time.monotonic()
                print(f"data: {num_documents:,} documents, {num_chars / 1e6:,.0f} M characters read", flush=True)
            if self.interrupt.requested:
                fault.touch()
            return not fault.exists()

        try:
            # on every rank: another node may not see yet what the first one made
            self.folder.mkdir(parents=True, exist_ok=True)
            where = (self.folder, name, self.ranks.rank, self.ranks.world)
            store.write(*where, read_documents(self.paths), self.encode, go_on)
        except UserError:
            fault.touch()
            raise
        except OSError as error:
            with suppress(OSError):
                fault.touch()
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def _publish(self, found: store.Store, manifest: dict[str, Any]) -> None:
        """Unless there is nothing in it, or a run began with something else."""
        if not len(found):
            raise UserError(f"{', '.join(self.paths)}: no {self.what}")
        if begun(self.run) and (before := store.published(self.folder).get("digest")):
            same_data(before, found.digest, Path(self.run.folder))
        store.publish(self.folder, manifest)

    def _clean(self, made: bool) -> None:
        with suppress(OSError):
            store.sweep(self.folder)
            self.folder.rmdir()  # it does not remove what holds something
        if made:
            with suppress(OSError):
                Path(self.run.folder, LOCK).unlink()
                Path(self.run.folder).rmdir()


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
