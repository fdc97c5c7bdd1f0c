"""Algebra on answers, each in a process of its own that the kernel ends in time. pool.py starts it.

A keeper imports math-verify once. For each line of JSON on its standard input it forks a child, which sets its own
limits and reports by its exit code what it found; the keeper writes one number a line: that code, or minus the signal
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
import sys
from collections.abc import Callable

from thinkmid.rollout.grade.codes import ERROR, MEMORY, READY, SLACK, YES

TOO_MUCH = 0.25  # of the memory limit: a "no" that took more may be an allocation that failed unseen


def judge(compare: Callable[[str, str], int], line: bytes, cpu_s: float, memory: int) -> int:
    """In a forked child: sets limits, then compares the two answers in a line of JSON. Returns the exit code."""
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
    """Reads and answers lines until standard input ends, or the process that started this does."""
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # parsers print
        os.dup2(null, stream)
    logging.disable(logging.CRITICAL)
    from thinkmid.rollout.grade import algebra  # once nothing that it prints reaches the pipe

    algebra.warm_up()
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page it shares
    os.write(out, f"{READY}\n".encode())
    starter = os.getppid()
    while os.getppid() == starter:
        if not select.select([0], [], [], 2)[0]:
            continue  # if the starter is gone, another process holds the other end of the pipe open
        # the next line comes after the answer to this one: the buffer never holds more than select sees
        if not (line := sys.stdin.buffer.readline()):
            return
        child = os.fork()
        if not child:
            code = ERROR
            try:
                os.close(out)
                os.dup2(null, 0)
                code = judge(algebra.compare, line, cpu_s, memory)
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(out, f"{status}\n".encode())
