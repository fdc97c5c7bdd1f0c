"""Prompts -> samples, each written to disk as it ends; a run that was stopped resumes."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from thinkmid import hub
from thinkmid.data.questions import QuestionSet
from thinkmid.data.wording import Wording
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig
from thinkmid.eval.generations import KEYS, MARK, key, read_mark, settings, stored
from thinkmid.eval.prompts import prompts_of
from thinkmid.files import Kinds, Row, locked, reopen, write_whole
from thinkmid.kernels import launch
from thinkmid.model import weights
from thinkmid.model.hf_config import read_config
from thinkmid.model.transformer import ModelConfig
from thinkmid.plan import memory
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import Sampling, seed
from thinkmid.rollout.engine.slices import leads, places
from thinkmid.run import identity
from thinkmid.run.folder import check_commits
from thinkmid.run.progress import Progress
from thinkmid.run.ranks import Ranks, start_ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request, Sample


def check_model(folder: Path, cfg: EvalConfig, model: dict[str, str]) -> None:
    """UserError if the generations there are those of another model, by content."""
    was = read_mark(folder)
    if was and (parts := identity.changed(was["model"], model, cfg.model.folder)):
        raise UserError(f"{folder}: drawn by another model (changed: {parts}); take another folder")


def plan(cfg: EvalConfig, sets: Mapping[str, QuestionSet]) -> int:
    """Prints what --dry-run reports: the configuration, memory and an estimate of time."""
    model_cfg, wording = model_of(cfg)
    questions = [question for found in sets.values() for question in found.questions]
    prompts = prompts_of(cfg, questions, wording, model_cfg.max_positions)
    print(f"# {len(prompts):,} samples of {len(questions):,} questions")
    return memory.dry_run_engine(cfg, model_cfg, cfg.sampling, max(len(p.tokens) for p in prompts))


def start(cfg: EvalConfig) -> Ranks | None:
    """The ranks that draw; None where what is there is graded again."""
    if cfg.run.regrade:
        return None
    ranks = start_ranks(cfg.engine.tensor_parallel)
    check_commits(cfg, ranks)
    return ranks


def model_of(cfg: EvalConfig) -> tuple[ModelConfig, Wording]:
    """Config of the model's folder, and what makes its prompts."""
    folder = cfg.model.folder
    return read_config(Path(folder)), Wording.read(cfg.data, folder, Tokenizer.load(folder))


Asked = Mapping[str, list[Prompt]]  # by set


def draw(cfg: EvalConfig, asked: Asked, sampling: Sampling, folder: Path, ranks: Ranks, keys: Kinds = KEYS) -> None:
    """Draws the samples that are not stored yet: this rank's share of every set's prompts. Collective.

    folder: in that of the run. A prompt's meta becomes part of its row, where the fields in keys identify the sample.
    UserError: another process draws for this run; what is there was asked in other words, or drawn by another model.
    """
    if any(asked.values()):
        with locked(folder.parent / f".lock-{ranks.rank:03d}", wait=False):
            draw_alone(cfg, asked, sampling, folder, ranks, keys)
    ranks.barrier()


def draw_alone(cfg: EvalConfig, asked: Asked, sampling: Sampling, folder: Path, ranks: Ranks, keys: Kinds) -> None:
    shape, wording = model_of(cfg)
    text = wording.tokenizer
    source, rows = Path(cfg.model.folder), sampling.max_batch
    known = identity.verified(source, ranks)
    model = identity.of_model(source, text, known)
    check_model(folder.parent, cfg, model)
    for line in launch.slow_dtypes(ranks.device, {"engine.dtype": cfg.engine.dtype}) if ranks.rank == 0 else ():
        print(f"warning: {line}", flush=True)
    longest = max(len(p.tokens) for prompts in asked.values() for p in prompts) + sampling.max_new
    engine = make_engine(cfg.engine, source, shape, text, device=ranks.device, max_len=longest, rows=rows)
    engine.load_weights(weights.stream_folder(source, cfg.engine.dtype, known), 0)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        drawn_by = settings(cfg) | {"model.folder": hub.asked(cfg.model.folder), "model": model}
        write_whole(folder.parent / MARK, json.dumps(drawn_by, indent=1) + "\n")
        hub.write_record(folder.parent, cfg)
    share = cfg.engine.tensor_parallel
    for name, prompts in asked.items():
        have = {key(row, keys): row for row in stored(folder, name, keys)}
        ranks.run_on_all(check_asked, folder, name, prompts, have, keys)
        ranks.barrier()  # all have looked before one writes
        left = [p for p in prompts if key(p.meta, keys) not in have]
        mine = [left[i] for i in places(len(left), ranks, share)]
        samples = chain.from_iterable(engine.generate(requests_of(mine, cfg.run.seed), sampling))
        bar = Progress(name, len(mine), "samples", rank=ranks.rank)
        with bar, reopen(folder / f"{name}-{ranks.rank:03d}.jsonl") as file:
            for done, (request, sample) in enumerate(samples, start=1):
                if leads(ranks, share):
                    file.write(json.dumps(row_of(mine[request.key[0]], sample, text), ensure_ascii=False) + "\n")
                bar.at(done)


def requests_of(prompts: list[Prompt], run_seed: int) -> Iterator[Request]:
    """A request for each prompt, its place the key. Those of the same tokens follow each other, with the first one's
    prompt: an engine reads that once."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        alike.setdefault(tuple(prompt.tokens), []).append(i)
    for first, i in ((group[0], i) for group in alike.values() for i in group):
        yield Request(prompt=prompts[first], seed=seed(run_seed, 0, prompts[i].id, 0), key=(i,))


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


def row_of(prompt: Prompt, sample: Sample, tokenizer: Tokenizer) -> Row:
    """The row that is stored for a sample."""
    return prompt.meta | {
        "asked": asked_of(prompt),
        "opened": tokenizer.opens(prompt.tokens),
        "text": tokenizer.decode(sample.tokens),
        "finish": sample.finish,
        "tokens": len(sample.tokens),
        "num_think": sample.num_think,
        "ids": sample.tokens.tolist(),
    }
