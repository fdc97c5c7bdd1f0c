"""Texts and questions of the miniature world, drawn from a seed.

Quantities are whole numbers 1..36: a start value of 3..33, then k = 1..4 steps that add or take 1..8, double or halve.
Four families of stories have such steps: events by weekday, a chain of comparisons, a box by hour, a derivation. The
held-out questions join two families, which no text does: its result is always stated before another family begins.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from thinkmid.errors import UserError
from thinkmid.mini.sentences import BOXES, DAYS, HOURS, LETTERS, NAMES, THINGS, after, say

# With numbers up to 24 and changes up to 4 a glance at the facts gave the result in a third of the cases, and text with
# thoughts taught hardly more than text without.
LARGEST = 36
CHANGE = 8  # most that a step adds or takes
MOST_STEPS = 4
SCALED = 0.35  # of the steps: double or halve, where the value allows it
SHUFFLED = 0.25  # of the comparisons and derivations: facts in any order
DISTRACTED = 0.25  # one sentence more, which the result does not need
LINKED = 0.2  # of the boxes and derivations: the start is a person's count
ASKED = 0.2  # of the documents: a question with its answer
CONTINUED = 0.5  # of the other documents about a person: one or two more steps, then a second result


@dataclass(kw_only=True)
class Story:
    """Facts so far, and the quantity that they lead to."""

    kind: str  # "person", "box" or "letter"
    about: dict[str, str]  # the words that name the quantity
    n: int  # its value after all facts
    facts: list[str]
    names: list[str]  # not used yet
    day: int | None = None  # index of the next weekday, once one was named


def start(rng: random.Random, kind: str, about: dict[str, str], before: Story | None = None) -> Story:
    """A quantity with a value of its own, or with the value of the person in the story before."""
    if before:
        before.facts.append(say(rng, f"{kind} link", n=0, **(before.about | about)))
        before.kind, before.about = kind, before.about | about
        return before
    n, names = rng.randint(3, LARGEST - 3), rng.sample(NAMES, len(NAMES))
    about = {"who": names.pop(), "thing": rng.choice(THINGS)} | about
    return Story(kind=kind, about=about, n=n, facts=[say(rng, kind, n=n, **about)], names=names)


def step(rng: random.Random, story: Story, kind: str, **words: str) -> None:
    """One more fact: 1..8 more or fewer, twice or half as many; the value stays in 1..36."""
    scales = [sign for sign, fits in (("*", 2 * story.n <= LARGEST), ("/", story.n % 2 == 0)) if fits]
    if scales and rng.random() < SCALED:
        sign, n = rng.choice(scales), 2
    else:
        change = rng.choice([d for d in (*range(-CHANGE, 0), *range(1, CHANGE + 1)) if 1 <= story.n + d <= LARGEST])
        sign, n = "-+"[change > 0], abs(change)
    story.n = after(story.n, sign, n)
    story.facts.append(say(rng, kind + sign, n=n, **(story.about | words)))


def events(rng: random.Random, k: int, before: Story | None = None) -> Story:
    story = before or start(rng, "person", {})
    if story.day is None:
        story.day = rng.randint(0, MOST_STEPS + 1 - k)  # leaves two weekdays for more steps
    for _ in range(k):
        step(rng, story, "event", day=DAYS[story.day], other=story.names.pop())
        story.day += 1
    return story


def comparison(rng: random.Random, k: int) -> Story:
    story = start(rng, "person", {})
    for _ in range(k):
        last, who = story.about["who"], story.names.pop()
        step(rng, story, "comparison", other=last, who=who)
        story.about["who"] = who
    return story


def box(rng: random.Random, k: int, before: Story | None = None) -> Story:
    if before is None and rng.random() < LINKED:
        before = start(rng, "person", {})
    story = start(rng, "box", {"box": rng.choice(BOXES)}, before)
    first = rng.randint(0, len(HOURS) - k)
    for hour in HOURS[first : first + k]:
        step(rng, story, "hour", hour=hour, who=story.names.pop())
    return story


def derivation(rng: random.Random, k: int, before: Story | None = None) -> Story:
    if before is None and rng.random() < LINKED:
        before = start(rng, "person", {})
    first = rng.randint(0, len(LETTERS) - k - 1)
    story = start(rng, "letter", {"x": LETTERS[first]}, before)
    for letter in LETTERS[first + 1 : first + k + 1]:
        step(rng, story, "sum", y=letter)
        story.about["x"] = letter
    return story


FAMILIES = (events, comparison, box, derivation)
# name: (first family, second family), 1 or 2 steps of each and 2 or 3 in all
HELD_OUT = {
    "held-out-a": (comparison, events),
    "held-out-b": (comparison, box),
    "held-out-c": (events, derivation),
}
STEPS = {f"{k}-step": (k,) for k in range(1, MOST_STEPS + 1)}
SETS = (*STEPS, *HELD_OUT)

Row = dict[str, str]  # of a jsonl file


def of_one_family(rng: random.Random, k: int) -> Story:
    """A story of k steps from one family."""
    family = rng.choice(FAMILIES)
    story = family(rng, k)
    if family in (comparison, derivation) and rng.random() < SHUFFLED:
        rng.shuffle(story.facts)
    return distracted(rng, story)


def of_two_families(rng: random.Random, kind: str) -> Story:
    """A story whose steps come from the two families of a held-out template."""
    first, second = HELD_OUT[kind]
    k1, k2 = rng.choice(((1, 1), (1, 2), (2, 1)))
    return distracted(rng, second(rng, k2, first(rng, k1)))


def distracted(rng: random.Random, story: Story) -> Story:
    if rng.random() < DISTRACTED:
        thing = rng.choice([thing for thing in THINGS if thing != story.about["thing"]])
        kind = rng.choice(("filler", "person"))
        line = say(rng, kind, who=story.names.pop(), thing=thing, n=rng.randint(3, LARGEST - 3))
        story.facts.insert(rng.randint(0, len(story.facts)), line)
    return story


def document(rng: random.Random) -> str:
    """Facts, then a sentence that states the result; perhaps more facts and a second result."""
    story = of_one_family(rng, rng.randint(1, MOST_STEPS))
    if rng.random() < ASKED:
        return " ".join([asked(rng, story), say(rng, f"{story.kind} answer", n=story.n, **story.about)])
    lines = [*story.facts, say(rng, f"{story.kind} result", n=story.n, **story.about)]
    if story.kind == "person" and rng.random() < CONTINUED:
        story.facts = []
        events(rng, rng.randint(1, 2), story)
        lines += [*story.facts, say(rng, "person result", n=story.n, **story.about)]
    return " ".join(lines)


def asked(rng: random.Random, story: Story) -> str:
    return " ".join(["Question:", *story.facts, say(rng, f"{story.kind} question", n=0, **story.about)])


def notes(rng: random.Random) -> str:
    """Filler and number sentences in any order, no results."""
    lines = [rng.choice(rng.choice(FAMILIES)(rng, 2).facts) for _ in range(rng.randint(1, 4))]
    lines += [say(rng, "filler") for _ in range(rng.randint(1, 4))]
    rng.shuffle(lines)
    return " ".join(lines)


def documents(seed: int | str, n: int) -> Iterator[Row]:
    """n documents {"text"}; a longer run begins with the shorter one."""
    rng = random.Random(f"documents {seed}")
    return ({"text": document(rng)} for _ in range(n))


def general(seed: int | str, n: int) -> Iterator[Row]:
    """n texts {"text"} for the base model: notes and documents in turn."""
    rng = random.Random(f"general {seed}")
    return ({"text": document(rng) if i % 2 else notes(rng)} for i in range(n))


def questions(kind: str, seed: int | str, n: int) -> Iterator[Row]:
    """n questions {"id", "question", "answer", "set"}, each ends with "Answer:" for the model to complete.

    kind: one of SETS, or "train" for 1..4 steps as the documents have them. UserError for any other.
    """
    if kind not in (*SETS, "train"):
        raise UserError(f"unknown set of questions '{kind}'; the sets are {', '.join(SETS)} and train")
    rng = random.Random(f"{kind} questions {seed}")
    for i in range(n):
        if kind in HELD_OUT:
            story = of_two_families(rng, kind)
        else:
            story = of_one_family(rng, rng.choice(STEPS.get(kind, range(1, MOST_STEPS + 1))))
        question = asked(rng, story) + " Answer:"
        yield {"id": f"{kind}-{i}", "question": question, "answer": str(story.n), "set": kind}
