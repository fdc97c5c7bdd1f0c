"""SIGTERM and SIGINT become a flag that every phase polls; a further signal, some seconds later, ends the process."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import FrameType

EXIT = 75  # EX_TEMPFAIL: stopped on request, saved, the same command resumes
# SLURM signals torchrun and its children, torchrun its children again, Ctrl-C all of them: one request
GRACE_S = 5.0


class Stopped(Exception):
    """A stop was requested on some rank; raised on every rank, and nothing of the step under way was applied."""


class Interrupt:
    """requested: a signal asked this process to stop."""

    def __init__(self) -> None:
        self.requested, self._since = False, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            name, further = signal.Signals(number).name, f"a further signal after {GRACE_S:g} s ends the run at once"
            if os.environ.get("RANK", "0") == "0":
                # not print: the signal may have interrupted one; and the terminal may be gone
                with suppress(OSError):
                    os.write(2, f"stopping: {name}; progress is saved first, {further}\n".encode())
        elif time.monotonic() - self._since > GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
