"""The annotator's model in this process: each rank has an engine of its own, on its own accelerator."""

from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from thinkmid.augment import annotators
from thinkmid.augment.annotators import AnnotatorConfig, Asking, Outcome, Reply
from thinkmid.augment.config import AnnotateConfig, WriterConfig
from thinkmid.augment.shards import Piece
from thinkmid.data.chat import Chat
from thinkmid.errors import UserError
from thinkmid.kernels import launch
from thinkmid.model import weights
from thinkmid.model.hf_config import read_config
from thinkmid.plan import memory
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import Engine, check_vllm, seed
from thinkmid.run import identity
from thinkmid.run.interrupt import Interrupt
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request, Sample

INSTRUCTIONS = 2048  # tokens of ours around a chunk, for any tokenizer
CONTEXT = "exceeds the context"


class EngineAnnotator:
    """Thoughts by a model in this process. The engine is made when the first outcome is asked for."""

    patience = 10  # an engine always responds

    def __init__(self, cfg: AnnotateConfig, interrupt: Interrupt):
        """Collective: each rank hashes its share of the model's files. UserError: a damaged or unsuitable model."""
        self._cfg, self._interrupt, self._folder = cfg, interrupt, Path(cfg.writer.folder)
        if cfg.engine.kind == "vllm":
            check_vllm()
        self._model_cfg, self._tokenizer = read_config(self._folder), Tokenizer.load(self._folder)
        self._chat = Chat(self._folder, self._tokenizer, thinking=cfg.writer.thinking)
        self._tokenizer = self._chat.tokenizer  # an answer ends with its turn
        self._max_len = longest(cfg, self._model_cfg.max_positions)
        self._ranks = start_ranks()
        self._known = identity.verified(self._folder, self._ranks)
        self.model = identity.of_model(self._folder, self._tokenizer, self._known)
        self.model["chat template"] = self._chat.digest
        self.failures = Counter[str]()

    def outcomes(self, pieces: Iterator[Piece]) -> Generator[tuple[Piece, Outcome]]:
        """Pieces with what became of them; once interrupted, what was unfinished is left out."""
        cfg, ranks = self._cfg, self._ranks
        for line in launch.slow_dtypes(ranks.device, {"engine.dtype": cfg.engine.dtype}) if ranks.rank == 0 else ():
            print(f"warning: {line}", flush=True)
        engine = make_engine(
            cfg.engine, self._folder, self._model_cfg, blind(self._tokenizer),
            device=self._ranks.device, max_len=self._max_len, rows=cfg.writer.max_batch,
        )  # fmt: skip
        engine.load_weights(weights.stream_folder(self._folder, cfg.engine.dtype, self._known), 0)
        write = EngineWriter(engine, self._tokenizer, self._chat, self._max_len, cfg.annotator, cfg.writer)
        yield from write(pieces, self._interrupt)


def plan(cfg: AnnotateConfig) -> int:
    """Prints what --dry-run reports: the configuration, memory and an estimate of time."""
    model_cfg = read_config(cfg.writer.folder)
    longest_prompt = longest(cfg, model_cfg.max_positions) - cfg.writer.max_tokens
    return memory.dry_run_engine(cfg, model_cfg, cfg.writer.sampling, longest_prompt)


def longest(cfg: AnnotateConfig, max_positions: int) -> int:
    """Tokens of the longest prompt with its answer. The numbers of its places at most double a chunk of prose."""
    room = 2 * cfg.chunks.max_tokens + INSTRUCTIONS + cfg.writer.max_tokens
    found = min(cfg.engine.max_len or room, max_positions)
    if found <= cfg.writer.max_tokens:
        raise UserError(f"writer.max_tokens {cfg.writer.max_tokens} leave no room for a prompt in {found} tokens")
    return found


def blind(tokenizer: Tokenizer) -> Tokenizer:
    """For engines that write answers: closing tags end nothing, for rewritten text holds many."""
    return replace(tokenizer, pieces=[b""] * tokenizer.vocab_size)


@dataclass
class EngineWriter:
    """Chunks through an engine, many at a time, outcomes as they come: for one run."""

    engine: Engine
    tokenizer: Tokenizer  # the model's
    chat: Chat  # ids of a question
    max_len: int  # tokens of the longest question with its answer
    annotator: AnnotatorConfig
    config: WriterConfig
    again: deque[tuple[Piece, Asking]] = field(default_factory=deque)  # to be asked another time
    asked: dict[tuple[int, ...], tuple[Piece, Asking]] = field(default_factory=dict)  # by the key of the request
    settled: list[tuple[Piece, Outcome]] = field(default_factory=list)  # not yet handed out

    def __call__(self, pieces: Iterator[Piece], interrupt: Interrupt) -> Iterator[tuple[Piece, Outcome]]:
        """Pieces with the outcomes of their chunks; what is unfinished once interrupted is left out."""
        for finished in self.engine.generate(self._requests(pieces), self.config.sampling):
            for request, sample in finished:
                self._hear(request, sample)
            yield from self._take()
            if interrupt.requested:
                return
        yield from self._take()

    def _requests(self, pieces: Iterator[Piece]) -> Iterator[Request | None]:
        """Questions as the engine pulls them: a chunk's next try before the next chunk. None: none for now."""
        for number in count():
            if self.again:
                piece, asking = self.again.popleft()
            elif following := next(pieces, None):
                piece, asking = following, annotators.begin(following.chunk, self.annotator)
            elif self.asked:
                yield None
                continue
            else:
                return
            tokens = [] if asking.done else self.chat(asking.prompt)
            if tokens and len(tokens) + self.config.max_tokens > self.max_len:
                asking.out.refused, asking.done = CONTEXT, True
            if asking.done:
                self.settled.append((piece, asking.out))
                continue
            prompt = Prompt(id=f"{piece.place.key}/{piece.place.number}", tokens=tokens)
            self.asked[number,] = piece, asking
            yield Request(prompt=prompt, seed=seed(self.config.seed, asking.out.calls, prompt.id, 0), key=(number,))

    def _hear(self, request: Request, sample: Sample) -> None:
        """Take an answer: it settles its chunk, or the model is asked again."""
        piece, asking = self.asked.pop(request.key)
        words, num_prompt = self.tokenizer.decode(sample.tokens), len(request.prompt.tokens)
        reply = Reply(words, num_prompt, len(sample.tokens), cut=sample.finish != "eos")
        annotators.hear(asking, reply, self.annotator)
        if asking.done:
            self.settled.append((piece, asking.out))
        else:
            self.again.append((piece, asking))

    def _take(self) -> list[tuple[Piece, Outcome]]:
        """Chunks that are settled since the last call."""
        settled, self.settled = self.settled, []
        return settled
