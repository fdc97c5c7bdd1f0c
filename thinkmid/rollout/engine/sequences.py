"""Host state of a generation: the requests that wait, and of each that runs what was drawn, and why it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thinkmid.rollout.engine.protocol import Sampling
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import STREAMS, Request, Sample, Written

Ints = NDArray[np.int64]
Texts = NDArray[np.str_]

STATE = {
    "seed": np.uint64,  # of the draws
    "newest": np.int64,  # last token, of the prompt before any is drawn
    "position": np.int64,  # of the newest token
    "count": np.int64,  # tokens drawn, and so the place of the newest one's key: the last of the prompt comes first
    "written": np.int64,  # tokens that the request brought
    "state": np.int64,  # of the closing tag's matcher
    "hits": np.int64,  # closing tags seen
    "open_state": np.int64,  # of the opening tag's matcher
    "opened": np.bool_,  # a thought, by the prompt's end or since
    "stop_state": np.int64,  # of the stop texts' matcher
    "think": np.int64,  # tokens up to the first closing tag, 0 before it comes
    "forced": np.int64,  # tokens of a forced closing tag
}


class Rows:
    """One row per running sequence, in a numpy table, so that a step of the whole batch is few calls.

    A row ends "unclosed" (thought budget spent), "suffix" (N tokens after the tag, or sampling.max_direct of a row that
    has opened no thought), "stop" (a stop text is complete; the token that completes it is the last), "eos" or
    "reclosed" (second tag). Stop texts are looked for in generated tokens alone, outside thoughts.

    A row whose request brings tokens replays them first: append() stores those instead of what it is given.
    """

    def __init__(self, requests: Iterable[Request | None], sampling: Sampling, tokenizer: Tokenizer):
        self.requests: list[Request] = []  # of each row
        self.waiting: deque[Request] = deque()
        self._source = iter(requests)
        self._sampling, self._matcher, self._opener = sampling, tokenizer.matcher, tokenizer.open_matcher
        self._tokenizer = tokenizer
        self._stops = tokenizer.stop_matcher(sampling.stop) if sampling.stop else None
        self._eos = np.array(sorted(tokenizer.eos_ids), np.int64)
        self._close = np.array(tokenizer.close_ids, np.int64)
        self.max_new = sampling.max_new + len(self._close)  # tokens that a row has room for
        streams = [(name, dtype, (self.max_new,)) for name, dtype in STREAMS.items()]
        self._table = np.zeros(0, np.dtype([*streams, *STATE.items()], align=True))

    @property
    def num(self) -> int:
        return len(self.requests)

    @property
    def most(self) -> int:
        """Rows that ever ran at a time."""
        return len(self._table)

    def column(self, name: str) -> NDArray[Any]:
        """(B,) one of STATE, as it is now."""
        return self._table[name][: self.num].copy()

    def pull(self, num: int) -> int:
        """Take requests from the caller until num wait, or none comes for now. Returns how many wait."""
        while len(self.waiting) < num and (request := next(self._source, None)):
            self.waiting.append(request)
        return len(self.waiting)

    def admit(self, num: int) -> Ints:
        """Give a row to at most num of those that wait. Returns the new rows."""
        first = self.num
        taken = [self.waiting.popleft() for _ in range(min(num, len(self.waiting)))]
        size = first + len(taken)
        if size > len(self._table):
            grown = np.zeros(size, self._table.dtype)
            grown[:first] = self._table[:first]
            self._table = grown
        for row, request in enumerate(taken, start=first):
            self.requests.append(request)
            self._start(row, request)
        return np.arange(first, size)

    def _start(self, row: int, request: Request) -> None:
        table, prompt = self._table, request.prompt.tokens
        table[row] = np.zeros((), table.dtype)
        # where direct answers have no budget of their own, every row is held to that of thoughts
        direct = self._sampling.max_direct > self._sampling.max_think
        opens = self._tokenizer.opens(prompt)
        table["opened"][row] = opens or not direct
        table["stop_state"][row] = self._stops.inside if self._stops and opens else 0
        table["seed"][row], table["newest"][row], table["position"][row] = request.seed, prompt[-1], len(prompt) - 1
        if request.written:
            n = table["written"][row] = min(len(request.written.tokens), self.max_new)
            for name in STREAMS:
                table[name][row, :n] = getattr(request.written, name)[:n]

    def replay(self, at: Ints) -> Texts:
        """Advance rows (b,) over what their requests brought. Returns (b,) why each ended, "" where it did not."""
        finished = np.full(len(at), "", dtype="<U8")
        while (late := (finished == "") & (self._table["count"][at] < self._table["written"][at])).any():
            finished[late] = self.append(at[late], 0, 0.0, True, 0)
        return finished

    def forced(self, at: Ints) -> Ints:
        """(b,) the token of the closing tag that must come next in rows (b,) whose thought budget is spent, else -1."""
        forced = np.full(len(at), -1, np.int64)
        if self._sampling.force_close:
            table, before_tag = self._table, self._sampling.max_think - len(self._close)
            spent = table["opened"][at] & (table["think"][at] == 0) & (table["count"][at] >= before_tag)
            forced[spent] = self._close[np.minimum(table["forced"][at[spent]], len(self._close) - 1)]
        return forced

    def append(self, at: Ints, *values: ArrayLike) -> Texts:
        """Store one token in each of the rows at (b,), by its entry in each of STREAMS: (b,), or one for all.

        Returns (b,) why each ended, "" where it continues.
        """
        table, count = self._table, self._table["count"][at]
        new = count >= table["written"][at]
        for name, value in zip(STREAMS, values, strict=True):
            table[name][at, count] = np.where(new, value, table[name][at, count])
        stored = table["tokens"][at, count]
        table["forced"][at] += ~table["drawn"][at, count]
        table["newest"][at] = stored
        table["position"][at] += 1
        count += 1
        table["count"][at] = count
        table["state"][at], hits = self._matcher.step(table["state"][at], stored)
        table["hits"][at] += hits
        table["open_state"][at], opens = self._opener.step(table["open_state"][at], stored)
        table["opened"][at] = opened = table["opened"][at] | (opens > 0)
        think = table["think"][at]
        table["think"][at] = think = np.where((think == 0) & (hits > 0), count, think)
        ended = np.full(len(count), "", dtype="<U8")
        ended[(think > 0) & (count - think >= self._sampling.max_suffix)] = "suffix"
        ended[count >= np.where(opened, self._sampling.max_new, self._sampling.max_direct)] = "suffix"
        ended[opened & (think == 0) & (count >= self._sampling.max_think)] = "unclosed"
        if self._stops:
            table["stop_state"][at], stops = self._stops.step(table["stop_state"][at], stored)
            ended[stops > 0] = "stop"
        ended[np.isin(stored, self._eos)] = "eos"
        ended[table["hits"][at] > 1] = "reclosed"
        return ended

    def tokens(self, row: int) -> list[int]:
        """The row's sequence: prompt, and tokens so far."""
        own: list[int] = self._table["tokens"][row, : self._table["count"][row]].tolist()
        return [*self.requests[row].prompt.tokens, *own]

    def sample(self, row: int, finish: str) -> Sample:
        n, think = int(self._table["count"][row]), int(self._table["think"][row])
        return Sample(**self._streams(row, n), finish=str(finish), num_think=think or n)

    def unfinished(self) -> list[Request]:
        """Requests of the rows, with what is written of them, and those that wait."""
        out = []
        for row, request in enumerate(self.requests):
            # one that is still replaying keeps all that it brought
            n = int(max(self._table["count"][row], self._table["written"][row]))
            out.append(replace(request, written=Written(**self._streams(row, n)) if n else None))
        return [*out, *self.waiting]

    def _streams(self, row: int, n: int) -> dict[str, Any]:
        return {name: self._table[name][row, :n].copy() for name in STREAMS}

    def keep(self, rows: Ints) -> list[tuple[int, int]]:
        """Drop all other rows; returns the moves (from, to) that fill their places."""
        kept = rows.tolist()
        holes = sorted(set(range(len(kept))) - set(kept))
        moves = list(zip([r for r in kept if r >= len(kept)], holes, strict=True))
        for source, target in moves:
            self.requests[target] = self.requests[source]
            self._table[target] = self._table[source]
        del self.requests[len(kept) :]
        return moves


def mixed(seed: NDArray[np.uint64], number: Ints) -> NDArray[np.uint64]:
    """(B,) a hash of a sequence's seed and a token's number (splitmix64's finaliser): draws depend on these alone."""
    with np.errstate(over="ignore"):
        z = seed + (number.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
