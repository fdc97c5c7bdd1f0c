"""What a run reports while it runs: metrics.jsonl, events.jsonl, rollouts/, the console, trackers if configured."""

import atexit
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thinkmid.errors import UserError, plain
from thinkmid.files import Row, finite, reopen, write_whole

# what a person watches: (name in the row, name on screen, format)
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("val_loss", "val loss", "{:.4f}"),
    ("reward", "reward", "{:.3f}"),
    ("thinking_tokens", "thinking", "{:.0f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("dead_groups", "dead", "{:.0%}"),
    ("grad_norm", "grad", "{:.3g}"),
    ("tokens_per_s", "tok/s", "{:,.0f}"),
)
PHASES = ("rollout", "reward", "train", "sync", "save")


class Tracker(Protocol):
    """What wandb.init and trackio.init return."""

    def log(self, row: dict[str, float], step: int) -> object: ...
    def finish(self) -> object: ...


class Log:
    """The record of one run. Ranks other than 0 write and print nothing.

    Steps count from 1: a row is written once its step is done. A log that starts after `start_step` steps removes the
    rows of later ones: they will be written again. `num_steps` is the whole run's, for the time left; `config` is shown
    by trackers.
    """

    def __init__(
        self,
        folder: str | Path,
        rank: int = 0,
        start_step: int = 0,
        *,
        num_steps: int = 0,
        trackers: Sequence[str] = (),
        config: Row | None = None,
    ):
        self.folder, self.on = Path(folder), rank == 0
        if not self.on:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob("rollouts/.*.tmp")]:
            left.unlink(missing_ok=True)  # of a write_whole that was killed
        self.trackers = [_tracker(name, self.folder, start_step, config or {}) for name in trackers]
        metrics = self.folder / "metrics.jsonl"
        self.metrics = reopen(metrics, partial(_is_past, metrics, start_step))
        self.events = reopen(self.folder / "events.jsonl")
        self.screen = _Live(str(self.folder), num_steps) if sys.stdout.isatty() else _Lines(num_steps)
        atexit.register(self.close)  # a program that ends by an error leaves the terminal in order too

    def write(self, step: int, row: Row) -> None:
        """Metrics of one step: numbers, or 0-dim arrays and tensors. NaN and infinities are written as null."""
        if self.on:
            row = finite({"step": step, **row})
            self._append(self.metrics, row)
            for tracker in self.trackers:
                tracker.log({k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}, step=step)
            self.screen.step(row)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened once: a restart, a skipped update, a save. Stamped with the wall clock, UTC."""
        if self.on:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._append(self.events, {"time": now, "kind": kind, **fields})

    def note(self, text: str) -> None:
        """Print a line, and keep it as an event."""
        self.say(f"note: {text}")
        self.event("note", text=text)

    def rollouts(self, step: int, rows: Iterable[Row]) -> None:
        """Everything sampled in one step, in rollouts/step-000040.jsonl."""
        if self.on:
            path = self.folder / "rollouts" / f"step-{step:06d}.jsonl"
            with self._survive(path):
                write_whole(path, "".join(map(_json_line, rows)))

    def phase(self, name: str) -> None:
        """What the run is doing from now on."""
        if self.on:
            self.screen.phase(name)

    def progress(self, done: int, total: int) -> None:
        """How much of the phase is done."""
        if self.on:
            self.screen.progress(done, total)

    def say(self, text: str) -> None:
        """Print text of any origin, a model's included: no control characters, no markup."""
        if self.on:
            self.screen.say(plain(text))

    def close(self) -> None:
        if self.on:
            self.on = False
            atexit.unregister(self.close)
            self.screen.close()
            for file in (self.metrics, self.events):
                with self._survive(file.name):
                    file.close()
            for tracker in self.trackers:
                tracker.finish()

    def _append(self, file: Any, row: Row) -> None:
        with self._survive(file.name):
            file.write(_json_line(row))

    @contextmanager
    def _survive(self, path: str | Path) -> Iterator[None]:
        """A full disk costs what it cannot hold, not the run; lines wait in their buffer."""
        try:
            yield
        except OSError as error:
            self.screen.say(plain(f"warning: {path}: cannot write it: {error.strerror}"))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_past(path: Path, start_step: int, row: Row) -> bool:
    if not isinstance(step := row.get("step", 0), int | float):
        raise UserError(f"{path}: step {json.dumps(step)} is no number")
    return step <= start_step


def _json_line(row: Row) -> str:
    # a lone surrogate in a model's text becomes \udXXX on disk, which is also how JSON spells it
    return json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"


# Two screens with the same five methods: lines for files and pipes, a live table for terminals.


class _Lines:
    def __init__(self, num_steps: int):
        self.num_steps, self.pace, self.next_print = num_steps, _Pace(num_steps), 0.0
        self.now = ""  # the phase

    def step(self, row: Row) -> None:
        total = f"/{self.num_steps}" if self.num_steps else ""
        cells = [f"step {row['step']}{total}"] + [f"{name} {value}" for name, value in _cells(row)]
        self.say("  ".join([*cells, _phase_seconds(row), self.pace.step(row["step"])]).rstrip())

    def phase(self, name: str) -> None:
        self.now, self.next_print = name, time.monotonic() + 30  # a phase shorter than this prints nothing

    def progress(self, done: int, total: int) -> None:
        if (now := time.monotonic()) >= self.next_print:
            self.next_print = now + 30
            self.say(f"  {self.now} {done}/{total}")

    def say(self, text: str) -> None:
        with suppress(OSError):  # no reader, or a full disk: the run continues, lines wait in their buffer
            print(text, flush=True)

    def close(self) -> None:
        try:
            sys.stdout.flush()
        except OSError:  # what still waits in the buffer is lost
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _Live:
    def __init__(self, title: str, num_steps: int):
        self.title, self.num_steps, self.pace = title, num_steps, _Pace(num_steps)
        self.row: Row = {}
        self.left = ""
        self.phase("starting")
        self.live = Live(get_renderable=self._render, refresh_per_second=2)
        self.live.start()

    def step(self, row: Row) -> None:
        self.row, self.left = row, self.pace.step(row["step"])

    def phase(self, name: str) -> None:
        self.now, self.done, self.total, self.since = name, 0, 0, time.monotonic()

    def progress(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def say(self, text: str) -> None:
        self.live.console.print(Text(text))  # a Text is printed as it is, brackets and all

    def close(self) -> None:
        self.phase("done")
        self.live.stop()

    def _render(self) -> Group:
        step = f"step {self.row['step']}" if self.row else "step -"
        total = f"/{self.num_steps}" if self.num_steps else ""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        cells = _cells(self.row)
        for name, _ in cells:
            table.add_column(Text(name), justify="right")
        table.add_row(*(Text(value, "bold") for _, value in cells))
        count = f" {self.done}/{self.total}" if self.total else ""
        now = f"{self.now}{count}, {duration(time.monotonic() - self.since)}"
        head = Text.assemble((self.title, "bold"), "   ", (step + total, "cyan"), "   ", self.left)
        tail = Text.assemble(("now ", "dim"), (now, "green"), "   ", (_phase_seconds(self.row), "dim"))
        return Group(Text(), head, *([table] if cells else []), tail)


class _Pace:
    """Time left, from the wall clock of the last 20 steps: what saves and validation cost is in it."""

    def __init__(self, num_steps: int):
        self.num_steps, self.times = num_steps, deque([time.monotonic()], maxlen=21)

    def step(self, step: int) -> str:
        self.times.append(time.monotonic())
        mean_s = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        left = self.num_steps - step
        return f"{duration(mean_s * left)} left" if left > 0 else ""


def _cells(row: Row) -> list[tuple[str, str]]:
    return [(name, form.format(row[key])) for key, name, form in SHOWN if isinstance(row.get(key), (int, float))]


def _phase_seconds(row: Row) -> str:
    spent = [(name, row.get(name + "_s")) for name in PHASES]
    return ", ".join(f"{name} {s:.1f} s" for name, s in spent if isinstance(s, (int, float)) and s >= 0.05)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


# Trackers.


def _tracker(name: str, folder: Path, start_step: int, config: Row) -> Tracker:
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, start_step)
        module = import_module(name)
    except ImportError:
        raise UserError(f"tracker '{name}' is not installed: pip install {name}") from None
    options = {"project": "thinkmid", "name": folder.resolve().name, "config": config}
    if name == "wandb":
        options |= {"dir": str(folder), "id": _run_id(folder / "wandb-id", start_step)}
    run: Tracker = module.init(**options, resume="allow" if start_step else "never")
    return run


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, row: dict[str, float], step: int) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def _run_id(path: Path, start_step: int) -> str:
    """Wandb's name for the run: a resumed run finds its old one, a fresh run takes a new one."""
    if not (start_step and path.exists()):
        write_whole(path, os.urandom(6).hex())
    return path.read_text()
