"""What sandbox.py reports: the exit code of a child, which is what it found about two answers."""

from __future__ import annotations

import signal

YES, NO, NO_ANSWER, NO_GOLD, FAR, MEMORY, ERROR = range(10, 17)
READY = "ready"  # a keeper's first line
SLACK = 1.4  # the clock allows this many times the CPU seconds
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
