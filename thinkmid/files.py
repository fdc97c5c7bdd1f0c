"""Files of a run's folder: checked as they are read again, written whole, locked."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any

from thinkmid.errors import UserError

Row = dict[str, Any]  # an object of a JSON or jsonl file
Kinds = Mapping[str, Callable[[Any], bool]]  # field -> whether a value may stand in it


def read_json(path: Path) -> Row:
    """The object in a JSON file. UserError: there is none, or a key stands twice: which one would count?"""
    try:
        value = json.loads(regular(path).read_bytes(), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {max(names, key=names.count)!r} stands twice")
    return row


def regular(path: Path) -> Path:
    """The path of a file that ends: a pipe that is opened waits for ever. UserError for what is not regular."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: not a regular file")
    return path


def digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_row(where: str, row: Row, must: Kinds, may: Kinds | None = None) -> None:
    """UserError names the first field that is not of its kind or, of those in must, is not there."""
    wrong = [name for name, fits in must.items() if not fits(row.get(name))]
    wrong += [name for name, fits in (may or {}).items() if name in row and not fits(row[name])]
    if wrong:
        raise UserError(f"{where}: '{wrong[0]}' is missing or not of its kind")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Finite, and so far below the largest float that sums and squares are too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock that one process at a time holds; the others wait, or get a UserError. Makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{path.parent}: another process works there") from None
        except OSError:  # a file system without locks
            pass
        yield


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that a crash leaves the old file or the new one, never a part. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """A JSON value: arrays, tensors and tuples as lists and numbers, NaN and infinities as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """Write a JSON file as write_whole does; numbers that JSON does not know become null."""
    write_whole(path, json.dumps(finite(value), indent=indent, allow_nan=False) + "\n")


def fsync(path: Path) -> None:
    """A file, or the entries of a folder, through to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def swap_in(new: Path, place: Path, aside: Path) -> None:
    """Put a folder in its place, durably; an older one goes aside: a folder cannot be renamed onto a full one."""
    if os.path.lexists(place):
        os.rename(place, aside)
    os.rename(new, place)
    fsync(place.parent)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a jsonl file as write_whole does."""
    write_whole(path, "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a jsonl file. A torn last line is left out; a broken line before it is a UserError with its number."""
    return [row for _, row in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[str, Row]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    found, numbers = [], [i for i, line in enumerate(lines) if line.strip()]
    for i in numbers:
        row = None
        with suppress(ValueError, RecursionError):  # a crash tears the last line; elsewhere it is an error, below
            row = json.loads(lines[i])
        if isinstance(row, dict):
            found.append((lines[i], row))
        elif i != numbers[-1]:
            raise UserError(f"{path}:{i + 1}: not a JSON object")
    return found


def reopen(path: Path, wanted: Callable[[Row], bool] = lambda row: True) -> Any:
    """A jsonl file, opened for whole lines to be added, with the wanted rows of the past; a torn last one is gone."""
    if path.exists():
        write_whole(path, "".join(line + "\n" for line, row in _lines(path) if wanted(row)))
    return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # each line reaches the system
