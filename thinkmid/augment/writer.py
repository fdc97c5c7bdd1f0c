"""The annotator's model in this process: chunks through an engine, many at a time, outcomes as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from thinkmid.augment import annotators
from thinkmid.augment.annotators import AnnotatorConfig, Asking, Outcome, Reply
from thinkmid.augment.shards import Piece
from thinkmid.data.chat import Chat
from thinkmid.errors import at_least
from thinkmid.rollout.engine.protocol import Engine, Sampling, seed
from thinkmid.run.interrupt import Interrupt
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request, Sample

INSTRUCTIONS = 2048  # tokens of ours around a chunk, for any tokenizer
CONTEXT = "exceeds the context"


@dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """The annotator's model, for kind 'engine'."""

    folder: str = ""  # Hugging Face folder of a model that follows instructions; its chat template is used
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 4096  # of one answer
    max_batch: int = 256  # answers written at a time
    seed: int = 0  # a try's draws depend on this, its chunk and its number alone
    thinking: bool = False  # templates that know enable_thinking: the model reasons before it answers

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1, max_batch=1, seed=0)
        _ = self.sampling  # has checks of its own

    @property
    def sampling(self) -> Sampling:
        """An answer is one piece up to its end: see blind()."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, max_think=self.max_tokens, max_suffix=0,
            max_batch=self.max_batch,
        )  # fmt: skip


def blind(tokenizer: Tokenizer) -> Tokenizer:
    """For engines that write answers: closing tags end nothing, for rewritten text holds many."""
    return replace(tokenizer, pieces=[b""] * tokenizer.vocab_size)


def room(chunk_tokens: int, cfg: WriterConfig) -> int:
    """Tokens of the longest sequence to be ready for. The numbers of its places at most double a chunk of prose."""
    return 2 * chunk_tokens + INSTRUCTIONS + cfg.max_tokens


@dataclass(frozen=True, kw_only=True)
class EngineWriter:
    """An annotator's model in an engine."""

    engine: Engine
    tokenizer: Tokenizer  # the model's
    chat: Chat  # ids of a question
    max_len: int  # tokens of the longest question with its answer
    annotator: AnnotatorConfig
    config: WriterConfig

    def __call__(self, pieces: Iterator[Piece], interrupt: Interrupt) -> Iterator[tuple[Piece, Outcome]]:
        """Pieces with the outcomes of their chunks, as they come; what is unfinished once interrupted is left out."""
        questions = Questions(pieces, self)
        for finished in self.engine.generate(questions, self.config.sampling):
            for request, sample in finished:
                questions.hear(request, sample)
            yield from questions.settled()
            if interrupt.requested:
                return
        yield from questions.settled()


class Questions:
    """A run's questions, as the engine pulls them: a chunk's next try before the next chunk. None: none for now."""

    def __init__(self, pieces: Iterator[Piece], writer: EngineWriter):
        self._pieces, self._writer = pieces, writer
        self._again: deque[tuple[Piece, Asking]] = deque()
        self._asked: dict[tuple[int, ...], tuple[Piece, Asking]] = {}  # by the key of the request
        self._settled: list[tuple[Piece, Outcome]] = []
        self._num = 0

    def __iter__(self) -> Iterator[Request | None]:
        while True:
            if self._again:
                piece, asking = self._again.popleft()
            elif following := next(self._pieces, None):
                piece, asking = following, annotators.begin(following.chunk, self._writer.annotator)
            elif self._asked:
                yield None
                continue
            else:
                return
            tokens = [] if asking.done else self._writer.chat(asking.prompt)
            if tokens and len(tokens) + self._writer.config.max_tokens > self._writer.max_len:
                asking.out.refused, asking.done = CONTEXT, True
            if asking.done:
                self._settled.append((piece, asking.out))
            else:
                yield self._request(piece, asking, tokens)

    def _request(self, piece: Piece, asking: Asking, tokens: list[int]) -> Request:
        self._num += 1
        prompt = Prompt(id=f"{piece.place.key}/{piece.place.number}", tokens=tokens)
        number = seed(self._writer.config.seed, asking.out.calls, prompt.id, 0)
        request = Request(prompt=prompt, seed=number, key=(self._num,))
        self._asked[request.key] = piece, asking
        return request

    def hear(self, request: Request, sample: Sample) -> None:
        """Take an answer: it settles its chunk, or the model is asked again."""
        piece, asking = self._asked.pop(request.key)
        reply = Reply(
            self._writer.tokenizer.decode(sample.tokens),
            prompt_tokens=len(request.prompt.tokens),
            written_tokens=len(sample.tokens),
            cut=sample.finish != "eos",
        )
        annotators.hear(asking, reply, self._writer.annotator)
        if asking.done:
            self._settled.append((piece, asking.out))
        else:
            self._again.append((piece, asking))

    def settled(self) -> list[tuple[Piece, Outcome]]:
        """Chunks with their outcomes, since the last call."""
        settled, self._settled = self._settled, []
        return settled
