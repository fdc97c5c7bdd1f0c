"""Stored samples -> prompts that end after a thought: the own one, none, an idle one, that of another question."""

from collections.abc import Sequence
from typing import NamedTuple

from thinkmid.errors import UserError
from thinkmid.eval.swap import Donors, Key
from thinkmid.files import Kinds, Row, is_count, is_text
from thinkmid.thoughts import CLOSE, OPEN
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt

CONDITIONS = ("own", "blank", "generic", "swapped")
# fields that identify a stored row: for a thought that has changed since, another sample is drawn
KEYS: Kinds = {"id": is_text, "sample": is_count, "condition": is_text, "thought": is_text, "given": is_count}
IDLE = " Let me think about this with care before I say anything."


class Thought(NamedTuple):
    """What a sample holds up to its first closing tag."""

    head: list[int]  # ids before the opened tag
    ids: list[int]  # from the opened tag, if the sample and not its prompt has it, through the closing one
    exact: bool  # the ids are those that were sampled


def thought_of(row: Row, tokenizer: Tokenizer, opened: bool) -> Thought | None:
    """The thought of a stored row; None where it does not open or close. opened: its prompt has the opening tag.

    Encoded again where the row holds no ids, or a tag shares a token with its neighbours.
    """
    before, tag, rest = ("", "", row["text"]) if opened else row["text"].partition(OPEN)
    inner, close, _ = rest.partition(CLOSE)
    if not close or CLOSE in before:
        return None
    tags = ([] if opened else tokenizer.open_ids), tokenizer.close_ids
    ids, end = row.get("ids", []), row["num_think"]
    start = 0 if opened else find(ids, tokenizer.open_ids)
    if tokenizer.decode(ids[:start]) == before and tokenizer.decode(ids[start:end]) == tag + inner + close:
        return Thought(ids[:start], ids[start:end], True)
    return Thought(tokenizer.encode(before), [*tags[0], *tokenizer.encode(inner), *tags[1]], False)


def find(ids: Sequence[int], part: Sequence[int]) -> int:
    """First index of the part in ids; len(ids) if it is not in there."""
    return next((i for i in range(len(ids)) if ids[i : i + len(part)] == part), len(ids))


def prompts_of(
    asked: dict[Key, Prompt], own: dict[Key, Thought], donors: Donors, tokenizer: Tokenizer, opened: bool, room: int
) -> list[Prompt]:
    """A prompt for every thought and condition; without donors none is swapped.

    asked: the prompt of each sample. own: its thought. donors: the sample whose thought replaces each one's own.
    opened: the template opens the tag. room: most tokens of a prompt. What a sample wrote before it opened its thought
    stays. UserError: a prompt of more than room tokens.
    """
    out = []
    for sample, thought in own.items():
        ids_of = replaced(thought.ids, tokenizer, opened)
        if donors:
            ids_of["swapped"] = own[donors[sample]].ids
        for condition, ids in ids_of.items():
            tokens = [*asked[sample].tokens, *thought.head, *ids]
            id = f"{condition}/{asked[sample].id}"
            if len(tokens) > room:
                raise UserError(f"prompt {id}: {len(tokens)} tokens; the context leaves {room} beside the new ones")
            meta = asked[sample].meta | {"condition": condition, "thought": tokenizer.decode(ids), "given": len(ids)}
            if condition == "swapped":
                meta["donor"] = list(donors[sample])
            out.append(Prompt(id=id, tokens=tokens, meta=meta))
    return out


def replaced(own: list[int], tokenizer: Tokenizer, opened: bool) -> dict[str, list[int]]:
    """Ids of the thoughts by condition, tags included; the idle one has as many tokens as the own one."""
    start = [] if opened else tokenizer.open_ids
    num_inner = max(0, len(own) - len(start) - len(tokenizer.close_ids))
    sentence = len(tokenizer.encode(IDLE))
    idle = tokenizer.encode(IDLE * (num_inner // sentence + 1))[:num_inner]
    return {"own": own, "blank": [*start, *tokenizer.close_ids], "generic": [*start, *idle, *tokenizer.close_ids]}
