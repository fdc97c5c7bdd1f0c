"""Whether two answers are equal, by math-verify and by their values at a point. Nothing bounds time or memory here."""

from __future__ import annotations

import zlib
from typing import Any

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig
from mpmath import mpmathify
from sympy import Eq, Expr, Float, Interval, MatrixBase, Rational, Set, Tuple

from thinkmid.rollout.grade.codes import FAR, NO, NO_ANSWER, NO_GOLD, YES

EXACT, ROUNDED = 1e-12, 2e-6  # relative; the second where one side has a decimal
APART = 1e-3
# what a grammar's tables and sympy's caches are filled with before the first fork
WARM = [
    (r"\frac{3\sqrt{2}}{2}", r"\sqrt{18}/2"),
    (r"(-\infty,3)\cup[5,\infty)", r"(-\infty, 3) \cup [5, +\infty)"),
    (r"x^2+2x+1", "(x+1)^2"),
    (r"\{1,-2\}", "-2, 1"),
    (r"(1,\frac{\pi}{3})", r"(1, \pi/3)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"y=2x+\ln 3", r"y = \ln 3 + 2x"),
    (r"2+3i", "3i+2"),
    (r"x \le 3", r"x < 3"),
    (r"3 \pm 2\sqrt{5}", "0.5, e^{2}"),
]

Sympy = Any  # an object of sympy, which has no types
CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]


def warm_up() -> None:
    """Fills the tables of grammars and the caches of sympy."""
    for pair in WARM:
        compare(*pair)


def compare(gold: str, answer: str) -> int:
    """YES, NO or the code of why neither, of two normal answers."""
    wanted, given = parsed(gold), parsed(answer)
    if wanted is None or given is None:
        return NO_GOLD if wanted is None else NO_ANSWER
    if apart(wanted, given):  # simplify() may never find that out
        return NO
    if not verify(wanted, given, timeout_seconds=None, raise_on_error=True):
        return NO
    return YES if near(wanted, given) else FAR


def parsed(answer: str) -> Sympy | None:
    """The sympy object of an answer, boxed, for math-verify misreads bare ones; None if it cannot be read."""
    found = parse(
        rf"\boxed{{{answer}}}", CONFIG, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return found[0] if found else None


def apart(a: Sympy, b: Sympy) -> bool:
    """Two expressions of the same variables, or of none, whose values at a point are plainly different."""
    if not all(isinstance(x, Expr) and not x.is_Symbol for x in (a, b)) or a.free_symbols != b.free_symbols:
        return False
    x, y = at_a_point(a), at_a_point(b)
    return x is not None and y is not None and bool(abs(x - y) > APART * max(abs(x), abs(y)))


def near(a: Sympy, b: Sympy) -> bool:
    """Relatively: math-verify rounds to six decimals and chops what is small, so that to it 2^-98 is 2^-99.

    Expressions are compared where their variables have values of no significance; what has no number is not doubted.
    """
    tolerance = ROUNDED if a.has(Float) or b.has(Float) else EXACT
    ours, theirs = ([at_a_point(part) for part in parts(x)] for x in (a, b))
    if len(ours) != len(theirs) or None in ours or None in theirs:
        return True
    pairs = ((ours, theirs), (theirs, ours))
    return all(any(close(x, y, tolerance) for y in others) for some, others in pairs for x in some)


def close(x: Sympy, y: Sympy, tolerance: float) -> bool:
    return bool(abs(x - y) <= tolerance * max(abs(x), abs(y)))


def parts(x: Sympy) -> list[Sympy]:
    """The numbers or expressions of a set, tuple, interval, matrix or assignment."""
    if isinstance(x, Eq):
        return parts(x.rhs) if x.lhs.is_Symbol and not x.rhs.free_symbols else [x]
    if isinstance(x, Interval):
        return [x.start, x.end]
    if isinstance(x, MatrixBase):
        return list(x)
    if isinstance(x, (Set, Tuple)) and x.args:
        return [part for arg in x.args for part in parts(arg)]
    return [x]


def at_a_point(x: Sympy) -> Sympy | None:
    """An mpmath complex number of 30 digits or, in all that has none, None."""
    try:
        value = x.subs({s: 1 + Rational(zlib.crc32(s.name.encode()) % 997, 1009) for s in x.free_symbols})
        value = value.doit().evalf(30)
        if not value.is_finite:
            return None
        real, imaginary = value.as_real_imag()
        return mpmathify(real) + 1j * mpmathify(imaginary)
    except (TypeError, ValueError, AttributeError, NotImplementedError):
        return None
