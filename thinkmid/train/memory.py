"""Before a run: batch arithmetic, a memory plan by phase, how long it may take."""

from __future__ import annotations

import os

from thinkmid import config
from thinkmid.kernels.head import CHUNK_BYTES
from thinkmid.model.transformer import ModelConfig
from thinkmid.train import duration
from thinkmid.train.duration import BYTES, block_parameters, cache_bytes

VLLM_RESIDUE = 3e9  # of an 8B model on an H100, by its users' reports; stays while it sleeps


def pair_cost(shape: ModelConfig) -> float:
    """FLOPs of one query-key pair over all layers, in those of one token's trip through the blocks."""
    return duration.pair_flops(shape) / (2 * block_parameters(shape))


def activation_bytes(shape: ModelConfig, dtype: str, checkpointing: bool) -> int:
    """Kept per token until the backward: inputs of every matmul, norm and product; with checkpointing, block inputs."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    block = 4 * shape.width + 3 * q + 4 * kv + 4 * shape.ffn
    kept = shape.layers * shape.width + block if checkpointing else shape.layers * block
    return kept * BYTES[dtype]


def training_phase(shape: ModelConfig, section, pack_tokens: int, world: int, copies: int = 0) -> dict[str, float]:
    """Bytes per rank while training, by owner. copies: of the weights, frozen or averaged."""
    n, small = shape.num_parameters, BYTES[section.dtype]
    head = shape.vocab * shape.width
    gathered = 2 * block_parameters(shape) // shape.layers + head * (1 if shape.tied else 2)
    kept = {"master weights of copies (fp32 shards)": copies * 4 * n / world} if copies else {}
    return kept | {
        "master weights (fp32 shard)": 4 * n / world,
        "Adam moments (fp32 shard)": 8 * n / world,
        "gradients (fp32 shard)": 4 * n / world,
        "gathered weights (two blocks, embedding, head)": small * gathered,
        "activations of one pack": pack_tokens * activation_bytes(shape, section.dtype, section.checkpointing),
        "head: one chunk of logits three times, fp32 weight gradient": 3 * CHUNK_BYTES["cuda"] + 4 * head,
    }


def rollout_phase(shape: ModelConfig, sampling, engine, max_prefix: int, rows: int) -> dict[str, float]:
    """Bytes per rank while sampling, by owner."""
    token = cache_bytes(shape, engine.dtype)
    weights = BYTES[engine.dtype] * shape.num_parameters / engine.tensor_parallel
    logits = {"logits and their distribution": rows * shape.vocab * (4 + 4 + 8 + 8)}
    if engine.kind == "vllm":
        held = engine.kv_gb * 1e9 / (token / engine.tensor_parallel)
        cache = {f"KV cache (engine.kv_gb: {held:,.0f} tokens)": engine.kv_gb * 1e9}
        graphs = {"CUDA graphs and workspace (estimate)": VLLM_RESIDUE if engine.compile else 0}
        return {f"engine weights ({engine.dtype})": weights} | cache | logits | graphs
    return {
        f"engine weights ({engine.dtype})": weights,
        "KV cache": rows * (max_prefix + sampling.max_new) * token,
        **logits,
    }


def dry_run_rl(cfg, shape: ModelConfig, max_prefix: int, judge: dict[str, float] | None = None) -> int:
    """judge: bytes per rank of an engine that stays awake beside the policy's, by owner."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    b, s = cfg.batch, cfg.sampling
    samples = b.prompts * b.siblings
    copies = cfg.keeps_frozen + bool(cfg.ema_decay)
    train = training_phase(shape, cfg.model, b.pack_tokens, world, copies)
    rows = min(s.max_batch, -(-samples // world))
    rollout = rollout_phase(shape, s, cfg.engine, max_prefix, rows)
    resident = {k: v for k, v in train.items() if "master" in k or ("moments" in k and not cfg.optim.offload)}
    shared = b.prompts * max_prefix + samples * s.max_new
    arithmetic = [
        f"P {b.prompts} prompts x G {b.siblings} siblings = {samples} samples a step, "
        f"{-(-b.prompts // world)} prompts a rank ({world} ranks)",
        f"loss of one token is divided by P*G*denom = {b.prompts // b.updates} * {b.siblings} * {cfg.loss.denom:g} "
        f"= {b.prompts // b.updates * b.siblings * cfg.loss.denom:g}"
        + (f" in each of {b.updates} updates" if b.updates > 1 else ""),
        f"at most {samples * s.max_new:,} new tokens a step, {-(-samples * s.max_new // world):,} a rank",
        f"at most {shared:,} trunk tokens a step, prefixes once a {'group' if b.share_prefix else 'sample'}; "
        f"{-(-shared // (world * b.pack_tokens))} packs of {b.pack_tokens:,} a rank",
    ]
    gathered = {"one gathered tensor": BYTES[cfg.engine.dtype] * shape.vocab * shape.width}
    judge, always = judge or {}, ("weights", "graphs", "KV")
    judge_kept = _kept(judge, always)
    resident |= judge_kept
    sync = resident | _kept(rollout, ("weights", "graphs")) | gathered
    sleeps = cfg.engine.kind == "vllm" and cfg.engine.sleep
    training = train | judge_kept | _kept(rollout, ("graphs",) if sleeps else always)
    _print(cfg, shape, arithmetic, {"sync": sync, "rollout": resident | rollout | judge, "training": training})
    if cfg.model.dtype == "bfloat16":
        _print_time(duration.of_rl(cfg, shape, max_prefix, world), cfg.run.steps, "step")
    return 0


def dry_run_sft(cfg) -> int:
    from thinkmid.model import weights

    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.model.folder:
        shape = weights.read_config(cfg.model.folder)
    else:
        from thinkmid.train.fresh import shape_of

        shape = shape_of(cfg.fresh, cfg.fresh.vocab, ())
    arithmetic = [
        f"{cfg.data.batch_tokens:,} tokens a step, {-(-cfg.data.batch_tokens // world):,} a rank ({world} ranks), "
        f"packs of {cfg.data.pack_tokens:,}",
        f"{cfg.run.steps:,} steps: {cfg.run.steps * cfg.data.batch_tokens:,} tokens",
    ]
    _print(cfg, shape, arithmetic, {"training": training_phase(shape, cfg.model, cfg.data.pack_tokens, world)})
    if cfg.model.dtype == "bfloat16":
        _print_time(duration.of_sft(cfg, shape, world), cfg.run.steps, "step")
    return 0


def dry_run_engine(cfg, shape: ModelConfig, sampling, max_prompt: int) -> int:
    """Of a program that only samples: annotation, evaluation."""
    rows = sampling.max_batch
    arithmetic = [
        f"{rows} answers at a time a rank, prompts of at most {max_prompt:,} tokens, {sampling.max_new:,} new"
    ]
    _print(cfg, shape, arithmetic, {"rollout": rollout_phase(shape, sampling, cfg.engine, max_prompt, rows)})
    if cfg.engine.dtype == "bfloat16":
        plan = duration.of_answers(shape, cfg.engine, sampling, prompts=1000, siblings=1, prompt=max_prompt)
        _print_time(plan, 0, "thousand answers of a rank")
    return 0


def _kept(rollout, words):
    """What of the engine's memory stays in another phase. The native engine's cache lives for one call."""
    return {k: v for k, v in rollout.items() if any(word in k for word in words) and not k.endswith("KV cache")}


def _print(cfg, shape, arithmetic, phases):
    print(config.to_toml(cfg))
    print(
        f"# model: {shape.num_parameters:,} parameters, {shape.layers} layers, width {shape.width}, "
        f"vocabulary {shape.vocab:,}"
    )
    for line in arithmetic:
        print(f"# {line}")
    print("# memory per rank, estimated by formula (thinkmid/train/memory.py)")
    for phase, owners in phases.items():
        print(f"#   {phase:<10}{_size(sum(owners.values())):>10}")
        for owner, size in owners.items():
            print(f"#   {_size(size):>20}  {owner}")


def _print_time(phases: dict[str, float], steps: int, unit: str) -> None:
    print(f"# time on H100s, an estimate and no measurement: {duration.ASSUMED} (thinkmid/train/duration.py)")
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
