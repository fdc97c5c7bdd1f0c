"""What the user got wrong, as opposed to what we got wrong."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a file or a row. One line that names it; programs print that line and exit with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The line for a name that is none of the known ones: what was meant, perhaps."""
    near = difflib.get_close_matches(name, known := list(known), 1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    return f"unknown {kind} '{name}'; {hint}"
