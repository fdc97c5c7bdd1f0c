"""The annotator's model in this process: chunks through an engine, many at a time, outcomes as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from thinkmid.augment import annotators
from thinkmid.augment.annotators import AnnotatorConfig, Asking, Outcome, Reply
from thinkmid.augment.shards import Piece as Item
from thinkmid.errors import at_least
from thinkmid.rollout.engine.protocol import Engine, Sampling, seed
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt

QUEUE = 2  # times max_batch: questions in the engine's hands, so that for each that ends another one waits
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


def through_engine(
    items: Iterator[Item],
    cfg: AnnotatorConfig,
    writer: WriterConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    chat: Callable[[str], list[int]],
    *,
    max_len: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[Item, Outcome]]:
    """Items with the outcomes of their chunks, as they come; what was unfinished when stopped() came is left out.

    text: the annotator's. chat: the ids of a question. max_len: tokens of the longest prompt with its answer.
    """
    prompts: list[Prompt] = []
    seeds_P_G: list[list[int]] = []
    asked: dict[int, tuple[Item, Asking]] = {}  # by the number of the prompt

    def queue(item: Item, asking: Asking) -> bool:
        """Hand the question over. False: nothing is to be asked, the outcome stands."""
        tokens = [] if asking.done else chat(asking.prompt)
        if not asking.done and len(tokens) + writer.max_tokens > max_len:
            asking.out.refused, asking.done = CONTEXT, True
        if not asking.done:
            asked[len(prompts)] = item, asking
            prompts.append(Prompt(id=f"{item.place.key}/{item.place.number}", tokens=tokens))
            seeds_P_G.append([seed(writer.seed, asking.out.calls, prompts[-1].id, 0)])
        return not asking.done

    def queue_fresh(number: int) -> Iterator[tuple[Item, Outcome]]:
        """Hand over so many new chunks. Yields those before them about which nothing is to be asked."""
        while number and (item := next(items, None)):
            if queue(item, asking := annotators.begin(item.chunk, cfg)):
                number -= 1
            else:
                yield item, asking.out

    yield from queue_fresh(QUEUE * writer.max_batch)
    for p, _, sample in engine.generate(prompts, seeds_P_G, writer.sampling, stopped):
        item, asking = asked.pop(p)
        cost = {"prompt_tokens": len(prompts[p].tokens), "written_tokens": len(sample.tokens)}
        prompts[p].tokens.clear()  # the list grows by every question of a run
        reply = Reply(tokenizer.decode(sample.tokens), **cost, cut=sample.finish != "eos")
        annotators.hear(asking, reply, cfg)
        # one place is free: for the same chunk, else for the next one
        if not queue(item, asking):
            yield item, asking.out
            yield from queue_fresh(1)
