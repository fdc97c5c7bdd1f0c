"""Verdicts on what the policy wrote: as values that come later, in a cache that asks for each once."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol, TypeVar

from thinkmid.tokenizer import Split
from thinkmid.types import Prompt, Sample, Tally

CACHE_SIZE = 100_000  # verdicts, some 200 bytes each

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Verdict:
    """What a judge or a grader found about one sample. It is a future too, that of a verdict that is known."""

    value: int | None  # 1, 0, or None: the judge failed, which is never a 0
    why: str
    p_yes: float | None = None  # of a model that was asked: the mean over its votes

    @property
    def reward(self) -> float:
        return float("nan") if self.value is None else float(self.value)

    def result(self) -> Verdict:
        return self


class Future(Protocol[T_co]):
    """A value that comes later: of a thread or process (concurrent.futures.Future is one), or of an engine."""

    def result(self) -> T_co:
        """The value, always the same. The first call may wait, or drive an engine."""


Pending = Future[Verdict]


class Reward(Protocol):
    """Gives each finished sample a verdict."""

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending:
        """Starts the work. Results are read after all samples of a step are drawn."""

    def finish(self, step: int) -> Tally:
        """After the last verdict of a step: metrics since the last call. UserError: its verdicts cannot be trusted."""

    def close(self) -> None:
        """Ends threads, processes and connections. Verdicts that are still to come fail."""


def malformed(parts: Split) -> Verdict | None:
    """0 for a sample without exactly one closing tag, which needs no judge; None for others."""
    if parts.num_tags == 1:
        return None
    return Verdict(0, "unclosed" if parts.num_tags == 0 else "closed more than once")


class VerdictCache:
    """Futures of verdicts by key. Keeps those under way and the last `size` that were read, but none that failed.

    counts: asked, cached, read and failed verdicts since take_counts(); sums over those read of the seconds from asking
    to reading (wait_s) and of P(yes) (p_yes). Its owner may count more.
    """

    def __init__(self, size: int):
        self._size = size
        self._known: dict[bytes, Verdict] = {}
        self._under_way: dict[bytes, CachedVerdict] = {}
        self.counts: dict[str, float] = defaultdict(float)

    def get(self, key: bytes) -> Pending | None:
        """The future that was added under this key, or None: ask, and add() one."""
        found = self._known.get(key) or self._under_way.get(key)
        self.counts["cached"] += found is not None
        return found

    def add(self, key: bytes, source: Pending) -> Pending:
        """The future to hand out for source: all who ask for this key share it."""
        self.counts["asked"] += 1
        self._under_way[key] = CachedVerdict(self, key, source)
        return self._under_way[key]

    def settle(self, key: bytes, verdict: Verdict, wait_s: float) -> None:
        """A verdict under way was read."""
        sums = {"read": 1, "failed": verdict.value is None, "wait_s": wait_s, "p_yes": verdict.p_yes or 0.0}
        for name, value in sums.items():
            self.counts[name] += value
        del self._under_way[key]
        if verdict.value is not None:
            self._known[key] = verdict
            if len(self._known) > self._size:
                del self._known[next(iter(self._known))]

    def take_counts(self) -> dict[str, float]:
        """The counts, which start over."""
        counts, self.counts = self.counts, defaultdict(float)
        return counts


class CachedVerdict:
    """A verdict under way. The cache learns what it is when it is read first."""

    def __init__(self, cache: VerdictCache, key: bytes, source: Pending):
        self._cache, self._key, self._source = cache, key, source
        self._began = time.perf_counter()
        self._verdict: Verdict | None = None

    def result(self) -> Verdict:
        if self._verdict is None:
            self._verdict = self._source.result()
            self._cache.settle(self._key, self._verdict, time.perf_counter() - self._began)
        return self._verdict


def digest(*texts: str) -> bytes:
    """16 bytes for these texts in this order."""
    state = hashlib.blake2b(digest_size=16)
    for data in (text.encode("utf-8", errors="surrogatepass") for text in texts):
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()
