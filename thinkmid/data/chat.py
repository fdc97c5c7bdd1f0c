"""Messages as a chat model reads them: the folder's own chat template, rendered in a sandbox."""

import hashlib
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thinkmid.errors import UserError
from thinkmid.thoughts import CLOSE, OPEN
from thinkmid.tokenizer import Tokenizer, longest, read_json, token_name

Message = Mapping[str, str]  # role and content
SLOT = "~question~"  # what the template is given in the place of a question
LIMIT_S = 10.0  # of one rendering
DAY = datetime(2024, 7, 26)  # today, for templates that cannot do without a date: a resumed run asks the same
# no characters by Unicode: before a character of a message that would begin the name of a special token, and around
# what stands in a {% generation %} block
HIDDEN, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"([{BEGIN}{END}])")


class Encoded(NamedTuple):
    """The ids of a rendering."""

    ids: list[int]
    generated: list[bool]  # of each, whether it lies in a {% generation %} block
    thought: list[bool]  # of each, whether it lies in a thought, tags included


class Chat:
    """Renders messages. Special tokens that the template spells are special; the same names in a message are letters,
    so that a text cannot end its own message. Think tags are encoded on their own, as everywhere.

    A begin token is there if the template writes one.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, thinking: bool | None = None):
        """thinking: the variable `enable_thinking` of templates that know it (`thinking` in some); None: their default.
        UserError: no template, a broken one."""
        self.folder, self._tokenizer = folder, tokenizer
        self.source, self._variables = read_template(Path(folder))
        self._variables |= {"tools": None, "documents": None}
        if thinking is not None:
            self._variables |= {"enable_thinking": thinking, "thinking": thinking}
        self._special = [t for t in tokenizer.tokenizer.get_added_tokens_decoder().values() if t.special]
        self._ids = {t.content.strip(): [tokenizer.special[t.content]] for t in self._special}
        self._ids |= {OPEN: tokenizer.open_ids, CLOSE: tokenizer.close_ids}
        # some special tokens take the white space beside them
        space = r"\s*"
        wide = [space * t.lstrip + re.escape(t.content) + space * t.rstrip for t in self._special]
        self._cuts, self._names = longest([*wide, OPEN, CLOSE]), tokenizer.names
        self._starts = re.compile(f"[{HIDDEN}{BEGIN}{END}]|(?={self._names.pattern}).", re.DOTALL)
        with guarded(folder):
            self._template = sandbox(self.source).from_string(self.source)
        around = self._render([{"role": "user", "content": SLOT}], answer=True).split(SLOT)
        if len(around) != 2:
            raise UserError(f"{folder}: its chat template holds a question {len(around) - 1} times, not once")
        self._before, self._after = (self._encode(part).ids for part in around)

    @property
    def digest(self) -> str:
        """Hash of the ids around a question."""
        return hashlib.blake2b(repr((self._before, self._after)).encode(), digest_size=16).hexdigest()

    def __call__(self, question: str) -> list[int]:
        """Ids of the prompt of a question as it is, whatever the template would trim of it."""
        return [*self._before, *self._tokenizer.encode(question), *self._after]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's, whose text ends with a turn too: `<|im_end|>` may not be its end of text."""
        messages = [{"role": "user", "content": SLOT}, {"role": "assistant", "content": SLOT}]
        after = self._render(messages, answer=False).rpartition(SLOT)[2]
        end = self._names.match(MARKS.sub("", after).lstrip())
        ids = [*self._tokenizer.eos_ids, *([self._tokenizer.special[end[0]]] if end else [])]
        return replace(self._tokenizer, eos_ids=tuple(dict.fromkeys(ids)))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the model's answer begins, after these messages."""
        return self._encode(self._render(messages, answer=True)).ids

    def conversation(self, messages: Sequence[Message]) -> Encoded:
        """Ids of these messages and nothing else. UserError: the template leaves the last thought out."""
        rendered = self._render(messages, answer=False)
        last = messages[-1]
        if last["role"] == "assistant" and CLOSE in last["content"] and CLOSE not in rendered:
            raise UserError(f"{self.folder}: its chat template leaves the thoughts of the assistant out")
        return self._encode(rendered)

    def answers(self, messages: Sequence[Message]) -> Encoded:
        """conversation(), with what the assistant wrote as generated, its end of turn included: {% generation %} blocks
        where the template has them, else from where a prompt would end. UserError: a prompt is no prefix in tokens."""
        found, ends = self.conversation(messages), self.tokenizer.eos_ids
        if re.search(r"{%-?\s*generation\b", self.source):
            return found
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.prompt(messages[:n])
            last = next((at for at, i in enumerate(found.ids) if at >= len(prompt) and i in ends), 0)
            if found.ids[: len(prompt)] != prompt or not last:
                reason = "does not end" if found.ids[: len(prompt)] == prompt else "begins otherwise than its prompt"
                wanted = "data.loss 'assistant' needs a template with {% generation %}"
                raise UserError(f"{self.folder}: as its chat template writes it, message {n + 1} {reason}; {wanted}")
            found.generated[len(prompt) : last + 1] = [True] * (last + 1 - len(prompt))
        return found

    def _render(self, messages: Sequence[Message], *, answer: bool) -> str:
        """answer: up to where one begins."""
        hidden = [{key: self._starts.sub(_hide, text) for key, text in message.items()} for message in messages]
        with guarded(self.folder):
            return self._template.render(messages=hidden, add_generation_prompt=answer, **self._variables)

    def _encode(self, rendered: str) -> Encoded:
        out, inside, thought = Encoded([], [], []), False, False
        for at, part in enumerate(self._cuts.split(rendered)):  # text, name, text, ...
            if at % 2:
                ids = self._ids[part.strip()]
                flags, is_thought = [inside] * len(ids), part == OPEN or (thought and part == CLOSE)
                thought = part == OPEN
            else:
                text, of_char, inside = read_marks(part, inside)
                ids, spans = self._tokenizer.encode_spans(text)
                flags, is_thought = [any(of_char[start:end]) for start, end in spans], thought
            out.ids.extend(ids)
            out.generated.extend(flags)
            out.thought.extend([is_thought] * len(ids))
        return out


class Generation(Extension):
    """Marks what stands between {% generation %} and {% endgeneration %}: the words of an assistant."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def read_marks(part: str, inside: bool) -> tuple[str, list[bool], bool]:
    """A part of a rendering as text, whether each character lies in a {% generation %} block, and whether its end does.

    inside: whether its beginning does.
    """
    text, of_char = "", list[bool]()
    for piece in MARKS.split(part):
        if piece in (BEGIN, END):
            inside = piece == BEGIN
        else:
            shown = re.sub(f"{HIDDEN}(.)", _show, piece, flags=re.DOTALL)
            text += shown
            of_char += [inside] * len(shown)
    return text, of_char, inside


def _hide(match: re.Match[str]) -> str:
    return HIDDEN + chr(ord(match[0]) ^ 0x8000)


def _show(match: re.Match[str]) -> str:
    return chr(ord(match[1]) ^ 0x8000)


def read_template(folder: Path) -> tuple[str, dict[str, Any]]:
    """The template's source, and the names of tokens that it may use."""
    path, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(path)
    source = alone.read_text(encoding="utf-8") if alone.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if not isinstance(source, str):
        files = f"{alone.name} or {path.name}"
        raise UserError(f"{folder}: no chat template in {files}; expected a model that follows instructions")
    return source, {f"{key}_token": token_name(path, config, f"{key}_token") or "" for key in ("bos", "eos", "pad")}


def sandbox(source: str) -> ImmutableSandboxedEnvironment:
    """Where a template is rendered, with what templates are written for: blocks leave no blank lines behind, loops may
    break. No clock in there."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = as_json
    if "strftime_now" in source and "strftime_now is defined" not in source:
        environment.globals["strftime_now"] = DAY.strftime
    return environment


def refuse(reason: str) -> NoReturn:
    """What templates call raise_exception."""
    raise jinja2.TemplateError(reason)


def as_json(value: object, indent: int | None = None) -> str:
    """jinja2's own is for HTML and would escape it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


@contextmanager
def guarded(folder: str | Path) -> Iterator[None]:
    """Errors of a template, and one that takes over LIMIT_S seconds, as one line. In the main thread only."""
    handler = signal.signal(signal.SIGALRM, _too_long)
    timer = signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    # a template fails in every way that Python does
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: its chat template fails: {reason or type(error).__name__}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"it takes over {LIMIT_S:g} s")
