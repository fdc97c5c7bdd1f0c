"""Do thoughts cause the answers? What follows a thought is drawn again: after that thought, after none, after an idle
one and after one of another question.

torchrun --nproc-per-node 2 -m thinkmid.eval.thoughts configs/mini-eval.toml

CONFIG and flags are those of the evaluation (thinkmid.eval.run) whose stored generations are probed.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from thinkmid import config, hub
from thinkmid.data.questions import Question, posed
from thinkmid.data.wording import Wording
from thinkmid.errors import UserError
from thinkmid.eval import conditions, stats
from thinkmid.eval.conditions import CONDITIONS, KEYS
from thinkmid.eval.config import EvalConfig, load_sets
from thinkmid.eval.generations import check_folder, key, read_mark, stored, whole
from thinkmid.eval.grade import grade
from thinkmid.eval.prompts import prompts_of
from thinkmid.eval.summary import Graded, as_row, compare_sets, in_words, tabulate
from thinkmid.eval.swap import swap
from thinkmid.files import write_json, write_rows
from thinkmid.rollout.grade.answers import squeezed
from thinkmid.rollout.grade.grader import Grader, make_grader
from thinkmid.thoughts import CLOSE
from thinkmid.types import Prompt


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(EvalConfig, argv, prog="thinkmid thoughts", description=__doc__)

    # it imports torch, which --help does without
    from thinkmid.eval import generate

    if not cfg.sampling.max_suffix:
        raise UserError("sampling.max_suffix 0 leaves nothing to draw after a thought")
    sets, folder = load_sets(cfg.data), Path(cfg.run.folder)
    if dry_run:
        print(config.to_toml(cfg))
        return 0
    check_folder(folder, cfg)
    model_cfg, wording = generate.model_of(cfg)
    room = model_cfg.max_positions
    probes = {name: probe_of(cfg, name, found.questions, wording, room) for name, found in sets.items()}
    with closing(make_grader(cfg.verify)) as grader:
        if ranks := generate.start(cfg):
            # the engine sees no closing tag in what it draws: its budget of thought is that of the answer
            sampling = replace(cfg.drawn, max_think=cfg.sampling.max_suffix, max_suffix=0, force_close=False)
            prompts = {name: probe.prompts for name, probe in probes.items() if probe.prompts}
            generate.draw(cfg, prompts, sampling, folder / "thoughts", ranks, KEYS)
        if not ranks or ranks.rank == 0:
            graded = {name: grade_set(cfg, name, probes[name], sets[name].questions, grader) for name in sets}
            for name, by_condition in graded.items():
                rows = (asdict(g) | {"condition": c} for c, samples in by_condition.items() for g in samples)
                write_rows(folder / "graded-thoughts" / f"{name}.jsonl", rows)
            content = read_mark(folder).get("model")
            about = {"model": hub.asked(cfg.model.folder), "content": content, "template": cfg.data.template}
            results = about | summarise(probes, graded, cfg.run.seed)
            write_json(folder / "thoughts.json", results)
            show(results)
            print(f"({folder}/thoughts.json)")
        if ranks:
            ranks.barrier()
    return 0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The prompts that probe one set."""

    prompts: list[Prompt]
    about: dict[str, Any]  # numbers of samples and thoughts; notes


def probe_of(cfg: EvalConfig, name: str, questions: Sequence[Question], wording: Wording, max_positions: int) -> Probe:
    """The probe of a set whose generations are there. UserError: samples are missing, the context is too short."""
    tokenizer, prompts = wording.tokenizer, prompts_of(cfg, questions, wording, max_positions)
    opened = tokenizer.opens(prompts[0].tokens)
    rows = whole(Path(cfg.run.folder, "generations"), name, questions, cfg.run.samples)
    found = {(r["id"], r["sample"]): conditions.thought_of(r, tokenizer, opened) for r in rows}
    thoughts = {sample: thought for sample, thought in found.items() if thought}
    known = {q.id: q for q in questions}
    golds = {(id, k): squeezed(posed(known[id], k).gold) for id, k in thoughts}
    donors = swap(golds, cfg.run.seed)
    asked = {(p.meta["id"], p.meta["sample"]): p for p in prompts}
    room = max_positions - cfg.sampling.max_suffix
    about = {
        "num_samples": len(rows),
        "num_thoughts": len(thoughts),  # opened and closed
        "thoughts": len(thoughts) / len(rows),
        "reencoded": sum(not t.exact for t in thoughts.values()),  # their ids may differ from the sampled ones
        "same_gold": sum(golds[a] == golds[b] for a, b in donors.items()),  # swapped, with equal gold answers
        "notes": [] if donors else [f"{name}: nothing to swap, fewer than two questions have a thought"],
    }
    return Probe(prompts=conditions.prompts_of(asked, thoughts, donors, tokenizer, opened, room), about=about)


def grade_set(
    cfg: EvalConfig, name: str, probe: Probe, questions: Sequence[Question], grader: Grader
) -> dict[str, list[Graded]]:
    """Graded samples by condition. UserError: some are not drawn yet."""
    folder = Path(cfg.run.folder, "thoughts")
    have = {key(row, KEYS): row for row in stored(folder, name, KEYS)}
    wanted = [key(p.meta, KEYS) for p in probe.prompts]
    if (there := sum(sample in have for sample in wanted)) != len(wanted):
        raise UserError(f"{folder}: {there} of {len(wanted)} samples of {name}; without regrade it draws")
    graded = {}
    for condition in CONDITIONS:
        rows = [have[sample] for sample in wanted if sample[2] == condition]
        for row in rows:
            row["finish"] = "reclosed" if CLOSE in row["text"] else row["finish"]
            row |= {"text": row["thought"] + row["text"], "num_think": row["given"]}
        if rows:
            graded[condition] = grade(cfg, rows, questions, grader)
    return graded


def summarise(
    probes: Mapping[str, Probe], graded: Mapping[str, Mapping[str, list[Graded]]], seed: int
) -> dict[str, Any]:
    """Accuracy by condition and own minus each, by set and over the sets that have the condition."""
    sets = {name: probe.about | {"conditions": {}, "own_minus": {}} for name, probe in probes.items()}
    mean: dict[str, Any] = {"conditions": {}, "own_minus": {}}
    for condition in CONDITIONS:
        found = {name: by_condition[condition] for name, by_condition in graded.items() if condition in by_condition}
        if not found:
            continue
        accuracy = {n: stats.proportion(stats.mean_at(tabulate(rows).scores)) for n, rows in found.items()}
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


def show(results: Mapping[str, Any]) -> None:
    """The tables on the console: accuracies by set and condition, differences over all sets, notes."""
    print(f"{'accuracy after':<20} {'thoughts':>8} " + " ".join(f"{c:>8}" for c in CONDITIONS))
    for name, found in results["sets"].items():
        print(f"{name:<20} {found['thoughts']:8.1%} {cells(found['conditions'])}")
    print(f"{'mean of the sets':<20} {'':8} {cells(results['mean']['conditions'])}")
    for condition, difference in results["mean"]["own_minus"].items():
        print(f"{f'own - {condition}':<20} {in_words(difference)}")
    for found in results["sets"].values():
        for note in found["notes"]:
            print(note)


def cells(accuracies: Mapping[str, Mapping[str, Any]]) -> str:
    means = [accuracies.get(condition, {}).get("mean") for condition in CONDITIONS]
    return " ".join(f"{'-':>8}" if mean is None else f"{mean:8.3f}" for mean in means)


if __name__ == "__main__":
    config.run(main)
