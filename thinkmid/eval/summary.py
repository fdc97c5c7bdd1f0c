"""Graded samples of one set -> the numbers that a table and a report show."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from thinkmid.eval import stats


@dataclass(frozen=True, kw_only=True)
class Graded:
    """One sample of one question after grading."""

    question: str  # its id
    sample: int
    score: float | None  # 1, 0, or None: the grader failed
    answer: str | None  # normalised, a choice's letter as for sample 0 (questions.base_answer); None: none was found
    truncated: bool  # ended by the token limit
    num_think: int  # tokens before the closing tag, it included; all of them if it never came
    unclosed: bool = False  # a thought was opened and never closed


@dataclass(frozen=True, kw_only=True)
class Table:
    """Samples by question: rows in order of the ids, so that two runs of one set line up."""

    ids: list[str]
    scores: stats.Array  # (Q, K), NaN: no verdict, or fewer than K samples
    answers: list[list[str | None]]


def tabulate(rows: Iterable[Graded]) -> Table:
    """ValueError: no row, or two with the same question and sample."""
    samples: dict[str, dict[int, Graded]] = {}
    for row in rows:
        if samples.setdefault(row.question, {}).setdefault(row.sample, row) is not row:
            raise ValueError(f"sample {row.sample} of question '{row.question}' stands twice")
    if not samples:
        raise ValueError("no graded sample")
    ids, columns = sorted(samples), sorted({sample for of_question in samples.values() for sample in of_question})
    cells = [[samples[id].get(sample) for sample in columns] for id in ids]
    return Table(
        ids=ids,
        scores=np.array([[math.nan if c is None or c.score is None else c.score for c in row] for row in cells]),
        answers=[[None if c is None else c.answer for c in row] for row in cells],
    )


def summarise(rows: Sequence[Graded], *, ks: Sequence[int], seed: int = 0) -> dict[str, float]:
    """mean, its interval over questions, pass@k and maj@k for k in ks that do not exceed the samples; shares.

    low, high: clustered by question; boot_low, boot_high: bootstrap, a check on them; se_rerun: of another sampling
    of the same questions. Shares of samples: unparsed, truncated, unclosed, failed (graders, never counted as wrong).
    mean_think: tokens. ValueError as in tabulate.
    """
    table = tabulate(rows)
    means = stats.mean_at(table.scores)
    num_samples = table.scores.shape[1]
    boot_low, boot_high = stats.bootstrap(means, seed=seed)
    summary = asdict(stats.proportion(means)) | {
        "num_samples": num_samples,
        "boot_low": boot_low,
        "boot_high": boot_high,
        "se_rerun": stats.sampling_se(table.scores),
        "unparsed": share(row.answer is None for row in rows),
        "truncated": share(row.truncated for row in rows),
        "unclosed": share(row.unclosed for row in rows),
        "failed": share(row.score is None for row in rows),
        "mean_think": share(row.num_think for row in rows),
    }
    for k in (k for k in ks if k <= num_samples):
        summary[f"pass@{k}"] = stats.proportion(stats.pass_at(table.scores, k)).mean
        summary[f"maj@{k}"] = stats.proportion(stats.maj_at(table.answers, table.scores, k)).mean
    return summary


def share(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def compare_sets(
    a: Mapping[str, Sequence[Graded]], b: Mapping[str, Sequence[Graded]], *, seed: int = 0
) -> tuple[dict[str, stats.Paired], stats.Paired]:
    """Two runs of the sets of a: by set, and over the sets with equal weights. ValueError: not the same questions."""
    means = {}
    for name in a:
        try:
            means[name] = paired_means(a[name], b[name])
        except ValueError as error:
            raise ValueError(f"set '{name}': {error}") from None
    by_set = {name: stats.paired([pair], seed=seed) for name, pair in means.items()}
    return by_set, stats.paired(list(means.values()), seed=seed)


def paired_means(a: Sequence[Graded], b: Sequence[Graded]) -> tuple[stats.Array, stats.Array]:
    """(Q,) means of the questions of both runs, in the same order."""
    table_a, table_b = tabulate(a), tabulate(b)
    if odd := set(table_a.ids) ^ set(table_b.ids):
        raise ValueError(f"{len(odd)} questions are in one run alone, '{min(odd)}' for one")
    return stats.mean_at(table_a.scores), stats.mean_at(table_b.scores)


def as_row(found: stats.Estimate | stats.Paired) -> dict[str, float | None]:
    """For a JSON file: the fields, a difference's among the others; None where a number is not finite."""
    row = asdict(found)
    row = row.pop("difference", {}) | row
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def in_words(difference: Mapping[str, float | None]) -> str:
    """A difference by as_row() for the console: mean, interval and p."""
    mean, low, high = (math.nan if difference[k] is None else difference[k] for k in ("mean", "low", "high"))
    return f"{mean:+10.3f}  {f'{low:+.3f} to {high:+.3f}':<16}  p {difference['p']:.4f}"
