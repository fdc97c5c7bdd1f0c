"""Who owns the accelerator's memory, and in which order it changes hands: an engine that sleeps while others train."""

from __future__ import annotations

# call -> states it may come in, state it leaves (None: the same)
CALLS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "sleep": (("ready", "weights", "asleep"), "asleep"),
    "wake_weights": (("asleep",), "weights"),
    "load_weights": (("weights", "ready"), None),
    "wake_cache": (("weights",), "ready"),
    "generate": (("ready",), None),
    "ask": (("ready",), None),
}
CYCLE = "sleep, wake_weights, load_weights, wake_cache, generate"


class Phases:
    """asleep: the trainer has the memory; weights are gone. weights: there is room for weights again, to be loaded; the
    KV cache comes later, for gathered weights and cache together may not fit. ready: the engine generates and judges.

    A call out of turn is refused: an engine asked to generate in its sleep waits for ever, one that woke and was given
    no weights writes noise. Sleep alone may come at any time: a run that stops wants the memory, whatever went wrong.
    """

    def __init__(self) -> None:
        self.state = "ready"
        self.loaded = False  # the engine says when a load is whole

    def enter(self, call: str) -> None:
        """RuntimeError unless it is the call's turn."""
        states, left = CALLS[call]
        if self.state not in states:
            raise RuntimeError(f"engine: {call} while {self.state}; the order is {CYCLE}")
        if call in ("wake_cache", "generate", "ask") and not self.loaded:
            raise RuntimeError(f"engine: {call} before load_weights: it holds no weights yet; the order is {CYCLE}")
        if call in ("sleep", "load_weights"):
            self.loaded = False
        self.state = left or self.state
