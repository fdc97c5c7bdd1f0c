"""Chunks through an annotator, several calls at a time, outcomes as they come."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from thinkmid.augment.annotators import Outcome
from thinkmid.augment.shards import Piece
from thinkmid.run.interrupt import Interrupt

Annotate = Callable[[str], Outcome]  # of a chunk
POLL_S = 0.5  # between looks at the interrupt while all workers are busy


def through_pool(
    pieces: Iterator[Piece], annotate: Annotate, workers: int, interrupt: Interrupt, abort: Callable[[], None]
) -> Generator[tuple[Piece, Outcome]]:
    """Pieces with the outcomes of their chunks, as they come. Queued are at most twice the calls that can run.

    Once interrupted, abort() must end the calls that run; their outcomes still come.
    """
    running: dict[Future[Outcome], Piece] = {}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="annotate")
    try:
        while not interrupt.requested:
            for piece in islice(pieces, 2 * workers - len(running)):
                running[pool.submit(annotate, piece.chunk)] = piece
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


def ended(running: dict[Future[Outcome], Piece], timeout_s: float | None) -> list[tuple[Piece, Outcome]]:
    """The outcomes of calls that have ended, which leave `running`."""
    return [(running.pop(future), future.result()) for future in wait(running, timeout_s, FIRST_COMPLETED).done]
