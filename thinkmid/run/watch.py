"""A rank that makes no progress ends, and leaves its stack: watch/rank-N.txt in the run folder."""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType


class Watch:
    """The file holds what the rank is doing now; on a hang, a crash, SIGTERM or an error, stacks of all threads too.

    The timer is C's own thread: it fires even while a stuck call holds Python's lock, and ends the process with code 1.
    """

    def __init__(self, folder: str | Path, rank: int, timeout_s: float):
        """timeout_s: seconds without a beat after which the process ends; 0: never."""
        path = Path(folder) / "watch" / f"rank-{rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # open as long as the process: the C handlers write to its descriptor
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        self._rank, self._timeout_s = rank, timeout_s
        self._armed, self._phase = 0.0, ""
        faulthandler.enable(self._file)
        faulthandler.register(signal.SIGTERM, self._file, chain=True)
        self._hook, sys.excepthook = sys.excepthook, self._note_error

    def beat(self, phase: str = "", step: int | None = None) -> None:
        """Progress was made; a new phase, if one is named, begins."""
        if phase:
            self._phase = phase
            self._file.seek(0)
            self._file.truncate()
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
            self._file.write(f"rank {self._rank}: {phase}" + (f", step {step}" if step is not None else ""))
            self._file.write(f", since {when} UTC\n")
            self._file.flush()
        now = time.monotonic()
        # arming starts a thread: once a second is enough
        if self._timeout_s and (phase or now - self._armed > min(1.0, self._timeout_s / 10)):
            self._armed = now
            faulthandler.dump_traceback_later(self._timeout_s, file=self._file, exit=True)

    def rest(self) -> None:
        """No more beats are to be expected."""
        faulthandler.cancel_dump_traceback_later()

    def _note_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.rest()
        traceback.print_exception(kind, error, trace, file=self._file)
        self._file.flush()
        self._hook(kind, error, trace)
