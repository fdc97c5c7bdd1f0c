"""A whole RL step: ours, TRL's GRPOTrainer and a plain loop of padded PyTorch on the same model, prompts and rewards.

    make rlmt && .venv/bin/python -m pip install --no-deps trl==1.16.0 accelerate==1.15.0
    .venv/bin/python -m benchmarks.rlmt --out benchmarks/results/rlmt-cpu.json --picture docs/rlmt-benchmark.svg

A step draws some samples for each of some prompts, rewards them, forms DrGRPO's gradient without KL, and takes one
AdamW step. Ours is the program's own loop (thinkmid.train.rl.train) with the native engine, its checks and its logs.
TRL runs with loss_type dr_grpo, beta 0, its whole batch in one forward, no recomputed activations, and transformers'
generate. The plain loop is what a competent user writes: transformers' generate, one padded forward with the logits of
completions alone, AdamW. No token ends a sample, so all draw the same number of tokens and nobody pads: what ragged
lengths cost a padded batch is not in these figures. The reward is the parity of the sum of the drawn token ids.

Each contender runs in a process of its own for a few steps, the first of which does not count; processes take turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.rollout import generate, load_peer
from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.files import read_rows, write_json, write_rows
from thinkmid.model import hf_config, weights
from thinkmid.rollout.verdict import Verdict
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Sample, Tally

MINI = Path("runs/mini-base/export")  # its tokenizer, and the shape of the first setting
TEXTS = Path("runs/mini-data/questions-train.jsonl")
CONTENDERS = ("thinkmid", "TRL", "plain loop")
RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Setting:
    prompts: int
    siblings: int
    prefix: int  # tokens of a prompt
    new: int  # tokens of a sample
    layers: int = 0  # 0: the miniature's own shape
    dead: int = 0  # of the prompts, those whose samples all get the reward 0


SETTINGS = {
    "miniature, 0.5 M": Setting(prompts=16, siblings=8, prefix=60, new=40),
    "10 M, P=512 G=16": Setting(prompts=4, siblings=16, prefix=512, new=128, layers=6),
    "10 M, half of the groups dead": Setting(prompts=4, siblings=16, prefix=512, new=128, layers=6, dead=2),
}


class Steps:
    """Seconds between calls, one call a step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._at = time.perf_counter()

    def __call__(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._at)
        self._at = now


def reward_of(is_dead: bool, tokens: list[int]) -> float:
    return 0.0 if is_dead else float(sum(tokens) % 2)


class Parity:
    """The reward of our loop, judged at once."""

    def __init__(self, dead: set[str], new: int, steps: Steps):
        self._dead, self._new, self._steps = dead, new, steps

    def __call__(self, prompt: Prompt, sample: Sample) -> Verdict:
        assert len(sample.tokens) == self._new
        return Verdict(int(reward_of(prompt.id in self._dead, sample.tokens.tolist())), "parity")

    def finish(self, step: int) -> Tally:
        self._steps()
        return {}

    def close(self) -> None:
        pass


def run_ours(s: Setting, folder: Path, num_steps: int) -> list[float]:
    from thinkmid.train import rl
    from thinkmid.train.config import RLPTConfig
    from thinkmid.train.job import Inputs, Source, open_job
    from thinkmid.train.sampler import Sampler

    run = tempfile.mkdtemp(dir=folder)
    flags = {
        "run.folder": run, "run.steps": num_steps, "run.save_every": num_steps, "run.rollouts_every": 0,
        "model.folder": folder / "model", "data.path": folder / "prompts.jsonl", "sampling.temperature": 1.0,
        "sampling.max_think": s.new, "sampling.max_suffix": 1, "batch.prompts": s.prompts, "loss.denom": s.new,
        "batch.siblings": s.siblings, "batch.pack_tokens": 8192, "optim.lr": RATE, "optim.warmup": 0,
    }  # fmt: skip
    cfg, _ = config.load(RLPTConfig, [f"--{name}={value}" for name, value in flags.items()], prog="", description="")
    source = Source.read(cfg.model.folder)
    source = replace(source, tokenizer=replace(source.tokenizer, eos_ids=(), pieces=[b"."] * source.model_cfg.vocab))
    rows = read_rows(folder / "prompts.jsonl")
    prompts = [Prompt(id=row["prompt"], tokens=row["tokens"], meta={}) for row in rows]
    ranks, interrupt = rl.start(cfg, source)
    job = open_job(cfg, source, Inputs(data="", num_steps=num_steps), ranks, interrupt)
    steps = Steps()
    reward = Parity({row["prompt"] for row in rows if row["is_dead"]}, s.new, steps)
    rl.train(job, cfg, Sampler(job, cfg, rl.open_policy(job, cfg, s.prefix).engine, reward), prompts)
    return steps.seconds


def run_trl(s: Setting, folder: Path, num_steps: int) -> list[float]:
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    rows = read_rows(folder / "prompts.jsonl")
    dead, steps = {row["prompt"] for row in rows if row["is_dead"]}, Steps()

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert {len(ids) for ids in completion_ids} == {s.new}
        return [reward_of(p in dead, ids) for p, ids in zip(prompts, completion_ids, strict=True)]

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps()

    options = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=s.prompts * s.siblings, gradient_accumulation_steps=1, steps_per_generation=1,
        num_generations=s.siblings, max_completion_length=s.new, temperature=1.0, beta=0.0, loss_type="dr_grpo",
        scale_rewards="none", learning_rate=RATE, max_steps=num_steps, save_strategy="no", logging_strategy="no",
        report_to=[], disable_tqdm=True, shuffle_dataset=False, dataloader_pin_memory=False,
        model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=options,
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows] * num_steps),
        processing_class=peer_tokenizer(folder),
        callbacks=[Ends()],
    )
    trainer.train()
    return steps.seconds


def run_plain(s: Setting, folder: Path, num_steps: int) -> list[float]:
    rows, model = read_rows(folder / "prompts.jsonl"), load_peer(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    prompts = torch.tensor([row["tokens"] for row in rows]).repeat_interleave(s.siblings, 0)  # (B, p)
    is_dead = [row["is_dead"] for row in rows for _ in range(s.siblings)]
    steps = Steps()
    for _ in range(num_steps):
        completions = generate(model, prompts, s.new, do_sample=True).clone()  # (B, n), for autograd
        pairs = zip(is_dead, completions.tolist(), strict=True)
        rewards = torch.tensor([reward_of(dead, ids) for dead, ids in pairs]).view(-1, s.siblings)
        adv = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)  # (B, 1)
        whole = torch.cat([prompts, completions], 1)
        logits = model(whole, logits_to_keep=s.new + 1).logits[:, :-1]  # (B, n, V)
        logp = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
        ratio = (logp - logp.detach()).exp()
        loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).sum() / (len(whole) * s.new)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps()
    return steps.seconds


def peer_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer, whose end token is beyond the model's vocabulary and is never drawn."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def prepare(s: Setting, folder: Path) -> None:
    """A model of random weights, and prompts of exactly s.prefix tokens."""
    shape = replace(hf_config.read_config(MINI), eos_ids=())
    if s.layers:
        shape = common.shape(s.layers, 64 * s.layers, shape.vocab)
    model = weights.stream(common.random_model(shape))
    weights.save(folder / "model", shape, model, dtype=torch.float32, extra_files=MINI)
    (folder / "model" / "generation_config.json").write_text("{}")  # no token ends a sample
    tokenizer = Tokenizer.load(MINI)
    words = " ".join(row["question"] for row in read_rows(TEXTS)).split()
    rng, rows = random.Random(0), []
    while len(rows) < s.prompts:
        start = rng.randrange(len(words) - s.prefix)
        for end in range(start + 1, start + s.prefix):
            text = " ".join(words[start:end])
            tokens = tokenizer.encode(text)
            if len(tokens) >= s.prefix:
                break
        if len(tokens) == s.prefix:
            rows.append({"prompt": text, "tokens": tokens, "is_dead": len(rows) < s.dead})
    write_rows(folder / "prompts.jsonl", rows)


def measure(name: str, num_rounds: int, num_steps: int) -> dict[str, list[float]]:
    """Seconds a step of each contender, first steps left out."""
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(SETTINGS[name], Path(folder))
        for _ in range(num_rounds):
            for contender in CONTENDERS:
                flags = ["--contender", contender, "--setting", name, "--folder", folder, "--steps", str(num_steps)]
                command = [sys.executable, "-m", "benchmarks.rlmt", *flags]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise UserError(f"{contender}, {name}: ended with code {done.returncode}")
                seconds[contender] += json.loads(done.stdout.splitlines()[-1])[1:]
    return seconds


def describe(name: str, seconds: dict[str, list[float]], tokens: int) -> list[str]:
    lines = [name]
    ours = statistics.median(seconds["thinkmid"])
    for contender, each in seconds.items():
        middle = statistics.median(each)
        spread = f"({min(each):.3f} to {max(each):.3f})"
        lines.append(f"  {contender:<12} {middle:8.3f} s a step {spread:<18} {tokens / middle:8.0f} drawn tokens/s")
        if contender != "thinkmid":
            lines[-1] += f"   ours is {middle / ours:.2f} times as fast"
    return lines


def draw(result: dict[str, Any], out: Path) -> None:
    """Bars: how many times longer each contender's step takes than ours, by setting."""
    from thinkmid.run.curves import figure_for

    with figure_for(out) as figure:
        figure.set_size_inches(3.9, 2.9)
        axis = figure.add_subplot()
        for c, contender in enumerate(CONTENDERS):
            medians = [{who: statistics.median(s) for who, s in of.items()} for of in result["seconds"].values()]
            ratios = [of[contender] / of["thinkmid"] for of in medians]
            places = np.arange(len(ratios)) + 0.27 * (c - 1)
            axis.bar_label(axis.bar(places, ratios, 0.25, label=contender), fmt="%.1f", padding=1, fontsize=7)
        axis.set_xticks(range(len(result["seconds"])), [name.replace(", ", ",\n") for name in result["seconds"]])
        axis.set_ylabel("seconds a step, ours = 1")
        figure.legend(loc="outside upper left", frameon=False, ncols=3)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of a turn; the first does not count")
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="JSON of the result")
    parser.add_argument("--picture", type=Path, help="bar chart")
    # one turn of one contender in a prepared folder
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    settings = args.setting or list(SETTINGS)
    if args.folder:
        torch.manual_seed(0)
        run = dict(zip(CONTENDERS, (run_ours, run_trl, run_plain), strict=True))[args.contender]
        print("\n" + json.dumps(run(SETTINGS[settings[0]], args.folder, args.steps)))
        return
    if not (MINI / "config.json").exists():
        raise UserError(f"{MINI}: no model; make rlmt makes it")
    result: dict[str, Any] = {"machine": common.machine(), "seconds": {}}
    for name in settings:
        s = SETTINGS[name]
        result["seconds"][name] = measure(name, args.rounds, args.steps)
        print("\n".join(describe(name, result["seconds"][name], s.prompts * s.siblings * s.new)), flush=True)
    if args.out:
        write_json(args.out, result)
    if args.picture:
        draw(result, args.picture)


if __name__ == "__main__":
    config.run(main)
