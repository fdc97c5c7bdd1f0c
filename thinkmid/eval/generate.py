"""Prompts -> samples, each written to disk as it ends; a run that was stopped resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig
from thinkmid.eval.generations import KEYS, MARK, key, read_mark, settings, stored
from thinkmid.files import Kinds, Row, locked, reopen, write_whole
from thinkmid.model import weights
from thinkmid.model.hf_config import read_config
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import Sampling, seed
from thinkmid.rollout.engine.slices import leads, places
from thinkmid.run import identity
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request, Sample


def check_model(folder: Path, cfg: EvalConfig, model: dict[str, str]) -> None:
    """UserError if the generations there are those of another model, by content."""
    was = read_mark(folder)
    if was and (parts := identity.changed(was["model"], model, cfg.model.folder)):
        raise UserError(f"{folder}: drawn by another model (changed: {parts}); take another folder")


def alone(folder: Path, ranks: Ranks) -> AbstractContextManager[None]:
    """Lock of this rank on a run's folder, held while it draws. UserError: another process holds it."""
    return locked(folder / f".lock-{ranks.rank:03d}", wait=False)


def model_of(cfg: EvalConfig) -> tuple[ModelConfig, Tokenizer]:
    """Config and tokenizer of the model's folder."""
    return read_config(Path(cfg.model.folder)), Tokenizer.load(cfg.model.folder)


def draw(
    cfg: EvalConfig,
    asked: Mapping[str, list[Prompt]],
    sampling: Sampling,
    folder: Path,
    ranks: Ranks,
    keys: Kinds = KEYS,
) -> None:
    """Draws the samples that are not stored yet: this rank's share of every set's prompts. Collective.

    A prompt's meta becomes part of its row, where the fields in keys identify the sample.
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
        ranks.run_on_all(lambda: check_asked(folder, name, prompts, have, keys))  # noqa: B023
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


def check_asked(
    folder: Path, name: str, prompts: Iterable[Prompt], have: Mapping[tuple[Any, ...], Row], keys: Kinds
) -> None:
    """UserError where a stored row belongs to other tokens than its prompt's: an id may be another question's now."""
    for prompt in prompts:
        row = have.get(key(prompt.meta, keys))
        if row is not None and row.get("asked", asked_of(prompt)) != asked_of(prompt):
            which = " ".join(map(str, key(prompt.meta, keys)))
            raise UserError(f"{folder}: {name}: {which} was asked in other words then; take another folder")


def asked_of(prompt: Prompt) -> str:
    return hashlib.blake2b(np.array(prompt.tokens, np.int64).tobytes(), digest_size=8).hexdigest()


def alike(prompts: Iterable[Prompt]) -> list[list[Prompt]]:
    """Prompts grouped by their tokens: engines prefill each group once."""
    groups: dict[tuple[int, ...], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(tuple(prompt.tokens), []).append(prompt)
    return list(groups.values())


def row_of(prompt: Prompt, sample: Sample, tokenizer: Tokenizer) -> Row:
    """The row that is stored for a sample."""
    return prompt.meta | {
        "asked": asked_of(prompt),
        "text": tokenizer.decode(sample.tokens),
        "finish": sample.finish,
        "tokens": len(sample.tokens),
        "num_think": sample.num_think,
        "ids": sample.tokens.tolist(),
    }
