"""Evaluation: n samples of every question of every set, graded by rule; generations are kept and can be graded again.

torchrun --nproc-per-node 2 -m thinkmid.eval.run configs/mini-eval.toml
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.rollout.checking import VerifyConfig, make_grader
from thinkmid.rollout.engine import EngineConfig, Sampling


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """Where results go and how much is asked."""

    folder: str  # generations/*.jsonl, results.json, config.toml; what is there already is not drawn again
    seed: int = 0
    samples: int = 16  # n of each question; the paper's 16
    ks: tuple[int, ...] = (1, 16)  # of pass@k and maj@k
    regrade: bool = False  # grade the generations that are there, draw none

    def __post_init__(self):
        if self.samples < 1 or not all(k >= 1 for k in self.ks):
            raise ValueError(f"samples {self.samples} and ks {self.ks} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """What is evaluated."""

    folder: str  # Hugging Face folder


@dataclass(frozen=True, kw_only=True)
class SetsConfig:
    """What is asked, and in which words."""

    # layout=path, or name:layout=path: gsm8k, math500, amc23, olympiadbench, gpqa-diamond, questions, ...
    sets: tuple[str, ...]
    template: str = "boxed-think"  # with "-think" the model starts inside its thought
    strict: bool = False  # a set that differs from its public copy is an error, not a note

    def __post_init__(self):
        for entry in self.sets:
            if "=" not in entry:
                raise ValueError(f"sets: {entry!r} must be LAYOUT=PATH or NAME:LAYOUT=PATH")
        if len(names := [name_of(entry) for entry in self.sets]) != len(set(names)) or not names:
            raise ValueError(f"sets needs different names, got {', '.join(names) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation. The paper: 16 samples at temperature 0.6 and top-p 0.95, at most 4096 new tokens."""

    run: EvalRun
    model: EvalModel
    data: SetsConfig
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.6, top_p=0.95))
    engine: EngineConfig = field(default_factory=EngineConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)


def name_of(entry: str) -> str:
    return entry.partition("=")[0].partition(":")[0]


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(EvalConfig, argv, prog="torchrun -m thinkmid.eval.run", description=__doc__)

    from thinkmid.eval import tasks
    from thinkmid.eval.prompts import find

    find(cfg.data.template)
    sets = {}
    for entry in cfg.data.sets:
        head, _, path = entry.partition("=")
        loaded = tasks.load(head.rpartition(":")[2], path, strict=cfg.data.strict)
        sets[name_of(entry)] = loaded.questions
        print(f"{name_of(entry)}: {len(loaded.questions)} questions" + "".join(f"; {n}" for n in loaded.notes))
    if dry_run:
        print(config.to_toml(cfg))
        return 0
    folder = Path(cfg.run.folder)
    drawn_by(folder, cfg)
    grader = make_grader(cfg.verify)
    try:
        rank, done = (0, None) if cfg.run.regrade else draw(cfg, sets, folder)
        if rank == 0:
            report(folder, cfg, grade(cfg, sets, folder, grader))
        if done:
            done()
    finally:
        grader.close()
    return 0


def drawn_by(folder: Path, cfg: EvalConfig) -> None:
    """UserError if the generations there were drawn by another configuration."""
    own = json.dumps([cfg.model.folder, cfg.data.template, repr(cfg.sampling), cfg.run.seed], ensure_ascii=False)
    mark = folder / "drawn-by.json"
    if mark.exists() and mark.read_text() != own:
        raise UserError(
            f"{folder}: holds generations of another model, template, sampling or seed; take another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(own)


def draw(cfg: EvalConfig, sets: dict, folder: Path):
    """Every rank its share of the questions, each sample written as it ends: (rank, what to call in the end)."""
    from thinkmid.eval.generate import generate
    from thinkmid.train import shard

    ranks = shard.start()
    generate(cfg, sets, folder / "generations", ranks)
    ranks.barrier()
    return ranks.rank, ranks.barrier


def grade(cfg: EvalConfig, sets: dict, folder: Path, grader) -> dict:
    """Graded samples by set."""
    from thinkmid.eval.generate import stored
    from thinkmid.eval.summary import Graded
    from thinkmid.eval.tasks import base_answer, posed
    from thinkmid.text import CLOSE, OPEN

    out = {}
    for name, questions in sets.items():
        known = {q.id: q for q in questions}
        stored_rows = stored(folder / "generations", name)
        rows = [r for r in stored_rows if r["id"] in known and r["sample"] < cfg.run.samples]
        if len(rows) != (wanted := len(questions) * cfg.run.samples):
            raise UserError(
                f"{folder}/generations: {len(rows)} of {wanted} samples of {name}; without regrade it draws"
            )
        asked = [grader(r["text"], posed(known[r["id"]], r["sample"]).gold, known[r["id"]].question) for r in rows]
        found = []
        for r, pending in zip(rows, asked, strict=True):
            verdict, answer = pending(), grader.answer(r["text"])
            opened = cfg.data.template.endswith("-think") or OPEN in r["text"]
            score = None if verdict.value is None else float(verdict.value)
            found.append(
                Graded(
                    question=r["id"],
                    sample=r["sample"],
                    score=0.0 if opened and CLOSE not in r["text"] else score,
                    answer=None if answer is None else base_answer(known[r["id"]], r["sample"], answer),
                    truncated=r["finish"] in ("unclosed", "suffix"),
                    num_think=r["num_think"],
                    unclosed=opened and CLOSE not in r["text"],
                )
            )
        out[name] = found
    return out


def report(folder: Path, cfg: EvalConfig, graded: dict) -> None:
    """results.json, graded/*.jsonl and a table on the console."""
    from dataclasses import asdict

    from thinkmid.eval.summary import summarise
    from thinkmid.log import write_whole

    results = {name: summarise(rows, ks=cfg.run.ks, seed=cfg.run.seed) for name, rows in graded.items()}
    mean = sum(r["mean"] for r in results.values()) / len(results)
    about = {"model": cfg.model.folder, "template": cfg.data.template, "samples": cfg.run.samples}
    about |= {"temperature": cfg.sampling.temperature, "top_p": cfg.sampling.top_p, "max_new": cfg.sampling.max_new}
    for name, rows in graded.items():
        write_whole(folder / "graded" / f"{name}.jsonl", "".join(json.dumps(asdict(r)) + "\n" for r in rows))
    write_whole(folder / "results.json", json.dumps(about | {"mean": mean, "sets": results}, indent=2) + "\n")
    print(f"{'set':<20} {'mean':>6}  {'95 % interval':<14} {'unparsed':>8} {'truncated':>9} {'thinking':>8}")
    for name, r in results.items():
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        shares = f"{r['unparsed']:8.1%} {r['truncated']:9.1%} {r['mean_think']:8.0f}"
        print(f"{name:<20} {r['mean']:6.3f}  {interval:<14} {shares}")
    print(f"{'mean of the sets':<20} {mean:6.3f}   ({folder}/results.json)")


if __name__ == "__main__":
    config.run(main)
