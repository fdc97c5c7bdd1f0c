"""Text of any origin, shown and not obeyed: what cannot be seen becomes a visible escape, the rest HTML-escaped."""

import html
import json
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
    return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(value))


def cut(value: Any) -> str:
    """visible(), its end left out where it is longer than the page takes, which is said."""
    text = str(value)
    rest = len(text) - LONGEST
    return visible(text[:LONGEST]) + (f" ⟨{rest:,} more characters⟩" if rest > 0 else "")


def escape(value: Any) -> str:
    """visible(), for HTML text and for attributes in double quotes."""
    return html.escape(visible(value), quote=True)


def json_block(value: Any) -> str:
    """JSON that can stand in a <script>: pure ASCII, and nothing in it that an HTML parser looks at."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)
