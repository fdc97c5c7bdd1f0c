"""Prompts of questions by template id: the words around a question, the think tag opened or not."""

from collections.abc import Iterable
from dataclasses import dataclass

from thinkmid.errors import UserError, unknown
from thinkmid.thoughts import OPEN, TAG
from thinkmid.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """The same words for every question; a choice may need others."""

    block: str  # a question, up to where its answer begins
    open: str = ""  # first of all, for an answer that is to be found
    choice: str = ""  # first of all, for the letter of an option
    stop: tuple[str, ...] = ()  # how the next question begins where a base model asks one itself: its answer is over


PROBLEM = "Problem: {question}\n\nSolution:"
TEMPLATES = {
    "as-is": Template("{question}"),
    "plain": Template("Question: {question}\nAnswer:", stop=("\nQuestion:",)),
    "answer-line": Template(
        PROBLEM,
        "Solve the problem. Show the steps, then close with one line of the form\nAnswer: <the result alone>\n\n",
        "Choose the right option. Show the steps, then close with one line of the form\nAnswer: <its letter alone>\n\n",
        stop=("\n\nProblem:", "\n\nSolve the problem. Show the", "\n\nChoose the right option. Show the"),
    ),
    "boxed": Template(
        PROBLEM,
        "Work through the problem below and finish with the result, alone, in \\boxed{}.\n\n",
        "Work through the problem below and finish with the letter of the right option, alone, in \\boxed{}.\n\n",
        stop=("\n\nProblem:", "\n\nWork through the problem below"),
    ),
}
# each with the think tag opened: the model starts inside its thought
IDS = [id for name in TEMPLATES for id in (name, f"{name}-think")]


def render(template_id: str, question: str, *, choice: bool = False, examples: Iterable[tuple[str, str]] = ()) -> str:
    """The whole prompt; it ends with the opened tag if the id ends with "-think".

    question: as posed. choice: the answer is the letter of an option. examples: questions with answers that stand
    before it. UserError: no such template.
    """
    name = find(template_id)
    template = TEMPLATES[name]
    parts = [template.choice if choice else template.open]
    for asked, answer in examples:
        # a space at the end of a prompt would be no token that models have seen there: it goes with the answer
        space = "" if answer[:1].isspace() or answer.startswith(OPEN) else " "
        parts.append(f"{template.block.format(question=asked)}{space}{answer}\n\n")
    return "".join([*parts, template.block.format(question=question), *([] if name == template_id else [OPEN])])


def stops(template_id: str, own: bool, more: tuple[str, ...]) -> tuple[str, ...]:
    """Texts at which an answer is over: the template's own, if they are wanted, and more. A chat template has none."""
    name = template_id.removesuffix("-think")
    return tuple(dict.fromkeys([*(TEMPLATES[name].stop if own and name in TEMPLATES else ()), *more]))


def find(template_id: str) -> str:
    """The name of the template without "-think"."""
    if template_id not in IDS:
        raise UserError(unknown("template", template_id, IDS))
    return template_id.removesuffix("-think")


def tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt. Think tags are encoded on their own, as in SFT and RLMT."""
    parts = map(tokenizer.encode, TAG.split(prompt))
    return [*tokenizer.begin_ids, *(i for ids in parts for i in ids)]
