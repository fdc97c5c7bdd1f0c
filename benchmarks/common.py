"""What every benchmark shares: contenders timed in turn, ratios by round, one table, one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.rollout.engine.protocol import Engine, Sampling, requests_of
from thinkmid.types import Group, Prompt


def options(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone, without the table")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timings of each contender, after one that does not count"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--width", type=int, default=128, help="heads of size 32, half as many key heads; 2.75 width ffn"
    )
    return parser


def shape(layers: int, width: int, vocab: int = 640) -> ModelConfig:
    """The miniature's shape at another size."""
    return ModelConfig(
        kind="qwen3", vocab=vocab, width=width, layers=layers, heads=width // 32, kv_heads=width // 64, head_dim=32,
        ffn=width * 11 // 4, rope_theta=1000.0, norm_eps=1e-6, tied=False, max_positions=1024, eos_ids=(),
    )  # fmt: skip


def random_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """No matrix at zero, so that every one of them shows in the outputs that the gates compare."""
    model, rng = weights.build(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1) if p.ndim == 1 else p.normal_(0, p.shape[1] ** -0.5, generator=rng)
    return model


def interleave(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round. They take turns, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if r:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Ratios of the timings of the same round: median, lowest and highest."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def gemms_s(cfg: ModelConfig, num_rows: int, num_head_rows: int) -> float:
    """Seconds of the weights' matrix products alone, for so many rows through the trunk and the head."""
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    block = [(q + 2 * kv, cfg.width), (cfg.width, q), (2 * cfg.ffn, cfg.width), (cfg.width, cfg.ffn)]
    pairs = [(torch.randn(num_rows, d), torch.randn(n, d), cfg.layers) for n, d in block]
    pairs.append((torch.randn(num_head_rows, cfg.width), torch.randn(cfg.vocab, cfg.width), 1))

    def once():
        began = time.perf_counter()
        for x, w, times in pairs:
            for _ in range(times):
                x @ w.T
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(9))


def machine() -> str:
    """What the figures were measured on. Load is what the system reports, ours included."""
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    load = os.getloadavg()[0]
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}"
    )


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def report(title: str, seconds: dict[str, list[float]], lines: list[str], result: dict, *, only_json: bool) -> None:
    """Table of medians, lines of findings, and the whole of it as one line of JSON."""
    if not only_json:
        print(f"{title}\n{machine()}")
        for name, s in seconds.items():
            print(f"  {name:<34} {statistics.median(s):8.3f} s   ({min(s):.3f} to {max(s):.3f})")
        print("\n".join(lines))
    print(json.dumps({"benchmark": title, "machine": machine(), "seconds": seconds, **result}))


def refuse(why: str) -> int:
    print(f"refused, results are wrong: {why}", file=sys.stderr)
    return 1


def collect(engine: Engine, prompts: Sequence[Prompt], seeds_P_G: list[list[int]], sampling: Sampling) -> list[Group]:
    """One sample for each seed, as groups in the order of the prompts."""
    steps = engine.generate(requests_of(prompts, seeds_P_G), sampling)
    samples = {request.key: sample for step in steps for request, sample in step}
    return [
        Group(prompt=prompt, samples=[samples[p, g] for g in range(len(seeds_P_G[p]))])
        for p, prompt in enumerate(prompts)
    ]
