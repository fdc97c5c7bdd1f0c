"""Records on disk, more than memory holds: ranks write them block by block, then each reads all by memory map."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thinkmid.data.source import Document
from thinkmid.log import write_whole

BLOCK_DOCUMENTS = 4096
BLOCK_CHARS = 1 << 24
MANIFEST = "store.json"  # written last: without it there is no store

# of a block of documents its records: their bytes, and whole numbers that are kept in memory beside their size
Encode = Callable[[Sequence[Document]], Iterable[tuple[bytes, tuple[int, ...]]]]


def blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """What is encoded at once, and by one rank: as many documents as the smaller of two bounds holds."""
    block, chars = [], 0
    for doc in documents:
        block.append(doc)
        chars += len(doc.text)
        if len(block) == BLOCK_DOCUMENTS or chars >= BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block


def write(folder: Path, rank: int, world: int, documents: Iterable[Document], encode: Encode, tell=lambda *_: None):
    """One rank's records: those of every world-th block. Every rank is given all documents, encode() a block of them.

    tell(documents, characters): is told of each block, whoever encodes it.
    """
    sizes, numbers, counts, digests = array("q"), array("q"), [], []
    num_documents = num_chars = 0
    with _part(folder, rank).open("wb") as file:
        for at, block in enumerate(blocks(documents)):
            if at % world == rank:
                digest, before = hashlib.blake2b(digest_size=16), len(sizes)
                for data, beside in encode(block):
                    file.write(data)
                    digest.update(len(data).to_bytes(8, "little") + data)
                    sizes.append(len(data))
                    numbers.extend(beside)
                counts.append(len(sizes) - before)
                digests.append(digest.digest())
            num_documents, num_chars = num_documents + len(block), num_chars + sum(len(doc.text) for doc in block)
            tell(num_documents, num_chars)
        file.flush()
        os.fsync(file.fileno())
    columns = len(numbers) // len(sizes) if sizes else 0
    with _index(folder, rank).open("wb") as file:
        np.savez(
            file,
            sizes=np.array(sizes, np.int64),
            numbers=np.array(numbers, np.int64).reshape(len(sizes), columns),
            counts=np.array(counts, np.int64),
            digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
        )
        file.flush()
        os.fsync(file.fileno())


def seal(folder: Path, world: int, made_of: dict[str, Any], files: list) -> None:
    """The manifest, once every rank has written. made_of: what decides the records beside the documents. files: where
    the documents came from, compared before a store is used again."""
    indices = [dict(np.load(_index(folder, rank), allow_pickle=False)) for rank in range(world)]
    digest = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16)
    each_once = _in_order([np.ones_like(x["counts"]) for x in indices])
    digest.update(np.concatenate([x["digests"] for x in indices])[each_once])
    parts = [_measured(folder, rank) for rank in range(world)]
    manifest = {"made_of": made_of, "files": files, "digest": digest.hexdigest(), "parts": parts}
    write_whole(folder / MANIFEST, json.dumps(manifest) + "\n")


def is_store_of(folder: Path, made_of: dict[str, Any], files: list) -> bool:
    """Whether the folder holds a whole store of just this."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        parts = [_measured(folder, rank) for rank in range(len(manifest["parts"]))]
        return (manifest["made_of"], manifest["files"], manifest["parts"]) == (made_of, files, parts)
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Store(Sequence[memoryview]):
    """The records in the order of their documents, whatever the number of ranks that wrote them.

    sizes (N,) bytes, numbers (N, C) int64: in memory, with another 12 bytes a record. digest: of records and made_of.
    """

    def __init__(self, folder: Path):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        world, self.digest = len(manifest["parts"]), manifest["digest"]
        indices = [dict(np.load(_index(folder, rank), allow_pickle=False)) for rank in range(world)]
        self._parts = [_mapped(_part(folder, rank)) for rank in range(world)]
        order = _in_order([x["counts"] for x in indices])
        self.sizes = np.concatenate([x["sizes"] for x in indices])[order]
        self.numbers = _stacked([x["numbers"] for x in indices])[order]
        self._starts = np.concatenate([np.cumsum(x["sizes"]) - x["sizes"] for x in indices])[order]
        self._part_of = np.repeat(np.arange(world, dtype=np.int32), [len(x["sizes"]) for x in indices])[order]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> memoryview:  # type: ignore[override]
        start = self._starts[i]
        return self._parts[self._part_of[i]][start : start + self.sizes[i]]


def _measured(folder: Path, rank: int) -> list:
    """Bytes of a part, and a hash of its index."""
    index = hashlib.blake2b(_index(folder, rank).read_bytes(), digest_size=16).hexdigest()
    return [_part(folder, rank).stat().st_size, index]


def _in_order(counts: list[np.ndarray]) -> np.ndarray:
    """What stands rank after rank, in the order of the documents. counts: of each block of each rank."""
    block_of = [np.repeat(np.arange(len(c)) * len(counts) + rank, c) for rank, c in enumerate(counts)]
    return np.argsort(np.concatenate(block_of), kind="stable")


def _stacked(numbers: list[np.ndarray]) -> np.ndarray:
    columns = max(x.shape[1] for x in numbers)
    return np.concatenate([x.reshape(len(x), columns) for x in numbers])


def _mapped(path: Path) -> memoryview:
    # an empty file cannot be mapped
    return memoryview(np.memmap(path, np.uint8, "r") if path.stat().st_size else b"")


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.bin"


def _index(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.npz"
