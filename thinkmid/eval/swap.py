"""Donors of swapped thoughts: samples of another question, with another gold answer where possible."""

import math
from collections.abc import Callable

from thinkmid.rollout.engine.protocol import seed

Key = tuple[str, int]  # question, sample
Donors = dict[Key, Key]  # of each sample that takes a thought


def swap(golds: dict[Key, str], run_seed: int) -> Donors:
    """Sample -> sample of another question, for samples with these gold answers; empty for fewer than two questions.

    A derangement of the questions: where all have as many samples, each sample is taken once. As few questions as
    any derangement allows meet their own gold answer, if a question's samples have all the same. It depends on the
    seed and on the samples, not on their order.
    """
    samples: dict[str, list[Key]] = {}
    for key in sorted(golds):
        samples.setdefault(key[0], []).append(key)
    kinds = {question: {golds[key] for key in keys} for question, keys in samples.items()}

    def cost(taker: str, giver: str) -> float:
        if taker == giver:
            return math.inf
        if kinds[taker].isdisjoint(kinds[giver]):
            return 0
        if len(kinds[taker] | kinds[giver]) == 1:
            return len(samples[taker])
        return partners(samples[taker], samples[giver], golds)[0]

    # in this order each question takes from the next, so none from itself
    order = sorted(samples, key=lambda question: seed(run_seed, 0, f"swapped/{question}", 0))
    if len(order) < 2:
        return {}
    donor = dict(zip(order, order[1:] + order[:1], strict=True))
    for question in order:
        improve(question, donor, cost)
    taken = {q: partners(samples[q], samples[d], golds)[1] for q, d in donor.items()}
    return {a: b for q in order for a, b in zip(samples[q], taken[q], strict=True)}


def improve(question: str, donor: dict[str, str], cost: Callable[[str, str], float]) -> None:
    """Exchanges the question's donor with another question's, where that helps most and if it does."""
    if not (mine := cost(question, donor[question])):
        return

    def change(other: str) -> tuple[float, float]:
        after = cost(question, donor[other])
        return after + cost(other, donor[question]) - mine - cost(other, donor[other]), after

    best = min((q for q in donor if q != question), key=change)
    if change(best)[0] < 0:
        donor[question], donor[best] = donor[best], donor[question]


def partners(takers: list[Key], givers: list[Key], golds: dict[Key, str]) -> tuple[int, list[Key]]:
    """(equal gold answers, a giver for each taker): in turn, from where fewest gold answers are equal."""
    found = []
    for turn in range(len(givers)):
        turned = [givers[(i + turn) % len(givers)] for i in range(len(takers))]
        found.append((sum(golds[a] == golds[b] for a, b in zip(takers, turned, strict=True)), turned))
        if not found[-1][0]:
            break
    return min(found, key=lambda pair: pair[0])
