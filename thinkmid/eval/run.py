"""Evaluation: n samples of every question of every set, graded by rule; generations are kept and can be graded again.

torchrun --nproc-per-node 2 -m thinkmid.eval.run configs/mini-eval.toml
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from thinkmid import config, hub
from thinkmid.data.questions import QuestionSet
from thinkmid.eval.config import EvalConfig, load_sets
from thinkmid.eval.generations import PATH_ALONE, check_folder, read_mark, whole
from thinkmid.eval.grade import grade
from thinkmid.eval.prompts import prompts_of
from thinkmid.eval.summary import Graded, summarise
from thinkmid.files import write_json, write_rows
from thinkmid.rollout.grade.grader import make_grader

SHARES = ("unparsed", "truncated", "unclosed")


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(EvalConfig, argv, prog="thinkmid eval", description=__doc__)

    # it imports torch, which --help does without
    from thinkmid.eval import generate

    sets, folder = load_sets(cfg.data), Path(cfg.run.folder)
    if dry_run:
        return generate.plan(cfg, sets)
    check_folder(folder, cfg)
    with closing(make_grader(cfg.verify)) as grader:
        if ranks := generate.start(cfg):
            model_cfg, wording = generate.model_of(cfg)
            room = model_cfg.max_positions
            prompts = {name: prompts_of(cfg, found.questions, wording, room) for name, found in sets.items()}
            if ranks.rank == 0:
                for name, found in sets.items():
                    for note in wording.notes(found.questions):
                        print(f"{name}: {note}")
            generate.draw(cfg, prompts, cfg.drawn, folder / "generations", ranks)
        if not ranks or ranks.rank == 0:
            graded = {}
            for name, found in sets.items():
                rows = whole(folder / "generations", name, found.questions, cfg.run.samples)
                graded[name] = grade(cfg, rows, found.questions, grader)
                write_rows(folder / "graded" / f"{name}.jsonl", map(asdict, graded[name]))
            results = results_of(cfg, sets, graded)
            write_json(folder / "results.json", results)
            config.save_run(folder, cfg, config.environment())
            show(results, folder)
        if ranks:
            ranks.barrier()
    return 0


def results_of(
    cfg: EvalConfig, sets: Mapping[str, QuestionSet], graded: Mapping[str, Sequence[Graded]]
) -> dict[str, Any]:
    """What results.json holds: what was evaluated and how, the mean of the sets, the numbers of each."""
    by_set = {
        name: summarise(rows, ks=cfg.run.ks or sorted({1, cfg.run.samples}), seed=cfg.run.seed)
        for name, rows in graded.items()
    }
    drawn_by = read_mark(Path(cfg.run.folder))
    about = {"model": hub.asked(cfg.model.folder), "template": cfg.data.template, "samples": cfg.run.samples}
    about |= {"temperature": cfg.sampling.temperature, "top_p": cfg.sampling.top_p, "max_new": cfg.sampling.max_new}
    about |= {"stop": stop} if (stop := cfg.drawn.stop) else {}
    about["content"] = drawn_by.get("model")
    if not cfg.data.template.endswith("-think"):
        about["max_direct"] = cfg.sampling.max_think if PATH_ALONE in drawn_by else cfg.sampling.max_direct
    about |= {name: drawn_by[f"data.{name}"] for name in ("system", "shots") if drawn_by.get(f"data.{name}")}
    about["questions"] = {name: found.sha256 for name, found in sets.items()}
    return about | {"mean": sum(r["mean"] for r in by_set.values()) / len(by_set), "sets": by_set}


def show(results: Mapping[str, Any], folder: Path) -> None:
    """The table on the console."""
    print(f"{'set':<20} {'mean':>6}  {'95 % interval':<14} {' '.join(f'{s:>9}' for s in SHARES)} {'thinking':>8}")
    for name, r in results["sets"].items():
        interval = f"{r['low']:.3f} to {r['high']:.3f}" if isfinite(r["low"]) else "-"
        cells = " ".join(f"{r[s]:9.1%}" for s in SHARES)
        print(f"{name:<20} {r['mean']:6.3f}  {interval:<14} {cells} {r['mean_think']:8.0f}")
    print(f"{'mean of the sets':<20} {results['mean']:6.3f}   ({folder}/results.json)")


if __name__ == "__main__":
    config.run(main)
