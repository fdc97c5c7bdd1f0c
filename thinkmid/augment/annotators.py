"""Annotators: chunks in, outcomes out. By the miniature's rules, or by a model: asked, checked, asked again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from thinkmid import thoughts
from thinkmid.augment import insert, prompts, rewrite
from thinkmid.augment.check import ACTION, Refused, accept
from thinkmid.mini import annotator as mini

STRATEGIES = {"insert": insert, "rewrite": rewrite}
SAID = 400  # characters of a refused answer that are kept


class Unanswered(Exception):
    """The model could not be reached: says nothing about the chunk, which stays to be done.

    said: what came instead of an answer, in the sender's words.
    """

    def __init__(self, reason: str, said: str = ""):
        super().__init__(reason)
        self.said = said


class Reply(NamedTuple):
    """What a model wrote for one prompt."""

    text: str
    prompt_tokens: int = 0  # 0 where nobody told
    written_tokens: int = 0
    fault: str = ""  # the endpoint will not answer this prompt, however often it is asked; text: what it says of it
    cut: bool = False  # ended by its budget


@dataclass(kw_only=True)
class Outcome:
    """What became of one chunk: text with thoughts, or why it was refused, or why nobody answered."""

    text: str | None = None
    refused: str = ""
    failed: str = ""
    rejected: bool = False  # refused by the endpoint, not by our checks
    said: str = ""  # beginning of the last answer that was refused, or of the endpoint's own words
    calls: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    retried: Counter = field(default_factory=Counter)  # reasons for which an answer was asked for again


@dataclass(frozen=True, kw_only=True)
class AnnotatorConfig:
    """Who writes the thoughts."""

    # the miniature's rules, a model behind an endpoint, or a model in this process
    kind: Literal["rules", "openai", "engine"] = "openai"
    strategy: Literal["insert", "rewrite"] = "insert"  # model names places and thoughts, or returns the text with them
    page: Literal["plain", "qa"] = "plain"  # prompt: for documents, or for pages of questions and answers
    retries: int = 2  # further tries of a chunk whose answer was refused
    min_thoughts: int = 1  # a chunk with fewer is refused
    max_thought: int = 4000  # characters of the longest thought

    def __post_init__(self):
        for name, low in (("retries", 0), ("min_thoughts", 0), ("max_thought", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


def by_rules(chunks: Sequence[str], cfg: AnnotatorConfig) -> list[Outcome]:
    """Thoughts by the rules of the miniature world, no calls."""
    outcomes = [Outcome(refused=unfit(chunk, cfg)) for chunk in chunks]
    for chunk, out in zip(chunks, outcomes, strict=True):
        if not out.refused:
            judge(out, chunk, cfg, lambda chunk=chunk: mini.annotate(chunk))
    return outcomes


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
    question = STRATEGIES[cfg.strategy].ask(chunk, cfg.page)
    return Asking(chunk=chunk, first=question, prompt=question)


def hear(asking: Asking, reply: Reply, cfg: AnnotatorConfig) -> None:
    """Take a reply: the outcome, and whether and how to ask again."""
    out, read = asking.out, STRATEGIES[cfg.strategy].read
    count(out, reply)
    judge(out, asking.chunk, cfg, lambda: read(asking.chunk, complete(reply)))
    out.said, out.rejected = reply.text[:SAID] if out.refused else "", bool(reply.fault)
    asking.done = not out.refused or bool(reply.fault) or out.calls > cfg.retries
    asking.prompt = asking.prompt if asking.done else prompts.again(asking.first, out.refused)


def by_model(chunks: Sequence[str], cfg: AnnotatorConfig, write: Callable[[list[str]], list[Reply]]) -> list[Outcome]:
    """Thoughts by a model. write gets the prompts of all chunks, then of those whose answer was refused, and so on.

    Where write raises Unanswered the outcomes say so.
    """
    all_asked = [begin(chunk, cfg) for chunk in chunks]
    while open_ones := [asking for asking in all_asked if not asking.done]:
        try:
            replies = write([asking.prompt for asking in open_ones])
        except Unanswered as error:
            for asking in open_ones:
                asking.out.failed, asking.out.said = str(error), error.said
            break
        for asking, reply in zip(open_ones, replies, strict=True):
            hear(asking, reply, cfg)
    return [asking.out for asking in all_asked]


def unfit(chunk: str, cfg: AnnotatorConfig) -> str:
    """Why a chunk is not even asked about, or ""."""
    if not chunk.strip():
        return "blank"
    tags = ACTION if cfg.kind != "rules" and cfg.strategy == "rewrite" else thoughts.TAG
    return "tags in the text" if tags.search(chunk) else ""


def count(out: Outcome, reply: Reply) -> None:
    if out.refused:
        out.retried[out.refused] += 1
    out.calls += 1
    out.prompt_tokens += reply.prompt_tokens
    out.written_tokens += reply.written_tokens


def complete(reply: Reply) -> str:
    if reply.fault or reply.cut:
        raise Refused(reply.fault or "cut off")
    return reply.text


def judge(out: Outcome, chunk: str, cfg: AnnotatorConfig, woven: Callable[[], str]) -> None:
    """Write into the outcome the woven text if it passes the last gate, else the reason."""
    try:
        out.text = accept(chunk, woven(), min_thoughts=cfg.min_thoughts, max_thought=cfg.max_thought)
        out.refused = ""
    except Refused as error:
        out.text, out.refused = None, str(error)
