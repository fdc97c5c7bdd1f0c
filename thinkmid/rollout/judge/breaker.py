"""A circuit breaker: an endpoint that does not respond is given up, and asked now and then whether it is back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Breaker:
    """Opens after `limit` questions in a row without a response, if none came for quiet_s since the first of them
    began; then it admits one question each quiet_s, and a response closes it. For one thread.

    Silence counts as well as number: a server that restarts refuses a whole round of questions in a second.
    """

    def __init__(self, limit: int, quiet_s: float, clock: Callable[[], float] = time.monotonic):
        self._limit, self._quiet_s, self._clock = limit, quiet_s, clock
        self._open, self._num_lost = False, 0
        self._silent_since = -math.inf
        self._probe_at = 0.0

    def admits(self) -> bool:
        """Whether to ask now."""
        now = self._clock()
        if self._open and now < self._probe_at:
            return False
        self._probe_at = now + self._quiet_s
        return True

    def heard(self) -> bool:
        """A response of any kind came. True if it closes the breaker."""
        closes, self._open, self._num_lost = self._open, False, 0
        self._silent_since = self._clock()
        return closes

    def lost(self, began: float) -> bool:
        """A question asked at `began`, by the clock, got no response. True if that opens the breaker."""
        now = self._clock()
        if not self._num_lost:  # a response to another question may have come since
            self._silent_since = max(self._silent_since, began)
        self._num_lost += 1
        self._probe_at = now + self._quiet_s
        silent = self._num_lost >= self._limit and now - self._silent_since >= self._quiet_s
        opens, self._open = silent and not self._open, self._open or silent
        return opens
