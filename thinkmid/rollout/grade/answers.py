"""Where a text gives its answer, and that answer in one spelling."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise, zip_longest

from thinkmid.data.templates import TEMPLATES
from thinkmid.thoughts import CLOSE, OPEN, TAG

TAIL = 20_000  # characters that are searched: an answer stands at the end
MOST_NEXT = 50  # next questions that a text is cut at

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\|\\[{}]|[{}]")  # a box, or what its balance is counted by
NEAR = re.compile(r"[^\n]{0,40}")  # between two boxes, or two answer lines, that are one answer
MARKER = re.compile(
    r"####(?!#)"
    r"|(?:(?<=\n)|^)[\s>#*_]{0,20}(?:the )?(?:final )?answer\s*(?:\*\*|__)?\s*:\s*(?:\*\*|__)?\s*\n?"
    r"|\banswer\s*:"
    r"|(?:\bthe\s+)?(?:\bfinal\s+)?\banswer\s+is\b(?:\s+(?:therefore|thus|then|simply|equal to))?\s*:?",
    re.IGNORECASE,
)
# a line that is an answer by itself: a number in digits, or the letter of an option
ALONE = re.compile(r"[^\w\n]{0,9}\d[\d,./]{0,40}[^\w\n]{0,9}|\W{0,3}[A-J]\W{0,3}")
# the next question, which a base model asks itself after its answer
NEXT = "|".join(sorted({re.escape(stop) for template in TEMPLATES.values() for stop in template.stop}))
NEXT_OR_TAG = re.compile(f"{NEXT}|{TAG.pattern}")
# a full stop that ends a sentence, or a comma with words after it
SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=\s|\**$)|;\s|,\s+(?=[A-Za-z]{2,}\s)|\s(?:because|since)\s")

TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
DISPLAY = re.compile(r"^(?:\s|\$\$|\\\[|\*\*)*")

SPELLINGS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "°": r"^\circ ",
        "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "∪": r"\cup ",
        "±": r"\pm ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "⌊": r"\lfloor ", "⌈": r"\lceil ",
        "£": "$", "€": "$", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34", "⁄": "/", "²": "^2", "³": "^3",
    }
)  # fmt: skip
REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])(?:\s*\.)?", ""),
        (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:\{,\}|,\\!|\\[!,])\s*(?=\d{3}(?!\d))", ","),  # thousands as TeX sets them
        (r"(?<!\\)\\[!,:; ()\[\]]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(?:\{\s*(\d)\s*\}|(\d))\s*(\d)", r"\\frac{\1\2}{\3}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le "),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge "),
        (r"\\(?:text(?:bf|rm|it|tt|sf|sc|sl|normal)|emph|[mh]box|math(?:rm|bf|it|sf|tt)|rm)\s*\{", r"\\text{"),
        (r"\\?\$|`|(?<![\w)}])(?:\*\*|__)|(?:\*\*|__)(?![\w({\\])", " "),
        (r"\\%|(?<=\d)\s*(?:per ?cent|pct)\b", "%"),
        (r"\s+", " "),
    ]
]


def after_thought(text: str) -> str | None:
    """What follows the last closing think tag, or the whole; None where a thought never closes."""
    rest = text.rpartition(CLOSE)[2]
    return None if OPEN in rest else rest


def ends_in_marker(prompt: str) -> bool:
    """Whether a prompt holds the words before an answer, such as "Answer:", so that the answer does not repeat them."""
    words = prompt.removesuffix(OPEN).rstrip()[-80:]
    return any(match.end() == len(words) for match in MARKER.finditer(words))


def extract(text: str, marked: bool = False) -> str | None:
    """The answer of a text: its last balanced \\boxed{}, else the content of its last answer line, else its first line
    if that is an answer by itself; None if it has none. marked: by ends_in_marker(), then any first line will do.

    Only what follows the last closing think tag is read; a thought that never closes has no answer. Several boxes,
    or several answer lines, on the last such line are one answer together, so that guessing twice is no way to win.
    A text that answers, then asks a next question as the templates do, is read up to there.
    """
    for number, part in enumerate(questions(text)):
        rest = after_thought(part)
        if rest is not None:
            tail = rest[-TAIL:]
            found = boxes(tail) or lines(tail) or ([] if number else first_line(rest, marked))
            if answers := list(dict.fromkeys(answer for answer in found if answer)):
                return ", ".join(answers)
    return None


def questions(text: str) -> list[str]:
    """The text in parts, each but the first beginning with a next question outside thoughts."""
    starts, inside = [len(text)], False
    for match in reversed(list(NEXT_OR_TAG.finditer(text))):
        if TAG.fullmatch(match[0]):
            inside = match[0] == CLOSE
        elif not inside:
            starts.append(match.start())
    first = starts[:0:-1][:MOST_NEXT]
    return [text[start:end] for start, end in pairwise([0, *first, len(text)])]


def first_line(text: str, marked: bool) -> list[str]:
    """Content of the first line, as of an answer line, if it is marked as one or is an answer by itself."""
    head = text.strip()[:TAIL]
    return lines(f"Answer: {head}") if marked or ALONE.fullmatch(head.split("\n", 1)[0]) else []


def boxes(text: str) -> list[str]:
    """Contents of the outermost balanced boxes on the line of the last one."""
    found: list[tuple[int, int, str]] = []
    stack: list[tuple[bool, int, int]] = []  # open braces: of a box? its start, its content's
    for match in BOX.finditer(text):
        if match[0][-1] == "{" and match[0] != r"\{":
            stack.append((match[0] != "{", match.start(), match.end()))
        elif match[0] == "}" and stack:
            is_box, start, inside = stack.pop()
            if is_box:
                while found and found[-1][0] > start:  # boxes in this box
                    found.pop()
                found.append((start, match.end(), text[inside : match.start()].strip()))
    return [unboxed(content) for content in together(text, found)]


def together(text: str, found: list[tuple[int, int, str]]) -> list[str]:
    """What was found last, with what stands near before it: contents of (start, end, content)."""
    kept = found[-1:]
    for one in reversed(found[:-1]):
        if not NEAR.fullmatch(text, one[1], kept[0][0]):
            break
        kept.insert(0, one)
    return [content for _, _, content in kept]


def unboxed(content: str) -> str:
    """A box around a box, or an answer in braces of its own, taken off."""
    while (match := re.match(r"\\(?:boxed|fbox)\s*\{", content)) and content.endswith("}"):
        content = content[match.end() : -1].strip()
    return content


def lines(text: str) -> list[str]:
    """Contents of the answer lines that begin on the line of the last one."""
    markers = list(MARKER.finditer(text))
    found = []
    for match, following in zip_longest(markers, markers[1:]):
        rest = DISPLAY.sub("", text[match.end() : following.start() if following else None], count=1)
        line = rest.split("\n", 1)[0].strip()
        content = line if match[0] == "####" else SENTENCE_END.split(line, maxsplit=1)[0]
        found.append((match.start(), match.end(), content.strip("*_ ")))
    return together(text, [one for one in found if one[2]])


@lru_cache(maxsize=4096)
def normal(answer: str) -> str:
    """One spelling of an answer: TeX without spacing, sizes, fonts and dollars; \\frac with braces; plain signs."""
    text = unicodedata.normalize("NFC", answer).translate(SPELLINGS)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = text.strip().rstrip(".,:; ").strip()
    if (match := re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)) or (match := re.fullmatch(r"\{([^{}]*)\}", text)):
        return normal(match[1])
    return text


def squeezed(answer: str) -> str:
    """A normal answer without spaces and without braces that hold one character: equal for equal TeX."""
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", without_text(answer)))


def without_text(answer: str) -> str:
    """A normal answer with the contents of \\text{} in its place."""
    return TEXT.sub(r"\1", normal(answer))
