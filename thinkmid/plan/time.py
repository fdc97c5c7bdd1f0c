"""How long a configuration may take on H100s: operations and bytes over assumed rates. Estimates, nothing measured."""

from __future__ import annotations

from typing import Any

from thinkmid.model.init import ModelSection
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling

PEAK = 989e12  # FLOP/s of an H100 SXM, bf16 dense: the vendor's figure
BANDWIDTH = 3.35e12  # bytes/s of its memory: the vendor's figure
TRAIN, PREFILL, DECODE = 0.4, 0.5, 0.6  # assumed shares of the peak, the peak and the bandwidth
ASSUMED = (
    f"training at {TRAIN:.0%} and prefill at {PREFILL:.0%} of {PEAK / 1e12:.0f} TFLOP/s, decoding at {DECODE:.0%} of "
    f"{BANDWIDTH / 1e12:.2f} TB/s"
)
BYTES = {"float32": 4, "bfloat16": 2}


def block_parameters(model_cfg: ModelConfig) -> int:
    """Parameters of all blocks, head and embedding left out: what each token is multiplied with."""
    return model_cfg.num_parameters - model_cfg.vocab * model_cfg.width * (1 if model_cfg.tied else 2) - model_cfg.width


def pair_flops(model_cfg: ModelConfig, span: float = 0) -> float:
    """FLOPs of one query-key pair over all layers, forward; of span keys a windowed layer sees no more than its
    window."""
    unseen = max(0.0, 1 - model_cfg.window / span) if model_cfg.window and span else 0
    return (model_cfg.layers - unseen * len(model_cfg.windowed_layers)) * 4 * model_cfg.heads * model_cfg.head_dim


def cache_bytes(model_cfg: ModelConfig, dtype: str) -> int:
    """Bytes of one token's keys and values."""
    return 2 * model_cfg.layers * model_cfg.kv_heads * model_cfg.head_dim * BYTES[dtype]


def forward_flops(model_cfg: ModelConfig, tokens: float, span: float, rows: float) -> float:
    """FLOPs of tokens that each attend to `span` keys; `rows` of them pass the head. 2 per parameter, and attention."""
    blocks = tokens * (2 * block_parameters(model_cfg) + span * pair_flops(model_cfg, span))
    return blocks + rows * 2 * model_cfg.vocab * model_cfg.width


def training_seconds(
    model_cfg: ModelConfig, section: ModelSection, world: int, *, tokens: float, span: float, rows: float
) -> float:
    """Forward and backward, 6 FLOPs a parameter and token; 8 in blocks that are recomputed; 2 less where it is frozen,
    the adapters themselves not counted."""
    head = forward_flops(model_cfg, 0, 0, rows)
    blocks = forward_flops(model_cfg, tokens, span, 0)
    frozen = head + forward_flops(model_cfg, tokens, 0, 0) if section.lora_rank else 0
    return (3 * head + (4 if section.checkpointing else 3) * blocks - frozen) / (world * TRAIN * PEAK)


def of_sft(cfg: Any, model_cfg: ModelConfig, world: int) -> dict[str, float]:
    """Seconds of a step of SFTConfig: every sequence has max_len tokens, of which a token sees half."""
    tokens, span = cfg.data.batch_tokens, cfg.data.max_len / 2
    return {"training": training_seconds(model_cfg, cfg.model, world, tokens=tokens, span=span, rows=tokens)}


def of_answers(
    model_cfg: ModelConfig, engine: EngineConfig, sampling: Sampling, *, prompts: float, siblings: int, prompt: int
) -> dict[str, float]:
    """Seconds in which one engine draws siblings of prompts, all of full length.

    A prompt is read once. For each token of a batch the weights are read, and keys and values of what stands before:
    bandwidth bounds it. As many sequences run at a time as the cache holds when they are half-way.
    """
    new, token_bytes = sampling.max_new, cache_bytes(model_cfg, engine.dtype)
    rows = min(sampling.max_batch, prompts * siblings)
    if engine.kind == "vllm":
        rows = min(rows, engine.kv_gb * 1e9 / token_bytes / (prompt / siblings + new / 2))
    batch_bytes = BYTES[engine.dtype] * model_cfg.num_parameters + rows * (prompt + new / 2) * token_bytes
    batches = prompts * siblings * new / rows
    prefill = forward_flops(model_cfg, prompts * prompt, prompt / 2, 0) / (PREFILL * PEAK)
    decoding = f"decoding, {rows:.0f} sequences at a time"
    return {"prefill": prefill, decoding: batches * batch_bytes / (DECODE * BANDWIDTH)}


def of_rl(cfg: Any, model_cfg: ModelConfig, max_prefix: int, world: int) -> dict[str, float]:
    """Seconds of a step of RLConfig at most: longest prefixes, samples of full length, no dead groups. Judge and sync
    are left out."""
    b, new = cfg.batch, cfg.sampling.max_new
    samples, engines = b.prompts * b.siblings, world / cfg.engine.tensor_parallel
    trunk = max_prefix * (b.prompts if b.share_prefix else samples) + samples * new
    span = max_prefix + new / 2  # keys of a new token; those of a prefix have fewer
    prompts = b.prompts / engines  # of each
    out = of_answers(model_cfg, cfg.engine, cfg.sampling, prompts=prompts, siblings=b.siblings, prompt=max_prefix)
    train = training_seconds(model_cfg, cfg.model, world, tokens=trunk, span=span, rows=samples * new)
    return out | {"training at most, no group dead": train}
