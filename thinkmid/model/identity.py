"""Which model is in a folder, by content: what it wrote is kept for it alone, wherever the folder lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from thinkmid.model.hf_config import read_config
from thinkmid.tokenizer import Tokenizer

if TYPE_CHECKING:
    from thinkmid.model.weights import Stamp


class Ranks(Protocol):
    """As of run/ranks.py."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def run_on_all(self, work: Callable[[], bytes]) -> bytes: ...

    def gather_bytes(self, payload: bytes) -> list[bytes]: ...


def verified(folder: Path, ranks: Ranks) -> dict[str, Stamp]:
    """weights.stamps() of all files. Collective: each is hashed by one rank, a damaged one is a UserError on all."""
    from thinkmid.model import weights

    mine = ranks.run_on_all(lambda: json.dumps(weights.stamps(folder, ranks.rank, ranks.world)).encode())
    parts = map(json.loads, ranks.gather_bytes(mine))
    return {file: weights.Stamp(*stamp) for part in parts for file, stamp in part.items()}


def of_model(folder: Path, tokenizer: Tokenizer, stamps: Mapping[str, Stamp]) -> dict[str, str]:
    """Hashes of what decides what a model writes. text: the folder's, whose end-of-text ids generation_config.json may
    list; stamps: of its weight files."""
    hashed = "".join(f"{file} {stamp.sha256}\n" for file, stamp in sorted(stamps.items()))
    return {
        "weights": hashlib.sha256(hashed.encode()).hexdigest(),
        "tokenizer": tokenizer.digest,
        # as it is read, as training compares it: another version of transformers may have written it anew
        "config": hashlib.sha256(json.dumps(asdict(read_config(folder)), sort_keys=True).encode()).hexdigest(),
    }


def changed(was: Any, now: Mapping[str, str], folder: Path | str) -> str:
    """In words what of a folder's model is not as it was, "" if nothing is. was: as read from a file."""
    before = was if isinstance(was, dict) else {}
    parts = [name for name in now if before.get(name) != now[name]]
    return f"{' and '.join(parts)} of {folder}" if parts else ""
