"""Host state of the sequences that an engine decodes: what was drawn, where each stands, why it ended."""

from __future__ import annotations

import numpy as np

from thinkmid.rollout.engine.protocol import Sampling
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Sample


class Rows:
    """One row per sequence; numpy columns, so that a step of the whole batch is few calls.

    A row ends "unclosed" (thought budget spent), "suffix" (N tokens after the tag, or sampling.max_direct of a row that
    has opened no thought), "eos" or "reclosed" (second tag).
    """

    def __init__(self, size: int, sampling: Sampling, tokenizer: Tokenizer):
        self.num = 0
        self.owner: list[tuple[int, int]] = []
        self._sampling, self._matcher, self._opener = sampling, tokenizer.matcher, tokenizer.open_matcher
        self._open = list(tokenizer.open_ids)
        self._eos = np.array(sorted(tokenizer.eos_ids), np.int64)
        self._close = np.array(tokenizer.close_ids, np.int64)
        max_new = sampling.max_new + len(self._close)
        self._tokens = np.zeros((size, max_new), np.int32)
        self._logp = np.zeros((size, max_new), np.float32)
        self._drawn = np.zeros((size, max_new), bool)
        self._seed = np.zeros(size, np.uint64)
        self._newest = np.zeros(size, np.int64)
        self._position = np.zeros(size, np.int64)  # of the newest token
        self._count = np.zeros(size, np.int64)  # generated
        self._state = np.zeros(size, np.int64)  # of the closing tag's matcher
        self._hits = np.zeros(size, np.int64)  # closing tags seen
        self._open_state = np.zeros(size, np.int64)  # of the opening tag's matcher
        self._opened = np.zeros(size, bool)  # by the prompt's end, or since
        self._think = np.zeros(size, np.int64)  # tokens up to the first closing tag, 0 before it comes
        self._forced = np.zeros(size, np.int64)  # tokens of a forced closing tag written so far
        self._columns = (
            self._tokens,
            self._logp,
            self._drawn,
            self._seed,
            self._newest,
            self._position,
            self._count,
            self._state,
            self._hits,
            self._open_state,
            self._opened,
            self._think,
            self._forced,
        )

    @property
    def seed(self):
        return self._seed[: self.num]

    @property
    def newest(self):
        return self._newest[: self.num]

    @property
    def position(self):
        return self._position[: self.num]

    @property
    def count(self):
        """(B,) tokens drawn so far, and so the place of the newest one's key: the last of the prompt comes first."""
        return self._count[: self.num]

    def add(self, p: int, g: int, seed: int, prompt_tokens) -> int:
        row = self.num
        self.num += 1
        self.owner.append((p, g))
        for state in (self._count, self._state, self._hits, self._open_state, self._think, self._forced):
            state[row] = 0
        # where direct answers have no budget of their own, every row is held to that of thoughts
        direct = self._sampling.max_direct > self._sampling.max_think
        self._opened[row] = not direct or list(prompt_tokens[-len(self._open) :]) == self._open
        self._seed[row], self._newest[row], self._position[row] = seed, prompt_tokens[-1], len(prompt_tokens) - 1
        return row

    def spent(self, at):
        """(b,) bool of the rows at (b,): the next token must be one of a forced closing tag."""
        if not self._sampling.force_close:
            return np.zeros(len(at), bool)
        unclosed = self._opened[at] & (self._think[at] == 0)
        return unclosed & (self._count[at] >= self._sampling.max_think - len(self._close))

    def forced(self):
        """(B,) the token that must come next where the thought budget is spent, else -1."""
        forced = np.full(self.num, -1, np.int64)
        spent = self.spent(np.arange(self.num))
        if spent.any():
            at = np.minimum(self._forced[: self.num], len(self._close) - 1)
            forced[spent] = self._close[at[spent]]
            self._forced[: self.num][spent] += 1
        return forced

    def append(self, at, token, logp, drawn):
        """Store one token in each of the rows at (b,). Returns (b,) why each ended, "" where it goes on."""
        count = self._count[at]
        self._tokens[at, count], self._logp[at, count], self._drawn[at, count] = token, logp, drawn
        self._newest[at] = token
        self._position[at] += 1
        count += 1
        self._count[at] = count
        self._state[at], hits = self._matcher.step(self._state[at], token)
        self._hits[at] += hits
        self._open_state[at], opens = self._opener.step(self._open_state[at], token)
        self._opened[at] = opened = self._opened[at] | (opens > 0)
        think = self._think[at]
        self._think[at] = think = np.where((think == 0) & (hits > 0), count, think)
        ended = np.full(len(count), "", dtype="<U8")
        ended[(think > 0) & (count - think >= self._sampling.max_suffix)] = "suffix"
        ended[count >= np.where(opened, self._sampling.max_new, self._sampling.max_direct)] = "suffix"
        ended[opened & (think == 0) & (count >= self._sampling.max_think)] = "unclosed"
        ended[np.isin(token, self._eos)] = "eos"
        ended[self._hits[at] > 1] = "reclosed"
        return ended

    def written(self, row: int) -> list[int]:
        """The row's tokens so far."""
        return self._tokens[row, : self._count[row]].tolist()

    def sample(self, row: int, finish: str, version: int) -> Sample:
        n, think = int(self._count[row]), int(self._think[row])
        return Sample(
            tokens=self._tokens[row, :n].copy(),
            logp=self._logp[row, :n].copy(),
            drawn=self._drawn[row, :n].copy(),
            finish=str(finish),
            num_think=think or n,
            version=version,
        )

    def keep(self, rows) -> list[tuple[int, int]]:
        """Drop all other rows; returns the moves (from, to) that fill their places."""
        holes = sorted(set(range(len(rows))) - set(rows.tolist()))
        moves = list(zip([r for r in rows.tolist() if r >= len(rows)], holes, strict=True))
        for source, target in moves:
            self.owner[target] = self.owner[source]
            for column in self._columns:
                column[target] = column[source]
        self.num = len(rows)
        del self.owner[self.num :]
        return moves
