"""The reward of questions with checkable answers: a grader's verdict on what follows the thought."""

from __future__ import annotations

from collections.abc import Sequence

from thinkmid.errors import UserError
from thinkmid.rollout.grade.answers import ends_in_marker
from thinkmid.rollout.grade.grader import Grader
from thinkmid.rollout.verdict import Pending, malformed
from thinkmid.thoughts import before_stop
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Sample, Tally


class AnswerReward:
    """Grades against meta["gold"] of a prompt, with meta["question"] where it is known."""

    def __init__(self, tokenizer: Tokenizer, grader: Grader, *, thinks: bool = True, stops: Sequence[str] = ()):
        """thinks False: samples need no closing tag, their whole text is graded. stops: an answer is read up to the
        first of these texts. close() closes the grader."""
        self._tokenizer, self._grader, self._thinks, self._stops = tokenizer, grader, thinks, stops

    def __call__(self, prompt: Prompt, sample: Sample) -> Pending:
        """Not exactly one closing tag is 0. UserError: the prompt has no gold answer."""
        gold = prompt.meta.get("gold")
        if gold is None or not str(gold).strip():
            raise UserError(f"prompt {prompt.id}: no gold answer")
        if self._thinks:
            parts = self._tokenizer.split_at_close(sample.tokens)
            if verdict := malformed(parts):
                return verdict
            text = parts.suffix
        else:
            text = self._tokenizer.decode(sample.tokens)
        marked = ends_in_marker(self._tokenizer.decode(prompt.tokens))
        question = str(prompt.meta.get("question", ""))
        return self._grader(before_stop(text, self._stops), str(gold), question, marked)

    def finish(self, step: int) -> Tally:
        """After the last verdict of a step: the grader's metrics since then."""
        return self._grader.row()

    def close(self) -> None:
        self._grader.close()
