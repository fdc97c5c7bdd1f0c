"""Records on disk, more than memory holds: ranks write them block by block, then each reads all by memory map.

1f9c03ab-00000.bin           the records of rank 0, of the version 1f9c03ab
1f9c03ab-00000.safetensors   their sizes
store.json                   the manifest of the current version: one replaces another when it is complete
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from thinkmid.data.source import Document
from thinkmid.errors import UserError
from thinkmid.files import read_json, regular, write_whole

FORMAT = 1  # version of the records' content and of the blocks of documents, which the digest depends on
BLOCK_DOCUMENTS = 4096
BLOCK_CHARS = 1 << 24
MANIFEST = "store.json"
OURS = re.compile(r"([0-9a-f]{8})-(\d{5}\.(bin|safetensors)|fault)")

Index = dict[str, NDArray[Any]]
# block of documents -> its records: bytes, and integers that are kept in memory beside their size
Encode = Callable[[Sequence[Document]], Iterable[tuple[bytes, tuple[int, ...]]]]


def blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in blocks, each encoded at once and by one rank: the smaller of two bounds ends a block."""
    block, chars = [], 0
    for doc in documents:
        block.append(doc)
        chars += len(doc.text)
        if len(block) == BLOCK_DOCUMENTS or chars >= BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block


def write(
    folder: Path, writing: str, rank: int, world: int, documents: Iterable[Document], encode: Encode
) -> Iterator[tuple[int, int]]:
    """One rank's records: those of every world-th block. Every rank is given all documents, encode() a block of them.

    Yields (documents, characters so far) after each block, whichever rank encodes it. Left early, it writes no index.
    """
    sizes, numbers, counts, digests = array("q"), array("q"), [], []
    num_documents = num_chars = 0
    with _file(folder, writing, rank, "bin").open("wb") as file:
        for at, block in enumerate(blocks(documents)):
            if at % world == rank:
                digest, before = hashlib.blake2b(digest_size=16), len(sizes)
                for data, beside in encode(block):
                    file.write(data)
                    digest.update(len(data).to_bytes(8, "little"))
                    digest.update(data)
                    sizes.append(len(data))
                    numbers.extend(beside)
                counts.append(len(sizes) - before)
                digests.append(digest.digest())
            num_documents, num_chars = num_documents + len(block), num_chars + sum(len(doc.text) for doc in block)
            yield num_documents, num_chars
        file.flush()
        os.fsync(file.fileno())
    index: Index = {
        "sizes": np.array(sizes, np.int64),
        "numbers": np.array(numbers, np.int64),
        "counts": np.array(counts, np.int64),
        "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
    }
    with _file(folder, writing, rank, "safetensors").open("wb") as file:
        file.write(save(index))
        file.flush()
        os.fsync(file.fileno())


def describe(folder: Path, writing: str, world: int, made_of: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what all ranks have written. made_of: what decides the records, to find a store again by."""
    indices = [_read_index(folder, writing, rank) for rank in range(world)]
    parts = [_measured(folder, writing, rank) for rank in range(world)]
    digest = _hash(_blocks_of(indices)[1].tobytes())
    return {"format": FORMAT, "made_of": made_of, "writing": writing, "parts": parts, "digest": digest}


def publish(folder: Path, manifest: dict[str, Any]) -> None:
    """Atomically make this version the current one and delete the others."""
    write_whole(folder / MANIFEST, json.dumps(manifest) + "\n")
    sweep(folder)


def sweep(folder: Path) -> None:
    """Delete the files of all versions but the current one; files that are not a store's stay."""
    kept = published(folder).get("writing")
    for path in folder.glob("*-*"):
        if (ours := OURS.fullmatch(path.name)) and ours[1] != kept:
            path.unlink()


def find(folder: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if all that it names is there and was made of this."""
    manifest = whole(folder)
    return manifest if manifest and manifest["made_of"] == made_of else None


def whole(folder: Path) -> dict[str, Any] | None:
    """The manifest, if its files are there and have the right sizes; records are verified when they are read."""
    manifest = published(folder)
    writing, parts, made_of = str(manifest.get("writing")), manifest.get("parts"), manifest.get("made_of")
    if not OURS.fullmatch(f"{writing}-fault") or not isinstance(made_of, dict) or manifest.get("format") != FORMAT:
        return None
    if not isinstance(parts, list) or not parts:
        return None
    try:
        found = [_measured(folder, writing, rank) for rank in range(len(parts))]
    except (OSError, UserError):
        return None
    return manifest if found == parts else None


def published(folder: Path) -> dict[str, Any]:
    """The manifest in the folder, {} without a readable one."""
    try:
        return read_json(folder / MANIFEST)
    except UserError:
        return {}


class Store(Sequence[memoryview]):
    """The records in the order of their documents, whatever the number of ranks that wrote them.

    sizes (N,) bytes, numbers (N, C) int64: in memory, with another 12 bytes a record. digest: of all records. A record
    raises UserError where its block of documents, compared once by each process, has other bytes than were written.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        writing, world, self.digest = manifest["writing"], len(manifest["parts"]), manifest["digest"]
        indices = [_read_index(folder, writing, rank) for rank in range(world)]
        self._files = [_file(folder, writing, rank, "bin") for rank in range(world)]
        self._parts = [_mapped(file) for file in self._files]
        order = _in_order([x["counts"] for x in indices])
        counts, self._digests = _blocks_of(indices)
        self._ends = np.cumsum(counts)  # records before and in each block, in the order of the documents
        self._is_checked = np.zeros(len(counts), bool)
        if _hash(self._digests.tobytes()) != self.digest:
            raise UserError(_damaged(folder / MANIFEST))
        self.sizes = np.concatenate([x["sizes"] for x in indices])[order]
        numbers = np.concatenate([x["numbers"] for x in indices])
        self.numbers = numbers.reshape(len(order), len(numbers) // max(1, len(order)))[order]
        self._starts = np.concatenate([np.cumsum(x["sizes"]) - x["sizes"] for x in indices])[order]
        self._part_of = np.repeat(np.arange(world, dtype=np.int32), [len(x["sizes"]) for x in indices])[order]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> memoryview:  # type: ignore[override]
        start, block = self._starts[i], int(np.searchsorted(self._ends, i, side="right"))
        if not self._is_checked[block]:
            self._check(block)
        part: memoryview = self._parts[self._part_of[i]]
        return part[start : start + self.sizes[i]]

    def _check(self, block: int) -> None:
        """UserError unless the bytes of a block are those that were written."""
        records = slice(self._ends[block - 1] if block else 0, self._ends[block])
        start, part = int(self._starts[records.start]), self._part_of[records.start]
        digest, data = hashlib.blake2b(digest_size=16), self._parts[part]
        for size in self.sizes[records].tolist():
            digest.update(size.to_bytes(8, "little"))
            digest.update(data[start : start + size])
            start += size
        if digest.digest() != self._digests[block].tobytes():
            raise UserError(_damaged(self._files[part]))
        self._is_checked[block] = True


def _measured(folder: Path, writing: str, rank: int) -> list[int | str]:
    """Bytes of a part, and a hash of its index."""
    index, part = (regular(_file(folder, writing, rank, kind)) for kind in ("safetensors", "bin"))
    return [part.stat().st_size, _hash(index.read_bytes())]


def _read_index(folder: Path, writing: str, rank: int) -> Index:
    """UserError unless its numbers fit to one another and to the part: they say where records lie."""
    path, part = (regular(_file(folder, writing, rank, kind)) for kind in ("safetensors", "bin"))
    num_bytes = part.stat().st_size
    try:
        index = load_file(path)
        sizes, counts, numbers, digests = (index[name] for name in ("sizes", "counts", "numbers", "digests"))
    except (SafetensorError, OSError, KeyError):
        raise UserError(_damaged(path)) from None
    flat = all(x.ndim == 1 and x.dtype == np.int64 for x in (sizes, counts, numbers))
    right = flat and digests.shape == (len(counts), 16) and digests.dtype == np.uint8
    right = right and sizes.min(initial=0) >= 0 and sizes.max(initial=0) <= num_bytes == sizes.sum()
    right = right and counts.min(initial=0) >= 0 and counts.max(initial=0) <= len(sizes) == counts.sum()
    if not right or len(numbers) % max(1, len(sizes)) or len(numbers) > 0 == len(sizes):
        raise UserError(_damaged(path))
    return index


def _damaged(path: Path) -> str:
    return f"{path}: its bytes changed since it was written; without {path.parent} the same command writes it anew"


def _blocks_of(indices: list[Index]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(records, digest) of each block, in the order of the documents."""
    each_once = _in_order([np.ones_like(x["counts"]) for x in indices])
    counts, digests = (np.concatenate([x[name] for x in indices]) for name in ("counts", "digests"))
    return counts[each_once], digests[each_once]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _in_order(counts: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Permutation from rank after rank to the order of the documents. counts: records of each block of each rank."""
    block_of = [np.repeat(np.arange(len(c)) * len(counts) + rank, c) for rank, c in enumerate(counts)]
    return np.argsort(np.concatenate(block_of), kind="stable")


def _mapped(path: Path) -> memoryview:
    # an empty file cannot be mapped
    return memoryview(np.memmap(path, np.uint8, "r").data if path.stat().st_size else b"")


def _file(folder: Path, writing: str, rank: int, kind: str) -> Path:
    """kind: "bin", a rank's part of the records; "safetensors", its index."""
    return folder / f"{writing}-{rank:05d}.{kind}"
