"""A GGUF file of llama.cpp: its model's config, and its weights under Hugging Face's names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from thinkmid.errors import UserError
from thinkmid.files import Row, regular
from thinkmid.model import gguf_tokenizer, weights
from thinkmid.model.transformer import Kind, ModelConfig, RopeScaling, inverse_frequencies
from thinkmid.model.weight_files import one_line, summary

KINDS = ("llama", "qwen2", "qwen3")
FREQS, EMBEDDING, HEAD = "rope_freqs.weight", "token_embd.weight", "output.weight"
SIZES = {
    "width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
    "ffn": "feed_forward_length", "max_positions": "context_length",
}  # fmt: skip
EPS, THETA, KV_HEADS = "attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.head_count_kv"
HEAD_DIMS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
READ = {*SIZES.values(), EPS, THETA, KV_HEADS, *HEAD_DIMS, "vocab_size"}
SCALING, TOKENS = "rope.scaling.", "tokenizer.ggml.tokens"


class Reader(gguf.GGUFReader):
    """The library's reader, which takes what stands past the end of a file for empty, and a damaged length for real."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **kw: Any) -> Any:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"it ends after {len(self.data)} bytes")
        return super()._get(offset, dtype, count, *rest, **kw)


class File(NamedTuple):
    """What stands in a GGUF file."""

    path: Path
    kind: Kind
    meta: Row  # key: value
    tensors: dict[str, Any]  # name: gguf.ReaderTensor, mapped from disk

    def number(self, key: str, default: float | None = None) -> Any:
        """The number at ARCHITECTURE.key. UserError: it is missing, or something else stands there."""
        value = self.meta.get(f"{self.kind}.{key}", default)
        if key in (EPS, THETA) and isinstance(value, float) and math.isfinite(value):
            return float(str(np.float32(value)))  # 9.999999747378752e-06 is what fp32 makes of 1e-05
        if key in (EPS, THETA) or type(value) is not int:
            raise UserError(f"{self.path}: {self.kind}.{key} is missing or not a number")
        return value


def read(path: Path) -> File:
    """The file, opened. UserError: damaged, cut short, one of several files, or of another architecture."""
    try:
        reader = Reader(regular(path))
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: damaged or not a GGUF file ({one_line(error)})") from None
    if reader.byte_order != "I":
        raise UserError(f"{path}: big-endian files are not supported")
    if (parts := meta.get("split.count", 1)) not in (0, 1):
        raise UserError(f"{path}: one of {parts} files of a model; join them with llama-gguf-split --merge")
    if (kind := meta.get("general.architecture")) not in KINDS:
        raise UserError(f"{path}: architecture {kind!r} is not supported; {', '.join(KINDS)} are")
    return File(path, kind, meta, {tensor.name: tensor for tensor in reader.tensors})


def model_config(file: File) -> ModelConfig:
    """ModelConfig from the metadata. UserError names the key that is missing or that this decoder does not support."""
    scaled = file.meta.get(f"{file.kind}.{SCALING}type") != "none"
    for name, value in file.meta.items():
        key = name.removeprefix(f"{file.kind}.")
        if key in {name, *READ} or value in (None, 0, "", []) or (key.startswith(SCALING) and not scaled):
            continue
        raise UserError(f"{file.path}: {name} {str(value)[:80]} is not supported")
    sizes = {field: file.number(key) for field, key in SIZES.items()}
    head_dim = file.number(HEAD_DIMS[0], sizes["width"] // max(sizes["heads"], 1))
    for key in HEAD_DIMS:
        if (odd := file.number(key, head_dim)) != head_dim:
            raise UserError(f"{file.path}: {file.kind}.{key} {odd} is not supported where {HEAD_DIMS[0]} is {head_dim}")
    if EMBEDDING not in file.tensors:
        raise UserError(f"{file.path}: {EMBEDDING} is missing")
    vocab, num_tokens = math.prod(file.tensors[EMBEDDING].shape[1:].tolist()), len(file.meta.get(TOKENS) or ())
    if vocab != num_tokens:
        raise UserError(f"{file.path}: {EMBEDDING} has {vocab} rows, but there are {num_tokens} tokens")
    kv_heads, theta, eps = file.number(KV_HEADS, sizes["heads"]), file.number(THETA, 10000.0), file.number(EPS)
    try:
        return ModelConfig(
            kind=file.kind,
            vocab=vocab,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope_theta=theta,
            norm_eps=eps,
            tied=HEAD not in file.tensors,
            eos_ids=gguf_tokenizer.end_ids(file.path, file.meta),
            bos_id=gguf_tokenizer.token_id(file.path, file.meta, "bos"),
            attention_bias=file.kind != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
            **sizes,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file.path}: {error}") from None


def with_stretch(file: File, cfg: ModelConfig) -> ModelConfig:
    """The config with Llama 3.1's stretch of RoPE, where the file holds a factor for each pair of a head.

    UserError: the factors are not those that stretch a context of 8,192 tokens as Llama 3.1 to 3.3 do.
    """
    if file.kind != "llama" or FREQS not in file.tensors:
        return cfg
    factors = values(file, FREQS)
    scaling = RopeScaling(
        factor=max(factors.max().item(), 1.0), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    stretched = replace(cfg, rope_scaling=scaling)
    expected = inverse_frequencies(cfg) / inverse_frequencies(stretched)
    if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-4):
        raise UserError(f"{file.path}: {FREQS} scales RoPE in a way that is not supported")
    return stretched


def tensors(file: File, cfg: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, fp32 tensor) of each weight, one dequantised at a time.

    UserError, before the first: tensors are missing, left over, mis-shaped or of an unknown quantisation.
    """
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, file.kind.upper()), cfg.layers)
    expected = {weights.hf_name(name): p for name, p in weights.build(cfg, device="meta").named_parameters()}
    sources = {name: str(names.get_name(name, (".weight", ".bias"))) for name in expected}
    shapes = {name: tuple(tensor.shape[::-1].tolist()) for name, tensor in file.tensors.items()}
    problems = {
        "missing": {source for source in sources.values() if source not in file.tensors},
        "unexpected": file.tensors.keys() - sources.values() - ({FREQS} if cfg.rope_scaling else set()),
        "mis-shaped": {
            f"{source} {shapes[source]} instead of {tuple(expected[name].shape)}"
            for name, source in sources.items()
            if shapes.get(source, expected[name].shape) != expected[name].shape
        },
    }
    if any(problems.values()):
        raise UserError(f"{file.path}: {summary(problems)}")
    if odd := [f"{name} {tensor.tensor_type.name}" for name, tensor in file.tensors.items() if not readable(tensor)]:
        raise UserError(f"{file.path}: {summary({'of a quantisation that is not supported': odd})}")
    return stream(file, cfg, sources)


def stream(file: File, cfg: ModelConfig, sources: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """tensors() without its checks. UserError names a tensor whose values are not finite."""
    heads = {"q_proj": cfg.heads, "k_proj": cfg.kv_heads} if cfg.kind == "llama" else {}
    for name, source in sources.items():
        tensor = values(file, source)
        if not tensor.isfinite().all():
            raise UserError(f"{file.path}: {source} holds values that are not finite")
        if projection := heads.keys() & set(name.split(".")):
            tensor = in_halves(tensor, heads[projection.pop()])
        yield name, tensor


def readable(tensor: Any) -> bool:
    """Whether the library dequantises tensors of this kind."""
    try:
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def values(file: File, name: str) -> Tensor:
    """A tensor of the file, dequantised: fp32, its last axis first in GGUF's own shape."""
    tensor = file.tensors[name]
    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * C, ...) of q or k as Hugging Face rotates them: i with i + C/2; llama.cpp has them side by side."""
    halves: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves
