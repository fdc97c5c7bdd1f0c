"""Scores of n samples per question -> accuracies with intervals over questions, and comparisons of two runs.

Arrays are (Q, K): Q questions, K samples each. A score is 1, 0, or NaN where no verdict came; NaN is left out and
counted, never a 0. Questions are what was drawn from the world, so every interval is over questions: the K samples of
one are correlated, and counting them as independent makes intervals up to sqrt(K) times too narrow.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95  # of intervals
FEW = 30  # degrees of freedom; from here on an expansion of Student's t quantile is as good as exact


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over questions and its interval."""

    mean: float
    se: float  # standard error over questions
    low: float
    high: float
    num_questions: int  # that have a value


@dataclass(frozen=True, kw_only=True)
class Paired:
    """How much better run a is than run b on the same questions."""

    difference: Estimate
    p: float  # chance of a mean difference this large, either way, if a and b were exchangeable on every question
    better: int  # questions on which a's mean is higher
    worse: int


def mean_at(scores: Array) -> Array:
    """(Q,) mean of each question's verdicts; NaN for a question that has none."""
    count = np.isfinite(scores).sum(1)
    return np.where(count, np.nansum(scores, 1) / np.maximum(count, 1), np.nan)


def pass_at(scores: Array, k: int) -> Array:
    """(Q,) chance that k of a question's n samples, drawn without replacement, hold a right one: 1 - C(n-c,k)/C(n,k).

    Unbiased for the chance that one of k fresh samples is right. NaN for a question of fewer than k verdicts.
    ValueError: k below 1 or above K, scores other than 0 and 1.
    """
    check_k(scores, k)
    verdicts = np.isfinite(scores)
    if not np.isin(scores[verdicts], (0, 1)).all():
        raise ValueError("pass@k needs scores of 0 and 1")
    counts = zip(verdicts.sum(1).tolist(), np.nansum(scores, 1).astype(int).tolist(), strict=True)
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else np.nan for n, c in counts])


def maj_at(answers: Sequence[Sequence[str | None]], scores: Array, k: int) -> Array:
    """(Q,) score of the most frequent answer among k samples, averaged over the K // k disjoint runs of k samples.

    answers: normalised, so that equal ones are equal strings; None where none was found, which has no vote. Answers
    that share the first place share the score, so the order of samples is nothing. No answer at all scores 0.
    ValueError: k below 1 or above K, answers of another shape.
    """
    check_k(scores, k)
    if [len(row) for row in answers] != [scores.shape[1]] * len(scores):
        raise ValueError(f"answers must be {scores.shape}, as the scores are")
    starts = range(0, scores.shape[1] - k + 1, k)
    pairs = zip(answers, scores.tolist(), strict=True)
    return np.array([mean_or_nan([majority(a[at : at + k], s[at : at + k]) for at in starts]) for a, s in pairs])


def majority(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """Score of the most frequent answer: the mean over its samples that have a verdict, NaN if none has."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    by_answer = [mean_or_nan([s for a, s in zip(answers, scores, strict=True) if a == answer]) for answer in tied]
    return mean_or_nan(by_answer)


def mean_or_nan(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def check_k(scores: Array, k: int) -> None:
    if scores.ndim != 2:
        raise ValueError(f"scores must be questions x samples, not {scores.shape}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be within 1 and the {scores.shape[1]} samples of a question, not {k}")


def proportion(values: Array, level: float = LEVEL) -> Estimate:
    """Mean of (Q,) per-question values within [0, 1], interval clustered by question. NaN questions are left out.

    Wilson's score interval for as many independent draws as would have this standard error. Away from the ends that
    is nearly mean +- t se, which near 0 and 1, where base models are, is too narrow, and empty if none is right.
    """
    mean, se, n = moments(values)
    if n < 2:
        return Estimate(mean=mean, se=se, low=0.0 if n else math.nan, high=1.0 if n else math.nan, num_questions=n)
    t, spread = t_quantile(level, n - 1), max(mean * (1 - mean), 0.0)
    draws = spread / se**2 if se > 0 and spread > 0 else n
    centre = (mean + t * t / (2 * draws)) / (1 + t * t / draws)
    half = t * math.sqrt(spread / draws + (t / (2 * draws)) ** 2) / (1 + t * t / draws)
    # the ends meet the mean but for rounding when all values are 0, or all 1
    low, high = max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
    return Estimate(mean=mean, se=se, low=low, high=high, num_questions=n)


def clustered(values: Array) -> Estimate:
    """Mean +- t se of (Q,) per-question values of any size; one question alone has an endless interval."""
    mean, se, n = moments(values)
    half = t_quantile(LEVEL, n - 1) * se if n > 1 else math.inf
    return Estimate(mean=mean, se=se, low=mean - half, high=mean + half, num_questions=n)


def moments(values: Array) -> tuple[float, float, int]:
    """Mean, its standard error over questions, and the number of questions that have a value."""
    values = values[np.isfinite(values)]
    n = len(values)
    se = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()) if n else math.nan, se, n


def sampling_se(scores: Array) -> float:
    """Standard error of the mean when the same questions are sampled anew: what a rerun differs by, not a new test.

    NaN if a question has only one verdict.
    """
    count = np.isfinite(scores).sum(1)
    count, scores = count[count > 0], scores[count > 0]
    if not len(count) or count.min() < 2:
        return math.nan
    within = np.nansum((scores - mean_at(scores)[:, None]) ** 2, 1) / (count - 1)
    return float(np.sqrt((within / count).sum()) / len(count))


def bootstrap(values: Array, *, seed: int, rounds: int = 4000) -> tuple[float, float]:
    """Percentile interval of the mean over questions drawn anew with replacement: a check that assumes no shape."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    bits = np.random.Philox(np.random.SeedSequence(seed))
    means = np.array([values[random_integers(bits, len(values), len(values))].mean() for _ in range(rounds)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def random_integers(bits: np.random.Philox, n: int, below: int) -> NDArray[np.int64]:
    """n integers in [0, below). Raw bits: numpy keeps these from version to version, unlike Generator's methods."""
    raw: NDArray[np.uint64] = bits.random_raw(n)
    return (raw % np.uint64(below)).astype(np.int64)


def paired(sets: Sequence[tuple[Array, Array]], *, seed: int, rounds: int = 10_000) -> Paired:
    """Two runs on the same sets of questions: the mean of the sets' mean differences, of equal weight as in average().

    sets: (Q,) per-question means of each run, in the same order: their differences cancel what makes one question
    harder than another. A question that either run has no value for is left out.
    p by flipping the signs of all differences, each with its weight in that mean: all 2^Q ways if these are at most
    `rounds`, else `rounds` random ones.
    """
    differences = [differences_of(a, b) for a, b in sets]
    estimates = [clustered(d) for d in differences]
    weighted = np.concatenate([d / max(1, len(d)) for d in differences]) if sets else np.empty(0)
    return Paired(
        difference=estimates[0] if len(estimates) == 1 else average(estimates),
        p=sign_flip_p(weighted, seed=seed, rounds=rounds),
        better=int((weighted > 0).sum()),
        worse=int((weighted < 0).sum()),
    )


def differences_of(a: Array, b: Array) -> Array:
    """a - b of the questions for which both have a value."""
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two runs must have the same questions, not {a.shape} and {b.shape}")
    difference = a - b
    known: Array = difference[np.isfinite(difference)]
    return known


def sign_flip_p(difference: Array, *, seed: int, rounds: int) -> float:
    moved = difference[difference != 0]  # the others change no sum
    n, exact = len(moved), 2 ** len(moved) <= rounds
    if exact:
        flips = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        sums = (moved * (1 - 2 * flips)).sum(1)
    else:
        bits = np.random.Philox(np.random.SeedSequence(seed))
        sums = np.array([(moved * (1 - 2 * random_integers(bits, n, 2))).sum() for _ in range(rounds)])
    # sums that are equal but for the order of addition count as equal
    as_large = np.abs(sums) >= abs(moved.sum()) - 1e-9
    return float(as_large.mean()) if exact else float((as_large.sum() + 1) / (rounds + 1))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of several sets' means, each set of equal weight whatever its size (the tables' five-column mean).

    Sets are independent, so their variances add; on either side of the mean the distances to the sets' limits do
    (Zou and Donner 2008, "MOVER"), which keeps skewed intervals skewed. ValueError: no set.
    """
    if not estimates:
        raise ValueError("an average needs at least one estimate")
    n, num_questions = len(estimates), sum(e.num_questions for e in estimates)
    mean = math.fsum(e.mean for e in estimates) / n
    se, below, above = (
        math.hypot(*distances) / n
        for distances in zip(*((e.se, e.mean - e.low, e.high - e.mean) for e in estimates), strict=True)
    )
    return Estimate(mean=mean, se=se, low=mean - below, high=mean + above, num_questions=num_questions)


def t_quantile(level: float, freedom: float) -> float:
    """Two-sided quantile of Student's t: exact below FEW degrees of freedom, which are whole numbers, and then by
    the expansion of Abramowitz and Stegun 26.7.5, within 1e-6. It replaces scipy.stats.t, all that we need of scipy."""
    if not 0 < level < 1:
        raise ValueError(f"level must be within 0 and 1, not {level}")
    if freedom < FEW:
        low, high = 0.0, math.pi / 2
        for _ in range(60):  # halves the angle's interval, down to rounding
            angle = (low + high) / 2
            low, high = (angle, high) if t_within(angle, int(freedom)) < level else (low, angle)
        return math.sqrt(freedom) * math.tan(low)
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**i for i, term in enumerate(terms))


def t_within(angle: float, freedom: int) -> float:
    """Chance that |t| is at most sqrt(freedom) * tan(angle). Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
