"""What an annotator wrote, held against the text: action tags of many names become one pair, all else is refused."""

import re
from itertools import pairwise

from thinkmid import thoughts
from thinkmid.errors import UNPRINTABLE, UserError

BEGIN, END = "=== answer ===", "=== end ==="  # lines around an answer: what a model says before and after is not used
COPIED = 60  # characters: a thought that holds so many of those that follow it gives them away
NAMES = (
    *("think", "thinking", "thought", "thoughts", "reason", "reasoning", "reflect", "reflection", "analysis"),
    *("plan", "planning", "goal", "set-goal", "task", "context", "global-context", "world-model", "scratchpad"),
    *("recall", "recall-knowledge", "knowledge", "simulate", "simulation", "lesson", "lessons", "reusable-lessons"),
    *("verify", "verification", "check", "tool-use", "python", "web-search", "monologue", "inner-monologue", "meta"),
)
_NAME = "|".join(sorted(NAMES, key=len, reverse=True)).replace("-", "[-_ ]?")
# groups of each alternative: "/" of a closing tag, name
ACTION = re.compile(
    rf"<\s{{0,3}}(/?)\s{{0,3}}({_NAME})(?:\s[^<>]*|/)?>"
    rf"|\[\[\s{{0,3}}(/?)\s{{0,3}}({_NAME})\s{{0,3}}/?\]\]"
    r"|\[(/?)(think|thinking|thought)\]",
    re.IGNORECASE,
)
BROKEN = re.compile(rf"</?(?:{_NAME})\b|\[\[/?(?:{_NAME})\b", re.IGNORECASE)


class Refused(Exception):
    """Why an answer cannot be used, in the few words under which it is counted."""


def answer(reply: str) -> str:
    """What stands between the two lines, once each. Reasoning that the endpoint left in front is not looked at."""
    reply = reply.replace("\r\n", "\n")
    if not reply.strip():
        raise Refused("empty answer")
    if reply.lstrip().startswith(thoughts.OPEN):
        reply = reply.partition(thoughts.CLOSE)[2]
    lines = reply.split("\n")
    at = {mark: [i for i, line in enumerate(lines) if line.strip() == mark] for mark in (BEGIN, END)}
    if not at[BEGIN]:
        raise Refused("no marked answer")
    if len(at[BEGIN]) > 1:
        raise Refused("several answers")
    (begin,), end = at[BEGIN], next((i for i in at[END] if i > at[BEGIN][0]), None)
    if end is None:
        raise Refused("cut off")
    return "\n".join(lines[begin + 1 : end])


def normalise(written: str) -> str:
    """Every pair of action tags as <think> and </think>: <Reflect>, <set_goal x="1">, [[thought]], [/THINK] ...

    A pair has the same name twice. Refused: nested tags, unbalanced tags, a tag that closes itself.
    """
    opened = None
    for match in ACTION.finditer(written):
        slash, name = tag_parts(match)
        if match[0].rstrip("]> ").endswith("/"):
            raise Refused("empty thought")
        if not slash and opened:
            raise Refused("nested tags")
        if slash and opened != name:
            raise Refused("unbalanced tags")
        opened = None if slash else name
    if opened:
        raise Refused("unbalanced tags")
    return ACTION.sub(lambda match: thoughts.CLOSE if tag_parts(match)[0] else thoughts.OPEN, written)


def tag_parts(match: re.Match[str]) -> tuple[str, str]:
    """("/" or "", name without its hyphens)."""
    slash, name = (group for group in match.groups() if group is not None)
    return slash, re.sub("[-_ ]", "", name.casefold())


def accept(chunk: str, woven: str, *, min_thoughts: int = 1, max_thought: int = 4000) -> str:
    """The woven text if it is the chunk, character by character, with thoughts that can be used; the last gate.

    max_thought: characters of the longest thought. Refused by reason otherwise.
    """
    try:
        pieces = thoughts.split(woven)
    except UserError:
        raise Refused("unbalanced tags") from None
    if "".join(piece for is_thought, piece in pieces if not is_thought) != chunk:
        raise Refused("altered text")
    places = [i for i, (is_thought, _) in enumerate(pieces) if is_thought]
    if len(places) < min_thoughts:
        raise Refused("too few thoughts")
    if any(b - a == 1 for a, b in pairwise(places)):
        raise Refused("two thoughts at one place")
    for i in places:
        following = pieces[i + 1][1] if i + 1 < len(pieces) else ""
        check_thought(pieces[i][1], following, max_thought)
    return woven


def check_thought(thought: str, following: str, max_thought: int) -> None:
    if not thought.strip():
        raise Refused("empty thought")
    if len(thought) > max_thought:
        raise Refused("thought too long")
    if UNPRINTABLE.search(thought):
        raise Refused("control characters")
    if ACTION.search(thought) or BROKEN.search(thought):
        raise Refused("broken tag")
    ahead = " ".join(following.split())[:COPIED]
    if len(ahead) == COPIED and ahead in " ".join(thought.split()):
        raise Refused("copies the text")
