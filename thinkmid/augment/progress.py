"""How far a process is with its chunks: counts and rates, on the console as they change."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from thinkmid.augment.annotators import Outcome
from thinkmid.errors import plain


@dataclass
class Progress:
    """What this process has done."""

    title: str
    total: int  # documents
    every_s: float  # between lines
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    documents: int = 0
    chunks: int = 0
    refused: int = 0
    written_tokens: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    since_answer: int = 0  # chunks without a response, in a row
    words: str = ""  # the endpoint's last words instead of an answer

    def count(self, outcome: Outcome) -> None:
        self.written_tokens += outcome.written_tokens
        if outcome.failed:
            self.unanswered[outcome.failed] += 1
            self.since_answer, self.words = self.since_answer + 1, outcome.said or self.words
        else:
            self.chunks, self.refused, self.since_answer = self.chunks + 1, self.refused + bool(outcome.refused), 0

    def row(self) -> dict[str, Any]:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rates = {"chunks_per_s": self.chunks / seconds, "written_tokens_per_s": self.written_tokens / seconds}
        about = {"seconds": seconds, "chunks": self.chunks, **rates}
        return {name: round(value, 3) for name, value in about.items()} | {"unanswered": self.unanswered}

    def line(self) -> str:
        return f"{self.documents}/{self.total} documents read, {self.counts()}"

    def counts(self) -> str:
        row = self.row()
        unanswered = f", {self.unanswered.total()} unanswered" if self.unanswered else ""
        rates = f"{row['chunks_per_s']:.1f} chunks/s, {row['written_tokens_per_s']:.0f} tokens/s written"
        return f"{self.chunks} chunks ({self.refused} refused{unanswered}), {rates}"

    def due(self) -> bool:
        if due := time.monotonic() - self.said >= self.every_s:
            self.said = time.monotonic()
        return due

    def say(self, text: str) -> None:
        print(plain(f"{self.title}: {text}"), flush=True)
