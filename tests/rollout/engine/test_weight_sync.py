from dataclasses import replace

import pytest
import torch

from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import fsdp

CFG = ModelConfig(
    kind="qwen3", vocab=37, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=19, rope_theta=100.0,
    norm_eps=1e-6, tied=False, max_positions=64, eos_ids=(0,),
)  # fmt: skip
TEXT = Tokenizer(tokenizer=None, pieces=[b"."] * CFG.vocab, eos_ids=(0,), bos_id=None, open_ids=[1], close_ids=[2])


def make_model(cfg, seed=0):
    model, rng = weights.build(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_push_the_engine_holds_the_trainers_bits(tied, sharded, dtype):
    cfg = replace(CFG, tied=tied)
    model = make_model(cfg)
    expected = {weights.hf_name(name): p.detach().clone().to(dtype) for name, p in model.named_parameters()}
    if sharded:
        fsdp.shard(model, start_ranks(), compute_dtype=torch.float32)
    engine = NativeEngine(cfg, TEXT, dtype=dtype)
    weight_sync.push(model, engine, 5, dtype)
    held = dict(engine.named_weights())
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    assert ("lm_head.weight" in held) != tied
    assert engine.version == 5
    # what it decodes with is what it shows
    tokens = torch.arange(5)
    plain = make_model(cfg).to(dtype)
    assert torch.equal(engine._model.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_second_push_brings_what_a_step_changed(sharded):
    model = make_model(CFG)
    if sharded:
        fsdp.shard(model, start_ranks(), compute_dtype=torch.float32)
    engine = NativeEngine(CFG, TEXT)
    weight_sync.push(model, engine, 0, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    weight_sync.push(model, engine, 1, torch.float32)
    expected = {weights.hf_name(name): p.detach() * 1.5 for name, p in make_model(CFG).named_parameters()}
    assert all(torch.equal(t, expected[name]) for name, t in engine.named_weights())


UP, Q, K = (f"model.layers.1.{part}.weight" for part in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj"))


def one_stale(named, old):
    return {**named, UP: old[UP]}


def bucket_stale(named, old):
    return {name: old[name] if "layers.1" in name else t for name, t in named.items()}


def all_stale(named, old):
    return old


def transposed(named, old):
    return {**named, Q: named[Q].T.contiguous()}


def parts_swapped(named, old):
    return {**named, K: named[V], V: named[K]}


def one_bit(named, old):
    t = named[UP].clone()
    t.view(torch.int32)[0, 0] ^= 1
    return {**named, UP: t}


V = "model.layers.1.self_attn.v_proj.weight"
FAULTS = {
    one_stale: f"bucket model.layers.1 is stale: {UP} of the version before",
    bucket_stale: "bucket model.layers.1 is stale: model.layers.1.input_layernorm.weight and 10 more of the version",
    all_stale: "sync was skipped: the engine still holds all weights of the version before",
    transposed: f"{Q} is transposed in the engine",
    parts_swapped: f"the engine holds {V} in the place of {K}: fused parts are in another order",
    one_bit: f"bucket model.layers.1 is damaged: {UP}",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_what_went_wrong_in_a_sync_is_named(fault):
    engine, old, new = NativeEngine(CFG, TEXT), make_model(CFG, seed=1), make_model(CFG)
    before = weight_sync.push(old, engine, 0, torch.float32)
    assert before == weight_sync.checksums(old, engine, torch.float32)
    assert weight_sync.difference(engine, before, {}) == ""
    spoilt = fault(dict(weights.stream(new)), dict(weights.stream(old)))
    engine.load_weights(spoilt.items(), 1)
    assert weight_sync.difference(engine, weight_sync.checksums(new, engine, torch.float32), before).startswith(
        FAULTS[fault]
    )


def test_weights_that_did_not_change_are_not_called_stale():
    """A step without gradients: the old weights are the new ones."""
    engine, model = NativeEngine(CFG, TEXT), make_model(CFG)
    before = weight_sync.push(model, engine, 0, torch.float32)
    assert weight_sync.difference(engine, weight_sync.push(model, engine, 1, torch.float32), before) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_checksum_sees_a_swap_one_bit_and_a_stale_half(dtype):
    torch.manual_seed(0)
    new, old = torch.randn(33, 17).to(dtype), torch.randn(33, 17).to(dtype)
    swapped, stale = new.clone(), new.clone()
    swapped[3, 4], swapped[3, 5] = new[3, 5], new[3, 4]
    stale[16:] = old[16:]
    expected = weight_sync.checksum(new)
    assert weight_sync.checksum(new.clone()) == expected
    assert weight_sync.checksum(new.T.contiguous()) != expected
    assert expected not in (weight_sync.checksum(swapped), weight_sync.checksum(stale))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    for place in (0, 1, 255, 560):
        for bit in range(8 * new.element_size()):
            flipped = new.clone()
            mask = torch.tensor(1).bitwise_left_shift(torch.tensor(bit)).to(integers)
            flipped.view(integers).view(-1)[place] ^= mask
            assert weight_sync.checksum(flipped) != expected, (place, bit)


def test_the_checksum_does_not_depend_on_memory_order():
    x = torch.arange(12.0).view(3, 4)
    assert weight_sync.checksum(x.T) == weight_sync.checksum(x.T.contiguous())
