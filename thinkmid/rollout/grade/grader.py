"""Rewards of answers by rule: what is certain here and now, what needs algebra in processes that can be killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

from thinkmid.errors import UserError
from thinkmid.rollout.grade.algebra import READY, SLACK, VALUES, WHYS
from thinkmid.rollout.grade.answers import extract, normal
from thinkmid.rollout.grade.rules import canonical, decide, gold_answer
from thinkmid.rollout.judge.model import malformed
from thinkmid.rollout.verdict import Once, Pending, Verdict, digest
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Sample, Tally

START_S = 60  # a keeper loads math-verify in this time, on the busiest machine
LATE_S = 5  # past its child's own limits a keeper is given up


KEEP = "import sys; from thinkmid.rollout.grade.algebra import main; main(float(sys.argv[1]), int(sys.argv[2]))"


class Keeper:
    """One process that keeps children of rollout/grade/algebra.py, started again whenever it is gone. For one thread.

    A fresh interpreter, not a fork: it holds nothing of a trainer's, no CUDA context either.
    """

    def __init__(self, cpu_s: float, memory_mib: int):
        root = str(Path(__file__).parents[2])
        paths = filter(None, [root, os.environ.get("PYTHONPATH")])
        self._env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        self._args = [sys.executable, "-c", KEEP, str(cpu_s), str(memory_mib << 20)]
        self._late_s = SLACK * cpu_s + LATE_S
        self._start()

    def ask(self, answer: str, gold: str) -> Verdict:
        """Failed if the child is killed or breaks, or the keeper itself is gone."""
        line = json.dumps([normal(gold), normal(answer)]) + "\n"
        try:
            if self._process.poll() is not None or self._process.stdin.closed:
                self._start()
            if not self._ready:
                self._ready = self._read(START_S) == READY
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
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
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a line that nobody will read
                pipe.close()

    def _start(self) -> None:
        # a session of its own: Ctrl-C in the terminal is the trainer's, and a group can be killed
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._args, env=self._env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._ready = False

    def _read(self, wait_s: float) -> str:
        """One line; what is read is a few bytes that come in one piece."""
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if not poll.poll(1000 * wait_s):
            raise TimeoutError(f"no answer in {wait_s:.0f} s")
        line = os.read(self._process.stdout.fileno(), 64).decode()
        if not line:
            raise TimeoutError("it ended")
        return line.strip()


class Pool:
    """Keepers, each with a thread that hands it one question after the other. close() ends them all."""

    def __init__(self, workers: int = 2, *, cpu_s: float = 1.0, memory_mib: int = 1024):
        """cpu_s: most work for one verdict, and by the clock 1.4 times that; memory_mib: its address space."""
        for name, value, low in (("workers", workers, 1), ("memory_mib", memory_mib, 256), ("cpu_s", cpu_s, 0.01)):
            if not value >= low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("answers are verified by math-verify, which is not installed: pip install math-verify")
        self._questions: SimpleQueue = SimpleQueue()
        self._closed = False
        self.keepers = [Keeper(cpu_s, memory_mib) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(k,), daemon=True) for k in self.keepers]
        for thread in self._threads:
            thread.start()

    def ask(self, answer: str, gold: str) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        if self._closed:
            raise RuntimeError("the pool is closed")
        self._questions.put((answer, gold, future))
        return future

    def close(self) -> None:
        """At once: what was asked and not answered is failed. No process is left."""
        self._closed = True
        for keeper in self.keepers:
            self._questions.put(None)
            keeper.kill()
        for thread in self._threads:
            thread.join()

    def _serve(self, keeper: Keeper) -> None:
        while (question := self._questions.get()) is not None:
            answer, gold, future = question
            future.set_result(Verdict(None, "closed") if self._closed else keeper.ask(answer, gold))
        keeper.kill()  # it may have been started again while it was being closed


class Grader:
    """Verdicts on answers: by rule where that is certain, else by algebra. For one thread.

    A verdict depends on text, gold answer and question alone, not on order, cache or number of workers.
    """

    def __init__(self, *, workers: int = 2, cpu_s: float = 1.0, memory_mib: int = 1024, cache_size: int = 100_000):
        """See Pool. Start it before the run is under way: a keeper needs a second to load."""
        self._once = Once(cache_size)
        self.pool = Pool(workers, cpu_s=cpu_s, memory_mib=memory_mib)
        self._sums: dict[str, float] = defaultdict(float)

    def __call__(self, text: str, gold: str, question: str = "") -> Pending:
        """The verdict on the answer that a whole text gives; `why` is "no answer" if it gives none.

        With the question known, an answer that only repeats an expression of it is 0.
        """
        answer = extract(text)
        verdict = decide(answer, gold, question)
        if verdict is not None:
            self._sums["exact"] += verdict.value is not None
            self._sums["failed"] += verdict.value is None
            return lambda: verdict
        pair = normal(answer), normal(gold_answer(gold))
        pending, known = self._once(digest(*pair), lambda: self._start(*pair))
        self._sums["cached" if known else "asked"] += 1
        return pending

    def answer(self, text: str) -> str | None:
        """What may vote: the answer that a text gives, in one spelling of those that rules know to be the same."""
        answer = extract(text)
        return None if answer is None else canonical(answer)

    def row(self) -> Tally:
        """Counts of verdicts since the last call; mean of the seconds from asking for one to reading it."""
        sums, self._sums = self._sums, defaultdict(float)
        row: Tally = {f"verify_{name}": sums[name] for name in ("asked", "exact", "failed", "cached")}
        return row | {"verify_wait_s": (sums["wait_s"], sums["read"])}

    def close(self) -> None:
        self.pool.close()

    def _start(self, answer: str, gold: str) -> Pending:
        began, future = time.perf_counter(), self.pool.ask(answer, gold)

        def read() -> Verdict:
            verdict = future.result()
            self._sums["failed"] += verdict.value is None  # such a sample leaves its group's baseline
            self._sums["read"] += 1
            self._sums["wait_s"] += time.perf_counter() - began
            return verdict

        return read


class AnswerReward:
    """The reward of questions with checkable answers: meta["gold"], and meta["question"] where it is known."""

    def __init__(self, tokenizer: Tokenizer, grader: Grader, *, thinks: bool = True):
        """Not thinks: samples have no closing tag, all of their text is read. close() closes the grader."""
        self._text, self._grader, self._thinks = tokenizer, grader, thinks

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending:
        """Only what follows the thought is read; not exactly one closing tag is 0. UserError: no gold answer."""
        gold = prompt.meta.get("gold")
        if gold is None or not str(gold).strip():
            raise UserError(f"prompt {prompt.id}: no gold answer")
        if not self._thinks:
            return self._grade(self._text.decode(sample.tokens), gold, prompt)
        parts = self._text.split_at_close(sample.tokens)
        if verdict := malformed(parts):
            return lambda: verdict
        return self._grade(parts.suffix, gold, prompt)

    def finish(self, step: int) -> Tally:
        """After the last verdict of a step: the grader's metrics since then."""
        return self._grader.row()

    def close(self) -> None:
        self._grader.close()

    def _grade(self, written: str, gold, prompt: Prompt) -> Pending:
        return self._grader(written, str(gold), str(prompt.meta.get("question", "")))
