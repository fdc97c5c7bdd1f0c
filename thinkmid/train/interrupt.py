"""SIGTERM and SIGINT become a flag that every phase polls; a second signal ends the process at once."""

from __future__ import annotations

import signal

EXIT = 75  # EX_TEMPFAIL: stopped on request, saved, the same command goes on


class Interrupt:
    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True
