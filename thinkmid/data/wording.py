"""How questions are put to a model: the words around them, a system text, examples that stand before them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from thinkmid import thoughts
from thinkmid.data import templates
from thinkmid.data.chat import Chat
from thinkmid.data.questions import Question, posed, squeeze
from thinkmid.data.source import ROWS, data_files, read_rows
from thinkmid.errors import UserError, at_least, unknown
from thinkmid.tokenizer import Tokenizer

CHAT = ("chat", "chat-think")


@dataclass(frozen=True, kw_only=True)
class WordingConfig:
    """The words around a question."""

    # words around a question: as-is, plain, answer-line, boxed; chat: the model's own chat template. With "-think" the
    # model starts inside its thought
    template: str = "boxed-think"
    template_stop: bool = True  # an answer ends where it begins the template's next question by itself
    system: str = ""  # chat: the system message; empty: the template's own, if it has one
    shots: str = ""  # solved examples that stand before a question: a file of rows with "question" and "answer"
    num_shots: int = 0  # the first so many rows of it; 0: all

    def __post_init__(self) -> None:
        at_least(self, num_shots=0)
        if self.template not in (known := [*templates.IDS, *CHAT]):
            raise ValueError(unknown("template", self.template, known))
        if self.system and self.template not in CHAT:
            raise ValueError(f"system needs template 'chat' or 'chat-think', got {self.template!r}")
        if self.num_shots and not self.shots:
            raise ValueError(f"num_shots {self.num_shots} needs shots: the file of examples")


class Shot(NamedTuple):
    """A solved example."""

    question: str
    answer: str  # thoughts between their tags


def read_shots(cfg: WordingConfig) -> list[Shot]:
    """The examples, in the order of their file. UserError names the file and row that cannot be used."""
    shots: list[Shot] = []
    if not cfg.shots:
        return shots
    for where, row in read_rows(data_files(Path(cfg.shots), ROWS)):
        if odd := [key for key in Shot._fields if not isinstance(row.get(key), str) or not row[key].strip()]:
            raise UserError(f'{where}: an example needs "question" and "answer"; "{odd[0]}" is missing or no text')
        try:
            thoughts.split(row["answer"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        shots.append(Shot(row["question"], row["answer"]))
        if len(shots) == cfg.num_shots:
            return shots
    if len(shots) < max(1, cfg.num_shots):
        raise UserError(f"{cfg.shots}: {len(shots)} examples, {max(1, cfg.num_shots)} are asked for")
    return shots


def digest(shots: Iterable[Shot]) -> str:
    """Hash of the examples' content; "" without any."""
    content = "".join(f"{len(text)} {text}" for shot in shots for text in shot)
    return hashlib.blake2b(content.encode("utf-8", "replace"), digest_size=8).hexdigest() if content else ""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Makes the prompts of questions."""

    cfg: WordingConfig
    tokenizer: Tokenizer  # of the model; with a chat template its texts end with a turn too
    chat: Chat | None
    shots: list[Shot]

    @staticmethod
    def read(cfg: WordingConfig, folder: str | Path, tokenizer: Tokenizer) -> Wording:
        """folder: of the model. UserError: it has no chat template, or one that fails; examples that cannot be used."""
        if cfg.template not in CHAT:
            return Wording(cfg=cfg, tokenizer=tokenizer, chat=None, shots=read_shots(cfg))
        chat = Chat(folder, tokenizer, thinking=cfg.template.endswith("-think"))
        return Wording(cfg=cfg, tokenizer=chat.tokenizer, chat=chat, shots=read_shots(cfg))

    def tokens(self, question: Question, sample: int = 0) -> list[int]:
        """Ids of the prompt of a question, as posed for its sample-th sample."""
        text = posed(question, sample).text
        shots = [shot for shot in self.shots if squeeze(shot.question) != squeeze(question.question)]
        return self.around(text, shots, choice=question.kind == "choice")

    def around(self, text: str, shots: Iterable[Shot] = (), *, choice: bool = False) -> list[int]:
        """Ids of the prompt of a text, after these examples. choice: the answer is the letter of an option."""
        if not self.chat:
            words = templates.render(self.cfg.template, text, choice=choice, examples=shots)
            return templates.tokens(self.tokenizer, words)
        system = [("system", self.cfg.system)] if self.cfg.system else []
        turns = [turn for shot in shots for turn in (("user", shot.question), ("assistant", shot.answer))]
        messages = [{"role": role, "content": words} for role, words in (*system, *turns, ("user", text))]
        ids = self.chat.prompt(messages)
        # a template may have opened the thought
        opens = self.cfg.template.endswith("-think") and not self.tokenizer.opens(ids)
        return [*ids, *(self.tokenizer.open_ids if opens else [])]

    def notes(self, questions: Sequence[Question]) -> list[str]:
        """Lines about questions that are among the examples, and such as spell special tokens in letters."""
        known, lines = {squeeze(shot.question) for shot in self.shots}, []
        if num := sum(squeeze(question.question) in known for question in questions):
            both = f"{num} of {len(questions)} questions are examples of {self.cfg.shots} too"
            lines.append(f"{both}; each is asked without its own example")
        warnings = (self.warning(question.meta["where"], question.question) for question in questions)
        return [*lines, *[warning for warning in warnings if warning][:1]]

    def warning(self, where: str, text: str) -> str | None:
        """A line about a text that stands as it is and spells a special token in letters."""
        name = self.tokenizer.spelled(text) if self.cfg.template.startswith("as-is") else None
        return f"warning: {where}: {in_letters(name)}" if name else None


def in_letters(name: str) -> str:
    """What to know where a text holds the name of a special token."""
    return f"{name} in a text is ordinary characters, not the special token; template 'chat' writes special tokens"
