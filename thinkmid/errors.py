"""Mistakes of the user, as opposed to ours."""

import difflib
import re
from collections.abc import Iterable

# C0 and C1 except newline and tab, text direction overrides, lone surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake in a config, a file or a row. One line that names it; programs print that line and exit with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The error line for an unknown name, with the nearest known one or all of them."""
    near = difflib.get_close_matches(name, known := list(known))
    near = [other for other in near if sorted(other) == sorted(name)] or near  # letters in another order
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


def counted(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks", "2,000 steps"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def short(number: float) -> str:
    """About how many: 640, 0.5 M, 135 M, 8.0 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= 0.095 * size:
            return f"{number / size:.{1 if number < 10 * size else 0}f} {unit}"
    return f"{number:,.0f}"


def plain(text: str) -> str:
    """Text that cannot steer a terminal: without control characters other than newline and tab."""
    return UNPRINTABLE.sub("", text)
