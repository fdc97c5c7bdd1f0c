"""The GPU session: one command measures kernels, training step and RL step on one GPU, most telling first.

    python -m benchmarks.session                  # both halves, 540 s at most
    python -m benchmarks.session --only first     # 240 s; --only second, 300 s; or names of sections
    python -m benchmarks.session --device cpu --toy   # a rehearsal: the same code at toy sizes, two minutes

Sections run one after the other in a process of their own, which is replaced where a section fails or overruns: that
costs this section alone. Every figure is written to OUT/session.json as it comes; a second call adds to it. The table
at the end, OUT/session.md, has prediction (benchmarks/predict.py) and floor beside each measurement. What to carry to a
machine that can fetch nothing: benchmarks/session.md. Exit codes: 0 all sections ok; 1 a section failed; 2 no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True, kw_only=True)
class Section:
    """A file of benchmarks/measure and the seconds that it may take."""

    module: str
    half: str
    budget_s: float


SECTIONS = {
    "ceilings": Section(module="ceilings", half="first", budget_s=25),
    "tests": Section(module="suite", half="first", budget_s=85),
    "attention": Section(module="attention", half="first", budget_s=50),
    "block": Section(module="block", half="first", budget_s=70),
    "variants": Section(module="variants", half="second", budget_s=70),
    "rl": Section(module="rl", half="second", budget_s=55),
    "head": Section(module="head", half="second", budget_s=40),
    "profile": Section(module="profile", half="second", budget_s=25),
    "rollout": Section(module="rollout", half="second", budget_s=35),
    "mini": Section(module="mini", half="second", budget_s=60),
}
HALVES = {"first": 240.0, "second": 300.0}  # seconds
SLOW = 4.0  # times the seconds of each on a CPU, where only a rehearsal runs
START_S = 60.0  # a worker that has not begun a section by then never will
LEAST = 0.3  # of a section's budget must be left for it to begin


# the parent: no torch in here, nothing of a section can spoil it


class Record:
    """What is known so far, on disk after every line."""

    def __init__(self, path: Path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else {"sections": {}}

    def on(self, found: dict) -> None:
        """The machine and the sizes. ValueError where the figures so far are of others."""
        was, now = ((x.get("environment", {}).get("gpu", ""), x.get("sizes", "")) for x in (self.found, found))
        if self.found["sections"] and was != now:
            raise ValueError(
                f"{self.path}: holds figures of {' '.join(was)}, not of {' '.join(now)}; --fresh forgets them"
            )
        self.found |= found

    def begin(self, name: str) -> None:
        self.found["sections"][name] = {"status": "running", "rows": []}
        self.write()

    def add(self, name: str, row: dict) -> None:
        self.found["sections"][name]["rows"].append(row)
        self.write()

    def end(self, name: str, status: str, seconds: float, why: str = "") -> None:
        section = self.found["sections"].setdefault(name, {"rows": []})
        section |= {"status": status, "seconds": round(seconds, 1)} | ({"why": why} if why else {})
        self.write()
        print(f"{name}: {status}, {seconds:.0f} s{': ' + why if why else ''}", flush=True)

    def write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


WORKER = [sys.executable, "-m", "benchmarks.session", "--worker"]


class Worker:
    """A process that runs sections in turn and says what it finds, a line of JSON each."""

    def __init__(self, names: list[str], flags: list[str], log: Path):
        command = [*WORKER, "--only", ",".join(names), *flags]
        self._log = open(log, "a", encoding="utf-8")  # noqa: SIM115
        # a group of its own, so that its children end with it
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout_s: float) -> dict | None:
        """The next event; None where the process ended. TimeoutError when none comes in time."""
        try:
            line = self._lines.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def stop(self) -> int:
        """Ends it and its children; how it ended."""
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()
        return self._process.wait()


def run(names: list[str], record: Record, flags: list[str], deadline: float, slow: float = 1.0) -> None:
    """All sections that there is time for, in order. slow: times the seconds that each may take."""
    left = list(names)
    while left:
        worker = Worker(left, flags, record.path.with_name("session-stderr.txt"))
        try:
            left = follow(worker, left, record, deadline, slow)
        finally:
            worker.stop()


def follow(worker: Worker, left: list[str], record: Record, deadline: float, slow: float) -> list[str]:
    """Follows one worker until it ends or has to; the sections that are still to be run."""
    while left:
        name, began = left[0], time.monotonic()
        budget_s = slow * SECTIONS[name].budget_s
        if deadline - began < LEAST * budget_s:
            record.end(name, "skipped", 0, "no time left")
            left = left[1:]
            continue
        limit = began + slow * START_S
        running = False
        while True:
            try:
                event = worker.next(min(limit, deadline) - time.monotonic())
            except TimeoutError:
                taken = time.monotonic() - began
                record.end(name, "overran" if running else "did not begin", taken, f"ended after {taken:.0f} s")
                return left[1:]
            if event is None:
                record.end(name, "crashed", time.monotonic() - began, f"its process ended with {worker.stop()}")
                return left[1:]
            if event["event"] == "environment":
                record.on(event["found"])
            elif event["event"] == "begin":
                if event["section"] != name:  # the worker is ahead of a section that there was no time for
                    return left
                running, began = True, time.monotonic()
                limit = began + budget_s
                record.begin(name)
            elif event["event"] == "row":
                record.add(name, event["row"])
            else:
                record.end(name, "failed" if event["why"] else "ok", time.monotonic() - began, event["why"])
                left = left[1:]
                if event["why"]:
                    return left  # a context that raised once may be of no use to the next section
                break
    return left


# the worker


def work(names: list[str], device: str, toy: bool, folder: Path, pipe: TextIO) -> int:
    """Runs sections until one raises; events go to the pipe."""
    import torch

    from benchmarks.measure.row import free
    from benchmarks.measure.sizes import H100, TOY
    from thinkmid.run.ranks import set_allocator

    def say(**event) -> None:
        print(json.dumps(event), file=pipe, flush=True)

    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    if where.type == "cuda":
        set_allocator()  # as a run has it, whichever section comes first
    say(event="environment", found=environment(where) | {"sizes": "toy" if toy else "H100"})
    for name in names:
        say(event="begin", section=name)
        why = ""
        try:
            section = importlib.import_module(f"benchmarks.measure.{SECTIONS[name].module}")
            for row in section.run(TOY if toy else H100, where, folder):
                say(event="row", row=asdict(row))
        except Exception as problem:  # recorded, and the sections after it are worth having
            import traceback

            traceback.print_exc()
            why = f"{type(problem).__name__}: {' '.join(str(problem).split())[:400]}"
        say(event="end", section=name, why=why)
        if why:
            return 1
        free(where)
    return 0


def environment(device) -> dict:
    """What the figures were measured on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from benchmarks.common import machine

    found = {"machine": machine(), "python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for package in ("torch", "triton", "numpy", "transformers", "liger-kernel", "flash-attn", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    return {"environment": found}


# the command


def chosen(only: str) -> list[str]:
    """Sections by name or by half, in the order of worth. ValueError names what is unknown."""
    names = {name for part in only.split(",") for name in SECTIONS if part in (name, SECTIONS[name].half)}
    known = [*HALVES, *SECTIONS]
    if unknown := sorted(set(only.split(",")) - set(known)):
        raise ValueError(f"unknown section {unknown[0]!r}, one of {', '.join(known)}")
    return [name for name in SECTIONS if name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="first,second", help=f"comma-separated: first, second, {', '.join(SECTIONS)}")
    parser.add_argument(
        "--budget-s", type=float, help="seconds for all of them; default: 240 for first, 300 for second"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write; default runs/gpu-session, with --toy runs/toy-session"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes: a rehearsal")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier call wrote to OUT")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args, began = parser.parse_args(), time.monotonic()
    try:
        names = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    if args.worker:
        return worker_main(names, args)
    if args.device == "cuda" and not has_gpu():
        print("benchmarks.session needs a GPU that torch can use; --device cpu --toy rehearses it", file=sys.stderr)
        return 2
    slow = SLOW if args.device == "cpu" else 1.0
    budget_s = args.budget_s or slow * sum(HALVES[half] for half in {SECTIONS[name].half for name in names})
    args.out = args.out or Path("runs/toy-session" if args.toy else "runs/gpu-session")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "session.json"
    if args.fresh:
        path.unlink(missing_ok=True)
    record = Record(path)
    flags = ["--device", args.device, "--out", str(args.out), *["--toy"] * args.toy]
    try:
        run(names, record, flags, began + budget_s, slow)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from benchmarks import predict

    table = predict.report(record.found)
    (args.out / "session.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\n{path}")
    return int(any(record.found["sections"][name]["status"] != "ok" for name in names))


def worker_main(names: list[str], args) -> int:
    # what libraries print is no event: it goes to the log
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)
        return work(names, args.device, args.toy, args.out, pipe)


def has_gpu() -> bool:
    """In a process of its own: this one stays free of CUDA."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
