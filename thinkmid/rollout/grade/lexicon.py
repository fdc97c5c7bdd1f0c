"""Words that the rules for answers know, from lexicon.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

_WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

UNITS: dict[str, str] = {word: unit for unit, others in _WORDS["units"].items() for word in (unit, *others)}
NOT_UNITS, FUNCTIONS, SHORT = (frozenset(_WORDS[name]) for name in ("not_units", "functions", "short"))
SPELLED: dict[str, str] = _WORDS["spelled"]
