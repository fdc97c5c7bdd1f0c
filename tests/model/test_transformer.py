from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, random_model

from thinkmid.model.transformer import RopeScaling, Transformer, init_weights, inverse_frequencies
from thinkmid.model.weights import build

QWEN3 = TINY
LLAMA = replace(QWEN3, kind="llama", tied=True, head_dim=6)
QWEN2 = replace(QWEN3, kind="qwen2", tied=True, kv_heads=1)
OLMO2 = replace(QWEN3, kind="olmo2")


def attend_within(segment):
    """Causal attention that stays inside segments, one head at a time; segment (T,) says where a token belongs."""
    allowed = (segment[:, None] == segment) & torch.ones(len(segment), len(segment), dtype=torch.bool).tril()

    def attend(layer, q, k, v):
        group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
        for h in range(q.shape[1]):
            scores = (q[:, h] @ k[:, h // group].T) / q.shape[2] ** 0.5
            out[:, h] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[:, h // group]
        return out

    return attend


@pytest.mark.parametrize("cfg", [LLAMA, QWEN2, QWEN3, OLMO2], ids=lambda c: c.kind)
def test_two_segments_in_one_row_are_two_forwards(cfg):
    model = random_model(cfg)
    first, second = torch.randint(cfg.vocab, (13,)), torch.randint(cfg.vocab, (7,))
    segment = torch.tensor([0] * 13 + [1] * 7)
    positions = torch.cat((torch.arange(13), torch.arange(7)))
    packed = model(torch.cat((first, second)), positions, attend_within(segment))
    torch.testing.assert_close(packed, torch.cat((model.logits(first), model.logits(second))))


@pytest.mark.parametrize("cfg", [LLAMA, QWEN2, QWEN3, OLMO2], ids=lambda c: c.kind)
def test_a_later_token_changes_nothing_before_it(cfg):
    model, tokens = random_model(cfg), torch.randint(cfg.vocab, (11,))
    other = tokens.clone()
    other[6] = (tokens[6] + 1) % cfg.vocab
    changed = (model.logits(tokens) - model.logits(other)).abs().amax(1) > 1e-4
    assert changed.tolist() == [False] * 6 + [True] * 5


def test_only_distances_matter_to_attention():
    model, tokens = random_model(LLAMA), torch.randint(LLAMA.vocab, (9,))
    attend = attend_within(torch.zeros(9, dtype=torch.long))
    shifted = model(tokens, torch.arange(9) + 1000, attend)
    # an angle near 1000 radians has an ulp of 6e-5
    torch.testing.assert_close(shifted, model.logits(tokens), atol=1e-3, rtol=1e-3)


def test_rows_repeat_and_reorder_positions_before_the_head():
    model, tokens = random_model(QWEN3), torch.randint(QWEN3.vocab, (8,))
    rows, attend = torch.tensor([5, 2, 2, 7]), attend_within(torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(model(tokens, torch.arange(8), attend, rows), model.logits(tokens)[rows])
    assert model(tokens, torch.arange(8), attend, torch.tensor([], dtype=torch.long)).shape == (0, QWEN3.vocab)


@pytest.mark.parametrize("cfg", [LLAMA, QWEN3], ids=["tied", "untied"])
def test_head_function_gets_normed_rows_and_the_weight_and_its_result_comes_back(cfg):
    model, tokens = random_model(cfg), torch.randint(cfg.vocab, (8,))
    rows, attend = torch.tensor([1, 6]), attend_within(torch.zeros(8, dtype=torch.long))
    hidden, weight, word = model(tokens, torch.arange(8), attend, rows, head=lambda h, w: (h, w, "as is"))
    assert word == "as is"
    assert weight is model.lm_head.weight
    assert (weight is model.embed_tokens.weight) == cfg.tied
    torch.testing.assert_close(F.linear(hidden, weight), model.logits(tokens)[rows])


@pytest.mark.parametrize("cfg", [LLAMA, QWEN3], ids=["tied", "untied"])
def test_checkpointing_recomputes_blocks_and_changes_no_gradient(cfg):
    tokens, calls = torch.randint(cfg.vocab, (8,)), []
    inner = attend_within(torch.zeros(8, dtype=torch.long))

    def attend(layer, q, k, v):
        calls.append(layer)
        return inner(layer, q, k, v)

    grads = []
    for checkpointing in (False, True):
        model = random_model(cfg, checkpointing=checkpointing)
        model(tokens, torch.arange(8), attend).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert calls == [0, 1, 0, 1, 1, 0]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    with torch.no_grad():
        model(tokens, torch.arange(8), attend)
    assert calls[6:] == [0, 1]


def test_sampling_first_leaves_training_possible():
    model, tokens = random_model(QWEN3), torch.randint(QWEN3.vocab, (8,))
    with torch.inference_mode():
        sampled = model.logits(tokens)
    trained = model.logits(tokens)
    trained.sum().backward()
    assert torch.equal(sampled, trained)


def test_angles_stay_in_fp32_in_a_bf16_model():
    model = build(QWEN3, "bfloat16")
    cos, sin = model.rope(torch.tensor([0, 3, 100_003]))
    angles = torch.tensor([0.0, 3.0, 100_003.0])[:, None] * inverse_frequencies(QWEN3)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


def test_llama3_scaling_keeps_fast_pairs_stretches_slow_ones_and_blends_between():
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    cfg = replace(LLAMA, head_dim=32, rope_scaling=scaling)
    plain, scaled = inverse_frequencies(replace(cfg, rope_scaling=None)), inverse_frequencies(cfg)
    turns = 64 * plain / (2 * torch.pi)
    fast, slow = turns > 4, turns < 1
    between, blend = ~fast & ~slow, (turns - 1) / 3
    assert all(band.any() for band in (fast, slow, between))
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.equal(scaled[slow], plain[slow] / 8)
    torch.testing.assert_close(scaled[between], (plain * (blend + (1 - blend) / 8))[between])


@pytest.mark.parametrize("cfg", [LLAMA, QWEN2, QWEN3, replace(QWEN3, attention_bias=True), OLMO2], ids=lambda c: c.kind)
def test_num_parameters_counts_what_the_model_has(cfg):
    assert cfg.num_parameters == sum(p.numel() for p in Transformer(cfg).parameters())


def test_initial_weights_depend_on_the_seed_alone():
    models = []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        models.append(build(QWEN3))
        before = torch.get_rng_state()
        init_weights(models[-1], seed)
        assert torch.equal(before, torch.get_rng_state())
    same, again, other = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["embed_tokens.weight"], other["embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_initial_scales_are_those_that_learned_fastest(kind):
    cfg = replace(QWEN3, kind=kind, vocab=600, width=128, ffn=352, head_dim=32)
    model = build(cfg)
    init_weights(model, 0)
    tokens = torch.randint(600, (20,))
    assert model.logits(tokens).eq(0).all()  # a uniform prediction
    std = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    assert std["embed_tokens.weight"] == pytest.approx(0.7, rel=0.02)
    assert std["layers.1.self_attn.k_proj.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert std["layers.0.mlp.up_proj.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert not any(std[f"layers.{i}.{name}.weight"] for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj"))
    rest = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert all(p.eq(1 if name.endswith("norm.weight") else 0).all() for name, p in rest.items())


def test_a_tied_model_starts_with_logits_of_order_one():
    model = build(replace(LLAMA, vocab=600, width=128))
    init_weights(model, 0)
    assert 0.8 < model.logits(torch.randint(600, (20,))).std() < 1.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "gemma3"}, "gemma3"),
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"layers": 0}, "layers .* 0"),
        ({"rope_theta": 0.0}, "rope_theta 0.0"),
        ({"kind": "qwen2", "attention_bias": True}, "attention_bias"),
    ],
)
def test_impossible_shapes_are_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        replace(QWEN3, **change)


def test_impossible_rope_scaling_is_refused():
    with pytest.raises(ValueError, match=r"low_freq_factor=4\.0"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_positions=64)
