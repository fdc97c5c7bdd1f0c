"""Before a run: batch arithmetic, a memory plan by phase, how long it may take."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch

from thinkmid import config
from thinkmid.errors import counted
from thinkmid.model.hf_config import read_config
from thinkmid.model.transformer import ModelConfig, fresh_model_cfg
from thinkmid.plan import time
from thinkmid.plan.footprint import mask_span, outside, scoring, training_phase
from thinkmid.plan.time import BYTES, block_parameters, cache_bytes
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling
from thinkmid.rollout.judge.ask import resident_engine

H100_BYTES = 84.9e9  # an 80 GB card, as the driver reports it
VLLM_RESIDUE = 3e9  # 8B model on an H100, by users' reports; stays allocated during sleep


def pair_cost(model_cfg: ModelConfig) -> float:
    """FLOPs of one query-key pair over all layers, in those of one token's trip through the blocks."""
    return time.pair_flops(model_cfg) / (2 * block_parameters(model_cfg))


def device_of(dtype: str, engine: EngineConfig | None = None) -> str:
    """Which device a plan is for: a configuration for GPUs may be planned on a laptop."""
    for_gpus = dtype == "bfloat16" or (engine is not None and (engine.kind == "vllm" or engine.dtype == "bfloat16"))
    return "cuda" if for_gpus or torch.cuda.is_available() else "cpu"


def rollout_phase(
    model_cfg: ModelConfig, sampling: Sampling, engine: EngineConfig, max_prefix: int, rows: int, prompts: int = 0
) -> dict[str, float]:
    """Bytes per rank while sampling, by owner. prompts: whose prefixes are stored once each; 0: one for each row."""
    token = cache_bytes(model_cfg, engine.dtype)
    weights = BYTES[engine.dtype] * model_cfg.num_parameters / engine.tensor_parallel
    logits = {"logits and their distribution": rows * model_cfg.vocab * (4 + 4 + 8 + 8)}
    if engine.kind == "vllm":
        held = engine.kv_gb * 1e9 / (token / engine.tensor_parallel)
        cache = {f"KV cache (engine.kv_gb: {held:,.0f} tokens)": engine.kv_gb * 1e9}
        graphs = {"CUDA graphs and workspace (estimate)": VLLM_RESIDUE if engine.compile else 0}
        return {f"engine weights ({engine.dtype})": weights} | cache | logits | graphs
    return {
        f"engine weights ({engine.dtype})": weights,
        "KV cache": (rows * sampling.max_new + min(prompts or rows, rows + 1) * max_prefix) * token,
        **logits,
    }


def dry_run_rl(cfg: Any, model_cfg: ModelConfig, max_prefix: int, judge: dict[str, float]) -> int:
    """Prints the plan of an RLConfig; exit code 0. judge: bytes per rank of an engine that stays awake beside the
    policy's, by owner."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    b, s = cfg.batch, cfg.sampling
    samples = b.prompts * b.siblings
    device, copies = device_of(cfg.model.dtype, cfg.engine), cfg.keeps_frozen + bool(cfg.ema_decay)
    copies *= not cfg.model.lora_rank  # the base without its adapters is no copy
    # the tokens of a group's prefix need no mask, but where a window hides a part of it
    replies, longest = b.siblings * s.max_new, max_prefix + s.max_new
    span = replies * longest // (max_prefix + replies) * b.share_prefix
    prefixes = max_prefix**2 // (max_prefix + replies)
    span = mask_span(model_cfg, span, span + prefixes if b.share_prefix else longest, longest)
    train = training_phase(model_cfg, cfg.model, b.pack_tokens, world, copies, device=device, span=span)
    if cfg.loss.next_token:
        second = BYTES[cfg.model.dtype] * model_cfg.width * (model_cfg.vocab + b.pack_tokens)
        train["head: gradients of the policy loss beside those of the next-token loss"] = second
    rows = min(s.max_batch, -(-samples // world))
    rollout = rollout_phase(model_cfg, s, cfg.engine, max_prefix, rows, -(-b.prompts // world))
    resident = {
        k: v for k, v in train.items() if "master" in k or "frozen" in k or ("moments" in k and not cfg.optim.offload)
    }
    resident |= outside(device, world)
    check = {}
    if cfg.engine.check_every:
        scored = min(cfg.engine.check_samples * s.max_new, b.pack_tokens)
        check["samples scored again (engine.check_every)"] = scoring(model_cfg, cfg.model, scored, world, device)
    gathered = {"one gathered tensor": BYTES[cfg.engine.dtype] * model_cfg.vocab * model_cfg.width}
    if cfg.model.lora_rank:  # as it came, merged in fp32, and in the engine's dtype
        merged = (BYTES[cfg.model.dtype] + 4 + BYTES[cfg.engine.dtype]) * model_cfg.ffn * model_cfg.width
        gathered["one gathered tensor"] = max(merged, gathered["one gathered tensor"])
    always = ("weights", "graphs", "KV")
    judge_kept = _kept(judge, always)
    resident |= judge_kept
    sync = resident | _kept(rollout, ("weights", "graphs")) | gathered
    sleeps = cfg.engine.kind == "vllm" and cfg.engine.sleep
    training = train | judge_kept | _kept(rollout, ("graphs",) if sleeps else always)
    phases = {"sync": sync, "rollout": resident | rollout | check | judge, "training": training}
    arithmetic = _rl_arithmetic(cfg, max_prefix, world) + _cache_room(cfg, model_cfg, max_prefix, rows)
    _print(cfg, model_cfg, arithmetic, phases, device)
    if cfg.model.dtype == "bfloat16":
        _print_time(time.of_rl(cfg, model_cfg, max_prefix, world), cfg.run.steps, "step")
    return 0


def _rl_arithmetic(cfg: Any, max_prefix: int, world: int) -> list[str]:
    b, s = cfg.batch, cfg.sampling
    samples = b.prompts * b.siblings
    shared = b.prompts * max_prefix + samples * s.max_new
    return [
        f"P {b.prompts} prompts x G {b.siblings} siblings = {samples} samples a step, "
        f"{-(-b.prompts // world)} prompts a rank ({counted(world, 'rank')})",
        f"loss of one token is divided by P*G*denom = {b.prompts // b.updates} * {b.siblings} * {cfg.loss.denom:g} "
        f"= {b.prompts // b.updates * b.siblings * cfg.loss.denom:g}"
        + (f" in each of {b.updates} updates" if b.updates > 1 else ""),
        f"at most {samples * s.max_new:,} new tokens a step, {-(-samples * s.max_new // world):,} a rank",
        f"at most {shared:,} tokens through the layers, prefixes once a {'group' if b.share_prefix else 'sample'}; "
        f"{-(-shared // (world * b.pack_tokens))} packs of {b.pack_tokens:,} a rank",
    ]


def dry_run_sft(cfg: Any) -> int:
    """Prints the plan of an SFTConfig; exit code 0."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    folder, fresh = cfg.model.folder, cfg.fresh
    model_cfg = read_config(folder) if folder else fresh_model_cfg(fresh, fresh.vocab, ())
    arithmetic = [
        f"{cfg.data.batch_tokens:,} tokens a step, {-(-cfg.data.batch_tokens // world):,} a rank "
        f"({counted(world, 'rank')}), packs of {cfg.data.pack_tokens:,}",
        f"{cfg.run.steps:,} steps: {cfg.run.steps * cfg.data.batch_tokens:,} tokens",
    ]
    device = device_of(cfg.model.dtype)
    span = mask_span(model_cfg, 0, cfg.data.max_len, cfg.data.max_len)
    training = training_phase(model_cfg, cfg.model, cfg.data.pack_tokens, world, device=device, span=span)
    _print(cfg, model_cfg, arithmetic, {"training": training}, device)
    if cfg.model.dtype == "bfloat16":
        _print_time(time.of_sft(cfg, model_cfg, world), cfg.run.steps, "step")
    return 0


def dry_run_engine(cfg: Any, model_cfg: ModelConfig, sampling: Sampling, max_prompt: int) -> int:
    """Prints the plan of a program that only samples: annotation, evaluation; exit code 0."""
    rows = sampling.max_batch
    room = f"prompts of at most {max_prompt:,} tokens, {sampling.max_new:,} new"
    device = device_of(cfg.engine.dtype, cfg.engine)
    owners = rollout_phase(model_cfg, sampling, cfg.engine, max_prompt, rows) | outside(device, 1)
    _print(cfg, model_cfg, [f"{rows} answers at a time a rank, {room}"], {"rollout": owners}, device)
    if cfg.engine.dtype == "bfloat16":
        plan = time.of_answers(model_cfg, cfg.engine, sampling, prompts=1000, siblings=1, prompt=max_prompt)
        _print_time(plan, 0, "thousand answers of a rank")
    return 0


def judge_phase(cfg: Any) -> dict[str, float]:
    """Bytes per rank of an RLMTConfig's resident judge, by owner; {} for others."""
    if not cfg.reward.judge or cfg.judge.kind != "resident":
        return {}
    model_cfg = read_config(cfg.judge.folder)
    engine, longest = resident_engine(cfg.judge, cfg.engine, cfg.sampling, model_cfg)
    owners = rollout_phase(model_cfg, cfg.sampling, engine, longest - cfg.sampling.max_new, cfg.sampling.max_batch)
    return {f"judge's {owner}": size for owner, size in owners.items()}


def _kept(rollout: dict[str, float], words: Sequence[str]) -> dict[str, float]:
    """What of the engine's memory stays in another phase. The native engine's cache lives for one call."""
    return {k: v for k, v in rollout.items() if any(word in k for word in words) and not k.endswith("KV cache")}


def _cache_room(cfg: Any, model_cfg: ModelConfig, max_prefix: int, rows: int) -> list[str]:
    """A line where vLLM's cache does not hold all sequences that run at a time, and what to set if it thrashes."""
    engine, token = cfg.engine, cache_bytes(model_cfg, cfg.engine.dtype) / cfg.engine.tensor_parallel
    # a prefix is stored once for its siblings
    whole, half = (max_prefix / cfg.batch.siblings + share * cfg.sampling.max_new for share in (1, 0.5))
    held = engine.kv_gb * 1e9 / token
    if engine.kind != "vllm" or rows * whole <= held:
        return []
    room = f"{rows} sequences of full length exceed the KV cache, which holds {int(held / whole)}"
    if rows * half <= held:
        return [f"{room}; {int(held / half)} of half that length, so preemption is expected for long ones only"]
    enough = math.ceil(rows * half * token / 1e9)
    advice = f"sampling.max_batch {int(held / half)} or engine.kv_gb {enough} holds all at half length"
    return [f"warning: {room}: vLLM preempts others and reads them again; {advice}"]


def _print(
    cfg: Any, model_cfg: ModelConfig, arithmetic: list[str], phases: dict[str, dict[str, float]], device: str
) -> None:
    print(config.to_toml(cfg))
    sizes = f"{model_cfg.layers} layers, width {model_cfg.width}, vocabulary {model_cfg.vocab:,}"
    for line in (f"model: {model_cfg.num_parameters:,} parameters, {sizes}", *arithmetic):
        print(f"# {line}")
    where = {"cpu": "on the CPU", "cuda": "on a GPU"}[device]
    print(f"# memory per rank {where}, by formula (thinkmid/plan/memory.py, footprint.py)")
    for phase, owners in phases.items():
        print(f"#   {phase:<10}{_size(sum(owners.values())):>10}")
        for owner, size in owners.items():
            print(f"#   {_size(size):>20}  {owner}")
    if device == "cuda" and (most := max(sum(owners.values()) for owners in phases.values())) > H100_BYTES:
        world = int(os.environ.get("WORLD_SIZE", 1))
        print(f"# warning: {_size(most)} a GPU ({world} ranks; WORLD_SIZE); an 80 GB H100 has {_size(H100_BYTES)}")


def _print_time(phases: dict[str, float], steps: int, unit: str) -> None:
    print(f"# time on H100s, an estimate and no measurement: {time.ASSUMED} (thinkmid/plan/time.py)")
    for phase, seconds in phases.items():
        print(f"#   {seconds:12,.1f} s a {unit}  {phase}")
    if steps:
        print(f"#   {steps * sum(phases.values()) / 3600:12,.1f} h for {steps:,} steps")


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
