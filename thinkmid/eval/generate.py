"""Prompts -> generations on disk, one row a sample, each written as it ends; a run that is stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from thinkmid.data.questions import Question, posed
from thinkmid.data.templates import render, tokens
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig
from thinkmid.files import Kinds, check_row, is_count, is_text, locked, read_json, read_rows, reopen, write_whole
from thinkmid.model import identity, weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import Sampling, seed
from thinkmid.rollout.engine.slices import leads, places
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request

MARK = "drawn-by.json"
PATH_ALONE = "model, template, sampling and seed"
KEYS: Kinds = {"id": is_text, "sample": is_count}  # of a row, and of its prompt's meta: what it is a sample of
DRAWN: Kinds = {"text": is_text, "finish": is_text, "num_think": is_count}


def is_ids(value: Any) -> bool:
    numbers = isinstance(value, list) and {*map(type, value)} <= {int}
    return numbers and 0 <= min(value, default=0) <= max(value, default=0) < 2**31


def settings(cfg: EvalConfig) -> dict[str, Any]:
    """What generations depend on beside the model."""
    sampling = {f"sampling.{name}": value for name, value in vars(cfg.sampling).items()}
    engine = {f"engine.{name}": getattr(cfg.engine, name) for name in ("kind", "dtype")}
    return {"data.template": cfg.data.template, **sampling, **engine, "run.seed": cfg.run.seed}


def read_mark(folder: Path) -> dict[str, Any]:
    """What drew the generations of a run: settings, "model.folder" and, by part, hashes of the "model"; {} before any
    are drawn. UserError: damaged."""
    mark = folder / MARK
    if mark.is_file() and (older := mark.read_text("utf-8", "replace")).startswith("["):
        return {PATH_ALONE: older}
    if not mark.exists():
        return {}
    drawn_by = read_json(mark)
    if not isinstance(drawn_by.get("model"), dict):
        raise UserError(f"{mark}: 'model' is missing or not of its kind")
    return drawn_by


def check_folder(folder: Path, cfg: EvalConfig) -> None:
    """UserError if another program's run is there, or generations that other settings drew."""
    was, now = read_mark(folder), settings(cfg)
    if not was and (folder / "config.toml").exists():
        raise UserError(f"{folder}: holds the run of another program; take another folder")
    if PATH_ALONE in was:
        now = {PATH_ALONE: path_alone(cfg)}
        if not cfg.run.regrade:
            raise UserError(f"{folder}: which weights drew what is there is unknown; run.regrade true grades it still")
    elif cfg.run.regrade:
        now |= {"model.folder": cfg.model.folder}
    if odd := [name for name in now if was and was.get(name) != now[name]]:
        raise UserError(f"{folder}: drawn with {odd[0]} = {was.get(odd[0])}, now {now[odd[0]]}; take another folder")


def path_alone(cfg: EvalConfig) -> str:
    """The mark of versions that knew a model by its path and gave a sample without a thought the budget of thoughts."""
    sampling = repr(Sampling(**vars(cfg.sampling)))
    return json.dumps([cfg.model.folder, cfg.data.template, sampling, cfg.run.seed], ensure_ascii=False)


def check_model(folder: Path, cfg: EvalConfig, model: dict[str, str]) -> None:
    """UserError if a model of other content drew what is there."""
    was = read_mark(folder)
    if was and (parts := identity.changed(was["model"], model, cfg.model.folder)):
        raise UserError(f"{folder}: drawn by another model (changed: {parts}); take another folder")


def generate(cfg: EvalConfig, sets: dict, folder: Path, ranks) -> None:
    """Draws what is not there yet of every set's (question, sample) pairs. Collective."""
    shape, text = model_of(cfg)
    asked = {name: prompts_of(cfg, found.questions, text, shape) for name, found in sets.items()}
    with alone(folder.parent, ranks):
        draw(cfg, asked, cfg.sampling, folder, ranks)


def alone(folder: Path, ranks):
    """While this rank draws for the run in the folder. UserError: a rank of another process does."""
    return locked(folder / f".lock-{ranks.rank:03d}", wait=False)


def model_of(cfg: EvalConfig) -> tuple[ModelConfig, Tokenizer]:
    return weights.read_config(Path(cfg.model.folder)), Tokenizer.load(cfg.model.folder)


def draw(
    cfg: EvalConfig,
    asked: dict[str, list[Prompt]],
    sampling: Sampling,
    folder: Path,
    ranks,
    keys: Kinds = KEYS,
) -> None:
    """Draws what is not there yet: this rank's share of every set's prompts. Collective.

    A prompt's meta goes into its row; there, the values of keys say whether the row is that prompt's sample.
    """
    shape, text = model_of(cfg)
    source, rows = Path(cfg.model.folder), sampling.max_batch
    known = identity.verified(source, ranks)
    model = identity.of_model(source, text, known)
    check_model(folder.parent, cfg, model)
    longest = max(len(p.tokens) for prompts in asked.values() for p in prompts) + sampling.max_new
    engine = make_engine(cfg.engine, source, shape, text, device=ranks.device, max_len=longest, rows=rows)
    engine.load_weights(weights.stream_folder(source, cfg.engine.dtype, known), 0)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        drawn_by = settings(cfg) | {"model.folder": cfg.model.folder, "model": model}
        write_whole(folder.parent / MARK, json.dumps(drawn_by, indent=1) + "\n")
    share = cfg.engine.tensor_parallel
    for name, prompts in asked.items():
        have = {key(row, keys): row for row in stored(folder, name, keys)}
        ranks.agree(lambda: check_asked(folder, name, prompts, have, keys))  # noqa: B023
        ranks.barrier()  # all have looked before one writes
        left = [p for p in prompts if key(p.meta, keys) not in have]
        alike_P_G = alike(left[i] for i in places(len(left), ranks, share))
        requests = requests_of(alike_P_G, cfg.run.seed)
        total, done, writes = sum(map(len, alike_P_G)), 0, leads(ranks, share)
        with reopen(folder / f"{name}-{ranks.rank:03d}.jsonl") as file:
            for request, sample in chain.from_iterable(engine.generate(requests, sampling)):
                p, g = request.key
                if writes:
                    file.write(json.dumps(row_of(alike_P_G[p][g], sample, text), ensure_ascii=False) + "\n")
                done += 1
                if ranks.rank == 0 and done % 500 == 0:
                    print(f"{name}: {done} of {total} samples of this rank", flush=True)


def requests_of(alike_P_G: list[list[Prompt]], run_seed: int) -> Iterator[Request]:
    """One request for each prompt, with the first of its group in its place: an engine reads that once."""
    for p, group in enumerate(alike_P_G):
        for g, prompt in enumerate(group):
            yield Request(prompt=group[0], seed=seed(run_seed, 0, prompt.id, 0), key=(p, g))


def check_asked(folder: Path, name: str, prompts: Iterable[Prompt], have: dict[tuple, dict], keys: Kinds) -> None:
    """UserError where a stored row answers other tokens than its prompt's: an id may be another question's now."""
    for prompt in prompts:
        row = have.get(key(prompt.meta, keys))
        if row is not None and row.get("asked", asked_of(prompt)) != asked_of(prompt):
            which = " ".join(map(str, key(prompt.meta, keys)))
            raise UserError(f"{folder}: {name}: {which} was asked in other words then; take another folder")


def asked_of(prompt: Prompt) -> str:
    return hashlib.blake2b(np.array(prompt.tokens, np.int64).tobytes(), digest_size=8).hexdigest()


def alike(prompts: Iterable[Prompt]) -> list[list[Prompt]]:
    """Prompts of the same tokens together: engines read these once."""
    groups: dict[tuple, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(tuple(prompt.tokens), []).append(prompt)
    return list(groups.values())


def prompts_of(
    cfg: EvalConfig, questions: Iterable[Question], tokenizer: Tokenizer, model_cfg: ModelConfig
) -> list[Prompt]:
    """One prompt per question and sample: a choice's options turn from sample to sample."""
    room, out = model_cfg.max_positions - cfg.sampling.max_new, []
    for q in questions:
        encoded: dict[str, list[int]] = {}  # the samples of most questions are asked the same
        for k in range(cfg.run.samples):
            words = render(cfg.data.template, posed(q, k).text, choice=q.kind == "choice")
            ids = encoded.get(words) or encoded.setdefault(words, tokens(tokenizer, words))
            if len(ids) > room:
                raise UserError(f"question {q.id}: {len(ids)} tokens; the context leaves {room} beside the new ones")
            out.append(Prompt(id=f"{q.id}/{k}", tokens=ids, meta={"id": q.id, "sample": k}))
    return out


def row_of(prompt: Prompt, sample, tokenizer: Tokenizer) -> dict:
    return prompt.meta | {
        "asked": asked_of(prompt),
        "text": tokenizer.decode(sample.tokens),
        "finish": sample.finish,
        "tokens": len(sample.tokens),
        "num_think": sample.num_think,
        "ids": sample.tokens.tolist(),
    }


def key(row: dict, keys: Kinds) -> tuple:
    return tuple(row[k] for k in keys)


def stored(folder: Path, name: str, keys: Kinds = KEYS) -> list[dict]:
    """Rows of a set, of all ranks, in order of their keys; one that stands twice counts once.

    UserError names the row that is not as draw() writes them.
    """
    # a whole name is compared, for a report takes it from files that anyone may have written
    parts = [(path, path.stem.rpartition("-")) for path in sorted(folder.glob("*.jsonl"))]
    paths = [path for path, (set_name, _, rank) in parts if set_name == name and rank.isdigit()]
    rows = {}
    for path in paths:
        for number, row in enumerate(read_rows(path), start=1):
            check_row(f"{path}:{number}", row, {**keys, **DRAWN}, {"ids": is_ids, "asked": is_text})
            rows[key(row, keys)] = row
    return [rows[k] for k in sorted(rows)]


def whole(folder: Path, name: str, questions: Iterable[Question], samples: int) -> list[dict]:
    """The stored rows of these questions' first samples. UserError unless all are there."""
    ids = {q.id for q in questions}
    rows = [r for r in stored(folder, name) if r["id"] in ids and r["sample"] < samples]
    if len(rows) != (wanted := len(ids) * samples):
        raise UserError(f"{folder}: {len(rows)} of {wanted} samples of {name}; eval.run without regrade draws them")
    return rows
