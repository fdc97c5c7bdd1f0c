"""Verdicts to come, each asked for once: what is under way or was answered is not asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one continuation."""

    value: int | None  # 1, 0, or None: the judge failed, which is never a 0
    why: str
    p_yes: float | None = None  # of a model that was asked: the mean over its votes

    @property
    def reward(self) -> float:
        return float("nan") if self.value is None else float(self.value)


Pending = Callable[[], Verdict]  # asked now, answered later: calling it may wait or drive an engine


class Once:
    """Remembers the last `size` verdicts by key; one that failed is forgotten, the next one is tried again."""

    def __init__(self, size: int):
        if size < 0:
            raise ValueError(f"cache_size must be at least 0, got {size}")
        self._size = size
        self._known: dict[bytes, Verdict] = {}
        self._under_way: dict[bytes, Pending] = {}

    def __call__(self, key: bytes, ask: Callable[[], Pending]) -> tuple[Pending, bool]:
        """The verdict to come, and whether it had been asked for before; ask() is called if not."""
        if key in self._known:
            known = self._known[key]
            return (lambda: known), True
        if key in self._under_way:
            return self._under_way[key], True
        answer = ask()

        @cache  # duplicates share it
        def pending() -> Verdict:
            verdict = answer()
            del self._under_way[key]
            if verdict.value is not None:
                self._known[key] = verdict
                if len(self._known) > self._size:
                    del self._known[next(iter(self._known))]
            return verdict

        self._under_way[key] = pending
        return pending, False


def digest(*texts: str) -> bytes:
    """16 bytes for these texts in this order."""
    state = hashlib.blake2b(digest_size=16)
    for data in (text.encode("utf-8", errors="surrogatepass") for text in texts):
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()
