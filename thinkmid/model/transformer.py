"""One decoder for training and decoding: Llama 3.x, Mistral, SmolLM3, Qwen2.5, Qwen3, OLMo 2 and 3.

The caller supplies the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkmid.errors import UserError
from thinkmid.kernels import apply_rope, rms_norm, swiglu
from thinkmid.model.init import FreshConfig

Kind = Literal["llama", "mistral", "smollm3", "qwen2", "qwen3", "olmo2", "olmo3"]
# beyond these a number is a mistake, found before it asks for memory
MOST_LAYERS, MOST, MOST_PARAMETERS = 2**12, 2**24, 2**42
HeadFn = Callable[[Tensor, Tensor], Any]  # hidden (R, D), weight (V, D) -> logits, or whatever the caller wants of them


class Attend(Protocol):
    """Attention of one layer: q (T, H, C), k and v (T, K, C) -> (T, H, C)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        """window: newest keys that a query sees, its own included; 0: all. Only layers with a window name it."""


class Form(NamedTuple):
    """What a kind alone decides."""

    qkv_bias: bool = False  # biases on q, k and v, whatever attention_bias says
    qk_norm: Literal["", "head", "width"] = ""  # RMSNorm of q and k before RoPE: of each head, or of all heads at once
    norm_after: bool = False  # norms of what attention and MLP give, instead of what they are given
    full_layers_scaled: bool = False  # rope_scaling, which may be YaRN, is for layers without a window alone
    windows: Literal["", "all", "some"] = ""  # which layers may have a window
    skips_rope: bool = False  # layers may do without RoPE
    has_bias_choice: bool = True  # attention_bias may be set


FORMS: dict[Kind, Form] = {
    "llama": Form(),
    "mistral": Form(windows="all", has_bias_choice=False),
    "smollm3": Form(windows="some", skips_rope=True),
    "qwen2": Form(qkv_bias=True, has_bias_choice=False),
    "qwen3": Form(qk_norm="head"),
    "olmo2": Form(qk_norm="width", norm_after=True),
    "olmo3": Form(qk_norm="width", norm_after=True, full_layers_scaled=True, windows="some"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of RoPE's slow frequencies."""

    factor: float  # >= 1, how far the slowest frequencies are stretched
    low_freq_factor: float  # fewer turns than this over original_max_positions: stretched in full
    high_freq_factor: float  # more turns than this: left alone
    original_max_positions: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"factor must be at least 1 and 0 < low_freq_factor < high_freq_factor, got {self}")


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN's stretch of RoPE's slow frequencies."""

    factor: float  # >= 1, how far the slowest frequencies are stretched
    beta_fast: float = 32.0  # more turns than this over original_max_positions: left alone
    beta_slow: float = 1.0  # fewer turns than this: stretched in full
    attention_factor: float  # > 0, cosines and sines are multiplied by it
    original_max_positions: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.beta_slow <= self.beta_fast and self.attention_factor > 0):
            raise ValueError(f"factor must be at least 1, 0 < beta_slow <= beta_fast, 0 < attention_factor, got {self}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a decoder. The kind decides where it has biases and norms. ValueError names field and value."""

    kind: Kind  # of FORMS
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # divides heads
    head_dim: int  # even; heads * head_dim need not be width
    ffn: int
    rope_theta: float
    rope_scaling: RopeScaling | Yarn | None = None
    norm_eps: float
    tied: bool  # the head is the embedding
    max_positions: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    attention_bias: bool = False  # biases on q, k, v and o
    window: int = 0  # keys that a query of a windowed layer sees, its own included
    windowed_layers: tuple[int, ...] = ()  # rising; others see all keys
    no_rope_layers: tuple[int, ...] = ()  # rising; there q and k are not rotated

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_positions"):
            most = MOST_LAYERS if name == "layers" else MOST
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [1, {most}], got {getattr(self, name)}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}, 2 head_dim {self.head_dim}")
        if not (self.rope_theta > 0 and self.norm_eps >= 0):
            raise ValueError(f"rope_theta {self.rope_theta} must be positive, norm_eps {self.norm_eps} not negative")
        if self.attention_bias and not self.form.has_bias_choice:
            raise ValueError(f"attention_bias is not a choice of kind {self.kind}")
        if isinstance(self.rope_scaling, Yarn) and not self.form.full_layers_scaled:
            raise ValueError(f"YaRN is not supported for kind {self.kind}")
        self._check_layers()
        if self.num_parameters > MOST_PARAMETERS:
            limit = f"at most {MOST_PARAMETERS:.1e} are possible"
            raise ValueError(f"a model of {self.num_parameters:.1e} parameters: {limit}")

    def _check_layers(self) -> None:
        """What single layers differ in must be what a config.json of the kind can say."""
        for name in ("windowed_layers", "no_rope_layers"):
            if list(layers := getattr(self, name)) != sorted(set(layers) & set(range(self.layers))):
                raise ValueError(f"{name} must rise within [0, {self.layers}), got {layers}")
        if not 0 <= self.window <= MOST or bool(self.window) != bool(self.windowed_layers):
            raise ValueError(f"window must lie in [1, {MOST}] if layers are windowed, else be 0, got {self.window}")
        most = {"": 0, "all": self.layers, "some": len(self.windowed_layers)}[self.form.windows]
        if len(self.windowed_layers) not in (0, most):
            raise ValueError(f"windowed_layers of kind {self.kind} must be none or {most}, got {self.windowed_layers}")
        if self.no_rope_layers and not self.form.skips_rope:
            raise ValueError(f"no_rope_layers are not supported for kind {self.kind}, got {self.no_rope_layers}")

    @property
    def form(self) -> Form:
        """What the kind decides."""
        return FORMS[self.kind]

    @property
    def qkv_bias(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.form.qkv_bias or self.attention_bias

    @property
    def qk_norms(self) -> tuple[int, int]:
        """Widths of the norms of q and k, 0 where there are none."""
        heads = {"": (0, 0), "head": (1, 1), "width": (self.heads, self.kv_heads)}[self.form.qk_norm]
        return heads[0] * self.head_dim, heads[1] * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Trained numbers; a tied head counts once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.width * (q + kv) + self.qkv_bias * (q + 2 * kv) + self.attention_bias * self.width
        norms = 2 * self.width + sum(self.qk_norms)
        block = attention + norms + 3 * self.width * self.ffn
        return self.vocab * self.width * (1 if self.tied else 2) + self.layers * block + self.width


def fresh_model_cfg(cfg: FreshConfig, vocab: int, eos_ids: tuple[int, ...]) -> ModelConfig:
    """A fresh model in Qwen3's form. UserError where the sizes make no model."""
    sizes = {name: value for name, value in vars(cfg).items() if name not in ("vocab", "tokenizer_data", "tags")}
    try:
        return ModelConfig(kind="qwen3", vocab=vocab, norm_eps=1e-6, eos_ids=eos_ids, **sizes)
    except ValueError as error:
        raise UserError(f"fresh: {error}") from None


def inverse_frequencies(cfg: ModelConfig) -> Tensor:
    """Radians per position of each pair, (C/2,) fp32 on the CPU; stretched where the config has rope_scaling."""
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / cfg.rope_theta ** (pairs / cfg.head_dim)
    if (scaling := cfg.rope_scaling) is None:
        return freq
    if isinstance(scaling, Yarn):
        keep = 1 - _yarn_ramp(cfg, scaling)
    else:
        turns = scaling.original_max_positions / (2 * math.pi / freq)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freq / scaling.factor + keep * freq


def _yarn_ramp(cfg: ModelConfig, yarn: Yarn) -> Tensor:
    """How far each pair is stretched, (C/2,) in [0, 1]: a ramp between the pairs that make beta_fast and beta_slow
    turns, rounded outwards to whole pairs."""
    per_pair = 2 * math.log(cfg.rope_theta) / cfg.head_dim  # natural logarithm of a frequency's fall
    fast, slow = (
        math.log(yarn.original_max_positions / (2 * math.pi * turns)) / per_pair
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), cfg.head_dim - 1)
    pairs = torch.arange(cfg.head_dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)


class RMSNorm(nn.Module):
    """kernels.rms_norm with its weight (D,). x (..., D); with a residual it returns (norm of the sum, sum)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Projections and RoPE around attend. x (T, D), cos and sin (T, C/2) -> (T, D)."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.width, q, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.width, kv, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.width, kv, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(q, cfg.width, bias=cfg.attention_bias)
        self.q_norm, self.k_norm = (RMSNorm(n, cfg.norm_eps) if n else nn.Identity() for n in cfg.qk_norms)
        self.norms_width = cfg.form.qk_norm == "width"
        self.rotates = layer not in cfg.no_rope_layers
        # a caller's attention that knows no windows fails, rather than seeing all keys
        self.window = {"window": cfg.window} if layer in cfg.windowed_layers else {}

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self._heads(self.q_proj(x), self.q_norm, cos, sin)
        k = self._heads(self.k_proj(x), self.k_norm, cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        out: Tensor = self.o_proj(attend(self.layer, q, k, v, **self.window).flatten(1))
        return out

    def _heads(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        """x (T, H * C) normed and rotated, (T, H, C)."""
        heads = (-1, self.head_dim)
        x = norm(x).unflatten(-1, heads) if self.norms_width else norm(x.unflatten(-1, heads))
        return apply_rope(x, cos, sin) if self.rotates else x


class MLP(nn.Module):
    """SwiGLU feed-forward. x (T, D) -> (T, D)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Block(nn.Module):
    """One pre-norm layer, its residual sums included. x (T, D) -> (T, D)."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        y, x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin, attend), x)
        out: Tensor = x + self.mlp(y)
        return out


class NormAfterBlock(nn.Module):
    """One layer that norms what attention and MLP add to the residual. x (T, D) -> (T, D)."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg)
        self.post_feedforward_layernorm = RMSNorm(cfg.width, cfg.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, cos, sin, attend))
        out: Tensor = x + self.post_feedforward_layernorm(self.mlp(x))
        return out


class Head(nn.Module):
    """The (V, D) weight, given to the caller's function. A module, so that FSDP2's hooks gather the weight first."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, fn: HeadFn = F.linear) -> Any:
        return fn(hidden, self.weight)


class Transformer(nn.Module):
    """The decoder. Parameters carry their Hugging Face names without the leading "model."."""

    def __init__(self, cfg: ModelConfig, *, checkpointing: bool = False, deterministic: bool = True) -> None:
        super().__init__()
        self.cfg, self.checkpointing = cfg, checkpointing  # checkpointing: recompute each block in the backward
        self.deterministic = deterministic  # what whoever trains it asks of attention's backward
        # nn.Embedding's own initialisation costs seconds on the meta device: it imports torch's compiler
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(cfg.vocab, cfg.width), freeze=False)
        block = NormAfterBlock if cfg.form.norm_after else Block
        self.layers = nn.ModuleList(block(cfg, i) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.lm_head = Head(self.embed_tokens.weight if cfg.tied else nn.Parameter(torch.empty(cfg.vocab, cfg.width)))
        # not a buffer: to_empty would leave garbage in it, and mixed precision would round it
        self._freq: dict[tuple[torch.device, bool], Tensor] = {}

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None, head: HeadFn = F.linear
    ) -> Any:
        """Run packed tokens through the decoder; returns what head(hidden, weight) returns, by default logits (R, V).

        tokens, positions (T,) int64; attend(layer, q, k, v) -> o with q, o (T, H, C) and k, v (T, K, C), q and k
        already rotated; rows (R,) int64 picks the positions that reach the final norm and the head, None: all of them.
        """
        cfg, full = self.cfg, self.rope(positions)
        windowed = self.rope(positions, scaled=False) if cfg.form.full_layers_scaled and cfg.rope_scaling else full
        x = self.embed_tokens(tokens)  # (T, D)
        for layer, block in enumerate(self.layers):
            cos, sin = windowed if layer in cfg.windowed_layers else full
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, attend)
        if rows is not None:
            x = x[rows]
        return self.lm_head(self.norm(x), head)

    def rope(self, positions: Tensor, *, scaled: bool = True) -> tuple[Tensor, Tensor]:
        """cos, sin of the angles at positions (T,): (T, C/2) each, fp32 whatever the model's dtype.

        scaled: with the config's rope_scaling.
        """
        cfg = self.cfg if scaled else replace(self.cfg, rope_scaling=None)
        if (key := (positions.device, scaled)) not in self._freq:
            self._freq[key] = inverse_frequencies(cfg).to(positions.device)
        angles = positions[:, None].float() * self._freq[key]
        if isinstance(cfg.rope_scaling, Yarn):
            return angles.cos() * cfg.rope_scaling.attention_factor, angles.sin() * cfg.rope_scaling.attention_factor
        return angles.cos(), angles.sin()

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits (T, V) of one sequence, tokens (T,) int64."""
        out: Tensor = self(tokens, torch.arange(len(tokens), device=tokens.device), _attend_causal)
        return out


def _attend_causal(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, C)
    mask = None
    if 0 < window < (size := q.shape[2]):
        mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fresh weights for a model that is not sharded yet: the same for a seed on every device, global RNG untouched.

    Matrices N(0, 1/fan_in), but attention-output, down projections and a separate head start at zero: the first step
    sees a uniform prediction and every block the identity. Embeddings N(0, 0.7^2); a tied one is the head's matrix too.
    """
    rng = torch.Generator("cpu").manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.fill_(1)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "bias")):
            p.zero_()
        else:
            std = 0.7 if name == "embed_tokens.weight" and not model.cfg.tied else p.shape[1] ** -0.5
            p.copy_(torch.empty(p.shape, dtype=torch.float32, device="cpu").normal_(0, std, generator=rng))
