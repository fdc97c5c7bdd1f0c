"""Questions -> prompts, one for every sample."""

from collections.abc import Iterable

from thinkmid.data.questions import Question, posed
from thinkmid.data.templates import render, tokens
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt


def prompts_of(
    cfg: EvalConfig, questions: Iterable[Question], tokenizer: Tokenizer, max_positions: int
) -> list[Prompt]:
    """One prompt per question and sample: a choice's options turn from sample to sample.

    max_positions: tokens of the model's context. UserError: a prompt that leaves no room for new tokens.
    """
    room, out = max_positions - cfg.sampling.max_new, []
    for q in questions:
        encoded: dict[str, list[int]] = {}  # the samples of most questions have the same prompt
        for k in range(cfg.run.samples):
            words = render(cfg.data.template, posed(q, k).text, choice=q.kind == "choice")
            ids = encoded.get(words) or encoded.setdefault(words, tokens(tokenizer, words))
            if len(ids) > room:
                raise UserError(f"question {q.id}: {len(ids)} tokens; the context leaves {room} beside the new ones")
            out.append(Prompt(id=f"{q.id}/{k}", tokens=ids, meta={"id": q.id, "sample": k}))
    return out
