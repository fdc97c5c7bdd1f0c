"""Questions whose answers are known, put to a judge's model without its guards: how far can it be trusted?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from thinkmid.errors import UserError
from thinkmid.rollout.judge.attacks import ATTACKS
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.model import Ask, JudgeError, p_yes
from thinkmid.rollout.judge.templates import nonce, render
from thinkmid.types import Prompt, Tally

NUM_REFERENCES = 9  # that the questions of one step are made of


@dataclass(frozen=True)
class Report:
    """What a judge's model answered to questions whose answers are known."""

    right: dict[str, list[bool]]  # by kind of question, whether each answer is
    faults: list[str]  # why questions failed: neither right nor wrong

    @property
    def shares(self) -> dict[str, float]:
        """Right answers by kind; 0 of none: a judge that never answers cannot be trusted."""
        return {kind: sum(right) / len(right) if right else 0.0 for kind, right in self.right.items()}

    @property
    def weakest(self) -> str:
        return min(self.shares, key=self.shares.__getitem__)

    @property
    def share(self) -> float:
        """Right answers in the worst kind."""
        return self.shares[self.weakest]

    def line(self) -> str:
        parts = [f"{kind} {sum(right)}/{len(right)}" for kind, right in self.right.items()]
        end = ""
        if self.faults:
            end = f", {len(self.faults)} failed, most of them for: {max(self.faults, key=self.faults.count)}"
        return f"judge canaries: {', '.join(parts)} right{end}; weakest: {self.weakest} ({self.share:.0%})"


def run(ask: Ask, template: str, seed: int, pairs: list[tuple[str, str]], num_attacks: int = 8) -> Report:
    """Asks about (suffix of another document, reference) pairs, each reference itself, and attacks drawn by seed.

    No guard decides and nothing is cached: this measures the model behind the fences.
    """
    drawn = random.Random(seed).sample(ATTACKS, min(num_attacks, len(ATTACKS)))
    questions = chain(
        (("same", True, reference, reference) for _, reference in pairs),
        (("other", False, other, reference) for other, reference in pairs),
        (("attack", False, attack, pairs[i % len(pairs)][1]) for i, attack in enumerate(drawn)),
    )
    asked = [
        (kind, wanted, ask(render(template, candidate, reference, nonce(seed, reference, 0))))
        for kind, wanted, candidate, reference in questions
    ]
    report = Report({kind: [] for kind, _, _ in asked}, [])
    for kind, wanted, answer in asked:
        try:
            report.right[kind].append((p_yes(answer) > 0.5) == wanted)
        except JudgeError as error:
            report.faults.append(f"{error} ({error.said})" if error.said else str(error))
    return report


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Examines a judge's model with the references of a run's prompts. The questions are the same on every rank."""

    cfg: JudgeConfig
    ask: Ask
    seed: int
    prompts: Sequence[Prompt]

    def examine(self, step: int, cut: Callable[[str], str]) -> Tally:
        """The share of right answers; {} in a step without examination. UserError: below cfg.canary_min.

        cut(text): as long as judges are shown it.
        """
        if not self.cfg.canary_every or step % self.cfg.canary_every:
            return {}
        texts = self._references(step, cut)
        if len(texts) < 2:
            return {}
        report = run(self.ask, self.cfg.template, self.seed + step, list(zip(texts[1:], texts, strict=False)))
        if report.share < self.cfg.canary_min:
            raise UserError(f"step {step}: the judge fails on known answers: {report.line()} (judge.canary_min)")
        return {"judge_canary": (report.share, 1)}

    def _references(self, step: int, cut: Callable[[str], str]) -> list[str]:
        """Different ones, not blank, drawn by seed and step."""
        rng, total = random.Random(f"{self.seed}/{step}"), len(self.prompts)
        wholes = [self.prompts[i].meta["reference"] for i in rng.sample(range(total), min(NUM_REFERENCES, total))]
        return [text for text in dict.fromkeys(map(cut, wholes)) if text.strip()]
