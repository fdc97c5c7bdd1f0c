"""What the user got wrong, as opposed to what we got wrong."""

import difflib
import re
from collections.abc import Iterable

# C0 and C1 except newline and tab, text direction overrides, lone surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake in a config, a file or a row. One line that names it; programs print that line and exit with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The line for a name that is none of the known ones: what was meant, perhaps."""
    near = difflib.get_close_matches(name, known := list(known), 1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    return f"unknown {kind} '{name}'; {hint}"


def at_least(config: object, **lows: float) -> None:
    """ValueError for the first field of a config that is below its bound, or NaN: `at_least(self, votes=1)`."""
    for name, low in lows.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(config, name)}")


def positive(config: object, *names: str) -> None:
    """ValueError for the first of these fields of a config that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def plain(text: str) -> str:
    """Text that cannot steer a terminal: without control characters other than newline and tab."""
    return UNPRINTABLE.sub("", text)
