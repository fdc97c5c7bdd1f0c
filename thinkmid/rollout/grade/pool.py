"""Algebra on answers in processes that can be killed, and threads that wait for them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import thinkmid
from thinkmid.errors import UserError
from thinkmid.rollout.grade.answers import normal
from thinkmid.rollout.grade.codes import READY, SLACK, VALUES, WHYS
from thinkmid.rollout.grade.config import VerifyConfig
from thinkmid.rollout.verdict import Verdict

START_S = 60  # a keeper loads math-verify in this time, on the busiest machine
LATE_S = 5  # past its child's own limits a keeper is given up

ROOT = Path(thinkmid.__file__).parents[1]  # what a keeper imports is what its starter did, wherever that was started
KEEP = """import sys
sys.path.insert(0, sys.argv[3])
from thinkmid.rollout.grade.sandbox import main
main(float(sys.argv[1]), int(sys.argv[2]))"""


class Keeper:
    """One process of sandbox.py with its children, started again whenever it is gone. For one thread.

    A fresh interpreter, not a fork: it holds nothing of a trainer's, no CUDA context either.
    """

    def __init__(self, cfg: VerifyConfig):
        self._args = [sys.executable, "-c", KEEP, str(cfg.cpu_s), str(cfg.memory_mib << 20), str(ROOT)]
        self._late_s = SLACK * cfg.cpu_s + LATE_S
        self._ready = False  # it has loaded
        self._start()

    def ask(self, answer: str, gold: str) -> Verdict:
        """Failed if the child is killed or breaks, or the keeper itself is gone."""
        line = json.dumps([normal(gold), normal(answer)]) + "\n"
        try:
            if self._process.poll() is not None or self._input.closed:
                self._start()
            if not self._ready:
                self._ready = self._read(START_S) == READY
            self._input.write(line.encode())
            self._input.flush()
            code = int(self._read(self._late_s))
        except (OSError, ValueError, TimeoutError) as error:
            self.kill()
            return Verdict(None, f"grader gone: {error or type(error).__name__}")
        return Verdict(VALUES.get(code), WHYS.get(code) or f"grader ended by code {code}")

    def kill(self) -> None:
        """The keeper and the child that it may have."""
        process = self._process
        if process.returncode is None:  # else its id may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (self._input, self._output):
            with contextlib.suppress(OSError):  # a line that is never read
                pipe.close()

    def _start(self) -> None:
        # a session of its own: Ctrl-C in the terminal is the trainer's, and a group can be killed
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._args, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        self._ready = False

    def _read(self, wait_s: float) -> str:
        """One line; what is read is a few bytes that come in one piece."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if not poll.poll(1000 * wait_s):
            raise TimeoutError(f"no answer in {wait_s:.0f} s")
        line = os.read(self._output.fileno(), 64).decode()
        if not line:
            raise TimeoutError("it ended")
        return line.strip()


class Pool:
    """Keepers, and as many threads that hand them questions. close() ends them all."""

    def __init__(self, cfg: VerifyConfig):
        """UserError: math-verify is not installed. By the clock a verdict may take 1.4 times cfg.cpu_s."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("answers are verified by math-verify, which is not installed: pip install math-verify")
        self._closed = False
        self.keepers = [Keeper(cfg) for _ in range(cfg.workers)]
        self._idle: SimpleQueue[Keeper] = SimpleQueue()
        for keeper in self.keepers:
            self._idle.put(keeper)
        self._threads = ThreadPoolExecutor(cfg.workers)

    def ask(self, answer: str, gold: str) -> Future[Verdict]:
        """RuntimeError: the pool is closed."""
        return self._threads.submit(self._ask, answer, gold)

    def close(self) -> None:
        """At once: questions without an answer yet have failed. No process is left."""
        self._closed = True
        for keeper in self.keepers:
            keeper.kill()
        self._threads.shutdown()
        for keeper in self.keepers:
            keeper.kill()  # it may have been started again while it was being closed

    def _ask(self, answer: str, gold: str) -> Verdict:
        if self._closed:
            return Verdict(None, "closed")
        keeper = self._idle.get()
        verdict = keeper.ask(answer, gold)
        self._idle.put(keeper)
        return verdict
