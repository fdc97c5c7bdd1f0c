"""Progress of long work: a bar where stdout is a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from time import monotonic as now
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from thinkmid.errors import plain
from thinkmid.run.log import duration


class Progress:
    """A with block, inside of which some of `total` things get done. Ranks other than 0 show nothing."""

    def __init__(self, title: str, total: int, unit: str, *, rank: int = 0, every_s: float = 30.0):
        """unit: what the things are, in the plural; every_s: seconds between lines."""
        self._title, self._total, self._unit, self._every_s = plain(title), total, unit, every_s
        self._on, self._bar, self._began = rank == 0, None, now()
        self._said = self._began
        if self._on and sys.stdout.isatty():
            words = TextColumn("{task.description}", markup=False)
            about = TextColumn("{task.fields[about]}", markup=False)
            self._bar = Bar(words, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn(), about)
            self._task = self._bar.add_task(self._title, total=total, about="")

    def at(self, done: int, about: str = "") -> None:
        """How many are done. about: more to show, in words."""
        at = now()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, about=plain(about))
        elif self._on and at - self._said >= self._every_s:
            self._said = at
            left = duration((at - self._began) * (self._total - done) / max(done, 1))
            more = f", {about}" if about else ""
            print(plain(f"{self._title}: {done:,} of {self._total:,} {self._unit}{more}, {left} left"), flush=True)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
