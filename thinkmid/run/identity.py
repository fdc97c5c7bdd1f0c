"""Which model is in a folder, by content: samples of one model are never taken for those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thinkmid.model.hf_config import read_config
from thinkmid.model.weight_files import Stamp, stamps
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer


def verified(folder: Path, ranks: Ranks) -> dict[str, Stamp]:
    """weight_files.stamps() of all files. Collective: one rank hashes each; a damaged one is a UserError on all."""
    mine = ranks.run_on_all(lambda: json.dumps(stamps(folder, ranks.rank, ranks.world)).encode())
    parts = map(json.loads, ranks.gather_bytes(mine))
    return {file: Stamp(*stamp) for part in parts for file, stamp in part.items()}


def of_model(folder: Path, tokenizer: Tokenizer, stamps: Mapping[str, Stamp]) -> dict[str, str]:
    """Hashes of weights, tokenizer and config: equal hashes, equal output.

    tokenizer: the folder's, whose end-of-text ids generation_config.json may list; stamps: of its weight files.
    """
    hashed = "".join(f"{file} {stamp.sha256}\n" for file, stamp in sorted(stamps.items()))
    return {
        "weights": hashlib.sha256(hashed.encode()).hexdigest(),
        "tokenizer": tokenizer.digest,
        # as it is read, as training compares it: another version of transformers may have written it anew
        "config": hashlib.sha256(json.dumps(asdict(read_config(folder)), sort_keys=True).encode()).hexdigest(),
    }


def changed(was: Any, now: Mapping[str, str], folder: Path | str) -> str:
    """Names the parts of a folder's model that differ from was, as read from a file; "" if none do."""
    before = was if isinstance(was, dict) else {}
    parts = [name for name in now if before.get(name) != now[name]]
    return f"{' and '.join(parts)} of {folder}" if parts else ""
