"""Questions -> prompts, one for every sample."""

from collections.abc import Iterable

from thinkmid.data.questions import Question
from thinkmid.data.wording import Wording
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig
from thinkmid.types import Prompt


def prompts_of(cfg: EvalConfig, questions: Iterable[Question], wording: Wording, max_positions: int) -> list[Prompt]:
    """One prompt per question and sample: a choice's options turn from sample to sample.

    max_positions: tokens of the model's context. UserError: a prompt that leaves no room for new tokens.
    """
    room, out = max_positions - cfg.sampling.max_new, []
    for q in questions:
        # the samples of most questions have the same prompt
        different = len(q.meta["options"]) if q.kind == "choice" else 1
        encoded = [wording.tokens(q, k) for k in range(min(different, cfg.run.samples))]
        if (longest := max(map(len, encoded))) > room:
            raise UserError(f"question {q.id}: {longest} tokens; the context leaves {room} beside the new ones")
        for k in range(cfg.run.samples):
            ids = encoded[k % different]
            out.append(Prompt(id=f"{q.id}/{k}", tokens=ids, meta={"id": q.id, "sample": k}))
    return out
