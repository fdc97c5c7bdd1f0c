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


def plain(text: str) -> str:
    """Text that cannot steer a terminal: without control characters other than newline and tab."""
    return UNPRINTABLE.sub("", text)
