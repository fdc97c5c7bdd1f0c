"""The miniature world read a second time, by key words and not by the table of sentences that wrote it."""

import re
from dataclasses import dataclass

DOUBLE, HALF = {"doubles", "doubled", "twice", "again"}, {"half", "halved"}
DOWN = {"gives", "loses", "sells", "takes", "removes", "picks", "fewer", "minus"}
BOXES = {"box", "bag", "jar"}
NAMES = {"Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo"}


@dataclass
class Result:
    stated: int | None  # None after a question without its answer
    values: list[int]  # from the start value to the result
    steps: list[tuple]  # (family, key, change as in "+3" or "/2"); a copied value has the family "link"
    start: str  # the quantity whose value was stated, a box by its own name
    thing: str | None


def run(text):
    """Every result of the text, in order."""
    known, waiting, out, asked = {}, [], [], None
    for sentence in re.split(r"(?<=[.?]) ", text.removeprefix("Question: ").removesuffix(" Answer:")):
        words = re.findall(r"\w+", sentence)
        number = next((int(w) for w in words if w.isdigit()), None)
        if sentence.endswith("?"):
            asked = (named(words), words[2].rstrip("s") if words[0] == "How" and words[1] == "many" else None)
        elif words[0] == "Answer" or words[0] in ("So", "Now", "That", "In"):
            name, thing = asked or (named(words), thing_of(words))
            out.append(Result(number, *known[name], thing))
            known[name] = ([number], [], name)
            asked = None
        elif fact := fact_of(words, number):
            waiting.append(fact)
            while ready := [f for f in waiting if f[1] is None or f[1] in known]:
                waiting.remove(ready[0])
                tell(known, *ready[0])
    if asked:
        out.append(Result(None, *known[asked[0]], asked[1]))
    return out


def named(words):
    letters = [w for w in words if len(w) == 1 and w.islower()]
    people = [w for w in words if w in NAMES]
    return "box" if BOXES & set(words) else (letters or people)[0]


def thing_of(words):
    return None if named(words).islower() and named(words) != "box" else words[-1].rstrip("s")


def fact_of(words, number):
    """(quantity, the quantity that it comes from or None, family, key, number or change)"""
    letters = [w for w in words if len(w) == 1 and w.islower()]
    people = [w for w in words if w in NAMES]
    sign = "*" if DOUBLE & set(words) else "/" if HALF & set(words) else "-" if DOWN & set(words) else "+"
    change = f"{sign}{2 if sign in '*/' else number}"
    if words[0] == "On":
        return people[0], people[0], "event", words[1], change
    if words[0] == "At":
        return "box", "box", "hour", words[1], change
    if words[0] in ("Compared", "Next"):
        return people[1], people[0], "comparison", people[1], change
    if len(letters) == 2:
        return letters[1], letters[0], "sum", letters[1], change
    if letters and people:
        return letters[0], people[0], "link", letters[0], "+0"
    if BOXES & set(words) and people:
        return "box", people[0], "link", words[1], "+0"
    if number is not None:
        name = (letters or ["box" if BOXES & set(words) else people[0]])[0]
        return name, None, "start", words[1] if name == "box" else name, number
    return None


def tell(known, name, source, family, key, change):
    if source is None:
        known[name] = ([change], [], key)
    else:
        values, steps, start = known[source]
        known[name] = ([*values, changed(values[-1], change)], [*steps, (family, key, change)], start)


def changed(value, change):
    if change == "*2":
        return value + value
    if change == "/2":
        return value // 2 if value % 2 == 0 else value / 2  # notes may halve anything, stories do not
    return value + int(change)
