"""Do thoughts cause the answers? What follows a thought is drawn again: after that thought, after none, after an idle
one and after one of another question.

torchrun --nproc-per-node 2 -m thinkmid.eval.thoughts configs/mini-eval.toml

CONFIG and flags are those of the evaluation (thinkmid.eval.run) whose stored generations are asked.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalConfig, sets_of
from thinkmid.rollout.grade.grader import make_grader
from thinkmid.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is asked about one set."""

    prompts: list[Prompt]
    about: dict  # numbers of samples and thoughts; notes


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(EvalConfig, argv, prog="torchrun -m thinkmid.eval.thoughts", description=__doc__)

    from thinkmid.eval.generate import check_folder

    if not cfg.sampling.max_suffix:
        raise UserError("sampling.max_suffix 0 leaves nothing to draw after a thought")
    sets = sets_of(cfg)
    if dry_run:
        print(config.to_toml(cfg))
        return 0
    folder = Path(cfg.run.folder)
    check_folder(folder, cfg)
    probes = probes_of(cfg, sets, folder / "generations")
    grader = make_grader(cfg.verify)
    try:
        rank, done = (0, None) if cfg.run.regrade else draw(cfg, probes, folder)
        if rank == 0:
            report(folder, cfg, probes, graded(cfg, sets, probes, folder, grader))
        if done:
            done()
    finally:
        grader.close()
    return 0


def probes_of(cfg: EvalConfig, sets: dict, folder: Path) -> dict[str, Probe]:
    """By set. UserError: samples are missing, the context is too short."""
    from thinkmid.data.questions import posed
    from thinkmid.eval import conditions, generate
    from thinkmid.eval.swap import swap
    from thinkmid.rollout.grade.answers import squeezed

    (shape, text), probes, opened = generate.model_of(cfg), {}, cfg.data.template.endswith("-think")
    for name, found in sets.items():
        rows = generate.whole(folder, name, found.questions, cfg.run.samples)
        thoughts = {(r["id"], r["sample"]): conditions.thought_of(r, text, opened) for r in rows}
        thoughts = {key: thought for key, thought in thoughts.items() if thought}
        known = {q.id: q for q in found.questions}
        golds = {(id, k): squeezed(posed(known[id], k).gold) for id, k in thoughts}
        donors = swap(golds, cfg.run.seed)
        asked = {(p.meta["id"], p.meta["sample"]): p for p in generate.prompts_of(cfg, found.questions, text, shape)}
        room = shape.max_positions - cfg.sampling.max_suffix
        about = {
            "num_samples": len(rows),
            "num_thoughts": len(thoughts),  # opened and closed
            "thoughts": len(thoughts) / len(rows),
            "reencoded": sum(not t.exact for t in thoughts.values()),  # whose ids may differ from the sampled ones
            "same_gold": sum(golds[a] == golds[b] for a, b in donors.items()),  # swapped, with equal gold answers
            "notes": [] if donors else [f"{name}: nothing to swap, fewer than two questions have a thought"],
        }
        prompts = conditions.prompts_of(asked, thoughts, donors, text, opened, room)
        probes[name] = Probe(prompts=prompts, about=about)
    return probes


def draw(cfg: EvalConfig, probes: dict[str, Probe], folder: Path):
    """Every rank its share of the prompts, each answer written as it ends: (rank, what to call in the end)."""
    from thinkmid.eval import conditions, generate
    from thinkmid.run.ranks import start_ranks

    ranks = start_ranks(cfg.engine.tensor_parallel)
    # the engine sees no closing tag in what it draws: its budget of thought is that of the answer
    sampling = replace(cfg.sampling, max_think=cfg.sampling.max_suffix, max_suffix=0, force_close=False)
    asked = {name: probe.prompts for name, probe in probes.items() if probe.prompts}
    if asked:
        with generate.alone(folder, ranks):
            generate.draw(cfg, asked, sampling, folder / "thoughts", ranks, conditions.KEYS)
    ranks.barrier()
    return ranks.rank, ranks.barrier


def graded(cfg: EvalConfig, sets: dict, probes: dict[str, Probe], folder: Path, grader) -> dict[str, dict]:
    """Set -> condition -> graded samples."""
    from thinkmid.eval import conditions, generate
    from thinkmid.eval.grade import grade
    from thinkmid.thoughts import CLOSE

    out = {}
    for name, probe in probes.items():
        have = {
            generate.key(r, conditions.KEYS): r for r in generate.stored(folder / "thoughts", name, conditions.KEYS)
        }
        wanted = [generate.key(p.meta, conditions.KEYS) for p in probe.prompts]
        if (there := sum(key in have for key in wanted)) != len(wanted):
            raise UserError(f"{folder}/thoughts: {there} of {len(wanted)} samples of {name}; without regrade it draws")
        out[name] = {}
        for condition in conditions.CONDITIONS:
            rows = [have[key] for key in wanted if key[2] == condition]
            for row in rows:
                row["finish"] = "reclosed" if CLOSE in row["text"] else row["finish"]
                row |= {"text": row["thought"] + row["text"], "num_think": row["given"]}
            if rows:
                out[name][condition] = grade(cfg.data.template, rows, sets[name].questions, grader)
    return out


def report(folder: Path, cfg: EvalConfig, probes: dict[str, Probe], graded: dict[str, dict]) -> None:
    """thoughts.json, graded-thoughts/*.jsonl and a table on the console."""
    from thinkmid.eval.generate import read_mark
    from thinkmid.files import write_whole

    for name, by_condition in graded.items():
        rows = [asdict(r) | {"condition": condition} for condition, found in by_condition.items() for r in found]
        write_whole(folder / "graded-thoughts" / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    about = {"model": cfg.model.folder, "content": read_mark(folder).get("model"), "template": cfg.data.template}
    results = about | summarise(probes, graded, cfg.run.seed)
    write_whole(folder / "thoughts.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    show(results)
    print(f"({folder}/thoughts.json)")


def summarise(probes: dict[str, Probe], graded: dict[str, dict], seed: int) -> dict:
    """Accuracy by condition and own minus each, by set and over the sets that have the condition."""
    from thinkmid.eval import stats
    from thinkmid.eval.conditions import CONDITIONS
    from thinkmid.eval.summary import as_row, compare_sets, proportion

    sets = {name: probe.about | {"conditions": {}, "own_minus": {}} for name, probe in probes.items()}
    mean: dict[str, dict] = {"conditions": {}, "own_minus": {}}
    for condition in CONDITIONS:
        found = {name: by_condition[condition] for name, by_condition in graded.items() if condition in by_condition}
        if not found:
            continue
        accuracy = {name: proportion(rows) for name, rows in found.items()}
        own = {name: graded[name]["own"] for name in found}
        pairs, over_sets = compare_sets(own, found, seed=seed)
        for name, rows in found.items():
            answers = {"unparsed": sum(r.answer is None for r in rows), "failed": sum(r.score is None for r in rows)}
            sets[name]["conditions"][condition] = as_row(accuracy[name]) | answers
            sets[name]["own_minus"][condition] = as_row(pairs[name])
        mean["conditions"][condition] = as_row(stats.average(list(accuracy.values()))) | {"num_sets": len(found)}
        mean["own_minus"][condition] = as_row(over_sets) | {"num_sets": len(found)}
    for part in [*sets.values(), mean]:
        part["own_minus"].pop("own", None)
    return {"mean": mean, "sets": sets}


def show(results: dict) -> None:
    from thinkmid.eval.conditions import CONDITIONS
    from thinkmid.eval.summary import in_words

    def cells(conditions: dict) -> str:
        means = [conditions.get(c, {}).get("mean") for c in CONDITIONS]
        return " ".join(f"{'-':>8}" if mean is None else f"{mean:8.3f}" for mean in means)

    print(f"{'accuracy after':<20} {'thoughts':>8} " + " ".join(f"{c:>8}" for c in CONDITIONS))
    for name, found in results["sets"].items():
        print(f"{name:<20} {found['thoughts']:8.1%} {cells(found['conditions'])}")
    print(f"{'mean of the sets':<20} {'':8} {cells(results['mean']['conditions'])}")
    for condition, d in results["mean"]["own_minus"].items():
        print(f"{f'own - {condition}':<20} {in_words(d)}")
    for found in results["sets"].values():
        for note in found["notes"]:
            print(note)


if __name__ == "__main__":
    config.run(main)
