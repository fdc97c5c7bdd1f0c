"""Generations -> graded samples."""

from collections.abc import Sequence

from thinkmid.data.questions import Question, base_answer, posed
from thinkmid.eval.summary import Graded
from thinkmid.files import Row
from thinkmid.rollout.grade.grader import Grader
from thinkmid.run.progress import Progress
from thinkmid.thoughts import CLOSE, OPEN


def grade(template: str, rows: Sequence[Row], questions: Sequence[Question], grader: Grader) -> list[Graded]:
    """Graded samples in the order of the rows, whose ids are those of questions."""
    known, found = {q.id: q for q in questions}, []
    asked = [grader(r["text"], posed(known[r["id"]], r["sample"]).gold, known[r["id"]].question) for r in rows]
    with Progress("grading", len(rows), "samples") as bar:
        verdicts = []
        for done, future in enumerate(asked, start=1):
            verdicts.append(future.result())
            bar.at(done)
    for r, verdict in zip(rows, verdicts, strict=True):
        answer = grader.answer(r["text"])
        unclosed = CLOSE not in r["text"] and (r.get("opened", template.endswith("-think")) or OPEN in r["text"])
        score = None if verdict.value is None else float(verdict.value)
        graded = Graded(
            question=r["id"], sample=r["sample"], score=0.0 if unclosed else score,
            answer=None if answer is None else base_answer(known[r["id"]], r["sample"], answer),
            truncated=r["finish"] in ("unclosed", "suffix"), num_think=r["num_think"], unclosed=unclosed,
        )  # fmt: skip
        found.append(graded)
    return found
