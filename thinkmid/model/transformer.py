"""One decoder for training and decoding: Llama 3.x, Qwen2.5, Qwen3. The caller supplies the attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkmid.errors import UserError
from thinkmid.kernels import apply_rope, rms_norm, swiglu
from thinkmid.model.init import FreshConfig

Kind = Literal["llama", "qwen2", "qwen3"]
# beyond these a number is a mistake, found before it asks for memory
MOST_LAYERS, MOST, MOST_PARAMETERS = 2**12, 2**24, 2**42
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (T, H, C), k, v (T, K, C) -> o (T, H, C)
HeadFn = Callable[[Tensor, Tensor], Any]  # hidden (R, D), weight (V, D) -> logits, or whatever the caller wants of them


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
class ModelConfig:
    """Sizes of a decoder. The kind decides where it has biases and q/k norms. ValueError names field and value."""

    kind: Kind  # qwen2: biases on q, k, v; qwen3: RMSNorm on each head of q and k before RoPE
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # divides heads
    head_dim: int  # even; heads * head_dim need not be width
    ffn: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    tied: bool  # the head is the embedding
    max_positions: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    attention_bias: bool = False  # llama, qwen3: biases on q, k, v and o

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
        if self.kind == "qwen2" and self.attention_bias:
            raise ValueError("attention_bias is not a choice of kind qwen2, whose q, k and v always have biases")
        if self.num_parameters > MOST_PARAMETERS:
            limit = f"at most {MOST_PARAMETERS:.1e} are possible"
            raise ValueError(f"a model of {self.num_parameters:.1e} parameters: {limit}")

    @property
    def qkv_bias(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.kind == "qwen2" or self.attention_bias

    @property
    def num_parameters(self) -> int:
        """Trained numbers; a tied head counts once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.width * (q + kv) + self.qkv_bias * (q + 2 * kv) + self.attention_bias * self.width
        norms = 2 * self.width + 2 * self.head_dim * (self.kind == "qwen3")
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
    """Radians per position of each pair, (C/2,) fp32 on the CPU; with Llama 3.1's stretch where the config has one."""
    pairs = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")
    freq = 1.0 / cfg.rope_theta ** (pairs / cfg.head_dim)
    if (scaling := cfg.rope_scaling) is None:
        return freq
    turns = scaling.original_max_positions / (2 * math.pi / freq)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freq / scaling.factor + keep * freq


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
        per_head = cfg.kind == "qwen3"
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if per_head else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if per_head else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = (-1, self.head_dim)
        q = apply_rope(self.q_norm(self.q_proj(x).unflatten(-1, heads)), cos, sin)  # (T, H, C)
        k = apply_rope(self.k_norm(self.k_proj(x).unflatten(-1, heads)), cos, sin)  # (T, K, C)
        v = self.v_proj(x).unflatten(-1, heads)
        out: Tensor = self.o_proj(attend(self.layer, q, k, v).flatten(1))
        return out


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
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.lm_head = Head(self.embed_tokens.weight if cfg.tied else nn.Parameter(torch.empty(cfg.vocab, cfg.width)))
        # not a buffer: to_empty would leave garbage in it, and mixed precision would round it
        self._freq: dict[torch.device, Tensor] = {}

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None, head: HeadFn = F.linear
    ) -> Any:
        """Run packed tokens through the decoder; returns what head(hidden, weight) returns, by default logits (R, V).

        tokens, positions (T,) int64; attend(layer, q, k, v) -> o with q, o (T, H, C) and k, v (T, K, C), q and k
        already rotated; rows (R,) int64 picks the positions that reach the final norm and the head, None: all of them.
        """
        cos, sin = self.rope(positions)
        x = self.embed_tokens(tokens)  # (T, D)
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, attend)
        if rows is not None:
            x = x[rows]
        return self.lm_head(self.norm(x), head)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin of the angles at positions (T,): (T, C/2) each, fp32 whatever the model's dtype."""
        device = positions.device
        if device not in self._freq:
            self._freq[device] = inverse_frequencies(self.cfg).to(device)
        angles = positions[:, None].float() * self._freq[device]
        return angles.cos(), angles.sin()

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits (T, V) of one sequence, tokens (T,) int64."""
        out: Tensor = self(tokens, torch.arange(len(tokens), device=tokens.device), _attend_causal)
        return out


def _attend_causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, C)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


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
