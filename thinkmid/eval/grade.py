"""Generations -> graded samples."""

from collections.abc import Sequence

from thinkmid.data.questions import Question, base_answer, posed
from thinkmid.data.templates import render
from thinkmid.data.wording import CHAT
from thinkmid.eval.config import EvalConfig
from thinkmid.eval.summary import Graded
from thinkmid.files import Row
from thinkmid.rollout.grade.answers import ends_in_marker
from thinkmid.rollout.grade.grader import Grader
from thinkmid.run.progress import Progress
from thinkmid.thoughts import CLOSE, OPEN, before_stop


def grade(cfg: EvalConfig, rows: Sequence[Row], questions: Sequence[Question], grader: Grader) -> list[Graded]:
    """Graded samples in the order of the rows, whose ids are those of questions; each is read up to its stop text."""
    known, asked, found = {q.id: q for q in questions}, [], []
    template, stops = cfg.data.template, cfg.drawn.stop
    for r in rows:
        put, opened = posed(known[r["id"]], r["sample"]), r.get("opened", template.endswith("-think"))
        text = before_stop(r["text"], stops, is_open=opened)
        marked = template not in CHAT and ends_in_marker(render(template, put.text))
        asked.append((r, text, opened, marked, grader(text, put.gold, known[r["id"]].question, marked)))
    with Progress("grading", len(rows), "samples") as bar:
        verdicts = []
        for done, (*_, future) in enumerate(asked, start=1):
            verdicts.append(future.result())
            bar.at(done)
    for (r, text, opened, marked, _), verdict in zip(asked, verdicts, strict=True):
        answer = grader.answer(text, marked)
        unclosed = CLOSE not in text and (opened or OPEN in text)
        score = None if verdict.value is None else float(verdict.value)
        graded = Graded(
            question=r["id"], sample=r["sample"], score=0.0 if unclosed else score,
            answer=None if answer is None else base_answer(known[r["id"]], r["sample"], answer),
            truncated=r["finish"] in ("unclosed", "suffix"), num_think=r["num_think"], unclosed=unclosed,
        )  # fmt: skip
        found.append(graded)
    return found
