"""What a run learns from, stored in its folder: tokenised once by all ranks, and found there by a run that goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from thinkmid.data.prompts import StoredPrompts, record
from thinkmid.data.sequences import Sequences, records
from thinkmid.data.source import Document, data_files, read_documents
from thinkmid.data.store import MANIFEST, Encode, Store, is_store_of, seal, write
from thinkmid.errors import UserError
from thinkmid.files import read_json
from thinkmid.text import Text
from thinkmid.train.folder import NEW_STORE, STORE, hold, same_data
from thinkmid.train.shard import Ranks
from thinkmid.types import Prompt

TELL_S = 10  # between lines of progress


def stored_sequences(paths, text: Text, max_len: int, run_folder: str, ranks: Ranks) -> tuple[Sequences, str]:
    """Token sequences of all documents, and a digest of them. Collective."""
    encode = lambda documents: records(documents, text)  # noqa: E731
    store = _stored(paths, encode, {"tokens": text.digest}, run_folder, ranks, "document of two tokens or more")
    return Sequences(store, max_len), store.digest


def stored_prompts(
    paths,
    make: Callable[[Sequence[Document]], Iterable[Prompt]],
    decides: dict[str, Any],
    run_folder: str,
    ranks: Ranks,
) -> tuple[StoredPrompts, str]:
    """The prompts that make() makes of all documents, and a digest of them. Collective.

    decides: what prompts come out, beside the documents.
    """
    encode = lambda documents: map(record, make(documents))  # noqa: E731
    store = _stored(paths, encode, decides, run_folder, ranks, f"prefix (data.prefix = {decides['prefix']!r})")
    return StoredPrompts(store), store.digest


def _stored(paths, encode: Encode, made_of: dict[str, Any], run_folder: str, ranks: Ranks, what: str) -> Store:
    """The store in a run's folder, written first where there is none of this. what: the data must have, for people."""
    folder, new = Path(run_folder, STORE), Path(run_folder, NEW_STORE)
    files = ranks.agree(lambda: _files(paths))
    if ranks.any(not is_store_of(folder, made_of, files)):
        is_ours = not Path(run_folder).exists()
        tell = _progress() if ranks.rank == 0 else lambda *_: None
        first = lambda work: ranks.agree(lambda: work() if ranks.rank == 0 else None)  # noqa: E731
        try:
            first(lambda: _emptied(new))
            ranks.agree(lambda: _write(new, ranks, read_documents(paths), encode, tell))
            first(lambda: seal(new, ranks.world, made_of, files))
            first(lambda: _put(new, folder, f"{', '.join(paths)}: no {what}"))
        except UserError:
            if ranks.rank == 0:
                shutil.rmtree(run_folder if is_ours else new, ignore_errors=True)
            raise
    return Store(folder)


def _emptied(new: Path) -> None:
    hold(new.parent)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()


def _write(new: Path, ranks: Ranks, *what: Any) -> None:
    try:
        write(new, ranks.rank, ranks.world, *what)
    except OSError as error:
        raise UserError(f"{new}: cannot be written ({error.strerror})") from error


def _put(new: Path, folder: Path, if_empty: str) -> None:
    """In the place of the old one, unless a run began with that."""
    found = Store(new)
    if not len(found):
        raise UserError(if_empty)
    if (folder / MANIFEST).exists() and any(folder.parent.glob("checkpoints/step-*")):
        same_data(read_json(folder / MANIFEST).get("digest"), found.digest, folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _files(paths) -> list:
    """Path, bytes and time of the last change of every file."""
    stats = [(str(file), os.stat(file)) for path in paths for file in data_files(Path(path))]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _progress() -> Callable[[int, int], None]:
    last = time.monotonic()

    def tell(num_documents: int, num_chars: int) -> None:
        nonlocal last
        if time.monotonic() - last > TELL_S:
            last = time.monotonic()
            print(f"data: {num_documents:,} documents, {num_chars / 1e6:,.0f} M characters read", flush=True)

    return tell
