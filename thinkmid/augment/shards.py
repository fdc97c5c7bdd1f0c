"""Parts of the output: finished chunks in a journal that survives a kill, then files that are whole or absent.

    journal/part-0003.jsonl   a line for each finished chunk, in the order in which they were finished; append-only
    sft-think/part-0003.jsonl sft-raw/... rl-think/... rl-raw/... heldout-think/... heldout-raw/...
                              {"id", "text"} in source order: with thoughts, and the same chunks without
    sft-control/...           sft-raw, then chunks of the control split up to as many tokens as sft-think has
    parts/part-0003.json      counts, and sha256 of those files and of itself; written last
    manifest.json             every file with sha256, once all parts are finished

A part belongs to a document by the document's hash, so it holds the same rows whoever made it, and when.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from thinkmid import thoughts
from thinkmid.augment import control
from thinkmid.augment.split import ANNOTATED
from thinkmid.errors import UserError
from thinkmid.files import Row, check_row, digest, is_count, is_text, read_json, write_whole
from thinkmid.tokenizer import Tokenizer

# fields of a journal's rows
PLACE = {"key": is_text, "chunk": is_count}
SAID = {
    **dict.fromkeys(("text", "raw", "refused"), is_text),
    **dict.fromkeys(("calls", "prompt_tokens", "written_tokens"), is_count),
    "retried": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
}


class Chunk(NamedTuple):
    """A chunk's place: which document, which of its chunks."""

    key: str  # of the document
    number: int


class Piece(NamedTuple):
    """A chunk that is still to be done."""

    part: int
    place: Chunk
    chunk: str


class Placed(NamedTuple):
    """A document in a part, for the order of rows."""

    key: str
    id: str
    split: str
    num_chunks: int


def part_of(key: str, parts: int) -> int:
    """The part that a document belongs to; key is hexadecimal."""
    return int(key[:16], 16) % parts


class Journal:
    """The finished chunks of one part. One process at a time; UserError if another one holds it.

    again: refused chunks count as unfinished.
    A line is one write: a process killed at any time leaves whole lines. What a crash of the machine tears off at the
    end is cut; the chunk is done again.
    """

    def __init__(self, path: Path, *, again: bool = False):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise UserError(f"{path}: another process works on this part") from None
        os.ftruncate(self._fd, path.read_bytes().rfind(b"\n") + 1)
        try:
            self.done = {place(row) for row in self.rows() if finished(row) and not (again and "refused" in row)}
        except UserError:
            os.close(self._fd)
            raise

    def rows(self) -> list[Row]:
        """All rows, oldest first. UserError names a line that is no row."""
        found = []
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    found.append(json.loads(line))
                    check_row("", found[-1], PLACE, SAID)
                except (ValueError, AttributeError, RecursionError):
                    raise UserError(
                        f"{self.path}:{number}: damaged; delete the line, its chunk is done again"
                    ) from None
        return found

    def add(self, row: Row) -> None:
        """Write down a chunk. UserError if the disk does not take it."""
        line = json.dumps(row).encode() + b"\n"
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None
        if written < len(line):
            raise UserError(f"{self.path}: cannot be written (disk full?)")
        if finished(row):
            self.done.add(place(row))

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def place(row: Row) -> Chunk:
    return Chunk(row["key"], row["chunk"])


def finished(row: Row) -> bool:
    """Accepted, refused or raw by decision; a chunk without a response is written down for its costs only."""
    return "text" in row or "refused" in row or "raw" in row


def any_accepted(folder: Path) -> bool:
    """Whether a chunk of the run was accepted so far, by any job."""
    # quotes inside of a string are escaped
    journals = sorted((folder / "journal").glob("part-*.jsonl"))
    return any(b'"text": ' in line for path in journals for line in path.open("rb"))


def tally(rows: Iterable[Row]) -> Row:
    """What the rows of a journal cost and came to; of a chunk that was done again the last row counts."""
    counts: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    last: dict[Chunk, Row] = {}
    for row in rows:
        counts.update({name: row.get(name, 0) for name in ("calls", "prompt_tokens", "written_tokens")})
        retried.update(row.get("retried", {}))
        last |= {place(row): row} if finished(row) else {}
    for row in last.values():
        accepted, refused_one = "text" in row, "refused" in row
        counts.update(chunks=accepted or refused_one, accepted=accepted, refused=refused_one)
        refused.update([row["refused"]] if "refused" in row else [])
    return {**counts, "refused_by": dict(sorted(refused.items())), "retried_by": dict(sorted(retried.items()))}


def publish(
    folder: Path, part: int, order: list[Placed], journal: Journal, tokenizer: Tokenizer, *, with_control: bool
) -> None:
    """The files of a part whose chunks are all finished, its status last."""
    rows = journal.rows()
    accepted = {place(row): row["text"] for row in rows if "text" in row}
    kept = {place(row): row["raw"] for row in rows if "raw" in row}
    reserve = [(name, kept[at]) for at, name in names(order).items() if at in kept]
    texts: dict[str, control.Rows] = {}
    splits: dict[str, dict[str, int]] = {}
    filling: dict[str, int] = {}
    for split in ANNOTATED:
        documents = [doc for doc in order if doc.split == split]
        think = [(name, accepted[at]) for at, name in names(documents).items() if at in accepted]
        raw = [(name, thoughts.strip(woven)) for name, woven in think]
        splits[split] = sizes(documents, think, raw, tokenizer)
        texts |= {f"{split}-think": think, f"{split}-raw": raw}
        if split == "sft":
            filled, filling = control.fill(raw, reserve, splits[split]["think_tokens"], tokenizer)
            texts |= {"sft-control": filled} if with_control else {}
    files = {f"{kind}/part-{part:04d}.jsonl": found for kind, found in texts.items()}
    written = {path: write_texts(folder / path, found) for path, found in files.items()}
    status = {"finished": True, "counts": tally(rows), "splits": splits, "control": filling, "files": written}
    write_status(folder, part, status)


def names(documents: list[Placed]) -> dict[Chunk, str]:
    """Row ids of all chunks, by place: two documents may have the same id."""
    return {Chunk(doc.key, k): f"{doc.id}#{k}" for doc in documents for k in range(doc.num_chunks)}


def write_texts(path: Path, rows: control.Rows) -> dict[str, object]:
    """Write rows of (id, text). Returns what a manifest holds of the file."""
    write_whole(path, "".join(json.dumps({"id": id, "text": chunk}) + "\n" for id, chunk in rows))
    return {"rows": len(rows), "sha256": digest(path)}


def sizes(documents: list[Placed], think: control.Rows, raw: control.Rows, tokenizer: Tokenizer) -> dict[str, int]:
    """Rows and tokens of a split: with thoughts as SFT reads them, and of the raw control."""
    pieces = [thoughts.split(text) for _, text in think]
    woven = tokenizer.encode_woven_many(pieces)
    return {
        "documents": len(documents),
        "rows": len(raw),
        "thoughts": sum(is_thought for found in pieces for is_thought, _ in found),
        "raw_tokens": sum(map(len, tokenizer.encode_many(chunk for _, chunk in raw))),
        "think_tokens": sum(len(tokens) for tokens, _ in woven),
        "thought_tokens": sum(sum(mask) for _, mask in woven),
    }


def status_path(folder: Path, part: int) -> Path:
    return folder / "parts" / f"part-{part:04d}.json"


def write_status(folder: Path, part: int, status: Row) -> None:
    write_whole(status_path(folder, part), json.dumps(status | {"sha256": seal(status)}, indent=1) + "\n")


def read_status(folder: Path, part: int) -> Row:
    """The status of a part; {} if it has none or one that was altered, so that the part is put together again."""
    try:
        status = read_json(status_path(folder, part))
    except UserError:
        return {}
    return status if status.pop("sha256", "") == seal(status) else {}


def seal(status: Row) -> str:
    return sha256(json.dumps(status, sort_keys=True).encode()).hexdigest()


def is_whole(folder: Path, part: int) -> bool:
    """The part is finished and its files are what it says."""
    status = read_status(folder, part)
    files = status.get("files", {}).items()
    return bool(status.get("finished")) and all(
        (folder / name).is_file() and digest(folder / name) == file["sha256"] for name, file in files
    )


def merge(folder: Path, parts: int) -> Row:
    """The sum of what the parts say about themselves; manifest.json too if all of them are finished."""
    found = [read_status(folder, part) for part in range(parts)]
    total = {"parts": parts, "finished": sum(bool(status.get("finished")) for status in found)}
    total |= add([status.get("counts", {}) for status in found])
    if total["finished"] == parts:
        files = {name: file for status in found for name, file in status["files"].items()}
        manifest = {"parts": parts, "files": dict(sorted(files.items()))}
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return total | {name: add([status.get(name, {}) for status in found]) for name in ("splits", "control")}


def add(trees: list[Row]) -> Row:
    """The sum of trees of numbers, key by key."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    out: Row = {}
    for name in names:
        values = [tree[name] for tree in trees if name in tree]
        out[name] = add(values) if isinstance(values[0], dict) else sum(values)
    return out
