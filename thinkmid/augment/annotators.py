"""One chunk through a model: asked, checked, asked again."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, NamedTuple

from thinkmid import thoughts
from thinkmid.augment import insert, prompts, rewrite
from thinkmid.augment.check import ACTION, Refused, accept
from thinkmid.errors import at_least

STRATEGIES: dict[str, ModuleType] = {"insert": insert, "rewrite": rewrite}
SAID = 400  # characters of a refused answer that are kept


class Unanswered(Exception):
    """The model could not be reached, which is no verdict on the chunk: it stays to be done.

    said: what came instead of an answer, in the sender's words.
    """

    def __init__(self, reason: str, said: str = ""):
        super().__init__(reason)
        self.said = said


class Reply(NamedTuple):
    """What a model wrote for one prompt."""

    text: str
    prompt_tokens: int = 0  # 0 where the endpoint does not count them
    written_tokens: int = 0
    fault: str = ""  # the endpoint will not answer this prompt, however often it is asked; text: its reason
    cut: bool = False  # ended by its budget


@dataclass(kw_only=True)
class Outcome:
    """What became of one chunk: text with thoughts, or why it was refused, or why there was no response."""

    text: str | None = None
    refused: str = ""
    failed: str = ""
    rejected: bool = False  # refused by the endpoint, not by our checks
    said: str = ""  # beginning of the last answer that was refused, or of the endpoint's own words
    calls: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    retried: Counter[str] = field(default_factory=Counter)  # reasons for which an answer was asked for again


@dataclass(frozen=True, kw_only=True)
class AnnotatorConfig:
    """Who writes the thoughts."""

    # a model behind an endpoint; a model in this process; rules, which another program brings (thinkmid.mini.annotate)
    kind: Literal["openai", "engine", "rules"] = "openai"
    strategy: Literal["insert", "rewrite"] = "insert"  # model names places and thoughts, or returns the text with them
    page: Literal["plain", "qa"] = "plain"  # prompt: for documents, or for pages of questions and answers
    retries: int = 2  # further tries of a chunk whose answer was refused
    min_thoughts: int = 1  # a chunk with fewer is refused
    max_thought: int = 4000  # characters of the longest thought

    def __post_init__(self) -> None:
        at_least(self, retries=0, min_thoughts=0, max_thought=1)


@dataclass(kw_only=True)
class Asking:
    """A chunk on its way through a model."""

    chunk: str
    first: str  # the question
    prompt: str  # the question, and from the second try on what was wrong with the last answer
    out: Outcome = field(default_factory=Outcome)
    done: bool = False


def begin(chunk: str, cfg: AnnotatorConfig) -> Asking:
    """Done at once if the chunk is not fit to be asked about."""
    if refused := unfit(chunk, cfg):
        return Asking(chunk=chunk, first="", prompt="", out=Outcome(refused=refused), done=True)
    question = prompts.ask(cfg.page, cfg.strategy, STRATEGIES[cfg.strategy].show(chunk))
    return Asking(chunk=chunk, first=question, prompt=question)


def hear(asking: Asking, reply: Reply, cfg: AnnotatorConfig) -> None:
    """Take a reply: the outcome, and whether and how to ask again."""
    out = asking.out
    if out.refused:
        out.retried[out.refused] += 1
    out.calls += 1
    out.prompt_tokens += reply.prompt_tokens
    out.written_tokens += reply.written_tokens
    try:
        if reply.fault or reply.cut:
            raise Refused(reply.fault or "cut off")
        woven = STRATEGIES[cfg.strategy].read(asking.chunk, reply.text)
        out.text = accept(asking.chunk, woven, min_thoughts=cfg.min_thoughts, max_thought=cfg.max_thought)
        out.refused = ""
    except Refused as error:
        out.text, out.refused = None, str(error)
    out.said, out.rejected = reply.text[:SAID] if out.refused else "", bool(reply.fault)
    asking.done = not out.refused or bool(reply.fault) or out.calls > cfg.retries
    asking.prompt = asking.prompt if asking.done else prompts.again(asking.first, out.refused)


def by_model(chunk: str, cfg: AnnotatorConfig, write: Callable[[str], Reply]) -> Outcome:
    """Thoughts by a model. write answers a prompt; where it raises Unanswered the outcome holds the reason."""
    asking = begin(chunk, cfg)
    while not asking.done:
        try:
            reply = write(asking.prompt)
        except Unanswered as error:
            asking.out.failed, asking.out.said = str(error), error.said
            break
        hear(asking, reply, cfg)
    return asking.out


def unfit(chunk: str, cfg: AnnotatorConfig) -> str:
    """Why a chunk is not even asked about, or ""."""
    if not chunk.strip():
        return "blank"
    tags = ACTION if cfg.strategy == "rewrite" else thoughts.TAG
    return "tags in the text" if tags.search(chunk) else ""
