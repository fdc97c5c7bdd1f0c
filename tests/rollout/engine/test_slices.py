"""The layout of a vLLM engine that ranks share, against other descriptions of it."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY

from thinkmid.model import weights
from thinkmid.model.weights import EMBEDDING, HEAD
from thinkmid.rollout.engine.slices import part

CFG = replace(TINY, kind="qwen2", heads=8, kv_heads=4, head_dim=2, ffn=12)
LAYER = "model.layers.1."


def parts(cfg, name, whole, tp):
    return [part(cfg, name, whole, rank, tp) for rank in range(tp)]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", [HEAD, EMBEDDING])
@pytest.mark.parametrize("vocab", [1, 37, 63, 64, 65, 640, 641])
def test_embedding_and_head_are_the_padded_vocabulary_split_evenly_and_the_padding_cut_off(vocab, name, tp):
    whole = torch.rand(vocab, 3)
    padded = torch.cat([whole, torch.full((-vocab % 64, 3), -1.0)])  # drawn rows are never negative
    for ours, rows in zip(parts(replace(CFG, vocab=vocab), name, whole, tp), padded.tensor_split(tp), strict=True):
        assert torch.equal(ours, rows[rows[:, 0] >= 0])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize(("module", "rows"), [("self_attn.q_proj", 16), ("mlp.gate_proj", 12), ("mlp.up_proj", 12)])
def test_rows_of_all_ranks_in_a_row_are_the_whole(module, rows, kind, tp):
    whole = torch.randn(rows, 5) if kind == "weight" else torch.randn(rows)
    ours = parts(CFG, f"{LAYER}{module}.{kind}", whole, tp)
    assert torch.equal(torch.cat(ours), whole)
    assert {len(p) for p in ours} == {rows // tp}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"])
def test_a_rank_holds_the_key_and_value_heads_that_its_query_heads_attend_to(name, kv_heads, tp):
    cfg = replace(CFG, kv_heads=kv_heads)
    heads = torch.randn(kv_heads, cfg.head_dim, 5) if name.endswith("weight") else torch.randn(kv_heads, cfg.head_dim)
    for rank, ours in enumerate(parts(cfg, f"{LAYER}self_attn.{name}", heads.flatten(0, 1), tp)):
        queries = range(rank * cfg.heads // tp, (rank + 1) * cfg.heads // tp)
        needed = sorted({q * kv_heads // cfg.heads for q in queries})
        assert torch.equal(ours, heads[needed].flatten(0, 1))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.down_proj"])
def test_what_ranks_make_of_their_slices_of_the_input_adds_up_to_the_output(module, tp):
    w, x = torch.randint(-9, 9, (5, 12)), torch.randint(-9, 9, (3, 12))
    slices = zip(x.split(12 // tp, dim=1), parts(CFG, f"{LAYER}{module}.weight", w, tp), strict=True)
    assert torch.equal(sum(x_part @ w_part.T for x_part, w_part in slices), x @ w.T)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_rank_holds_norms_and_the_output_bias_whole_and_a_share_of_everything_else(kind, tied):
    cfg = replace(CFG, kind=kind, tied=tied, vocab=128, attention_bias=kind == "llama")
    for name, whole in weights.stream(weights.build(cfg)):
        replicated = "norm" in name or name.endswith("o_proj.bias")
        for ours in parts(cfg, name, whole, 4):
            assert ours.numel() == (whole.numel() if replicated else whole.numel() / 4), name
        assert part(cfg, name, whole, 0, 1).shape == whole.shape
