"""Prompts of questions by template id: the words around a question, the think tag opened or not."""

from dataclasses import dataclass

from thinkmid.errors import UserError, unknown
from thinkmid.thoughts import OPEN
from thinkmid.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """The same words for every question; a choice may need others."""

    open: str  # for an answer that is to be found
    choice: str  # for the letter of an option
    stop: tuple[str, ...] = ()  # how the next question begins where a base model asks one itself: its answer is over


TEMPLATES = {
    "as-is": Template("{question}", "{question}"),
    "plain": Template("Question: {question}\nAnswer:", "Question: {question}\nAnswer:", stop=("\nQuestion:",)),
    "answer-line": Template(
        "Solve the problem. Show the steps, then close with one line of the form\nAnswer: <the result alone>\n\n"
        "Problem: {question}\n\nSolution:",
        "Choose the right option. Show the steps, then close with one line of the form\nAnswer: <its letter alone>\n\n"
        "Problem: {question}\n\nSolution:",
        stop=("\n\nProblem:", "\n\nSolve the problem. Show the", "\n\nChoose the right option. Show the"),
    ),
    "boxed": Template(
        "Work through the problem below and finish with the result, alone, in \\boxed{{}}.\n\n"
        "Problem: {question}\n\nSolution:",
        "Work through the problem below and finish with the letter of the right option, alone, in \\boxed{{}}.\n\n"
        "Problem: {question}\n\nSolution:",
        stop=("\n\nProblem:", "\n\nWork through the problem below"),
    ),
}
# each with the think tag opened: the model starts inside its thought
IDS = [id for name in TEMPLATES for id in (name, f"{name}-think")]


def render(template_id: str, question: str, *, choice: bool = False) -> str:
    """The whole prompt; it ends with the opened tag if the id ends with "-think".

    question: as posed. choice: the answer is the letter of an option. UserError: no such template.
    """
    name = find(template_id)
    words = TEMPLATES[name].choice if choice else TEMPLATES[name].open
    return words.format(question=question) + ("" if name == template_id else OPEN)


def stops(template_id: str, own: bool, more: tuple[str, ...]) -> tuple[str, ...]:
    """Texts at which an answer is over: the template's own, if they are wanted, and more."""
    return tuple(dict.fromkeys([*(TEMPLATES[find(template_id)].stop if own else ()), *more]))


def find(template_id: str) -> str:
    """The name of the template without "-think"."""
    if template_id not in IDS:
        raise UserError(unknown("template", template_id, IDS))
    return template_id.removesuffix("-think")


def tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt. An opened tag at its end is encoded on its own, as in SFT and RLMT."""
    bare = prompt.removesuffix(OPEN)
    tag = [] if bare == prompt else tokenizer.open_ids
    return [*tokenizer.begin_ids, *tokenizer.encode(bare), *tag]
