import numpy as np
import pytest
import torch
from conftest import TINY, assert_no_worse

from thinkmid import _csrc
from thinkmid.kernels import launch
from thinkmid.rollout.cache import Cache, Prefixes, attention

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


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (6, 2), (7, 1)])
@pytest.mark.parametrize("size", [2, 16, 24])
def test_the_newest_token_attends_to_its_prefix_and_to_its_own(path, heads, kv_heads, size):
    cfg = type("Shape", (), {"kv_heads": kv_heads, "head_dim": size, "layers": TINY.layers})
    like, layer = torch.zeros(0), 1
    prefixes, owner = Prefixes(cfg, len(PREFIXES), max(PREFIXES), like), []
    for p, length in enumerate(PREFIXES):
        prefixes.add(p, length)
        owner += [(p, g) for g in range(p + 1)]
    num = len(owner)
    cache, count = Cache(cfg, num + 1, max(COUNTS) + 1, like), np.resize(np.array(COUNTS), num)
    for x in (*cache.k, *cache.v, *prefixes.cache.k, *prefixes.cache.v):
        x.normal_()  # finite, as what a longer sequence left behind
    q, k, v = torch.randn(num, heads, size), torch.randn(num, kv_heads, size), torch.randn(num, kv_heads, size)
    before = cache.k[layer].clone()
    out = attention(cache, prefixes.families(owner), count)(layer, q, k, v)
    for row, (p, _) in enumerate(owner):
        here, there = slice(count[row]), slice(PREFIXES[p])
        keys = [prefixes.cache.k[layer][p, ..., there], before[row, ..., here], k[row, ..., None]]
        keys = torch.cat(keys, -1).transpose(1, 2).repeat_interleave(heads // kv_heads, 0)  # (H, length, C)
        values = [prefixes.cache.v[layer][p, :, there], cache.v[layer][row, :, here], v[row, :, None]]
        values = torch.cat(values, 1).repeat_interleave(heads // kv_heads, 0)

        def slow(dtype, row=row, keys=keys, values=values):
            p = (keys.to(dtype) @ q[row, :, :, None].to(dtype) * size**-0.5).softmax(1)
            return (p * values.to(dtype)).sum(1)

        assert_no_worse(out[row], slow(torch.float64), slow(torch.float32) + 2e-7)
        assert torch.equal(cache.k[layer][row, ..., count[row]], k[row])
        assert torch.equal(cache.v[layer][row, :, count[row]], v[row])
