"""Questions -> generations on disk, one row a sample, each written as it ends; a run that is stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from thinkmid.errors import UserError
from thinkmid.eval.prompts import render, tokens
from thinkmid.eval.tasks import posed
from thinkmid.log import read_rows, reopen
from thinkmid.model import weights
from thinkmid.rollout.engine import make_engine, seed
from thinkmid.text import Text
from thinkmid.types import Prompt


def generate(cfg, sets: dict, folder: Path, ranks) -> None:
    """Draws what is not there yet: this rank's share of every set's (question, sample) pairs. Collective."""
    source = Path(cfg.model.folder)
    shape, text = weights.read_config(source), Text.load(source)
    asked = {name: prompts_of(cfg, questions, text, shape) for name, questions in sets.items()}
    longest = max(len(p.tokens) for prompts in asked.values() for p in prompts) + cfg.sampling.max_new
    rows = cfg.sampling.max_batch
    engine = make_engine(cfg.engine, source, shape, text, device=ranks.device, max_len=longest, rows=rows)
    engine.load_weights(weights.stream_folder(source, cfg.engine.dtype), 0)
    folder.mkdir(parents=True, exist_ok=True)
    share = cfg.engine.tensor_parallel
    for name, prompts in asked.items():
        have = {(row["id"], row["sample"]) for row in stored(folder, name)}
        ranks.barrier()  # all have looked before one writes
        left = [p for p in prompts if (p.meta["id"], p.meta["sample"]) not in have]
        mine = left[ranks.rank // share :: ranks.world // share]
        write = ranks.rank % share == 0
        with reopen(folder / f"{name}-{ranks.rank:03d}.jsonl") as file:
            drawn = engine.generate(mine, [[seed(cfg.run.seed, 0, q.id, 0)] for q in mine], cfg.sampling)
            for done, (p, _, sample) in enumerate(drawn, start=1):
                if write:
                    file.write(json.dumps(row_of(mine[p], sample, text), ensure_ascii=False) + "\n")
                if ranks.rank == 0 and done % 500 == 0:
                    print(f"{name}: {done} of {len(mine)} samples of this rank", flush=True)


def prompts_of(cfg, questions, text, shape) -> list[Prompt]:
    """One prompt per question and sample: a choice's options turn from sample to sample."""
    room, out = shape.max_positions - cfg.sampling.max_new, []
    for q in questions:
        encoded: dict[str, list[int]] = {}  # the samples of most questions are asked the same
        for k in range(cfg.run.samples):
            words = render(cfg.data.template, posed(q, k).text, choice=q.kind == "choice")
            ids = encoded.get(words) or encoded.setdefault(words, tokens(text, words))
            if len(ids) > room:
                raise UserError(f"question {q.id}: {len(ids)} tokens; the context leaves {room} beside the new ones")
            out.append(Prompt(id=f"{q.id}/{k}", tokens=ids, meta={"id": q.id, "sample": k}))
    return out


def row_of(prompt: Prompt, sample, text) -> dict:
    return {
        "id": prompt.meta["id"],
        "sample": prompt.meta["sample"],
        "text": text.decode(sample.tokens),
        "finish": sample.finish,
        "tokens": len(sample.tokens),
        "num_think": sample.num_think,
    }


def stored(folder: Path, name: str) -> Iterator[dict]:
    """Rows of a set, of all ranks, in order of question and sample; one that stands twice counts once."""
    rows = {(r["id"], r["sample"]): r for path in sorted(folder.glob(f"{name}-[0-9]*.jsonl")) for r in read_rows(path)}
    return iter([rows[key] for key in sorted(rows)])
