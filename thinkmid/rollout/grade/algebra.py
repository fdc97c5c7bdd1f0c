"""Algebra on answers, each in a process of its own that the kernel ends in time. verify.py starts it.

A keeper imports math-verify once. For each line of JSON on its standard input it forks a child, which sets its own
limits and says by its exit code what it found; the keeper writes one number a line: that code, or minus the signal
that ended the child. So one answer leaves nothing behind for the next, whatever it does.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import select
import signal
import zlib

YES, NO, NO_ANSWER, NO_GOLD, FAR, MEMORY, ERROR = range(10, 17)
READY = "ready"
WHYS = {
    YES: "equal by algebra",
    NO: "not equal by algebra",
    NO_ANSWER: "not readable as mathematics",
    NO_GOLD: "the gold answer is not readable as mathematics",
    FAR: "equal only when rounded",
    MEMORY: "took too much memory",
    ERROR: "math-verify broke",
    -signal.SIGPROF: "took too long",
    -signal.SIGALRM: "took too long",
}
VALUES = {YES: 1, NO: 0, NO_ANSWER: 0, FAR: 0}  # all others: failed

TOO_MUCH = 0.25  # of the memory limit: a "no" that took more may be an allocation that failed unseen
SLACK = 1.4  # the clock allows this many times the CPU seconds
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


def compare(gold: str, answer: str) -> int:
    """YES, NO or why neither. Both are normal answers; nothing bounds the time or the memory that this takes."""
    from math_verify import verify

    wanted, given = parsed(gold), parsed(answer)
    if wanted is None or given is None:
        return NO_GOLD if wanted is None else NO_ANSWER
    if apart(wanted, given):  # simplify() may never find that out
        return NO
    if not verify(wanted, given, timeout_seconds=None, raise_on_error=True):
        return NO
    return YES if near(wanted, given) else FAR


def parsed(answer: str):
    """The sympy object of an answer, boxed, for math-verify misreads bare ones; None if it cannot be read."""
    from math_verify import parse
    from math_verify.parser import LatexExtractionConfig

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    found = parse(
        rf"\boxed{{{answer}}}", config, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
    )
    return found[0] if found else None


def apart(a, b) -> bool:
    """Two expressions of the same variables, or of none, whose values at a point are plainly different."""
    from sympy import Expr

    if not all(isinstance(x, Expr) and not x.is_Symbol for x in (a, b)) or a.free_symbols != b.free_symbols:
        return False
    x, y = at_a_point(a), at_a_point(b)
    return x is not None and y is not None and abs(x - y) > APART * max(abs(x), abs(y))


def near(a, b) -> bool:
    """Relatively: math-verify rounds to six decimals and chops what is small, so that to it 2^-98 is 2^-99.

    Expressions are compared where their variables have values of no significance; what has no number is not doubted.
    """
    from sympy import Float

    tolerance = ROUNDED if a.has(Float) or b.has(Float) else EXACT
    ours, theirs = ([at_a_point(part) for part in parts(x)] for x in (a, b))
    if len(ours) != len(theirs) or None in ours or None in theirs:
        return True

    def found(x, among):
        return any(abs(x - y) <= tolerance * max(abs(x), abs(y)) for y in among)

    return all(found(x, theirs) for x in ours) and all(found(y, ours) for y in theirs)


def parts(x) -> list:
    """The numbers or expressions of a set, tuple, interval, matrix or assignment."""
    from sympy import Eq, Interval, MatrixBase, Set, Tuple

    if isinstance(x, Eq):
        return parts(x.rhs) if x.lhs.is_Symbol and not x.rhs.free_symbols else [x]
    if isinstance(x, Interval):
        return [x.start, x.end]
    if isinstance(x, MatrixBase):
        return list(x)
    if isinstance(x, (Set, Tuple)) and x.args:
        return [part for arg in x.args for part in parts(arg)]
    return [x]


def at_a_point(x):
    """An mpmath complex number of 30 digits or, in all that has none, None."""
    from mpmath import mpmathify
    from sympy import Rational

    try:
        value = x.subs({s: 1 + Rational(zlib.crc32(s.name.encode()) % 997, 1009) for s in x.free_symbols})
        value = value.doit().evalf(30)
        if not value.is_finite:
            return None
        real, imaginary = value.as_real_imag()
        return mpmathify(real) + 1j * mpmathify(imaginary)
    except (TypeError, ValueError, AttributeError, NotImplementedError):
        return None


def judge(line: str, cpu_s: float, memory: int) -> int:
    """In a forked child: limits, then the comparison of one line's answers."""
    for which in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(which, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # no handler, so the kernel ends the process even where Python would not listen
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, SLACK * cpu_s)
    before = peak()
    try:
        code = compare(*json.loads(line))
    except (MemoryError, RecursionError):
        return MEMORY
    except Exception:  # of math-verify, sympy or antlr; the verdict is failed, and that is counted
        code = ERROR
    return MEMORY if code != YES and peak() - before > TOO_MUCH * memory else code


def peak() -> int:
    """Most bytes that this process has had mapped or, without /proc, resident."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(cpu_s: float, memory: int) -> None:
    """Until standard input ends, or whoever started this does."""
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # parsers print
        os.dup2(null, stream)
    logging.disable(logging.CRITICAL)
    for pair in WARM:
        compare(*pair)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page it shares
    os.write(out, f"{READY}\n".encode())
    starter, rest = os.getppid(), b""
    while True:
        while b"\n" not in rest:
            if not select.select([0], [], [], 2)[0]:
                if os.getppid() != starter:  # another process holds the other end of the pipe open
                    return
                continue
            read = os.read(0, 65536)
            if not read:
                return
            rest += read
        line, _, rest = rest.partition(b"\n")
        child = os.fork()
        if not child:
            code = ERROR
            try:
                os.close(out)
                os.dup2(null, 0)
                code = judge(line.decode(), cpu_s, memory)
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(out, f"{status}\n".encode())
