"""config.json of a Hugging Face folder <-> ModelConfig."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from thinkmid.errors import UserError
from thinkmid.files import read_json
from thinkmid.model.transformer import FORMS, MOST_LAYERS, ModelConfig, RopeScaling, Yarn
from thinkmid.model.weight_files import ADAPTER_CONFIG

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM",
}  # fmt: skip
# what transformers takes where a key is missing, beside what _parse takes for all
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "use_sliding_window": False},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096},
}
THETAS = {"smollm3": 2e6, "olmo3": 5e5}  # of rope_theta, alike
PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
YARN_KEYS = ("factor", "beta_fast", "beta_slow", "attention_factor", ORIGINAL)
FULL, SLIDING = "full_attention", "sliding_attention"
NO_ROPE = ("no_rope_layers", "no_rope_layer_interval")
# keys of other decoders: each changes what is computed, unless it is null, false, 0, 1 or empty
FOREIGN = (
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv", "use_qk_norm",
    "attention_chunk_size", "attn_temperature_tuning", *NO_ROPE, "rope_interleaved",
    PARTIAL, "use_bidirectional_attention", "per_layer_config", "compression_config",
)  # fmt: skip


def read_config(folder: str | Path) -> ModelConfig:
    """ModelConfig from a folder's config.json. UserError names the key that this decoder does not support."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder")
    path = Path(folder) / "config.json"
    if not path.exists() and path.with_name(ADAPTER_CONFIG).exists():
        raise UserError(f"{folder}: holds adapters and no model; export.lora 'merged' writes one that can be read")
    if not path.exists() and (Path(folder) / "export" / "config.json").exists():
        raise UserError(f"{folder}: a run's folder; did you mean {folder}/export?")
    raw = read_json(path)
    try:
        _refuse_unsupported(raw)
        return _parse(DEFAULTS.get(raw["model_type"], {}) | raw)
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None


def config_dict(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a ModelConfig. RoPE is written twice: as transformers 5 spells it, and as older readers do."""
    rope, parameters = _rope_dict(cfg), dict[str, Any](rope_theta=cfg.rope_theta)
    plain = {**parameters, "rope_type": "default"}
    parameters = {**parameters, **rope} if rope else plain
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
        "rope_scaling": rope,
        "rope_parameters": {FULL: parameters, SLIDING: plain} if cfg.form.full_layers_scaled else parameters,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "max_position_embeddings": cfg.max_positions,
        "attention_dropout": 0.0,
        **({"attention_bias": cfg.attention_bias} if cfg.form.has_bias_choice else {}),
        **_own_keys(cfg),
        **token_ids(cfg),
    }


def _own_keys(cfg: ModelConfig) -> dict[str, Any]:
    """Keys that only configs of this kind have."""
    types = {"layer_types": [SLIDING if i in cfg.windowed_layers else FULL for i in range(cfg.layers)]}
    rotated = {"no_rope_layers": [int(i not in cfg.no_rope_layers) for i in range(cfg.layers)]}
    window, no_pad = cfg.window or None, {"pad_token_id": None}  # else a token of the published vocabulary is taken
    own: dict[str, dict[str, Any]] = {
        "llama": {"mlp_bias": False},
        "mistral": {"sliding_window": window},
        "smollm3": {**no_pad, **rotated, **types, "use_sliding_window": bool(window), "sliding_window": window},
        "olmo2": no_pad,
        # without windowed layers transformers wants a number all the same
        "olmo3": {**no_pad, **types, "sliding_window": window or DEFAULTS["olmo3"]["sliding_window"]},
    }
    return own.get(cfg.kind, {"use_sliding_window": False})


def _rope_dict(cfg: ModelConfig) -> dict[str, Any] | None:
    """rope_scaling as Hugging Face spells it."""
    if (scaling := cfg.rope_scaling) is None:
        return None
    if isinstance(scaling, Yarn):
        values = (scaling.factor, scaling.beta_fast, scaling.beta_slow, scaling.attention_factor)
        return {"rope_type": "yarn", **dict(zip(YARN_KEYS, (*values, scaling.original_max_positions), strict=True))}
    stretch = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    return {"rope_type": "llama3", **dict(zip(ROPE_KEYS, stretch, strict=True))}


def token_ids(cfg: ModelConfig) -> dict[str, Any]:
    """The keys that config.json and generation_config.json share."""
    eos = list(cfg.eos_ids) if len(cfg.eos_ids) > 1 else next(iter(cfg.eos_ids), None)
    return {"bos_token_id": cfg.bos_id, "eos_token_id": eos}


def _parse(raw: dict[str, Any]) -> ModelConfig:
    theta, scaling = _rope(raw)
    no_rope = _no_rope_layers(raw)
    window, windowed = _windows(raw, no_rope)
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
        attention_bias=FORMS[kind].has_bias_choice and _flag(raw, "attention_bias"),
        window=window,
        windowed_layers=windowed,
        no_rope_layers=no_rope,
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in list(ARCHITECTURES):
        raise ValueError(f"model_type {kind!r} is not supported; {', '.join(ARCHITECTURES)} are")
    layers = _number(raw, "num_hidden_layers")
    # without the key transformers takes 4096
    sliding = raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None
    foreign = [key for key in FOREIGN if not FORMS[kind].skips_rope or key not in NO_ROPE]
    refused = {
        **{key: raw.get(key) is True or raw.get(key) not in (None, 0, 1, [], {}) for key in foreign},
        "is_causal": not raw.get("is_causal", True),
        "architectures": raw.get("architectures") not in (None, [], [ARCHITECTURES[kind]]),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": raw.get("mlp_bias"),
        "attention_bias": kind == "mistral" and raw.get("attention_bias"),
        "use_sliding_window": not FORMS[kind].windows and sliding and _number(raw, "max_window_layers", 28) < layers,
        "layer_types": FORMS[kind].windows != "some"
        and raw.get("layer_types") not in (None, [FULL] * min(layers, MOST_LAYERS)),
        "quantization_config": raw.get("quantization_config"),
    }
    if bad := [key for key, is_bad in refused.items() if is_bad]:
        raise ValueError(f"{bad[0]} {_short(raw[bad[0]])} is not supported for {kind}")


def _no_rope_layers(raw: dict[str, Any]) -> tuple[int, ...]:
    """Layers without RoPE. SmolLM3's list says 1 for a layer with RoPE; without the list, every so many-th has none."""
    if not FORMS[raw["model_type"]].skips_rope:
        return ()
    layers, given = _number(raw, "num_hidden_layers"), raw.get("no_rope_layers")
    if given is None:
        interval = _number(raw, "no_rope_layer_interval", 4)
        if interval < 1:
            raise ValueError(f"no_rope_layer_interval must be at least 1, got {interval}")
        return tuple(range(interval - 1, min(layers, MOST_LAYERS), interval))
    if not isinstance(given, list) or len(given) != layers or any(x not in (0, 1) for x in given):
        raise ValueError(f"no_rope_layers must be {layers} times 0 or 1, got {_short(given)}")
    return tuple(i for i, rotates in enumerate(given) if not rotates)


def _windows(raw: dict[str, Any], no_rope: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The window, 0 without one, and the layers that have it."""
    kind, layers, types = raw["model_type"], _number(raw, "num_hidden_layers"), raw.get("layer_types")
    every = range(min(layers, MOST_LAYERS))
    if kind == "mistral":
        windowed = tuple(every) if raw.get("sliding_window") is not None else ()
    elif FORMS[kind].windows and types is not None:
        if not isinstance(types, list) or len(types) != layers or any(t not in (FULL, SLIDING) for t in types):
            raise ValueError(f"layer_types must be {layers} times {FULL!r} or {SLIDING!r}, got {_short(types)}")
        windowed = tuple(i for i, t in enumerate(types) if t == SLIDING)
    elif kind == "olmo3":
        windowed = tuple(i for i in every if (i + 1) % 4)
    else:  # SmolLM3's, where nothing says which
        windowed = no_rope if _flag(raw, "use_sliding_window") and raw.get("sliding_window") is not None else ()
    if not windowed:
        return 0, ()
    if raw.get("use_sliding_window") is False:  # some readers slide, others do not
        raise ValueError(f"use_sliding_window is off, but {kind} has a sliding window; which one counts?")
    if (window := _number(raw, "sliding_window")) < 1:
        raise ValueError(f"sliding_window must be at least 1, got {window}")
    return window, windowed


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | Yarn | None]:
    """Base and scaling, from rope_parameters (transformers 5) or from rope_theta and rope_scaling (older).

    ValueError where both are given and differ: readers disagree on which one counts.
    """
    if FORMS[raw["model_type"]].full_layers_scaled:
        raw = _rope_of_full_layers(raw)
    found = {key: _rope_of(raw, key) for key in ("rope_parameters", "rope_scaling") if raw.get(key)}
    if len(set(found.values())) > 1:
        both = " and ".join(f"{key} {_short(raw[key])}" for key in found)
        raise ValueError(f"{both} do not say the same; which one counts?")
    return next(iter(found.values()), None) or _rope_of(raw, "rope_scaling")


def _rope_of_full_layers(raw: dict[str, Any]) -> dict[str, Any]:
    """OLMo 3's config with rope_parameters of the layers without a window alone. The others take the base as it is."""
    nested = raw.get("rope_parameters")
    if not nested:
        # transformers 5 takes the default for the layers with a window
        if raw.get("rope_theta") not in (None, THETAS["olmo3"]):
            raise ValueError(f"rope_theta {_short(raw['rope_theta'])} without rope_parameters: readers disagree on it")
        return raw
    if not isinstance(nested, dict) or nested.keys() != {FULL, SLIDING}:
        raise ValueError(f"rope_parameters must hold {FULL!r} and {SLIDING!r}, got {_short(nested)}")
    full, sliding = (_rope_of({**raw, "rope_parameters": nested[t]}, "rope_parameters") for t in (FULL, SLIDING))
    if sliding != (full[0], None):
        raise ValueError(f"rope_parameters: {SLIDING} {_short(nested[SLIDING])} is not supported beside {FULL}'s base")
    return {**raw, "rope_parameters": nested[FULL]}


def _rope_of(raw: dict[str, Any], key: str) -> tuple[float, RopeScaling | Yarn | None]:
    rope = raw.get(key) or {}
    types = {"default": (), "llama3": ROPE_KEYS} | (
        {"yarn": YARN_KEYS} if FORMS[raw["model_type"]].full_layers_scaled else {}
    )
    known = {"rope_type", "type", "rope_theta", PARTIAL, *ROPE_KEYS, *(key for keys in types.values() for key in keys)}
    if not isinstance(rope, dict) or not set(rope) <= known:
        raise ValueError(f"{key} {_short(rope)} is not supported")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in types:
        raise ValueError(f"{key}: rope_type {rope_type!r} is not supported; {' and '.join(types)} are")
    spelled = (("rope_theta", "rope_theta", raw.get("rope_theta")), ("rope_type", "type", rope.get("type")))
    for name, other, value in spelled:
        if None not in (value, rope.get(name)) and value != rope[name]:
            raise ValueError(f"{key}: {name} {_short(rope[name])}, but {other} {_short(value)}; which one counts?")
    if rope.get(PARTIAL) not in (None, 1):
        raise ValueError(f"{key}: {PARTIAL} {_short(rope[PARTIAL])} is not supported")
    default = THETAS.get(raw["model_type"], 10000.0)
    theta = _number(raw if rope.get("rope_theta") is None else rope, "rope_theta", default, as_type=float)
    if rope_type == "default":
        if rope.get("factor") not in (None, 1):
            raise ValueError(f"{key}: factor {_short(rope['factor'])} means nothing without a rope_type")
        return theta, None
    scaling = _yarn(rope) if rope_type == "yarn" else _llama3(rope)
    if raw.get(ORIGINAL) not in (None, original := scaling.original_max_positions):  # transformers takes this one
        raise ValueError(f"{ORIGINAL} {_short(raw[ORIGINAL])} differs from {original} in {key}")
    return theta, scaling


def _llama3(rope: dict[str, Any]) -> RopeScaling:
    factor, low, high = (_number(rope, name, as_type=float) for name in ROPE_KEYS[:3])
    original = _number(rope, ORIGINAL)
    return RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_positions=original)


def _yarn(rope: dict[str, Any]) -> Yarn:
    factor = _number(rope, "factor", as_type=float)
    defaults = (("beta_fast", 32.0), ("beta_slow", 1.0), ("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1))
    given = {key: _number(rope, key, default, as_type=float) for key, default in defaults}
    return Yarn(factor=factor, **given, original_max_positions=_number(rope, ORIGINAL))


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
