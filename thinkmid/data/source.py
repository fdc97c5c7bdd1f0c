"""Documents out of files and folders, and the seeded order in which a program takes them."""

import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from thinkmid.errors import UserError, plain

ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = (*ROWS, ".txt", ".md")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# files that describe a data set
CARD = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|data(set)?[_-]?card)([._-][a-z]{2}){0,2}\.(md|txt)", re.I
)
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it came from."""

    id: str  # the row's own, else `where`
    text: str  # not blank; otherwise as it stands in the file: line ends, NUL bytes and all
    where: str  # "file:line", for messages; "file:row" in parquet, "file:1" for a file that is one text
    messages: Sequence[Mapping[str, str]] = ()  # of a conversation, whose text is only counted; see conversations.py


def read_documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Documents of the given files and folders, in that order; those with blank text are left out.

    UserError names the file and line: as in read_rows; no "text", or not a string; nothing left at all.
    """
    empty = True
    for where, row in read_rows(paths, only=("id", "text")):
        document = as_document(where, row)
        if document.text.strip():
            empty = False
            yield document
    if empty:
        others = [*left, f"known are {', '.join(SUFFIXES)}"] if (left := left_out(paths)) else []
        raise UserError("; ".join([f"{', '.join(map(str, paths))}: no document with text", *others]))


def as_document(where: str, row: dict[str, Any]) -> Document:
    if "text" not in row:
        raise UserError(f'{where}: no "text" in this row; it has {", ".join(row) or "nothing"}')
    if not isinstance(row["text"], str):
        raise UserError(f'{where}: "text" must be a string, not {json_kind(row["text"])}')
    if not isinstance(row.get("id", ""), str | int | None):
        raise UserError(f'{where}: "id" must be a string, not {json_kind(row["id"])}')
    own = row.get("id")
    return Document(id=where if own is None or own == "" else str(own), text=row["text"], where=where)


def json_kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


def read_rows(paths: Sequence[str | Path], only: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row in .jsonl (also .gz, .zst) and .parquet files; a .txt or .md file is one {"text": ...}.

    A folder stands for the files that data_files() finds in it. UserError names file and line: missing path, unknown
    kind, file or row that cannot be read.
    only: the columns that a parquet file is read for, if it has the last of these.
    """
    for file in [file for path in paths for file in data_files(Path(path))]:
        name = file.name.lower()
        if name.endswith(".parquet"):
            yield from parquet_rows(file, only)
        elif name.endswith((".txt", ".md")):
            yield f"{file}:1", {"text": decode(file, b"".join(lines(file)))}
        else:
            for number, line in enumerate(lines(file), start=1):
                if line.strip():
                    yield f"{file}:{number}", json_row(f"{file}:{number}", line)


def data_files(path: Path, kinds: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The file, or those of these kinds below the folder, sorted by path; left_out() names the others.

    Hidden files are none. Links are followed, under their own names: caches and users' folders are made of them. One
    that leads nowhere is an error if it is called as data is. Cards (README.md) are documents among texts alone.
    """
    return _look(path, kinds)[0]


def left_out(paths: Sequence[str | Path], kinds: tuple[str, ...] = SUFFIXES) -> list[str]:
    """A line for each folder of which not every file is read: how many are not, of which kinds, and one by name."""
    out = []
    for path, files in ((path, _look(Path(path), kinds)[1]) for path in paths if os.path.isdir(path)):
        kind_of = {file: _kind(file) for file in files}
        found = Counter(kind_of.values()).most_common()
        named = [f"{kind} ({n})" for kind, n in found[:6]] + [f"{len(found) - 6} more kinds"] * (len(found) > 6)
        if files:
            example = next(file for file in files if kind_of[file] == found[0][0]).relative_to(path)
            count = f"{len(files)} file{'s' * (len(files) > 1)}"
            out.append(f"{path}: {count} left out: {', '.join(named)}, such as {example}")
    # a file may be called anything
    return [" ".join(plain(line).split()) for line in out]


def _look(path: Path, kinds: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """Files that are read, and those that are not."""
    if not os.path.isdir(path):  # these take a path of any length; a pipe, which may never end, is no file
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file or folder")
        if not path.name.lower().endswith(kinds):
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(kinds)}")
        return [path], []
    files, closed = _walk(path)
    read = [file for file in files if file.name.lower().endswith(kinds)]
    bare = [file for file in read if not _is_card(file)]
    # beside rows, or where nothing else could be read, a card is no document
    if any(file.name.lower().endswith(ROWS) for file in bare) or (not bare and len(read) < len(files)):
        read = bare
    others = sorted({*files, *closed} - {*read}, key=lambda file: (_is_card(file), file))
    return [file for name in read for file in data_files(name, kinds)], others


def _is_card(file: Path) -> bool:
    return CARD.fullmatch(file.name) is not None


def _walk(path: Path) -> tuple[list[Path], list[Path]]:
    """Files below a folder, sorted, and links to folders that are not followed, for what is there is read elsewhere."""
    home = Path(os.path.realpath(path))
    walked, followed, files, closed = set[Path](), set[Path](), list[Path](), list[Path]()
    for at, folders, names in os.walk(path, onerror=_unreadable, followlinks=True):
        if (here := Path(os.path.realpath(at))) in walked:  # within a folder that a link led to
            closed.append(Path(at))
            folders.clear()
            continue
        walked.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(at, name) for name in names if not name.startswith(".")]
        for link in [Path(at, name) for name in folders if os.path.islink(Path(at, name))]:
            real = Path(os.path.realpath(link))
            around = any(inner.is_relative_to(real) for inner in (home, here))
            inside = real.is_relative_to(home) and not any(part[:1] == "." for part in real.relative_to(home).parts)
            if real in followed or around or inside:
                closed.append(link)
                folders.remove(link.name)
            followed.add(real)
    return sorted(files), closed


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _kind(file: Path) -> str:
    """What a file is that is left out, in few words."""
    if file.is_dir():
        return "links to folders already read"
    if not file.exists():
        return "broken links"
    if _is_card(file):
        return file.name
    endings = Path(file.name.lower()).suffixes
    return f"*{''.join(endings[-2 if endings[-1] in COMPRESSED else -1 :])}" if endings else "without an ending"


def lines(file: Path) -> Iterator[bytes]:
    """Lines of a file that may be compressed, line ends kept, byte order mark dropped."""
    number = 0
    try:
        with open_bytes(file) as stream:
            for number, line in enumerate(stream, start=1):
                yield line.removeprefix(BOM) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}:{number + 1}: cannot be read ({error})") from error


@contextmanager
def open_bytes(file: Path) -> Iterator[Iterable[bytes]]:
    name = file.name.lower()
    if name.endswith(".zst"):
        zstandard = optional("zstandard", file)
        try:
            with file.open("rb") as raw:
                yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
    else:
        with gzip.open(file) if name.endswith(".gz") else file.open("rb") as stream:
            yield stream


def decode(file: Path, data: bytes) -> str:
    """The text of a file; bytes that are not UTF-8 are lost, with a warning on the console."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not int(os.environ.get("RANK", 0)):
            print(f"warning: {file}: not UTF-8 at byte {error.start}; such bytes are read as U+FFFD", flush=True)
        return data.decode("utf-8", errors="replace")


def json_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object, not {json_kind(row)}")
    return row


def parquet_rows(file: Path, only: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow, parquet = optional("pyarrow", file), optional("pyarrow.parquet", file)
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [name for name in only if name in names] if only and only[-1] in names else None
            batches = table.iter_batches(batch_size=1024, columns=columns)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{file}:{number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # a year that Python has not
        raise UserError(f"{file}:{number + 1}: cannot be read ({' '.join(str(error).split())})") from error


def optional(package: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{file}: needs {package.partition('.')[0]}; pip install thinkmid[data]") from error


class Order:
    """Endless seeded order over n items: a fresh permutation each epoch, a pure function of (n, seed) and a cursor.

    The cursor is the number of items taken so far; storing it is all that resuming needs.
    """

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise UserError(f"an order needs at least one item, not {n}")
        self.n, self.seed = n, seed
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # epoch and its permutation, to save time

    def take(self, cursor: int, count: int) -> list[int]:
        """The count indices after the first `cursor` ones."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, start = divmod(cursor + len(taken), self.n)
            taken += self._permutation(epoch)[start : start + count - len(taken)].tolist()
        return taken

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._last[0] != epoch:
            # raw bits: numpy keeps these from version to version, unlike Generator.permutation
            bits = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(self.n)
            self._last = (epoch, np.argsort(bits, kind="stable"))
        return self._last[1]
