import numpy as np
import pytest
import torch
from conftest import TINY, assert_no_worse

from thinkmid import _csrc
from thinkmid.kernels import launch
from thinkmid.rollout.engine.kv_cache import Attention, Cache, Prefixes

PREFIXES = [0, 1, 15, 16, 17, 40]  # tokens; each has as many siblings as its place says
COUNTS = [0, 1, 14, 15, 16, 30]


@pytest.fixture(params=[*_csrc.isas(), "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(launch, "has_cpp", lambda: False)
        yield
    else:
        was = _csrc.isa()
        _csrc.use_isa(request.param)
        yield
        _csrc.use_isa(was)


def decode(heads, kv_heads, size, dtype=torch.float32, scale=1.0, window=0):
    """Attention of rows over prefixes and their own tokens, of any length; yields (out, q, keys, values) of each.

    out, q (H, C); keys, values (H, length, C), of them the window's newest. scale: of queries.
    """
    cfg = type("Shape", (), {"kv_heads": kv_heads, "head_dim": size, "layers": TINY.layers})
    like, layer = torch.zeros(0, dtype=dtype), 1
    prefixes = Prefixes(cfg, like)
    prefixes.add(dict(enumerate(PREFIXES)))
    owner = [p for p in range(len(PREFIXES)) for _ in range(p + 1)]
    num = len(owner)
    cache, count = Cache(cfg, num + 1, max(COUNTS) + 1, like), np.resize(np.array(COUNTS), num)
    for x in (*cache.k, *cache.v, *prefixes.cache.k, *prefixes.cache.v):
        x.normal_()  # finite, as what a longer sequence left behind
    q, k, v = (torch.randn(num, n, size).to(dtype) for n in (heads, kv_heads, kv_heads))
    q *= scale
    before = cache.k[layer].clone()
    out = Attention(cache, prefixes.families(owner), count)(layer, q, k, v, window)
    assert out.dtype == dtype
    for row, p in enumerate(owner):
        here, there = slice(count[row]), slice(PREFIXES[p])
        keys = [prefixes.cache.k[layer][p, ..., there], before[row, ..., here], k[row, ..., None]]
        keys = torch.cat(keys, -1).transpose(1, 2).repeat_interleave(heads // kv_heads, 0)
        values = [prefixes.cache.v[layer][p, :, there], cache.v[layer][row, :, here], v[row, :, None]]
        values = torch.cat(values, 1).repeat_interleave(heads // kv_heads, 0)
        assert torch.equal(cache.k[layer][row, ..., count[row]], k[row])
        assert torch.equal(cache.v[layer][row, :, count[row]], v[row])
        yield out[row], q[row], keys[:, -window:], values[:, -window:]


def slow(q, keys, values, dtype):
    p = (keys.to(dtype) @ q[:, :, None].to(dtype) * q.shape[1] ** -0.5).softmax(1)
    return (p * values.to(dtype)).sum(1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (6, 2), (7, 1)])
@pytest.mark.parametrize("size", [2, 16, 24])
def test_the_newest_token_attends_to_its_prefix_and_to_its_own(path, heads, kv_heads, size):
    for out, *qkv in decode(heads, kv_heads, size):
        assert_no_worse(out, slow(*qkv, torch.float64), slow(*qkv, torch.float32) + 2e-7)


# 1, 2, around the vectors of csrc and the lengths of prefixes, all but one key of the longest, and all
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 70, 71, 72])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (7, 1)])
def test_a_window_hides_the_oldest_keys_of_the_prefix_and_then_of_its_own(path, window, heads, kv_heads):
    for out, *qkv in decode(heads, kv_heads, 16, window=window):
        assert qkv[1].shape[1] <= window
        assert_no_worse(out, slow(*qkv, torch.float64), slow(*qkv, torch.float32) + 2e-7)


@pytest.mark.parametrize("size", [24, 128])
def test_in_bf16_scores_are_no_coarser_than_those_of_torchs_attention(size):
    # scores of 10 and more, whose rounding to 8 bits would be that of the result
    ours, exact, theirs = [], [], []
    for out, *qkv in decode(6, 2, size, torch.bfloat16, scale=10.0):
        q, keys, values = qkv
        ours.append(out)
        exact.append(slow(*qkv, torch.float64))
        theirs.append(torch.nn.functional.scaled_dot_product_attention(q[:, None], keys, values)[:, 0])
    assert_no_worse(torch.stack(ours), torch.stack(exact), torch.stack(theirs))
