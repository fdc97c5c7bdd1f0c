"""Evaluation: n samples of every question of every set, graded by rule; generations are kept and can be graded again.

torchrun --nproc-per-node 2 -m thinkmid.eval.run configs/mini-eval.toml
"""

from __future__ import annotations

import json
from pathlib import Path

from thinkmid import config
from thinkmid.eval.config import EvalConfig, sets_of
from thinkmid.rollout.grade.grader import make_grader


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(EvalConfig, argv, prog="torchrun -m thinkmid.eval.run", description=__doc__)

    from thinkmid.eval.generate import check_folder

    sets = sets_of(cfg)
    if dry_run:
        return plan(cfg, sets)
    folder = Path(cfg.run.folder)
    check_folder(folder, cfg)
    grader = make_grader(cfg.verify)
    try:
        rank, done = (0, None) if cfg.run.regrade else draw(cfg, sets, folder)
        if rank == 0:
            found = graded(cfg, sets, folder, grader)
            config.save_run(folder, cfg, config.environment())
            report(folder, cfg, sets, found)
        if done:
            done()
    finally:
        grader.close()
    return 0


def plan(cfg: EvalConfig, sets: dict) -> int:
    """What --dry-run prints: the configuration, memory and an estimate of time."""
    from thinkmid.eval.generate import prompts_of
    from thinkmid.model import weights
    from thinkmid.plan import memory
    from thinkmid.tokenizer import Tokenizer

    source = Path(cfg.model.folder)
    model_cfg, tokenizer = weights.read_config(source), Tokenizer.load(source)
    asked = [p for found in sets.values() for p in prompts_of(cfg, found.questions, tokenizer, model_cfg)]
    print(f"# {len(asked):,} samples of {sum(len(found.questions) for found in sets.values()):,} questions")
    return memory.dry_run_engine(cfg, model_cfg, cfg.sampling, max(len(p.tokens) for p in asked))


def draw(cfg: EvalConfig, sets: dict, folder: Path):
    """Every rank its share of the questions, each sample written as it ends: (rank, what to call in the end)."""
    from thinkmid.eval.generate import generate
    from thinkmid.run.ranks import start_ranks

    ranks = start_ranks(cfg.engine.tensor_parallel)
    generate(cfg, sets, folder / "generations", ranks)
    ranks.barrier()
    return ranks.rank, ranks.barrier


def graded(cfg: EvalConfig, sets: dict, folder: Path, grader) -> dict:
    """Graded samples by set."""
    from thinkmid.eval.generate import whole
    from thinkmid.eval.grade import grade

    out = {}
    for name, found in sets.items():
        rows = whole(folder / "generations", name, found.questions, cfg.run.samples)
        out[name] = grade(cfg.data.template, rows, found.questions, grader)
    return out


def report(folder: Path, cfg: EvalConfig, sets: dict, graded: dict) -> None:
    """results.json, graded/*.jsonl and a table on the console."""
    from dataclasses import asdict

    from thinkmid.eval.generate import PATH_ALONE, read_mark
    from thinkmid.eval.summary import summarise
    from thinkmid.files import write_whole

    results = {name: summarise(rows, ks=cfg.run.ks, seed=cfg.run.seed) for name, rows in graded.items()}
    mean = sum(r["mean"] for r in results.values()) / len(results)
    about = {"model": cfg.model.folder, "template": cfg.data.template, "samples": cfg.run.samples}
    about |= {"temperature": cfg.sampling.temperature, "top_p": cfg.sampling.top_p, "max_new": cfg.sampling.max_new}
    drawn_by = read_mark(folder)
    about["content"] = drawn_by.get("model")
    if not cfg.data.template.endswith("-think"):
        about["max_direct"] = cfg.sampling.max_think if PATH_ALONE in drawn_by else cfg.sampling.max_direct
    about["questions"] = {name: found.sha256 for name, found in sets.items()}
    for name, rows in graded.items():
        write_whole(folder / "graded" / f"{name}.jsonl", "".join(json.dumps(asdict(r)) + "\n" for r in rows))
    write_whole(folder / "results.json", json.dumps(about | {"mean": mean, "sets": results}, indent=2) + "\n")
    shares = ("unparsed", "truncated", "unclosed")
    print(f"{'set':<20} {'mean':>6}  {'95 % interval':<14} {' '.join(f'{s:>9}' for s in shares)} {'thinking':>8}")
    for name, r in results.items():
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        cells = " ".join(f"{r[s]:9.1%}" for s in shares)
        print(f"{name:<20} {r['mean']:6.3f}  {interval:<14} {cells} {r['mean_think']:8.0f}")
    print(f"{'mean of the sets':<20} {mean:6.3f}   ({folder}/results.json)")


if __name__ == "__main__":
    config.run(main)
