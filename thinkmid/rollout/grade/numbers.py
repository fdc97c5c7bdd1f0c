"""Numbers that a text spells out: nothing is left to work out."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from thinkmid.rollout.grade.answers import normal

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
FRACTION = rf"\\frac \{{ (?P<over>[-+]?(?:{DIGITS})) \}} \{{ (?P<under>[-+]?(?:{DIGITS})) \}}"
POWER = r"(?:(?P<e1>\d)|\{ (?P<e2>[-+]?\d{1,3}) \})(?!\d)"
LITERAL = re.compile(
    rf"(?P<sign>[-+])? (?: (?P<power>10) \^ (?:(?P<p1>\d)|\{{ (?P<p2>-?\d{{1,3}}) \}})(?!\d)"
    rf"| (?:(?P<whole>\d+) )? {FRACTION}"
    rf"| (?:(?P<mixed>\d+)[ ]+)? (?P<top>{DIGITS}) / (?P<bottom>{DIGITS})"
    rf"| (?P<number>{DIGITS}) (?: (?:\\times|\\cdot|\*|x) 10 (?:\^|\*\*) {POWER}"
    rf"| [eE](?P<e3>[-+]?\d{{1,3}})(?!\d))? )"
    r"(?P<percent> %)?(?P<rest>.*)".replace(" ", r"\s*").replace(r"[\s*]+", r"\s+"),
    re.DOTALL,
)
UNIT = re.compile(
    r"\s*(?:\^\\circ\s*[CF]?|\\text\s*\{(?P<text>[^{}\d]*(?:\^[23])?)\s*\}"
    r"|(?P<words>[A-Za-z][A-Za-z]+(?:[ /.-]+[A-Za-z]+)*))?"
    r"\s*(?:\^\s*\{?\s*[23]\s*\}?)?\s*"
)
# words after a number that make it another number, or several, or no number at all
NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        "or and not to but if mod modulo pi e i sqrt sin cos tan sec csc cot log ln exp inf infinity infty alpha "
        "beta gamma theta phi lambda omega choose factorial half third quarter dozen hundred thousand million "
        "billion trillion times plus minus over under less more at most least greater fewer through than either "
        "is base between maybe perhaps one two three four five six seven eight nine ten eleven twelve twenty "
        "thirty forty fifty x y z n ",
    )
)
ASSIGNED = re.compile(
    r"\s*(?:\\(?:angle|overline|triangle|text|operatorname)\s*)?\{?\\?[A-Za-z]+\}?(?:_\{?\w+\}?)?(?:\s*\([^()=]*\))?\s*"
    r"(?:=|\\approx(?![A-Za-z]))(?!.*=)(?P<right>.*)",
    re.DOTALL,
)


class Number(NamedTuple):
    """What a text spells out."""

    value: Fraction
    spelling: str  # "integer", "decimal", "fraction"; "quotient": a fraction that is a whole number
    percent: bool
    unit: str


def number(answer: str) -> Number | None:
    """The number that an answer spells out, with a unit or after "x =" perhaps; None if it is anything else."""
    text = normal(answer)
    if assigned := ASSIGNED.fullmatch(text):
        text = assigned["right"].strip()
    text = re.sub(r"^\s*\\approx(?![A-Za-z])", "", text).strip()
    while inner := re.fullmatch(r"\(([^(),]*)\)|\{([^{},]*)\}", text):
        text = next(part for part in inner.groups() if part is not None).strip()
    match = LITERAL.match(text) if len(text) < 2000 else None
    if not match or (unit := unit_of(match["rest"])) is None:
        return None
    try:
        value, spelling = value_of(match)
    except ZeroDivisionError:
        return None
    return Number(-value if match["sign"] == "-" else value, spelling, bool(match["percent"]), unit)


def unit_of(rest: str) -> str | None:
    """The unit after a number, "" for none; None if that is more than a unit."""
    match = UNIT.fullmatch(rest)
    if not match:
        return None
    unit = (match["text"] or match["words"] or "").strip().casefold()
    return None if NO_UNITS & set(re.findall(r"[a-z]+", unit if match["words"] else f"{unit} ")) else unit


def value_of(match: re.Match[str]) -> tuple[Fraction, str]:
    """Value without sign, and how it is spelled."""
    part = {name: Fraction(digits.replace(",", "")) for name, digits in match.groupdict().items() if is_number(digits)}
    if match["power"]:
        return Fraction(10) ** int(match["p1"] or match["p2"]), "integer"
    for over, under, whole in (("over", "under", "whole"), ("top", "bottom", "mixed")):
        if match[over]:
            ratio = part[over] / part[under]
            spelling = "quotient" if ratio.denominator == 1 and not match[whole] else "fraction"
            return part.get(whole, 0) + ratio, spelling
    exponent = int(match["e1"] or match["e2"] or match["e3"] or 0)
    spelling = "decimal" if "." in match["number"] else "integer"
    return part["number"] * Fraction(10) ** exponent, spelling


def is_number(digits: str | None) -> bool:
    return re.fullmatch(r"[-+\d.,]*\d[-+\d.,]*", digits or "") is not None
