"""The weight files of a Hugging Face folder: which there are, opened, and held to the hashes of an export's seal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from thinkmid.errors import UserError
from thinkmid.files import digest, read_json, regular

SINGLE, INDEX, SEAL = "model.safetensors", "model.safetensors.index.json", "thinkmid.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of a PEFT folder
Sources = dict[str, tuple[Path, Any]]  # tensor name -> file that holds it, open handle


class Stamp(NamedTuple):
    """Hash of a weight file, and what shows without reading it again that it is unchanged."""

    sha256: str
    size: int
    mtime_ns: int
    inode: int


def listed(folder: Path) -> Mapping[str, set[str] | None]:
    """Weight file -> tensors it should hold; None where no index says so. The index is not trusted."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{folder}: holds both {SINGLE} and {INDEX}; which one counts?")
    if single.exists():
        return {SINGLE: None}
    if not index.exists():
        raise UserError(f"{single}: No such file or directory")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not re.fullmatch(r"\w[\w.+ -]{0,250}", file, re.ASCII):
            raise UserError(f"{index}: weight_map: {file[:80]!r} is not a plain file name")
        files.setdefault(file, set()).add(name)
    return files


def open_all(folder: Path) -> Sources:
    """Every tensor's file, open for slices. UserError for a file that does not hold exactly what the index lists."""
    sources: Sources = {}
    for file, expected in listed(folder).items():
        handle = _open(folder, file)
        names = set(handle.keys())
        if expected is not None and names != expected:
            not_listed, not_there = names - expected, expected - names
            both = summary({"in the file but not listed for it": not_listed, "listed for it but not there": not_there})
            raise UserError(f"{folder / file}: {both}")
        sources.update(dict.fromkeys(names, (folder / file, handle)))
    return sources


def _open(folder: Path, file: str) -> Any:
    """A safetensors file, open for slices; a regular file of the folder itself."""
    path, home = folder / file, Path(os.path.realpath(folder))  # unlike resolve, it lives through a loop of links
    real = Path(os.path.realpath(path))
    # a snapshot in Hugging Face's cache holds links to the blobs of its repository, which may be links to those that
    # repositories share, in folders by the first two letters of a hash
    homes = (home.parents[1] / "blobs", home.parents[2] / "blobs") if home.parent.name == "snapshots" else ()
    if real.parent not in (home, *homes) and real.parent.parent not in homes[1:]:
        raise UserError(f"{path}: links to a file outside its folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: damaged or not safetensors: {one_line(e)}") from None


def is_export(folder: Path) -> bool:
    """Whether the folder carries the seal of an export of ours."""
    return (folder / SEAL).exists()


def is_sealed(folder: str | Path) -> bool:
    """Whether the folder's seal names every weight file, so that hashes() need not read them."""
    return listed(Path(folder)).keys() <= _sealed(Path(folder)).keys()


def hashes(folder: str | Path, rank: int = 0, world: int = 1) -> dict[str, str]:
    """Weight file -> sha256 as the seal names it, else computed: every world-th file, from rank on."""
    folder = Path(folder)
    sealed, mine = _sealed(folder), sorted(listed(folder))[rank::world]
    return {file: sealed.get(file) or digest(regular(folder / file)) for file in mine}


def stamps(folder: str | Path, rank: int = 0, world: int = 1) -> dict[str, Stamp]:
    """Weight file -> Stamp, hashed now: every world-th file, from rank on, where ranks share the work.

    UserError names a file of an export that does not match its hash in the seal.
    """
    folder, found = Path(folder), {}
    sealed = _sealed(folder)
    for file in sorted(listed(folder))[rank::world]:
        at = _stat(folder, file)  # before its bytes are read: a file that replaces it meanwhile is noticed
        found[file] = Stamp(digest(folder / file), *at)
        if is_export(folder) and sealed.get(file) != found[file].sha256:
            raise UserError(f"{folder / file}: does not match its sha256 in {SEAL}; damaged or changed since export")
    return found


def check_same(folder: Path, known: Mapping[str, Stamp]) -> None:
    """UserError if files came, went or changed since known = stamps(folder)."""
    if odd := sorted(known.keys() ^ listed(folder).keys()):
        raise UserError(f"{folder / odd[0]}: came or went since this run began to read the folder")
    for file, stamp in known.items():
        if _stat(folder, file) != stamp[1:] and digest(folder / file) != stamp.sha256:
            raise UserError(f"{folder / file}: changed since this run began to read it")


def _stat(folder: Path, file: str) -> tuple[int, int, int]:
    _open(folder, file)  # a regular file of the folder itself
    at = (folder / file).stat()
    return at.st_size, at.st_mtime_ns, at.st_ino


def _sealed(folder: Path) -> dict[str, str]:
    """Weight file -> sha256 in the seal of an export; {} for a folder that is none."""
    sealed = read_json(folder / SEAL).get("sha256") if is_export(folder) else {}
    if not isinstance(sealed, dict):
        raise UserError(f"{folder / SEAL}: sha256 must map file names to hashes")
    return sealed


def summary(problems: Mapping[str, Iterable[str]]) -> str:
    """One line: how many of each kind, and the first few by name."""
    parts = []
    for kind, names in ((kind, sorted(names)) for kind, names in problems.items() if names):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{len(names)} {kind}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def one_line(e: Exception) -> str:
    """Its message without line breaks."""
    return " ".join(str(e).split())
