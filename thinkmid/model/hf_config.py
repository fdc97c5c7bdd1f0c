"""config.json of a Hugging Face folder <-> ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from thinkmid.errors import UserError
from thinkmid.files import read_json
from thinkmid.model.transformer import MOST_LAYERS, ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PARTIAL = "partial_rotary_factor"
# keys of other decoders: each changes what is computed, unless it is null, false, 0, 1 or empty
FOREIGN = (
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv", "use_qk_norm",
    "attention_chunk_size", "attn_temperature_tuning", "no_rope_layers", "no_rope_layer_interval", "rope_interleaved",
    PARTIAL, "use_bidirectional_attention", "per_layer_config", "compression_config",
)  # fmt: skip


def read_config(folder: str | Path) -> ModelConfig:
    """ModelConfig from a folder's config.json. UserError names the key that this decoder does not support."""
    path = Path(folder) / "config.json"
    if not path.exists() and (Path(folder) / "export" / "config.json").exists():
        raise UserError(f"{folder}: a run's folder; did you mean {folder}/export?")
    raw = read_json(path)
    try:
        _refuse_unsupported(raw)
        return _parse(raw)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def config_dict(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a ModelConfig. RoPE is written twice: as transformers 5 spells it, and as older readers do."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := cfg.rope_scaling) is not None:
        stretch = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
        rope = {"rope_type": "llama3", **dict(zip(ROPE_KEYS, stretch, strict=True))}
    own = {
        "llama": {"attention_bias": cfg.attention_bias, "mlp_bias": False},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"attention_bias": cfg.attention_bias, "use_sliding_window": False},
    }
    return {
        "architectures": [ARCHITECTURES[cfg.kind]],
        "model_type": cfg.kind,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.ffn,
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **rope},
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "max_position_embeddings": cfg.max_positions,
        "attention_dropout": 0.0,
        **own[cfg.kind],
        **token_ids(cfg),
    }


def token_ids(cfg: ModelConfig) -> dict[str, Any]:
    """The keys that config.json and generation_config.json share."""
    eos = list(cfg.eos_ids) if len(cfg.eos_ids) > 1 else next(iter(cfg.eos_ids), None)
    return {"bos_token_id": cfg.bos_id, "eos_token_id": eos}


def _parse(raw: dict[str, Any]) -> ModelConfig:
    theta, scaling = _rope(raw)
    kind, width, heads = raw["model_type"], _number(raw, "hidden_size"), _number(raw, "num_attention_heads")
    return ModelConfig(
        kind=kind,
        vocab=_number(raw, "vocab_size"),
        width=width,
        layers=_number(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_number(raw, "num_key_value_heads", heads),
        head_dim=_number(raw, "head_dim", 128 if kind == "qwen3" else width // max(heads, 1)),
        ffn=_number(raw, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(raw, "rms_norm_eps", 1e-6, as_type=float),
        tied=_flag(raw, "tie_word_embeddings"),
        max_positions=_number(raw, "max_position_embeddings"),
        eos_ids=_ids(raw, "eos_token_id"),
        bos_id=next(iter(_ids(raw, "bos_token_id")), None),
        attention_bias=kind != "qwen2" and _flag(raw, "attention_bias"),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in list(ARCHITECTURES):
        raise ValueError(f"model_type {kind!r} is not supported; {', '.join(ARCHITECTURES)} are")
    layers = _number(raw, "num_hidden_layers")
    # without the key transformers takes 4096
    sliding = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    refused = {
        **{key: raw.get(key) is True or raw.get(key) not in (None, 0, 1, [], {}) for key in FOREIGN},
        "is_causal": not raw.get("is_causal", True),
        "architectures": raw.get("architectures") not in (None, [], [ARCHITECTURES[kind]]),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": raw.get("mlp_bias"),
        "use_sliding_window": sliding and _number(raw, "max_window_layers", 28) < layers,
        "layer_types": raw.get("layer_types") not in (None, ["full_attention"] * min(layers, MOST_LAYERS)),
        "quantization_config": raw.get("quantization_config"),
    }
    if bad := [key for key, is_bad in refused.items() if is_bad]:
        raise ValueError(f"{bad[0]} {_short(raw[bad[0]])} is not supported for {kind}")


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from rope_parameters (transformers 5) or from rope_theta and rope_scaling (older).

    ValueError where both are given and differ: readers disagree on which one counts.
    """
    found = {key: _rope_of(raw, key) for key in ("rope_parameters", "rope_scaling") if raw.get(key)}
    if len(set(found.values())) > 1:
        both = " and ".join(f"{key} {_short(raw[key])}" for key in found)
        raise ValueError(f"{both} do not say the same; which one counts?")
    return next(iter(found.values()), None) or _rope_of(raw, "rope_scaling")


def _rope_of(raw: dict[str, Any], key: str) -> tuple[float, RopeScaling | None]:
    rope = raw.get(key) or {}
    if not isinstance(rope, dict) or not set(rope) <= {"rope_type", "type", "rope_theta", PARTIAL, *ROPE_KEYS}:
        raise ValueError(f"{key} {_short(rope)} is not supported")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{key}: rope_type {rope_type!r} is not supported; default and llama3 are")
    spelled = (("rope_theta", "rope_theta", raw.get("rope_theta")), ("rope_type", "type", rope.get("type")))
    for name, other, value in spelled:
        if None not in (value, rope.get(name)) and value != rope[name]:
            raise ValueError(f"{key}: {name} {_short(rope[name])}, but {other} {_short(value)}; which one counts?")
    if rope.get(PARTIAL) not in (None, 1):
        raise ValueError(f"{key}: {PARTIAL} {_short(rope[PARTIAL])} is not supported")
    theta = _number(raw if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0, as_type=float)
    if rope_type == "default":
        if rope.get("factor") not in (None, 1):
            raise ValueError(f"{key}: factor {_short(rope['factor'])} means nothing without a rope_type")
        return theta, None
    factor, low, high = (_number(rope, name, as_type=float) for name in ROPE_KEYS[:3])
    original = _number(rope, ROPE_KEYS[3])
    if raw.get(ROPE_KEYS[3]) not in (None, original):  # transformers takes this one
        raise ValueError(f"{ROPE_KEYS[3]} {_short(raw[ROPE_KEYS[3]])} differs from {original} in {key}")
    scaling = RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_positions=original)
    return theta, scaling


def _number(raw: dict[str, Any], key: str, default: Any = None, *, as_type: type[int] | type[float] = int) -> Any:
    value = default if raw.get(key) is None else raw[key]
    # inf and nan are not below; an integer may be larger than any float
    if isinstance(value, bool) or not isinstance(value, (int, as_type)) or not abs(value) < 2**63:
        raise ValueError(f"{key} must be {'a whole' if as_type is int else 'a finite'} number, got {_short(value)}")
    return as_type(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {_short(value)}")
    return value


def _ids(raw: dict[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or abs(i) >= 2**31 for i in ids):
        raise ValueError(f"{key} must be token ids, got {_short(value)}")
    return tuple(ids)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]
