"""Run folders as the programs write them, small, with texts that a test chooses."""

import json


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rl_run(folder, kind="rlmt", start="", steps=3, groups=2, text="so it is", rollouts=True, **texts):
    """Rewards of the siblings of a group are 1, 0 and none; `texts` replace fields of every rollout."""
    jsonl(
        folder / "metrics.jsonl",
        [
            {"step": s, "reward": s / 10, "thinking_tokens": 20 + s, "generated_tokens": 100, "trunk_tokens": 50}
            for s in range(1, steps + 1)
        ],
    )
    reward = "[verify]" if kind == "rlpt" else "[judge]"
    (folder / "config.toml").write_text(f"[model]\nfolder = {json.dumps(str(start))}\n[sampling]\n[data]\n{reward}\n")
    for s in range(1, steps + 1) if rollouts else ():
        rows = [
            row(f"p{s}-{g}", i, reward, text, texts) for g in range(groups) for i, reward in enumerate((1, 0, None))
        ]
        jsonl(folder / "rollouts" / f"step-{s:06d}.jsonl", rows)
    return folder


def row(prompt_id, sibling, reward, text, texts):
    own = {"prompt": "the start", "thought": f"hm {sibling}", "suffix": text, "reference": "so it was", "why": "rule"}
    own |= {"prompt_id": prompt_id, **texts}
    verdict = {"value": reward, "why": own.pop("why")}
    finish = "eos" if sibling < 2 else "unclosed"
    numbers = {"sibling": sibling, "reward": reward, "tokens": 9, "thinking_tokens": 5, "version": 0}
    return own | numbers | {"verdict": verdict, "finish": finish}


def eval_run(folder, model="elsewhere", sets=("gsm8k",), mean=0.25, text="hm</think> 4", config=""):
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"mean": mean, "se": 0.05, "low": mean - 0.1, "high": mean + 0.15, "num_questions": 7, "num_samples": 2}
    shares = {"unparsed": 0.125, "truncated": 0.5, "unclosed": 0.25, "failed": 0.0625, "mean_think": 321.0}
    about = {"model": str(model), "template": "as-is", "samples": 2, "temperature": 0.6, "top_p": 0.95, "max_new": 96}
    results = about | {"mean": mean, "sets": dict.fromkeys(sets, numbers | shares)}
    (folder / "results.json").write_text(json.dumps(results))
    for name in sets:
        rows = [{"id": f"q{q}", "sample": k} for q in range(3) for k in range(2)]
        own = {"text": text, "finish": "eos", "tokens": 8, "num_think": 4}
        jsonl(folder / "generations" / f"{name}-000.jsonl", [row | own for row in rows])
        graded = [{"question": r["id"], "sample": r["sample"], "score": 1.0 - r["sample"], "answer": "4"} for r in rows]
        jsonl(folder / "graded" / f"{name}.jsonl", graded)
    if config:
        (folder / "config.toml").write_text(config)
    return folder
