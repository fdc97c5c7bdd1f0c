"""Chunks through an annotator, several calls at a time, outcomes as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Protocol

from thinkmid.augment.annotators import Outcome

POLL_S = 0.5  # between looks at stopped() while all workers are busy


class Item(Protocol):
    """Whatever carries a chunk."""

    chunk: str


def through_pool(
    items: Iterator[Item], annotate, batch: int, workers: int, stopped, abort
) -> Iterator[tuple[Item, Outcome]]:
    """Items with the outcomes of their chunks, as they come. Queued are at most twice the calls that can run."""
    running: dict[Future, list[Item]] = {}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="annotate")
    try:
        while not stopped():
            while len(running) < 2 * workers and (taken := list(islice(items, batch))):
                running[pool.submit(annotate, [item.chunk for item in taken])] = taken
            if not running:
                return
            yield from ended(running, POLL_S)
        for future in [future for future in running if future.cancel()]:
            del running[future]
        abort()
        while running:
            yield from ended(running, None)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ended(running: dict[Future, list[Item]], timeout_s: float | None) -> Iterable[tuple[Item, Outcome]]:
    """The outcomes of calls that have ended, which leave `running`."""
    out: list[tuple[Item, Outcome]] = []
    for future in wait(running, timeout_s, FIRST_COMPLETED).done:
        out += zip(running.pop(future), future.result(), strict=True)
    return out
