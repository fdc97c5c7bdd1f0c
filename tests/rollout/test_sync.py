from dataclasses import replace

import pytest
import torch

from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout import sync
from thinkmid.rollout.native import NativeEngine
from thinkmid.text import Text
from thinkmid.train import shard

CFG = ModelConfig(
    kind="qwen3", vocab=37, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=19, rope_theta=100.0,
    norm_eps=1e-6, tied=False, max_positions=64, eos_ids=(0,),
)  # fmt: skip
TEXT = Text(tokenizer=None, pieces=[b"."] * CFG.vocab, eos_ids=(0,), bos_id=None, open_ids=[1], close_ids=[2])


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
        shard.shard(model, shard.start(), compute_dtype=torch.float32)
    engine = NativeEngine(cfg, TEXT, dtype=dtype)
    sync.push(model, engine, 5, dtype)
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
        shard.shard(model, shard.start(), compute_dtype=torch.float32)
    engine = NativeEngine(CFG, TEXT)
    sync.push(model, engine, 0, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    sync.push(model, engine, 1, torch.float32)
    expected = {weights.hf_name(name): p.detach() * 1.5 for name, p in make_model(CFG).named_parameters()}
    assert all(torch.equal(t, expected[name]) for name, t in engine.named_weights())


def test_an_engine_that_kept_one_stale_tensor_is_found():
    model, engine = make_model(CFG), NativeEngine(CFG, TEXT)
    sync.push(make_model(CFG, seed=1), engine, 0, torch.float32)
    load = engine.load_weights
    stale = "model.layers.1.mlp.up_proj.weight"
    kept = dict(engine.named_weights())[stale].clone()
    engine.load_weights = lambda named, version: load(
        ((name, kept if name == stale else t) for name, t in named), version
    )
    with pytest.raises(RuntimeError, match=stale):
        sync.push(model, engine, 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_checksum_sees_a_swap_one_bit_and_a_stale_half(dtype):
    torch.manual_seed(0)
    new, old = torch.randn(33, 17).to(dtype), torch.randn(33, 17).to(dtype)
    swapped, stale = new.clone(), new.clone()
    swapped[3, 4], swapped[3, 5] = new[3, 5], new[3, 4]
    stale[16:] = old[16:]
    expected = sync.checksum(new)
    assert sync.checksum(new.clone()) == expected
    assert sync.checksum(new.T.contiguous()) != expected
    assert expected not in (sync.checksum(swapped), sync.checksum(stale))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
    for place in (0, 1, 255, 560):
        for bit in range(8 * new.element_size()):
            flipped = new.clone()
            mask = torch.tensor(1).bitwise_left_shift(torch.tensor(bit)).to(integers)
            flipped.view(integers).view(-1)[place] ^= mask
            assert sync.checksum(flipped) != expected, (place, bit)


def test_the_checksum_does_not_depend_on_memory_order():
    x = torch.arange(12.0).view(3, 4)
    assert sync.checksum(x.T) == sync.checksum(x.T.contiguous())
