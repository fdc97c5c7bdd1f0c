"""Prompts of questions by template id: what the model is told, examples before it, the think tag opened or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thinkmid.errors import UserError, unknown
from thinkmid.thoughts import CLOSE, OPEN
from thinkmid.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """The same words for every question; a choice may need others."""

    open: str  # for an answer that is to be found
    choice: str  # for the letter of an option


TEMPLATES = {
    "as-is": Template("{question}", "{question}"),
    "plain": Template("Question: {question}\nAnswer:", "Question: {question}\nAnswer:"),
    "answer-line": Template(
        "Solve the problem. Show the steps, then close with one line of the form\nAnswer: <the result alone>\n\n"
        "Problem: {question}\n\nSolution:",
        "Choose the right option. Show the steps, then close with one line of the form\nAnswer: <its letter alone>\n\n"
        "Problem: {question}\n\nSolution:",
    ),
    "boxed": Template(
        "Work through the problem below and finish with the result, alone, in \\boxed{{}}.\n\n"
        "Problem: {question}\n\nSolution:",
        "Work through the problem below and finish with the letter of the right option, alone, in \\boxed{{}}.\n\n"
        "Problem: {question}\n\nSolution:",
    ),
}
# each with the think tag opened: the model starts inside its thought
IDS = [id for name in TEMPLATES for id in (name, f"{name}-think")]


def render(template_id: str, question: str, *, choice: bool = False, shots: Sequence[tuple[str, str]] = ()) -> str:
    """The whole prompt; it ends with the opened tag if the id ends with "-think".

    question: as posed. shots: (question, worked answer) pairs put before it in the same words; where the tag is
    opened a worked answer starts inside its thought. UserError: no such template, a shot without its closing tag.
    """
    name = find(template_id)
    opened = name != template_id
    for _, worked in shots:
        if opened and worked.count(CLOSE) != 1:
            raise UserError(f"an example for '{template_id}' must hold {CLOSE} once: {worked[:60]!r}")
    template = TEMPLATES[name].choice if choice else TEMPLATES[name].open
    tag = OPEN if opened else ""
    joint = "" if opened else " "
    before = [f"{template.format(question=asked)}{tag}{joint}{worked.strip()}\n\n" for asked, worked in shots]
    return "".join([*before, template.format(question=question), tag])


def find(template_id: str) -> str:
    """The name of the template without "-think"."""
    if template_id not in IDS:
        raise UserError(unknown("template", template_id, IDS))
    return template_id.removesuffix("-think")


def tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt. An opened tag at its end is encoded on its own, as in SFT and RLMT."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if prompt.endswith(OPEN):
        return [*begin, *tokenizer.encode(prompt.removesuffix(OPEN)), *tokenizer.open_ids]
    return [*begin, *tokenizer.encode(prompt)]
