"""Questions to models at hand: the policy itself, another model's weights in the same engine, a small one beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from thinkmid.errors import UserError
from thinkmid.rollout.engine.protocol import Engine
from thinkmid.rollout.judge.model import JudgeError
from thinkmid.rollout.judge.templates import ANSWERS
from thinkmid.tokenizer import Tokenizer

JUDGE = -2  # version of an engine that holds a judge's weights


def choices(tokenizer: Tokenizer) -> tuple[list[int], int, int]:
    """Tokens that " yes" and " no" have in common, which end the question, and the one in which each goes on."""
    yes, no = (tokenizer.encode(answer) for answer in ANSWERS)
    first = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
    if first is None:
        raise UserError(f"the judge's tokenizer cannot tell {ANSWERS[0]!r} from {ANSWERS[1]!r}: {yes} and {no}")
    return yes[:first], yes[first], no[first]


class EngineAsk:
    """P(yes) by the weights that the engine holds. Questions join the running batch, one token each."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_len: int):
        """max_len: tokens of the longest question."""
        self._engine, self._text, self._max_len = engine, tokenizer, max_len
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._shared, *self._choices = choices(tokenizer)

    def __call__(self, prompt: str) -> Callable[[], float]:
        tokens = [*self._begin, *self._text.encode(prompt), *self._shared]
        if len(tokens) < self._max_len:
            return self._engine.ask(tokens, tuple(self._choices))

        def fail():
            raise JudgeError(f"a question of {len(tokens)} tokens exceeds the engine's {self._max_len}")

        return fail


class SwapAsk:
    """P(yes) by other weights in the same engine: questions wait until the first answer is called for, then the
    weights are replaced once for all of them. The next sync brings the policy's back; until then the version is JUDGE.
    """

    def __init__(self, ask: EngineAsk, engine: Engine, weights: Callable[[], Iterable]):
        """weights() streams the judge's (name, tensor) pairs."""
        self._ask, self._engine, self._weights = ask, engine, weights
        self._waiting: list[tuple[str, list]] = []

    def __call__(self, prompt: str) -> Callable[[], float]:
        self._waiting.append((prompt, box := []))

        def answer():
            if not box:
                self._run()
            return box[0]()

        return answer

    def _run(self):
        if self._engine.version != JUDGE:
            self._engine.load_weights(self._weights(), JUDGE)
        for prompt, box in self._waiting:
            box.append(self._ask(prompt))
        self._waiting = []
