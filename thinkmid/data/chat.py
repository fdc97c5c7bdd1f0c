"""A question as a chat model expects it: the folder's own chat template, rendered in a sandbox."""

import hashlib
import re
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from thinkmid.errors import UserError
from thinkmid.tokenizer import Tokenizer, read_json, token_name

SLOT = "~question~"  # what the template is given in the place of a question


class Chat:
    """Wraps questions. Special tokens that the template spells are special; the same names in a question are letters,
    so that a text cannot end its own message."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, thinking: bool):
        """thinking: the variable `enable_thinking` of templates that know it. UserError: no template, a broken one."""
        source, names = read_template(Path(folder))
        rendered = render(folder, source, names | {"enable_thinking": thinking})
        if rendered.count(SLOT) != 1:
            raise UserError(f"{folder}: its chat template holds a question {rendered.count(SLOT)} times, not once")
        self._text = tokenizer
        self._before, self._after = (with_specials(part, tokenizer) for part in rendered.split(SLOT))

    @property
    def digest(self) -> str:
        """Hash of the ids around a question."""
        return hashlib.blake2b(repr((self._before, self._after)).encode(), digest_size=16).hexdigest()

    def __call__(self, question: str) -> list[int]:
        """Ids of the whole prompt, up to where the model's answer begins."""
        return [*self._before, *self._text.encode(question), *self._after]


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The template's source, and the names of tokens that it may use."""
    path, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(path)
    source = alone.read_text(encoding="utf-8") if alone.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((one.get("template") for one in source if one.get("name") == "default"), None)
    if not isinstance(source, str):
        raise UserError(f"{path}: no chat_template; an annotator is a model that follows instructions")
    return source, {f"{key}_token": token_name(path, config, f"{key}_token") or "" for key in ("bos", "eos", "pad")}


def refuse(reason: str) -> NoReturn:
    """What templates call raise_exception."""
    raise jinja2.TemplateError(reason)


def render(folder: str | Path, source: str, variables: dict[str, Any]) -> str:
    """SLOT as the only message. No clock in there: a resumed run asks the same."""
    # as templates are written for: blocks leave no blank lines behind, loops may break
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = refuse
    messages = [{"role": "user", "content": SLOT}]
    try:
        return sandbox.from_string(source).render(messages=messages, add_generation_prompt=True, **variables)
    # a template fails in every way that Python does
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: its chat template fails: {reason or type(error).__name__}") from None


def with_specials(part: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a part of the template."""
    special = {t.content: i for i, t in tokenizer.tokenizer.get_added_tokens_decoder().items() if t.special}
    if not special:
        return tokenizer.encode(part)
    longest_first = sorted(special, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", part)
    return [i for piece in pieces for i in ([special[piece]] if piece in special else tokenizer.encode(piece))]
