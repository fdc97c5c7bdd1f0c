"""Documents out of files and folders, and the seeded order in which a program takes them."""

import glob
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
from thinkmid.files import read_json

ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
SAVED, SPLITS = "state.json", "dataset_dict.json"  # of datasets' save_to_disk: one set in its folder, or several below
TEXTS = (".txt", ".md")
TEXT_ENDS = tuple(f"{ending}:1" for ending in TEXTS)  # of `where` in a file that is one text
SUFFIXES = (*ROWS, *TEXTS)
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# files that describe a data set
CARD = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|data(set)?[_-]?card)([._-][a-z]{2}){0,2}\.(md|txt)", re.I
)
IN_CACHE = re.compile(r".*/(?=datasets--[^/]+/snapshots/)")  # the place of the Hub's cache
BOM = b"\xef\xbb\xbf"
BATCH = 1024  # rows of a table in memory at a time


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and where it came from."""

    id: str  # the row's own, else `where`, without the place of the Hub's cache
    text: str  # not blank; otherwise as it stands in the file: line ends, NUL bytes and all
    where: str  # "file:line", for messages; "file:row" in parquet, "file:1" for a file that is one text
    messages: Sequence[Mapping[str, str]] = ()  # of a conversation, whose text is only counted; see conversations.py


def read_documents(paths: Sequence[str | Path], column: str = "text") -> Iterator[Document]:
    """Documents of the given files and folders, in that order; those with blank text are left out.

    column: of rows, the field that holds the text. UserError names the file and line: as in read_rows; no such field,
    or not a string; nothing left at all.
    """
    empty = True
    for where, row in read_rows(paths, only=("id", column)):
        document = as_document(where, row, "text" if where.endswith(TEXT_ENDS) else column)
        if document.text.strip():
            empty = False
            yield document
    if empty:
        others = [*left, f"known are {', '.join(SUFFIXES)}"] if (left := left_out(paths)) else []
        raise UserError("; ".join([f"{', '.join(map(str, paths))}: no document with text", *others]))


def as_document(where: str, row: dict[str, Any], column: str = "text") -> Document:
    if column not in row:
        raise UserError(f'{where}: no "{column}" in this row; it has {", ".join(row) or "nothing"}')
    if not isinstance(row[column], str):
        raise UserError(f'{where}: "{column}" must be a string, not {json_kind(row[column])}')
    if not isinstance(row.get("id", ""), str | int | None):
        raise UserError(f'{where}: "id" must be a string, not {json_kind(row["id"])}')
    own = row.get("id")
    found = IN_CACHE.sub("", where)  # the same on another machine
    return Document(id=found if own is None or own == "" else str(own), text=row[column], where=where)


def json_kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


def read_rows(paths: Sequence[str | Path], only: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row in .jsonl (also .gz, .zst), .parquet and .arrow files, with all of its fields; a .txt
    or .md file is one {"text": ...}.

    A folder stands for the files that data_files() finds in it. UserError names file and line: missing path, unknown
    kind, file or row that cannot be read.
    only: the columns that a parquet or arrow file is read for, if it has the last of these.
    """
    for file in [file for path in paths for file in data_files(Path(path))]:
        name = file.name.lower()
        if name.endswith((".parquet", ".arrow")):
            yield from table_rows(file, only)
        elif name.endswith(TEXTS):
            yield f"{file}:1", {"text": decode(file, b"".join(lines(file)))}
        else:
            for number, line in enumerate(lines(file), start=1):
                if line.strip():
                    yield f"{file}:{number}", json_row(f"{file}:{number}", line)


def data_files(path: Path, kinds: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The file, or those of these kinds below the folder, sorted by path; left_out() names the others. A path with `*`
    that is none itself stands for all that it matches, `**` for folders of any depth.

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
            if not (matched := sorted(glob.glob(str(path), recursive=True)) if "*" in str(path) else []):
                raise UserError(f"{path}: no such file or folder")
            return [file for name in matched for file in data_files(Path(name), kinds)], []
        if not path.name.lower().endswith(kinds):
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(kinds)}")
        return [path], []
    files, closed = _walk(path)
    read = [file for file in files if file.name.lower().endswith(kinds)]
    _refuse_splits(files)
    beside = _beside([file for file in read if file.name.endswith(".arrow")])
    read = [file for file in read if file not in beside]
    bare = [file for file in read if not _is_card(file)]
    # beside rows, or where nothing else could be read, a card is no document
    if any(file.name.lower().endswith(ROWS) for file in bare) or (not bare and len(read) < len(files)):
        read = bare
    others = sorted({*files, *closed} - {*read}, key=lambda file: (_is_card(file), file))
    return [file for name in read for file in data_files(name, kinds)], others


def _refuse_splits(files: Iterable[Path]) -> None:
    """UserError for a DatasetDict of several splits: which would be meant?"""
    for folder in (file.parent for file in files if file.name == SPLITS):
        splits = read_json(folder / SPLITS).get("splits")
        if isinstance(splits, list) and len(splits) > 1:
            raise UserError(f"{folder}: holds the splits {', '.join(map(str, splits))}; name one: {folder}/{splits[0]}")


def _beside(tables: Sequence[Path]) -> set[Path]:
    """Those of these .arrow files that are no part of the data set which save_to_disk wrote: results of its map()."""
    beside = set[Path]()
    for folder in {file.parent for file in tables if (file.parent / SAVED).is_file()}:
        state = read_json(folder / SAVED)
        parts = [str(part.get("filename")) for part in state.get("_data_files") or () if isinstance(part, dict)]
        if lost := [name for name in parts if not (folder / name).is_file()]:
            raise UserError(f"{folder / lost[0]}: no such file; {SAVED} names it")
        if state.get("_indices_files"):
            raise UserError(f"{folder}: an older datasets saved it with a mapping of indices; save it again")
        beside |= {file for file in tables if file.parent == folder and file.name not in parts}
    return beside


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


def table_rows(file: Path, only: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .parquet or .arrow file."""
    pyarrow, number = optional("pyarrow", file), 0
    batches = parquet_batches if file.name.lower().endswith(".parquet") else arrow_batches
    try:
        rows = chain.from_iterable(batch.to_pylist() for batch in batches(file, only))
        for number, row in enumerate(rows, start=1):
            yield f"{file}:{number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # a year that Python has not
        raise UserError(f"{file}:{number + 1}: cannot be read ({' '.join(str(error).split())})") from error


def parquet_batches(file: Path, only: Sequence[str]) -> Iterator[Any]:
    with optional("pyarrow.parquet", file).ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=BATCH, columns=_columns(table.schema_arrow.names, only))


def arrow_batches(file: Path, only: Sequence[str]) -> Iterator[Any]:
    """Of a stream, as datasets writes it, or of a file with a footer (Feather)."""
    pyarrow, ipc = optional("pyarrow", file), optional("pyarrow.ipc", file)
    with pyarrow.memory_map(str(file)) as source:
        has_footer = source.read(6) == b"ARROW1"
        source.seek(0)
        with ipc.open_file(source) if has_footer else ipc.open_stream(source) as table:
            columns = _columns(table.schema.names, only) or table.schema.names
            batches = map(table.get_batch, range(table.num_record_batches)) if has_footer else table
            for batch in batches:  # of any size
                for at in range(0, batch.num_rows, BATCH):
                    yield batch.slice(at, BATCH).select(columns)


def _columns(names: Sequence[str], only: Sequence[str]) -> list[str] | None:
    return [name for name in only if name in names] if only and only[-1] in names else None


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
