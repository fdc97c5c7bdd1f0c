"""Text of any origin, made visible: what cannot be seen becomes an escape. The templates escape HTML."""

import re
from typing import Any

from thinkmid.errors import UNPRINTABLE

# beside the console's list: line separators, direction marks, what has no width, tag characters
UNSEEN = re.compile(
    UNPRINTABLE.pattern + "|[\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u2060-\u2064\ufeff]"
    "|[\U000e0000-\U000e007f]"
)
LONGEST = 20_000  # characters of one text on the page


def visible(value: Any) -> str:
    """The text with every character that hides or reorders others as ⟨U+XXXX⟩; newline and tab stay."""
    return UNSEEN.sub(_code_point, str(value))


def cut(value: Any) -> str:
    """visible(), limited to LONGEST characters and a note of how many more there were."""
    text = str(value)
    rest = len(text) - LONGEST
    return visible(text[:LONGEST]) + (f" ⟨{rest:,} more characters⟩" if rest > 0 else "")


def _code_point(found: re.Match[str]) -> str:
    return f"⟨U+{ord(found[0]):04X}⟩"
