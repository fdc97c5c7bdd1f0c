import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import flip_bit, spawn
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from thinkmid.errors import UserError
from thinkmid.model import weight_files, weights
from thinkmid.model.transformer import ModelConfig, RopeScaling, Transformer, Yarn
from thinkmid.model.weights import (
    build,
    config_dict,
    load_into,
    load_model,
    materialise,
    read_config,
    save,
    stream,
    stream_folder,
)

# odd sizes: with two ranks no tensor splits evenly
ODD = ModelConfig(
    kind="qwen3", vocab=37, width=21, layers=2, heads=4, kv_heads=2, head_dim=6, ffn=19, rope_theta=500.0,
    norm_eps=1e-6, tied=False, max_positions=128, eos_ids=(0, 5),
)  # fmt: skip
STRETCH = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
YARN = Yarn(factor=4.0, beta_fast=3.0, beta_slow=0.5, attention_factor=1.3, original_max_positions=32)
FAMILY = {
    "llama3": replace(ODD, kind="llama", width=24, head_dim=16, rope_scaling=STRETCH, bos_id=3, eos_ids=(1,)),
    "llama-biased-tied": replace(ODD, kind="llama", width=24, attention_bias=True, tied=True),
    "qwen2-tied": replace(ODD, kind="qwen2", width=24, tied=True, kv_heads=1),
    "qwen3": replace(ODD, head_dim=10),
    "qwen3-tied": replace(ODD, head_dim=10, tied=True),
    "mistral": replace(ODD, kind="mistral", head_dim=10),
    "mistral-windowed-tied": replace(ODD, kind="mistral", tied=True, window=5, windowed_layers=(0, 1)),
    "smollm3-tied": replace(ODD, kind="smollm3", layers=3, head_dim=10, tied=True, no_rope_layers=(1,)),
    "smollm3-windowed": replace(
        ODD, kind="smollm3", layers=3, attention_bias=True, window=7, windowed_layers=(0, 2), no_rope_layers=(2,)
    ),
    "olmo2": replace(ODD, kind="olmo2", head_dim=10, norm_eps=1e-5),
    "olmo2-biased-tied": replace(ODD, kind="olmo2", kv_heads=1, attention_bias=True, tied=True),
    "olmo3": replace(
        ODD, kind="olmo3", layers=4, head_dim=10, rope_theta=5e5, rope_scaling=YARN, window=6, windowed_layers=(0, 1, 2)
    ),
    "olmo3-tied": replace(ODD, kind="olmo3", rope_theta=5e5, tied=True, window=2, windowed_layers=(1,)),
    "olmo3-full": replace(ODD, kind="olmo3", rope_theta=5e5),
}


def randomise(model):
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model


def export(folder, cfg=ODD, model=None, dtype="float32", shard_bytes=5e9, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MAX_SHARD_BYTES", shard_bytes)
        save(folder, cfg, stream(model or randomise(Transformer(cfg))), dtype=dtype, **kwargs)
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# transformers


def assert_same_logits(model, theirs):
    tokens = torch.arange(100) * 7 % model.cfg.vocab
    with torch.no_grad():
        naive, exact = theirs(tokens[None]).logits[0], theirs.double()(tokens[None]).logits[0]
        assert exact.std() > 0.1
        error, allowed = ((x.double() - exact).abs().max().item() for x in (model.logits(tokens), naive))
        assert error <= max(2 * allowed, 2e-5), f"error {error} against {allowed}"


@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())
def test_transformers_reads_our_export_and_agrees(tmp_path, cfg):
    transformers = pytest.importorskip("transformers")
    model = randomise(Transformer(cfg))
    export(tmp_path / "m", cfg, model)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == (list(cfg.eos_ids) if len(cfg.eos_ids) > 1 else cfg.eos_ids[0])
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("spelling", ["transformers 5", "older"])
@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())
def test_we_read_the_export_of_transformers_and_agree(tmp_path, cfg, spelling):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config_dict(cfg)), attn_implementation="eager"
    )
    randomise(theirs).save_pretrained(tmp_path)
    if spelling == "older":
        raw = json.loads((tmp_path / "config.json").read_text())
        rope = raw.pop("rope_parameters")
        rope = rope.get("full_attention", rope)
        raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if cfg.rope_scaling else None}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == cfg
    assert_same_logits(load_model(tmp_path), theirs)


# config.json


@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())
def test_config_survives_the_round_trip_in_either_spelling(tmp_path, cfg):
    for drop in ((), ("rope_parameters",), ("rope_theta", "rope_scaling")):
        raw = {key: value for key, value in config_dict(cfg).items() if key not in drop}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert read_config(tmp_path) == cfg


def test_config_defaults_are_those_of_transformers(tmp_path):
    keep = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    raw = {key: value for key, value in config_dict(FAMILY["llama3"]).items() if key in keep}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 64}))
    cfg = read_config(tmp_path)
    assert (cfg.kv_heads, cfg.head_dim, cfg.rope_theta, cfg.norm_eps) == (4, 24 // 4, 10000.0, 1e-6)
    assert (cfg.tied, cfg.eos_ids, cfg.bos_id, cfg.rope_scaling) == (False, (), None, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: rope_type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: .* 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        # beside the llama3 of both keys
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling: rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_parameters .* and rope_scaling .* do not say the same"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters .* and rope_scaling .* do not say the same"),
        ({"rope_theta": 123.0}, "rope_parameters: rope_theta 500.0, but rope_theta 123.0"),
        ({"rope_scaling": {"type": "llama3", "rope_type": "default"}}, "rope_scaling: rope_type .*, but type"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings 64 differs from 32"),
        ({"rope_parameters": None, "rope_scaling": {"factor": 4.0}}, "rope_scaling: factor 4.0 means nothing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"attention_multiplier": 0.1}, "attention_multiplier 0.1"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config"),
        ({"use_qk_norm": True}, "use_qk_norm true"),
        ({"is_causal": False}, "is_causal false"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "kv_heads 3"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
        ({"hidden_size": 10**20}, "hidden_size must be a whole number"),
        ({"eos_token_id": 10**20}, "eos_token_id must be token ids"),
        ({"num_hidden_layers": 10**12, "layer_types": ["full_attention"]}, "layer_types"),
        ({"num_hidden_layers": 10**12}, r"layers must lie in \[1, 4096\]"),
        ({"vocab_size": 2**25}, "vocab must lie in"),
        ({"vocab_size": 2**24, "intermediate_size": 2**24, "hidden_size": 2**24}, "a model of .* parameters"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_what_this_decoder_cannot_do_is_refused_by_key(tmp_path, change, said):
    (tmp_path / "config.json").write_text(json.dumps(config_dict(FAMILY["llama3"]) | change))
    with pytest.raises(UserError, match=rf"^.*config\.json: .*{said}.*$"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias true"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral-windowed-tied", {"use_sliding_window": False}, "use_sliding_window is off, but mistral has"),
        ("mistral-windowed-tied", {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ("mistral-windowed-tied", {"sliding_window": "4k"}, "sliding_window must be a whole number"),
        ("mistral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("mistral", {"no_rope_layers": [1, 0]}, "no_rope_layers .* is not supported for mistral"),
        ("smollm3-tied", {"no_rope_layers": [1, 0]}, "no_rope_layers must be 3 times 0 or 1"),
        ("smollm3-tied", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers must be 3 times 0 or 1"),
        ("smollm3-tied", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be"),
        ("smollm3-tied", {"mlp_bias": True}, "mlp_bias true"),
        ("smollm3-windowed", {"layer_types": ["sliding_attention"]}, "layer_types must be 3 times"),
        ("smollm3-windowed", {"layer_types": ["chunked_attention"] * 3}, "layer_types must be 3 times"),
        ("smollm3-windowed", {"use_sliding_window": False}, "use_sliding_window is off, but smollm3 has"),
        ("smollm3-windowed", {"sliding_window": None}, "sliding_window must be a whole number, got null"),
        ("olmo2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmo2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters must hold"),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e4}, "rope_theta 10000.0 without rope_parameters"),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn", "mscale": 1.0}}, "rope_scaling .*mscale.* is not supported"),
        ("olmo3", {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "original_max_position_embeddings"),
        ("olmo3", {"original_max_position_embeddings": 64}, "differs from 32 in rope_parameters"),
        ("olmo3-full", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_key(tmp_path, family, change, said):
    (tmp_path / "config.json").write_text(json.dumps(config_dict(FAMILY[family]) | change))
    with pytest.raises(UserError, match=rf"^.*config\.json: .*{said}.*$"):
        read_config(tmp_path)


@pytest.mark.parametrize("part", ["full_attention", "sliding_attention"])
def test_a_base_or_a_stretch_of_olmo_3s_windowed_layers_alone_is_refused(tmp_path, part):
    raw = config_dict(FAMILY["olmo3"])
    raw["rope_parameters"][part]["rope_theta"] = raw["rope_theta"] = 1e4
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="rope_theta"):
        read_config(tmp_path)
    raw = config_dict(FAMILY["olmo3"])
    raw["rope_parameters"] = dict.fromkeys(raw["rope_parameters"], raw["rope_parameters"]["full_attention"])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"sliding_attention .* is not supported"):
        read_config(tmp_path)


# what their makers publish, as far as it decides anything; numbers of parameters as on their cards
PUBLISHED = {
    "Mistral-7B-v0.1": (7_241_732_096, {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
        "rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }),
    "SmolLM3-3B": (3_075_098_624, {
        "model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "vocab_size": 128256, "max_position_embeddings": 65536,
        "rope_theta": 5e6, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
        "max_window_layers": 28, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "mlp_bias": False,
        "layer_types": ["full_attention"] * 36, "attention_bias": False, "rms_norm_eps": 1e-6,
    }),
    "OLMo-2-1124-7B": (7_298_617_344, {
        "model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 100352, "max_position_embeddings": 4096,
        "rope_theta": 500000, "rope_scaling": None, "attention_bias": False, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }),
    "Olmo-3-1025-7B": (7_298_011_136, {
        "model_type": "olmo3", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 100278, "max_position_embeddings": 65536,
        "rope_theta": 500000, "attention_bias": False, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "sliding_window": 4096,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    num, raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cfg, theirs = read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert cfg.num_parameters == num
    # what is left out is what transformers takes
    bare = {k: v for k, v in raw.items() if k not in ("layer_types", "no_rope_layers", "tie_word_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    assert read_config(tmp_path) == cfg
    assert (cfg.tied, cfg.kv_heads, cfg.norm_eps) == (
        theirs.tie_word_embeddings, theirs.num_key_value_heads, theirs.rms_norm_eps
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    for layer, block in enumerate(model.model.layers):
        windowed = getattr(block.self_attn, "sliding_window", theirs.sliding_window if "Mistral" in name else None)
        assert (cfg.window if layer in cfg.windowed_layers else None) == windowed
        assert (layer not in cfg.no_rope_layers) == bool(getattr(block.self_attn, "use_rope", True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "llama", "window": 5, "windowed_layers": (0,)}, "windowed_layers of kind llama must be none or 0"),
        (
            {"kind": "mistral", "window": 5, "windowed_layers": (0,)},
            "of kind mistral must be none or 2",
        ),
        ({"kind": "olmo3", "window": 5}, "window must lie in .* if layers are windowed, else be 0, got 5"),
        ({"kind": "olmo3", "windowed_layers": (1,)}, "window must lie in .* got 0"),
        ({"kind": "olmo3", "window": 5, "windowed_layers": (1, 0)}, "windowed_layers must rise"),
        ({"kind": "smollm3", "no_rope_layers": (2,)}, "no_rope_layers must rise within"),
        ({"kind": "olmo2", "no_rope_layers": (1,)}, "no_rope_layers are not supported for kind olmo2"),
        ({"kind": "qwen3", "rope_scaling": YARN}, "YaRN is not supported for kind qwen3"),
        ({"kind": "mistral", "attention_bias": True}, "attention_bias is not a choice of kind mistral"),
    ],
)
def test_what_a_kinds_config_cannot_say_is_no_shape_of_it(change, said):
    with pytest.raises(ValueError, match=said):
        replace(ODD, **change)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "mistral", "smollm3-tied", "olmo2", "olmo3"])
def test_a_whole_rotary_factor_is_harmless_wherever_it_stands(tmp_path, family):
    raw = config_dict(FAMILY[family])
    for rope in (raw, raw["rope_scaling"], raw["rope_parameters"], *raw["rope_parameters"].values()):
        if isinstance(rope, dict) and (rope is raw or "rope_type" in rope):
            rope["partial_rotary_factor"] = 1.0
    assert json.dumps(raw).count("partial_rotary_factor") > 1
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == FAMILY[family]


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000])
def test_broken_config_files_are_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"^.*config\.json: .+$"):
        read_config(tmp_path)


def test_a_config_of_another_model_asks_for_no_memory(tmp_path):
    folder = export(tmp_path / "m")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"vocab_size": 2**24, "hidden_size": 2**16}))  # 4 TiB
    with pytest.raises(UserError, match="mis shaped"):
        load_model(folder)


def test_a_key_that_stands_twice_is_named(tmp_path):
    text = json.dumps(config_dict(ODD))
    (tmp_path / "config.json").write_text(text[:-1] + ', "vocab_size": 38}')
    with pytest.raises(UserError, match="key 'vocab_size' stands twice"):
        read_config(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match=r"nowhere/config\.json: no such file"):
        load_model(tmp_path / "nowhere")


LLAMA3 = config_dict(FAMILY["llama3"])["rope_scaling"]
HARMLESS = {
    "null": {"rope_scaling": None},
    "empty": {"rope_scaling": {}},
    "the same twice": {"rope_scaling": LLAMA3, "rope_theta": 500},
    "the older name of the key": {
        "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()}, "rope_theta": 500.0,
    },
    "a theta in each": {"rope_scaling": {**LLAMA3, "rope_theta": 500.0}},
    "alone": {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "factors of one": {"partial_rotary_factor": 1.0, "logits_scaling": 1.0, "attention_multiplier": None},
    "what is switched off": {"attn_logit_softcapping": None, "use_qk_norm": False, "quantization_config": None},
    "nothing of layers": {"layer_types": None, "per_layer_config": {}, "no_rope_layers": []},
    "a window beyond the layers": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_said_twice_or_changes_nothing_is_read_as_transformers_does(tmp_path, change):
    transformers = pytest.importorskip("transformers")
    model = randomise(Transformer(FAMILY["llama3"]))
    export(tmp_path / "m", FAMILY["llama3"], model)
    path = tmp_path / "m" / "config.json"
    raw = {
        key: value for key, value in json.loads(path.read_text()).items() if key not in ("rope_scaling", "rope_theta")
    }
    path.write_text(json.dumps(raw | change))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert_same_logits(load_model(tmp_path / "m"), theirs)


def test_sliding_window_that_is_switched_off_is_fine(tmp_path):
    off = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config_dict(ODD) | off))
    assert read_config(tmp_path) == ODD


# out and in again


@pytest.mark.parametrize("shard_bytes", [5e9, 3000, 1])
@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())
def test_reimport_is_bitwise(tmp_path, cfg, shard_bytes):
    model = randomise(Transformer(cfg))
    export(tmp_path / "m", cfg, model, shard_bytes=shard_bytes)
    again = load_model(tmp_path / "m")
    assert again.cfg == cfg
    assert not again.training
    assert same(dict(model.named_parameters()), dict(again.named_parameters()))
    assert (again.lm_head.weight is again.embed_tokens.weight) == cfg.tied


def test_shards_stay_under_the_limit_and_the_index_says_where_everything_is(tmp_path):
    folder = export(tmp_path / "m", shard_bytes=3000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    sizes = {file: [t.nbytes for t in load_file(folder / file).values()] for file in files}
    assert all(sum(size) <= 3000 or len(size) == 1 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values())) == 4 * ODD.num_parameters
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}


@pytest.mark.parametrize("wide", ["float32", "float16", "bfloat16"])
def test_narrow_files_widen_exactly_and_wide_ones_round_once(tmp_path, wide):
    model = randomise(Transformer(ODD))
    folder = export(tmp_path / "m", model=model, dtype=wide)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = dict(load_model(folder, dtype=dtype).named_parameters())
        expected = {name: p.to(getattr(torch, wide)).to(dtype) for name, p in model.named_parameters()}
        assert same(loaded, expected)


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(UserError, match="'float8'"):
        load_model(export(tmp_path / "m"), dtype="float8")


KEPT = {
    "tokenizer.json": "{}",
    "tokenizer.model": "pieces",
    "added_tokens.json": '{"<think>": 40}',
    "special_tokens_map.json": '{"pad_token": "<pad>"}',
    "chat_template.jinja": "hi",
    "additional_chat_templates/tool_use.jinja": "ho",
    "generation_config.json": '{"eos_token_id": [0, 5, 7],\n "pad_token_id": 7, "temperature": 0.6, "top_p": 0.95}',
    "LICENSE": "do as you like",
    "NOTICE.txt": "made by somebody",
}


def test_what_does_not_depend_on_the_weights_survives_two_stages_byte_by_byte(tmp_path):
    base = export(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    for name, text in KEPT.items():
        (base / name).write_text(text)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"pad_token_id": 7, "auto_map": {"AutoModel": "evil.Model"}}))
    for name in ("notes.txt", "README.md", "evil.py", "optimizer.pt"):
        (base / name).write_text("private")
    one = export(tmp_path / "one", extra_files=base)
    two = export(tmp_path / "two", extra_files=one, texts={"README.md": "a card"})
    assert {name: (two / name).read_text() for name in KEPT} == KEPT
    files = {path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()}
    assert files == KEPT.keys() | {"README.md", "config.json", "model.safetensors", "thinkmid.json"}
    assert (two / "README.md").read_text() == "a card"
    assert json.loads((two / "config.json").read_text()) == raw | {"pad_token_id": 7}


def test_without_a_generation_config_transformers_finds_ends_and_padding_as_in_the_source(tmp_path):
    transformers = pytest.importorskip("transformers")
    base = export(tmp_path / "base")
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"pad_token_id": 7}))
    (base / "generation_config.json").unlink()
    folder = export(tmp_path / "m", extra_files=base)
    for path in (base, folder):
        read = transformers.AutoModelForCausalLM.from_pretrained(path).generation_config
        assert (read.eos_token_id, read.pad_token_id) == ([0, 5], 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_a_folder_is_read_from_its_tensors(tmp_path, dtype):
    folder = export(tmp_path / "m", dtype=dtype, shard_bytes=3000)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": "float8", "torch_dtype": "float64"}))
    assert weights.dtype_of(folder) == dtype


@pytest.mark.parametrize(("one", "other", "both"), [("F16", "BF16", "F32"), ("F32", "BF16", "F32")])
def test_of_several_dtypes_the_narrowest_that_holds_all_counts(tmp_path, one, other, both):
    folder = export(tmp_path / "m")
    tensors = {name: t.to(weights.FILE_DTYPES[other]) for name, t in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(weights.FILE_DTYPES[one])
    save_file(tensors, folder / "model.safetensors")
    assert weights.DTYPES[weights.dtype_of(folder)] == weights.FILE_DTYPES[both]


def test_a_value_beyond_the_range_of_the_dtype_is_refused_by_name(tmp_path):
    model = randomise(Transformer(ODD))
    with torch.no_grad():
        model.norm.weight[2] = 70_000.0
    export(tmp_path / "m", model=model, dtype="bfloat16")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values that are not finite, as torch\.float16"):
        export(tmp_path / "m", model=model, dtype="float16")
    assert weights.dtype_of(tmp_path / "m") == "bfloat16"  # the older one stays


def test_an_older_export_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 1)
    folder, model = export(tmp_path / "m"), randomise(Transformer(ODD))
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def breaks_off():
        yield from list(stream(model))[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(folder, ODD, breaks_off(), dtype="float32")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    with torch.no_grad():
        model.norm.weight.add_(1)
    export(folder, model=model)
    assert torch.equal(load_model(folder).norm.weight, model.norm.weight)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_an_export_caught_between_the_two_renames_is_put_back(tmp_path):
    folder = export(tmp_path / "m")
    folder.rename(tmp_path / "m.replaced")
    with pytest.raises(ZeroDivisionError):
        save(folder, ODD, ((str(i), torch.ones(1 // i)) for i in (1, 0)), dtype="float32")
    load_model(folder)


def test_a_folder_that_is_no_export_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="home: is not an export"):
        export(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_snapshot_of_the_hub_cache_with_its_links_loads(tmp_path):
    folder = export(tmp_path / "m")
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(folder.iterdir()):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert same(load_model(snapshot).state_dict(), load_model(folder).state_dict())


def test_blobs_that_repositories_of_the_cache_share_load_and_others_do_not(tmp_path):
    folder, cache = export(tmp_path / "m"), tmp_path / "cache"
    snapshot = cache / "models--x" / "snapshots" / "abc"
    for at in (snapshot, cache / "blobs" / "0f", cache / "models--x" / "blobs", cache / "models--y" / "blobs"):
        at.mkdir(parents=True)
    for i, file in enumerate(folder.iterdir()):
        shutil.copyfile(file, cache / "blobs" / "0f" / f"0f{i}")
        (cache / "models--x" / "blobs" / str(i)).symlink_to(f"../../blobs/0f/0f{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert same(load_model(snapshot).state_dict(), load_model(folder).state_dict())
    shutil.copyfile(folder / "model.safetensors", cache / "models--y" / "blobs" / "z")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--y/blobs/z")
    with pytest.raises(UserError, match=r"links to a file outside its folder"):
        load_model(snapshot)


# what stands beside the weights


def inv_freq(cfg):
    return cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)


@pytest.mark.parametrize("shard_bytes", [5e9, 3000])
@pytest.mark.parametrize("names", [["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"]])
def test_buffers_of_rope_are_ignored_as_in_transformers(tmp_path, names, shard_bytes):
    transformers = pytest.importorskip("transformers")
    folder, cfg = tmp_path / "m", FAMILY["llama3"]
    model = randomise(Transformer(cfg))
    export(folder, cfg, model, shard_bytes=shard_bytes)
    file = sorted(folder.glob("*.safetensors"))[0].name
    edit(folder, lambda tensors: tensors.update({name: inv_freq(cfg) for name in names}), file)
    if (index := folder / "model.safetensors.index.json").exists():
        listed = json.loads(index.read_text())
        index.write_text(json.dumps(listed | {"weight_map": listed["weight_map"] | dict.fromkeys(names, file)}))
    assert same(dict(load_model(folder).named_parameters()), dict(model.named_parameters()))
    assert same(dict(stream_folder(folder, "float32")), dict(stream(model)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert_same_logits(load_model(folder), theirs)
    assert weights.dtype_of(folder) == "float32"
    again = export(tmp_path / "again", cfg, load_model(folder), extra_files=folder)
    assert not any("rotary" in name for name in load_file(again / "model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.weight",  # nobody's buffer
        "model.layers.0.rotary_emb.inv_freq",
        "rotary_emb.inv_freq.scale",
        "model.layers.0.self_attn.masked_bias",  # of GPT-2 and its like, which are not read at all
        "model.layers.0.self_attn.q_norm.bias",
        "model.layers.0.self_attn.rotary_emb.inv_freq.model.norm.weight",
        "embed_tokens.weight",  # of a model saved without its head
    ],
)
def test_nothing_else_beside_the_weights_is_ignored(tmp_path, name):
    folder = export(tmp_path / "m", FAMILY["llama3"])
    edit(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    for read in (load_model, weights.dtype_of, lambda folder: list(stream_folder(folder, "float32"))):
        with pytest.raises(UserError, match=f"1 unexpected: {name}$"):
            read(folder)


# damage


def edit(folder, change, file="model.safetensors"):
    """Rewrite a weight file after change(tensors); its hash is forgotten so that the damage itself must be seen."""
    (folder / "thinkmid.json").unlink(missing_ok=True)
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def poke(value, name="model.layers.1.mlp.up_proj.weight"):
    return lambda tensors: tensors[name][3].fill_(value)


def rename_all(tensors):
    for name in list(tensors):
        tensors["base." + name] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight$"),
        (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight$"),
        (lambda t: t.update({"extra.bias": torch.ones(1)}), "1 unexpected: extra.bias$"),
        (rename_all, r"25 missing: lm_head.weight, [^;]* and 22 more; 25 unexpected: base.lm_head.weight, .* 22 more$"),
        (lambda t: t.update({"model.norm.weight": torch.ones(20)}), r"model.norm.weight \[20\] instead of \[21\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(21).long()}), "unsupported dtype: model.norm.weight I64"),
        (poke(float("nan")), "model.layers.1.mlp.up_proj.weight .* not finite"),
        (poke(float("inf")), "not finite"),
        (poke(float("-inf")), "not finite"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, said):
    folder = export(tmp_path / "m")
    edit(folder, change)
    with pytest.raises(UserError, match=said):
        load_model(folder)


def test_overflow_of_a_narrower_dtype_is_named(tmp_path):
    folder = export(tmp_path / "m")
    edit(folder, poke(1e6))
    load_model(folder)
    with pytest.raises(UserError, match=r"up_proj\.weight .* not finite"):
        load_model(folder, dtype="float16")


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    folder = export(tmp_path / "m", replace(ODD, tied=True))
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(folder)
    edit(folder, lambda t: t["lm_head.weight"][36, 20].add_(1e-3))
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep, sealed):
    folder = export(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    if not sealed:
        (folder / "thinkmid.json").unlink()
    with pytest.raises(UserError, match=r"^\S*model\.safetensors: .*damaged.*$"):
        load_model(folder)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_flipped_bit_is_caught_by_the_hash(tmp_path, place):
    folder = export(tmp_path / "m", shard_bytes=3000)
    file = sorted(folder.glob("model-*.safetensors"))[1]
    raw = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header + int((len(raw) - header) * place)] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=rf"{file.name}: does not match its sha256"):
        load_model(folder)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [*((v, "float32") for v in (float("nan"), float("inf"), float("-inf"))), (1e6, "float16"), (3.4e38, "bfloat16")],
)
def test_what_an_engine_is_filled_with_is_finite_in_its_dtype(tmp_path, value, dtype):
    folder = export(tmp_path / "m")
    edit(folder, poke(value))
    line = r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"
    with pytest.raises(UserError, match=line):
        list(stream_folder(folder, dtype))


def test_a_half_precision_folder_that_is_not_finite_is_named_too(tmp_path):
    folder = export(tmp_path / "m", dtype="float16")
    edit(folder, poke(float("inf")))
    with pytest.raises(UserError, match="not finite"):
        list(stream_folder(folder, "bfloat16"))


def test_an_engine_gets_the_bytes_of_the_export_or_nothing(tmp_path):
    folder = export(tmp_path / "m", shard_bytes=3000)
    expected = {name: tensor.clone() for name, tensor in stream(load_model(folder))}
    assert same(dict(stream_folder(folder, "float32")), expected)
    flip_bit(file := sorted(folder.glob("model-*.safetensors"))[1])
    with pytest.raises(UserError, match=rf"{file.name}: does not match its sha256"):
        next(stream_folder(folder, "float32"))


def test_an_engine_is_not_filled_from_a_tied_folder_with_another_head(tmp_path):
    folder = export(tmp_path / "m", replace(ODD, tied=True))
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-3}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        next(stream_folder(folder, "float32"))


@pytest.mark.parametrize("sealed", [True, False])
def test_a_folder_that_is_read_again_is_hashed_once_and_must_stay_as_it_was(tmp_path, monkeypatch, sealed):
    folder, hashed = export(tmp_path / "m", shard_bytes=3000), []
    if not sealed:
        (folder / "thinkmid.json").unlink()
    digest = weight_files.digest
    monkeypatch.setattr(weight_files, "digest", lambda path: hashed.append(path.name) or digest(path))
    known = weight_files.stamps(folder)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    for _ in range(3):
        list(stream_folder(folder, "float32", known))
    assert sorted(hashed) == files == sorted(known)
    os.utime(folder / files[1], (1, 1))
    list(stream_folder(folder, "float32", known))
    assert hashed[len(files) :] == [files[1]]
    flip_bit(folder / files[2])
    with pytest.raises(UserError, match=rf"{files[2]}: changed since"):
        next(stream_folder(folder, "float32", known))


def test_ranks_hash_each_file_once_and_know_all(tmp_path):
    folder = export(tmp_path / "m", shard_bytes=3000)
    shares = [weight_files.stamps(folder, rank, 3) for rank in range(3)]
    assert all(shares)
    assert sum(map(len, shares)) == len(list(folder.glob("*.safetensors")))
    whole = weight_files.stamps(folder)
    assert shares[0] | shares[1] | shares[2] == whole
    for file, stamp in whole.items():
        assert stamp.sha256 == hashlib.sha256((folder / file).read_bytes()).hexdigest()


def test_a_file_without_a_hash_does_not_pass_as_sealed(tmp_path):
    folder = export(tmp_path / "m")
    for seal in ({"sha256": {}}, {}):
        (folder / "thinkmid.json").write_text(json.dumps(seal))
        with pytest.raises(UserError, match="sha256"):
            load_model(folder)


@pytest.fixture
def shards(tmp_path):
    """An export in several files, without hashes."""
    folder = export(tmp_path / "m", shard_bytes=3000)
    (folder / "thinkmid.json").unlink()
    return folder


def remap(folder, change):
    """Edit the index's weight_map."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def redirect(folder, name):
    """Let the index say that the last file is called name."""
    last = sorted(folder.glob("model-*.safetensors"))[-1].name
    remap(folder, lambda where: where.update({t: name for t, file in where.items() if file == last}))
    return folder / last


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "x" * 300])
def test_weight_map_must_hold_plain_file_names(shards, name):
    redirect(shards, name)
    with pytest.raises(UserError, match=r"index\.json: weight_map: .* is not a plain file name"):
        load_model(shards)


def test_weight_map_must_not_lead_outside_by_a_link(shards):
    last = redirect(shards, "link.safetensors")
    last.rename(shards.parent / "secret.safetensors")
    (shards / "link.safetensors").symlink_to("../secret.safetensors")
    with pytest.raises(UserError, match=r"link\.safetensors: links to a file outside"):
        load_model(shards)


def test_weight_map_must_name_regular_files_that_exist(shards):
    redirect(shards, "other.safetensors").unlink()
    with pytest.raises(UserError, match=r"other\.safetensors: no such file"):
        load_model(shards)
    (shards / "other.safetensors").symlink_to("other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: no such file"):
        load_model(shards)
    (shards / "other.safetensors").unlink()
    os.mkfifo(shards / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: not a regular file"):
        load_model(shards)


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}])
def test_weight_map_must_be_a_map(shards, weight_map):
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: weight_map must map"):
        load_model(shards)


def test_a_tensor_in_two_files_or_not_where_the_index_says_is_named(shards):
    first = sorted(shards.glob("model-*.safetensors"))[0].name
    edit(shards, lambda t: t.update({"model.norm.weight": torch.ones(21)}), first)
    with pytest.raises(UserError, match=rf"{first}: 1 in the file but not listed for it: model\.norm\.weight"):
        load_model(shards)
    edit(shards, lambda t: t.pop("model.norm.weight"), first)
    remap(shards, lambda where: where.update({"model.norm.weight": first}))
    with pytest.raises(UserError, match=rf"{first}: 1 listed for it but not there: model\.norm\.weight"):
        load_model(shards)


def test_a_single_file_beside_an_index_is_ambiguous_and_none_is_missed(shards):
    save_file({"a": torch.ones(1)}, shards / "model.safetensors")
    with pytest.raises(UserError, match="holds both"):
        load_model(shards)
    for file in shards.glob("model*"):
        file.unlink()
    with pytest.raises(UserError, match="No such file"):
        load_model(shards)


def test_a_tied_head_is_streamed_under_its_own_name_only_on_request():
    for cfg, once, twice in ((replace(ODD, tied=True), 0, 1), (ODD, 1, 1)):
        model = randomise(Transformer(cfg))
        for tied_twice, count in ((False, once), (True, twice)):
            named = list(stream(model, "bfloat16", tied_twice=tied_twice))
            heads = [tensor for name, tensor in named if name == "lm_head.weight"]
            assert len(heads) == count
            assert all(torch.equal(head, model.lm_head.weight.bfloat16()) for head in heads)


def test_stream_keeps_layer_order():
    names = [name for name, _ in stream(build(ODD))]
    blocks = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert [names[0], *names[-2:]] == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert blocks == sorted(blocks)
    assert len(blocks) == len(names) - 3


# two ranks

SHARDED = {"untied": ODD, "tied": replace(ODD, tied=True), "olmo2": FAMILY["olmo2"]}


def attend_like_logits(layer, q, k, v):
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def loss_of(model):
    tokens = torch.arange(12) * 5 % model.cfg.vocab
    logits, twice = model(tokens, torch.arange(12), attend_like_logits, tokens % 12, lambda h, w: (h @ w.T, 2 * h))
    return logits.square().mean() + twice.square().mean()


def shard(cfg, mesh, **kwargs):
    model = build(cfg, device="meta")
    model.checkpointing = True
    for block in model.layers:
        fully_shard(block, mesh=mesh, **kwargs)
    return materialise(fully_shard(model, mesh=mesh, **kwargs), "cpu")


def two_ranks_worker(rank, folder):
    torch.set_num_threads(1)
    weights.MAX_SHARD_BYTES = 3000
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    keep = {}
    for name, cfg in SHARDED.items():
        model = shard(cfg, mesh)
        load_into(model, folder / name)
        keep |= {f"{name}/local/{n}": p.to_local().clone() for n, p in model.named_parameters()}
        keep |= {f"{name}/whole/{n}": t.clone() for n, t in stream(model, tied_twice=True)}
        save(folder / f"{name}-again", cfg, stream(model), dtype="float32")
        loss_of(model).backward()
        keep |= {f"{name}/grad/{n}": p.grad.full_tensor() for n, p in model.named_parameters()}
        # a forward leaves this one unsharded, in bf16: neither reading nor filling may notice
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        mixed = shard(cfg, mesh, mp_policy=bf16, reshard_after_forward=False)
        for p in mixed.parameters():
            torch.nn.init.zeros_(p)
        with torch.no_grad():
            loss_of(mixed)
        load_into(mixed, folder / name)
        with torch.no_grad():
            loss_of(mixed)
        keep |= {f"{name}/mixed/{n}": t.clone() for n, t in stream(mixed)}
        keep |= {f"{name}/bf16/{n}": t.clone() for n, t in stream(mixed, "bfloat16")}
    try:
        load_into(shard(ODD, mesh), folder / "damaged")
    except UserError as e:
        (folder / f"refused-{rank}").write_text(str(e))
    save_file(keep, folder / f"rank-{rank}")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Folder of what two ranks saw: rank-0 and rank-1, exports <name> and <name>-again."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, cfg in SHARDED.items():
        export(folder / name, cfg, shard_bytes=3000)
    shutil.copytree(folder / "untied", folder / "damaged")
    with sorted((folder / "damaged").glob("*.safetensors"))[1].open("r+b") as f:
        f.seek(-3, os.SEEK_END)
        f.write(b"?")
    spawn(two_ranks_worker, 2, folder)
    return folder


def seen(folder, rank, prefix):
    return {
        name.removeprefix(prefix + "/"): tensor
        for name, tensor in load_file(folder / f"rank-{rank}").items()
        if name.startswith(prefix + "/")
    }


@pytest.mark.parametrize("name", SHARDED)
def test_each_rank_holds_exactly_its_rows(two_ranks, name):
    parts, whole = [seen(two_ranks, rank, f"{name}/local") for rank in (0, 1)], load_model(two_ranks / name)
    for n, p in whole.named_parameters():
        assert [part[n].shape[0] for part in parts] == [(len(p) + 1) // 2, len(p) // 2]
        assert torch.equal(torch.cat([part[n] for part in parts]), p)


@pytest.mark.parametrize("name", SHARDED)
def test_stream_of_a_sharded_model_gives_every_rank_the_whole_tensors(two_ranks, name):
    expected = dict(stream(load_model(two_ranks / name), tied_twice=True))
    for rank in (0, 1):
        assert same(seen(two_ranks, rank, f"{name}/whole"), expected)


@pytest.mark.parametrize("name", SHARDED)
def test_units_left_unsharded_in_bf16_are_filled_and_streamed_from_their_masters(two_ranks, name):
    model = load_model(two_ranks / name)
    for rank in (0, 1):
        assert same(seen(two_ranks, rank, f"{name}/mixed"), dict(stream(model)))
        assert same(seen(two_ranks, rank, f"{name}/bf16"), {n: t.bfloat16() for n, t in stream(model)})


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_write_the_same_bytes_as_one(two_ranks, name):
    one, two = ({f.name: f.read_bytes() for f in (two_ranks / n).iterdir()} for n in (name, f"{name}-again"))
    assert one == two


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_and_checkpointed_gradients_are_the_plain_models(two_ranks, name):
    model = load_model(two_ranks / name)
    loss_of(model).backward()
    for rank in (0, 1):
        grads = seen(two_ranks, rank, f"{name}/grad")
        for n, p in model.named_parameters():
            torch.testing.assert_close(grads[n], p.grad)


def test_damage_is_refused_by_the_rank_that_checked_the_file(two_ranks):
    refusals = [f.read_text() for f in sorted(two_ranks.glob("refused-*"))]
    assert len(refusals) == 1
    assert "damaged/model-00002" in refusals[0]
