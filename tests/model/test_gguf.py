import glob
import json
import os
import struct
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import exit_code, random_model

from thinkmid.model import gguf as program
from thinkmid.model import hf_config, weights
from thinkmid.model.transformer import ModelConfig, RopeScaling
from thinkmid.tokenizer import Tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")
Quant = gguf.GGMLQuantizationType

# rows of whole blocks, and heads whose sizes differ from each other
SMALL = ModelConfig(
    kind="llama", vocab=320, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, rope_theta=5000.0,
    norm_eps=1e-5, tied=False, max_positions=128, eos_ids=(0,), bos_id=3,
)  # fmt: skip
STRETCH = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
FAMILY = {
    "llama": SMALL,
    "llama-tied-biased": replace(SMALL, tied=True, attention_bias=True, kv_heads=1),
    "llama-stretched": replace(SMALL, head_dim=32, rope_theta=500000.0, rope_scaling=STRETCH),
    "qwen2": replace(SMALL, kind="qwen2", tied=True),
    "qwen3": replace(SMALL, kind="qwen3", head_dim=128),
    "qwen3-tied": replace(SMALL, kind="qwen3", head_dim=24, tied=True),
}
TENSORS = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
CONTROL = ["<|end|>", "<|im_start|>", "<｜begin▁of▁sentence｜>", "<|bos|>"]  # ids 0 to 3
KEPT = "<think>"  # whole, though an ordinary token; the last id
ODD = [
    "", " ", "  ", "a", " a", "  a", "\n", "\n\n \n", "\t\tx", "x \n y", "\r\n", "...", "?!", "it's WE'LL I'd they'RE",
    "12", "1234567", " 3", "  3", "3.14", "1,000,000", "x=12*(3+4)", "½ ² ١٢٣ Ⅷ", "naïve café", "cafe\u0301", "ﬁ",
    "ｶﾀｶﾅ", "Ω", "日本語テキスト", "Привет, мир", "مرحبا بالعالم", "\U0001f469\u200d\U0001f467 \U0001f1eb",
    "\U0001f1eb\U0001f1f7", "\u200b\u00a0\u3000",
    "\x00\x07", "<think>", "a<think>b</think>", "< think >", "<|end|>", "<|im_start|>user\nhi<|im_end|>",
    "<｜begin▁of▁sentence｜>x", "def f(x):\n    return x  # y", "https://a.b/c?d=e&f=g#h", "A" * 300, " " * 70,
    "ab " * 40, "ÿþ", "\U0001f9ff\U000e0041", "e\u0301\u0302x",
]  # fmt: skip


def llama_cpp_order(rows, heads):
    """llama.cpp's converter's order of the rows of q and k: the two halves of each head, interleaved."""
    heads = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(rows.shape)


def gguf_name(name):
    parts = name.split(".")
    block = [f"blk.{parts[1]}"] if parts[0] == "layers" else []
    return ".".join([*block, TENSORS[parts[-2]], parts[-1]])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Tokens and merges of a byte-level vocabulary: control tokens, bytes and merges, one token that is kept whole."""
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(["the cat sat on the mat 12 345 naïve it's    we'll    x\n\n" * 50], 310, folder, "plain")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    ordinary = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in CONTROL]
    tokens = [*CONTROL, *ordinary[: SMALL.vocab - len(CONTROL) - 1], KEPT]
    tokens = [*tokens[:-1], *(f"[PAD{i}]" for i in range(SMALL.vocab - len(tokens))), KEPT]
    known = set(tokens)
    merges = [" ".join(pair) for pair in model["merges"] if {"".join(pair), *pair} <= known]
    return tokens, [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL) - 1) + [4], merges


def fields(cfg, bpe):
    tokens, types, merges = bpe
    a = cfg.kind
    return {
        f"{a}.block_count": cfg.layers, f"{a}.context_length": cfg.max_positions, f"{a}.embedding_length": cfg.width,
        f"{a}.feed_forward_length": cfg.ffn, f"{a}.attention.head_count": cfg.heads,
        f"{a}.attention.head_count_kv": cfg.kv_heads, f"{a}.attention.key_length": cfg.head_dim,
        f"{a}.attention.value_length": cfg.head_dim, f"{a}.rope.dimension_count": cfg.head_dim,
        f"{a}.rope.freq_base": cfg.rope_theta, f"{a}.attention.layer_norm_rms_epsilon": cfg.norm_eps,
        f"{a}.vocab_size": cfg.vocab, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }  # fmt: skip


def matrices(model, quant=Quant.F32):
    """{GGUF name: (values, quantisation)} in llama.cpp's order; norms and biases stay fp32."""
    cfg, found = model.cfg, {}
    for name, p in model.named_parameters():
        values = p.detach().float().numpy()
        if cfg.kind == "llama" and {"q_proj", "k_proj"} & set(name.split(".")):
            values = llama_cpp_order(values, cfg.heads if "q_proj" in name else cfg.kv_heads)
        found[gguf_name(name)] = values, quant if values.ndim == 2 else Quant.F32
    if cfg.rope_scaling:
        found["rope_freqs.weight"] = llama3_factors(cfg), Quant.F32
    return found


def llama3_factors(cfg):
    """What llama.cpp divides each pair's frequency by; from the wave lengths of Llama 3.1's paper code."""
    scaling, factors = cfg.rope_scaling, []
    for pair in range(cfg.head_dim // 2):
        wave = 2 * np.pi * cfg.rope_theta ** (2 * pair / cfg.head_dim)
        if wave < scaling.original_max_positions / scaling.high_freq_factor:
            factors.append(1.0)
        elif wave > scaling.original_max_positions / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            turns = scaling.original_max_positions / wave
            smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def write(path, kind, meta, tensors):
    """A GGUF file. A value of None leaves a key or a tensor out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, kind)
    for key, value in meta.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
            writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, tensor in tensors.items():
        if tensor is not None:
            values, quant = tensor
            writer.add_tensor(name, values if quant == Quant.I8 else gguf.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(path, folder, *flags):
    program.main([str(path), str(folder), *flags])
    return folder


def small(tmp_path, bpe, cfg=SMALL, quant=Quant.F32, meta=None, tensors=None):
    """A file of a random model, and the model."""
    model = random_model(cfg)
    parts = fields(cfg, bpe) | (meta or {}), matrices(model, quant) | (tensors or {})
    return write(tmp_path / "in" / "small.gguf", cfg.kind, *parts), model


# what comes out


@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())
def test_the_source_weights_and_config_come_back(tmp_path, bpe, cfg):
    path, model = small(tmp_path, bpe, cfg)
    folder = convert(path, tmp_path / "out")
    assert hf_config.read_config(folder) == cfg
    loaded = dict(weights.load_model(folder).named_parameters())
    assert loaded.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(loaded[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("cfg", FAMILY.values(), ids=FAMILY.keys())
def test_logits_are_those_of_transformers_on_the_same_file(tmp_path, bpe, cfg):
    transformers = pytest.importorskip("transformers")
    if cfg.rope_scaling or cfg.attention_bias or (cfg.kind == "qwen3" and cfg.head_dim != 128):
        pytest.skip("transformers' reader leaves out the stretch, biases and the size of Qwen3's heads")
    path, _ = small(tmp_path, bpe, cfg, Quant.Q8_0)
    ours = weights.load_model(convert(path, tmp_path / "out"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.arange(60) * 7 % cfg.vocab
    with torch.no_grad():
        want = theirs(tokens[None]).logits[0]
        assert (ours.logits(tokens) - want).abs().max() < 2e-5 * want.std()


def halves(values):
    return values.astype(np.float16).astype(np.float32)


def bf16(values):
    return torch.from_numpy(values).bfloat16().float().numpy()


def q8_0(values):
    """By hand: 32 values share a scale in fp16."""
    blocks = gguf.quantize(values, Quant.Q8_0).reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (scale * blocks[:, 2:].copy().view(np.int8)).reshape(values.shape)


def q4_0(values):
    """By hand: the low halves of 16 bytes, then the high ones, less 8, times a scale in fp16."""
    blocks = gguf.quantize(values, Quant.Q4_0).reshape(-1, 18)
    scale, nibbles = blocks[:, :2].copy().view(np.float16).astype(np.float32), blocks[:, 2:]
    levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32) - 8
    return (scale * levels).reshape(values.shape)


@pytest.mark.parametrize(
    ("quant", "by_hand"), [(Quant.F16, halves), (Quant.BF16, bf16), (Quant.Q8_0, q8_0), (Quant.Q4_0, q4_0)]
)
def test_quantised_weights_are_what_their_blocks_say(tmp_path, bpe, quant, by_hand):
    cfg = replace(SMALL, kind="qwen2")  # no permuted rows here
    path, model = small(tmp_path, bpe, cfg, quant)
    loaded = dict(weights.load_model(convert(path, tmp_path / "out")).named_parameters())
    for name, p in model.named_parameters():
        want = torch.from_numpy(by_hand(p.detach().numpy())) if p.ndim == 2 else p
        assert torch.equal(loaded[name], want), name


def test_dtype_is_that_asked_for(tmp_path, bpe):
    path, model = small(tmp_path, bpe)
    folder = convert(path, tmp_path / "out", "--dtype", "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = dict(weights.load_model(folder, "bfloat16").named_parameters())
    assert all(torch.equal(loaded[name], p.bfloat16()) for name, p in model.named_parameters())


# tokens


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_tokens_are_those_of_transformers_on_the_same_file(tmp_path, bpe, pre):
    transformers = pytest.importorskip("transformers")
    path, _ = small(tmp_path, bpe, meta={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
    folder = convert(path, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    # theirs knows no control token made of other characters, and no NFC
    texts = [text for text in ODD if "｜" not in text and (pre != "qwen2" or "\u0301" not in text)]
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    assert ours("<｜begin▁of▁sentence｜>x").input_ids[0] == CONTROL.index("<｜begin▁of▁sentence｜>")
    assert ours("a<think>").input_ids[-1] == SMALL.vocab - 1
    assert (ours("cafe\u0301").input_ids == ours("café").input_ids) == (pre == "qwen2")


def test_digits_of_smollm_stand_alone(tmp_path, bpe):
    path, _ = small(tmp_path, bpe, meta={"tokenizer.ggml.pre": "smollm"})
    tokenizer = Tokenizer.load(convert(path, tmp_path / "out"))
    pieces = [[tokenizer.decode([i]) for i in tokenizer.encode(text)] for text in ("12", "  345", "x 12")]
    assert pieces == [["1", "2"], ["  ", "3", "4", "5"], ["x", " ", "1", "2"]]


def test_a_word_that_is_a_token_needs_no_merges_in_llama_3(tmp_path, bpe):
    tokens, _, merges = bpe
    word = max((token for token in tokens if token.isascii() and token.isalpha()), key=len)
    fewer = [pair for pair in merges if pair.replace(" ", "") != word]
    for pre, alone in {"llama-bpe": True, "qwen2": False}.items():
        meta = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": fewer}
        path, _ = small(tmp_path / pre, bpe, meta=meta)
        tokenizer = Tokenizer.load(convert(path, tmp_path / pre / "out"))
        assert (tokenizer.encode(word) == [tokens.index(word)]) == alone


def test_control_tokens_are_special_and_kept_ones_are_not(tmp_path, bpe):
    path, _ = small(tmp_path, bpe)
    added = json.loads((convert(path, tmp_path / "out") / "tokenizer.json").read_text())["added_tokens"]
    assert {token["content"]: token["special"] for token in added} == {**dict.fromkeys(CONTROL, True), KEPT: False}


def test_texts_survive_and_special_tokens_are_named(tmp_path, bpe):
    meta = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 1}
    path, _ = small(tmp_path, bpe, meta=meta)
    folder = convert(path, tmp_path / "out")
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in ODD] == ODD
    assert (tokenizer.eos_ids, tokenizer.begin_ids) == ((0, 1), [3])
    about = json.loads((folder / "tokenizer_config.json").read_text())
    assert about["chat_template"] == "{{ messages[0].content }}"
    assert (about["bos_token"], about["eos_token"], about["pad_token"]) == ("<|bos|>", "<|end|>", "<|im_start|>")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [0, 1]


def test_every_reader_puts_the_begin_token_in_front_iff_the_file_says_so(tmp_path, bpe):
    transformers = pytest.importorskip("transformers")
    said = {"gpt-2": {None: False, True: True, False: False}, "llama-bpe": {None: True, True: True, False: False}}
    for pre, cases in said.items():
        for flag, begins in cases.items():
            meta = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag}
            path, _ = small(tmp_path / f"{pre}{flag}", bpe, meta=meta)
            folder = convert(path, tmp_path / f"{pre}{flag}" / "out")
            assert (transformers.AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == 3) == begins
            assert bool(Tokenizer.load(folder).begin_ids) == begins
            bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            assert [bare.encode("a", add_special_tokens=added).ids[0] == 3 for added in (True, False)] == [
                begins,
                False,
            ]


def test_sentencepiece_vocabularies_come_through_transformers(tmp_path):
    pytest.importorskip("transformers")
    words = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "▁abc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    cfg = replace(SMALL, vocab=len(tokens), eos_ids=(2,), bos_id=1)
    meta = fields(cfg, (tokens, [2, 3, 3] + [6] * 256 + [1] * len(words), [])) | {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    path = write(tmp_path / "in" / "sp.gguf", "llama", meta, matrices(random_model(cfg)))
    tokenizer = Tokenizer.load(convert(path, tmp_path / "out"))
    assert [tokenizer.pieces[i] for i in tokenizer.encode(" ab é")] == [b" ab", b" ", b"\xc3", b"\xa9"]
    assert tokenizer.begin_ids == [1]


# refusals

NAN = np.full((SMALL.ffn, SMALL.width), np.nan, np.float32), Quant.F32
REFUSED = {
    "another architecture": ({}, {}, "gemma2", "architecture 'gemma2' is not supported; llama, qwen2, qwen3 are"),
    "one of many files": ({"split.count": 3}, {}, "llama", "one of 3 files of a model"),
    "experts": ({"llama.expert_count": 8}, {}, "llama", "llama.expert_count 8 is not supported"),
    "another scaling": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, {}, "llama",
        "llama.rope.scaling.type yarn is not supported",
    ),
    "a factor without a type": (
        {"llama.rope.scaling.factor": 4.0}, {}, "llama", "llama.rope.scaling.factor 4.0 is not supported",
    ),
    "half of a head rotated": (
        {"llama.rope.dimension_count": 8}, {}, "llama",
        "llama.rope.dimension_count 8 is not supported where attention.key_length is 16",
    ),
    "no width": ({"llama.embedding_length": None}, {}, "llama", "llama.embedding_length is missing or not a number"),
    "a width in words": ({"llama.embedding_length": "64"}, {}, "llama", "llama.embedding_length is missing or not"),
    "heads per layer": (
        {"llama.attention.head_count_kv": [2, 2]}, {}, "llama", "llama.attention.head_count_kv is missing or not a",
    ),
    "odd heads": ({"llama.attention.head_count_kv": 3}, {}, "llama", "kv_heads 3 must divide heads 4"),
    "a missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "llama", "1 missing: blk.1.ffn_up.weight"),
    "no embedding": ({}, {"token_embd.weight": None}, "llama", "token_embd.weight is missing"),
    "a tensor too many": (
        {}, {"blk.0.attn_sinks.weight": (np.ones(4, np.float32), Quant.F32)}, "llama",
        "1 unexpected: blk.0.attn_sinks.weight",
    ),
    "another stretch": (
        {}, {"rope_freqs.weight": (np.linspace(1, 9, 8, dtype=np.float32), Quant.F32)}, "llama",
        "rope_freqs.weight scales RoPE in a way that is not supported",
    ),
    "a stretch in Qwen2": (
        {}, {"rope_freqs.weight": (np.ones(8, np.float32), Quant.F32)}, "qwen2", "1 unexpected: rope_freqs.weight",
    ),
    "a tensor of another shape": (
        {}, {"blk.0.ffn_up.weight": (np.ones((95, 64), np.float32), Quant.F32)}, "llama",
        "1 mis-shaped: blk.0.ffn_up.weight (95, 64) instead of (96, 64)",
    ),
    "an unknown quantisation": (
        {}, {"blk.0.ffn_up.weight": (np.ones((96, 64), np.int8), Quant.I8)}, "llama",
        "1 of a quantisation that is not supported: blk.0.ffn_up.weight I8",
    ),
    "not a number": ({}, {"blk.1.ffn_up.weight": NAN}, "llama", "blk.1.ffn_up.weight holds values that are not finite"),
    "fewer tokens": ({"tokenizer.ggml.tokens": ["a", "b"]}, {}, "llama", "has 320 rows, but there are 2 tokens"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, {}, "llama", "tokenizer.ggml.model None is not supported"),
    "another tokenizer": ({"tokenizer.ggml.model": "t5"}, {}, "llama", "tokenizer.ggml.model 't5' is not supported"),
    "other words": ({"tokenizer.ggml.pre": "tekken"}, {}, "llama", "tokenizer.ggml.pre 'tekken' is not supported"),
    "an end beyond the tokens": (
        {"tokenizer.ggml.eos_token_id": 320}, {}, "llama", "eos_token_id 320 is none of the 320 tokens",
    ),
    "a broken merge": ({"tokenizer.ggml.merges": ["zz yy"]}, {}, "llama", "tokenizer.json: not a tokenizer ("),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, "llama", "tokenizer.ggml.merges or token_type is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_supported_is_refused_by_name(tmp_path, bpe, case, capsys):
    meta, tensors, kind, line = case
    cfg = replace(SMALL, kind=kind if kind in ("llama", "qwen2") else "llama")
    model = random_model(cfg)
    path = write(tmp_path / "small.gguf", kind, fields(cfg, bpe) | meta, matrices(model) | tensors)
    assert exit_code(program, [str(path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ")
    assert said.count("\n") == 1
    assert line in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, bpe, capsys):
    path, _ = small(tmp_path, bpe)
    raw, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in [0, 3, 4, 11, 24, *range(30, len(raw), len(raw) // 60), len(raw) - 1]:
        cut.write_bytes(raw[:size])
        assert exit_code(program, [str(cut), str(tmp_path / "out")]) == 2, size
        assert capsys.readouterr().err.startswith(f"error: {cut}: damaged or not a GGUF file"), size
    assert not (tmp_path / "out").exists()


def test_a_damaged_length_ends_at_once(tmp_path, bpe, capsys):
    path, _ = small(tmp_path, bpe)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4 + 4  # kind, kind of elements
    raw[at : at + 8] = struct.pack("<Q", 2**61)
    path.write_bytes(raw)
    assert exit_code(program, [str(path), str(tmp_path / "out")]) == 2
    assert "damaged or not a GGUF file" in capsys.readouterr().err


def test_other_mistakes_end_with_one_line(tmp_path, bpe, capsys, monkeypatch):
    path, _ = small(tmp_path, bpe)
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "mine.txt").write_text("mine")
    assert exit_code(program, [str(path), str(full)]) == 2
    assert capsys.readouterr().err == f"error: {full}: exists already and is not empty\n"
    assert [file.name for file in full.iterdir()] == ["mine.txt"]
    assert exit_code(program, [str(tmp_path / "nowhere.gguf"), str(empty)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere.gguf'}: No such file or directory\n"
    assert exit_code(program, [str(path), str(empty)]) is None
    assert (empty / "model.safetensors").exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "thinkmid.model.gguf_file")
    monkeypatch.delattr("thinkmid.model.gguf_file")
    assert exit_code(program, [str(path), str(tmp_path / "new")]) == 2
    assert "needs gguf; pip install thinkmid[gguf]" in capsys.readouterr().err


# a real model


def smollm2():
    found = os.environ.get("THINKMID_SMOLLM2") or next(iter(sorted(glob.glob("build/SmolLM2*.gguf"))), "")
    return Path(found) if found and Path(found).is_file() else None


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    if smollm2() is None:
        pytest.skip("no SmolLM2-135M-Instruct: THINKMID_SMOLLM2=FILE.gguf or build/SmolLM2*.gguf")
    return convert(smollm2(), tmp_path_factory.mktemp("smol") / "model")


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers_and_knows_paris(smol):
    transformers = pytest.importorskip("transformers")
    ours, tokenizer = weights.load_model(smol), Tokenizer.load(smol)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2().parent, gguf_file=smollm2().name, dtype=torch.float32
    )
    tokens = torch.tensor(tokenizer.encode("The capital of France is"))
    with torch.no_grad():
        mine, want = ours.logits(tokens), theirs(tokens[None]).logits[0]
    assert (mine - want).abs().max() < 2e-5 * want.std()
    assert tokenizer.decode([mine[-1].argmax()]) == " Paris"


@pytest.mark.slow
def test_smollm2_has_the_tokens_of_transformers(smol):
    transformers = pytest.importorskip("transformers")
    ours = transformers.AutoTokenizer.from_pretrained(smol)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2().parent, gguf_file=smollm2().name)
    # theirs does not part digits from the spaces in front of them
    texts = [*ODD, *(f"{a}{b}" for a in ODD[13:40] for b in ("x ", "\n", ". The"))]
    texts = [text for text in texts if not any(a.isspace() and b.isnumeric() for a, b in pairwise(text))]
    assert len(texts) > 100
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    tokenizer = Tokenizer.load(smol)
    plain = [text for text in texts if "<|" not in text]  # Tokenizer takes the names of special tokens for characters
    assert [tokenizer.encode(text) for text in plain] == [ours(text).input_ids for text in plain]
