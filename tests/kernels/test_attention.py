import sys
import types

import pytest
import torch
from conftest import assert_no_worse, assert_same

from thinkmid.kernels import attention, launch
from thinkmid.kernels.attention import varlen_attention
from thinkmid.model.attention import attend_pack
from thinkmid.types import Pack

# (queries, keys of a shared prefix before them): 1, primes, a rung of the ladder +- 1, one very long among short ones
PLAIN = [(1, 0), (7, 0), (16, 0), (17, 0), (15, 0), (1, 0), (211, 0), (2, 0)]
WINDOW = 9  # cuts into the prefix
SHARED = [(13, 0), (1, 13), (5, 13), (33, 13), (307, 13), (2, 13), (13, 13)]


def slow(q, k, v, cu_q, cu_k, kv_rows=None, window=0):
    """One query and one head at a time: the last query of a segment sees the last key, and `window` keys in all."""
    if kv_rows is not None:
        k, v = k[kv_rows], v[kv_rows]
    out, share = [], q.shape[1] // k.shape[1]
    for s in range(len(cu_q) - 1):
        q0, q1, k0, k1 = (int(x) for x in (cu_q[s], cu_q[s + 1], cu_k[s], cu_k[s + 1]))
        for i in range(q0, q1):
            end = k1 - (q1 - 1 - i)
            seen = slice(max(k0, end - window) if window else k0, end)
            rows = []
            for h in range(q.shape[1]):
                p = (k[seen, h // share] @ q[i, h] / q.shape[2] ** 0.5).softmax(0)
                rows.append(p @ v[seen, h // share])
            out.append(torch.stack(rows))
    return torch.stack(out) if out else torch.zeros_like(q)


def layout(segments):
    """cu_q, cu_k, kv_rows where the first segment is the prefix of those that name one."""
    queries = torch.tensor([n for n, _ in segments])
    starts = torch.cat((torch.zeros(1, dtype=torch.long), queries.cumsum(0)))
    keys = [torch.cat((torch.arange(p), torch.arange(a, a + n))) for (n, p), a in zip(segments, starts, strict=False)]
    cu_k = torch.cat((torch.zeros(1, dtype=torch.long), torch.tensor([len(k) for k in keys]).cumsum(0)))
    shared = torch.cat(keys) if any(p for _, p in segments) else None
    return starts.int(), cu_k.int(), shared


def random_qkv(num_rows, heads=4, kv_heads=2, dtype=torch.float64):
    shapes = ((num_rows, heads, 6), (num_rows, kv_heads, 6), (num_rows, kv_heads, 6))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(fn, qkv, do):
    out = fn(*qkv)
    return dict(zip(("o", "dq", "dk", "dv"), (out, *torch.autograd.grad((out * do).sum(), qkv)), strict=True))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("segments", [PLAIN, SHARED, [(5, 0)], [(1, 0)]], ids=["plain", "shared", "one", "one token"])
def test_packed_attention_is_the_loop_over_queries(segments, kv_heads):
    cu_q, cu_k, kv_rows = layout(segments)
    qkv = random_qkv(int(cu_q[-1]), kv_heads=kv_heads)
    do = torch.randn_like(qkv[0])
    ours = with_gradients(lambda *x: varlen_attention(*x, cu_q, cu_k, kv_rows), qkv, do)
    assert_same(ours, with_gradients(lambda *x: slow(*x, cu_q, cu_k, kv_rows), qkv, do))


@pytest.mark.parametrize("window", [1, 2, WINDOW, 16, 211, 320, 1000])
@pytest.mark.parametrize("segments", [PLAIN, SHARED, [(1, 0)]], ids=["plain", "shared", "one token"])
def test_a_window_hides_what_is_older_wherever_it_is_stored(segments, window):
    cu_q, cu_k, kv_rows = layout(segments)
    qkv = random_qkv(int(cu_q[-1]))
    do = torch.randn_like(qkv[0])
    ours = with_gradients(lambda *x: varlen_attention(*x, cu_q, cu_k, kv_rows, window=window), qkv, do)
    assert_same(ours, with_gradients(lambda *x: slow(*x, cu_q, cu_k, kv_rows, window), qkv, do))


def test_a_window_that_hides_nothing_changes_no_bit():
    cu_q, cu_k, kv_rows = layout(SHARED)
    qkv = random_qkv(int(cu_q[-1]), dtype=torch.float32)
    wide = varlen_attention(*qkv, cu_q, cu_k, kv_rows, window=320)
    assert torch.equal(wide, varlen_attention(*qkv, cu_q, cu_k, kv_rows))


def test_with_a_window_queries_of_the_padding_see_a_key_too():
    cu_q, cu_k, kv_rows = layout(SHARED)
    plan = attention._plan(cu_q, cu_k, kv_rows, torch.device("cpu"), 2)
    assert any(len(b.real) < b.q_rows.numel() for b in plan.buckets)
    assert all(b.mask is None or b.mask.any(-1).all() for b in plan.buckets)


def test_layers_of_different_windows_share_one_attention():
    cu_q, cu_k, kv_rows = layout(SHARED)
    attend, qkv = attention.SegmentAttention(cu_q, cu_k, kv_rows), random_qkv(int(cu_q[-1]))
    for layer, window in enumerate((0, WINDOW, 2, 0)):
        assert_same({"o": attend(layer, *qkv, window)}, {"o": slow(*qkv, cu_q, cu_k, kv_rows, window)})


def test_segments_that_share_nothing_do_not_see_each_other():
    cu_q, cu_k, kv_rows = layout(SHARED)
    qkv = random_qkv(int(cu_q[-1]))
    with torch.no_grad():
        before = varlen_attention(*qkv, cu_q, cu_k, kv_rows)
        qkv[1][cu_q[3] : cu_q[4]] += 1
        changed = (varlen_attention(*qkv, cu_q, cu_k, kv_rows) - before).abs().amax((1, 2)) > 0
    assert not changed[: cu_q[3]].any()
    assert not changed[cu_q[4] :].any()
    # the first row of the segment: of the keys that moved it sees its own alone, and those of the prefix stayed
    assert changed[cu_q[3] : cu_q[4]].all()


def test_segments_without_queries_take_no_part():
    cu = torch.tensor([0, 0, 3, 3, 8], dtype=torch.int32)
    qkv = random_qkv(8)
    assert_same({"o": varlen_attention(*qkv, cu, cu)}, {"o": slow(*qkv, cu, cu)})
    empty = torch.tensor([0], dtype=torch.int32)
    assert varlen_attention(*random_qkv(0), empty, empty).shape == (0, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_to_buckets_costs_no_accuracy(dtype):
    cu_q, cu_k, kv_rows = layout(SHARED)
    qkv = [x.detach() for x in random_qkv(int(cu_q[-1]), dtype=dtype)]
    exact = slow(*(x.double() for x in qkv), cu_q, cu_k, kv_rows)
    assert_no_worse(varlen_attention(*qkv, cu_q, cu_k, kv_rows), exact, slow(*qkv, cu_q, cu_k, kv_rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(8, 3, 6)}, "H a multiple of K"),
        ({"k": torch.zeros(8, 2, 5)}, "H a multiple of K"),
        ({"cu_q": torch.tensor([0, 7])}, "cu_q must end at 8"),
        ({"cu_k": torch.tensor([0, 9])}, "cu_k at 8"),
        ({"kv_rows": torch.arange(7)}, "cu_k at 7"),
        ({"window": -1}, "window must be 0 or .* got -1"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(change, said):
    q, k, v = (x.detach().float() for x in random_qkv(8))
    cu = torch.tensor([0, 8])
    with pytest.raises(ValueError, match=said):
        varlen_attention(**{"q": q, "k": k, "v": v, "cu_q": cu, "cu_k": cu, **change})


# The GPU paths, up to the call of the library: stand-ins with the libraries' signatures that check and compute.


def checked(q, k, v, cu_q, cu_k, max_q, max_k, calls, left):
    """What the kernels assume of their arguments, then the truth. left: older keys that a query sees, -1: all."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert type(max_q) is type(max_k) is int
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert cu_q[-1] == len(q)
    assert cu_k[-1] == len(k) == len(v)
    calls.append((q, k, v))
    return slow(q, k, v, cu_q, cu_k, window=left + 1)


def fake_flash_3(calls, monkeypatch, *, with_lse=False):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert causal
        assert (seqused_q, seqused_k, softmax_scale, qv) == (None, None, None, None)
        assert window_size in ((-1, -1), (WINDOW - 1, 0))
        asked.append(deterministic)
        out = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, calls, window_size[0])
        return (out, out.sum(-1).T) if with_lse else out

    asked = []
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return "flash-attn-3", asked


def fake_first_flash_3(calls, monkeypatch):
    return fake_flash_3(calls, monkeypatch, with_lse=True)


def fake_flash(calls, monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal
        assert (dropout_p, softmax_scale, return_attn_probs) == (0.0, None, False)
        assert window_size in ((-1, -1), (WINDOW - 1, 0))
        asked.append(deterministic)
        return checked(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, calls, window_size[0])

    asked = []
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return "flash-attn", asked


def fake_torch(calls, monkeypatch):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert window_size in ((-1, 0), (WINDOW - 1, 0))  # causal, aligned at the bottom right
        assert enable_gqa or query.shape[1] == key.shape[1]
        return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, calls, window_size[0])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return "torch-varlen", None


def fake_old_torch(calls, monkeypatch):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert window_size in ((-1, 0), (WINDOW - 1, 0))
        assert query.shape[1] == key.shape[1]  # knows no grouped heads
        return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, calls, window_size[0])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return "torch-varlen", None


FAKES = [fake_flash_3, fake_first_flash_3, fake_flash, fake_torch, fake_old_torch]


@pytest.fixture(params=FAKES, ids=lambda f: f.__name__)
def library(request, monkeypatch):
    """(impl, the calls that its stand-in saw)."""
    calls = []
    impl, _ = request.param(calls, monkeypatch)
    return impl, calls


@pytest.mark.parametrize("fake", FAKES[:3])
def test_a_library_is_asked_for_a_deterministic_backward_unless_that_is_switched_off(fake, monkeypatch):
    impl, asked = fake([], monkeypatch)
    cu = torch.tensor([0, 8], dtype=torch.int32)
    for flag in ({}, {"deterministic": False}, {"deterministic": True}):
        varlen_attention(*random_qkv(8), cu, cu, impl=impl, **flag)
    assert asked == [True, False, True]


@pytest.mark.parametrize("segments", [PLAIN[:6], SHARED[:4]], ids=["plain", "shared"])
@pytest.mark.parametrize("window", [0, WINDOW])
def test_a_library_gets_gathered_keys_and_the_causal_convention(segments, library, window):
    impl, calls = library
    cu_q, cu_k, kv_rows = layout(segments)
    qkv = random_qkv(int(cu_q[-1]), heads=6)
    do = torch.randn_like(qkv[0])
    ours = with_gradients(lambda *x: varlen_attention(*x, cu_q, cu_k, kv_rows, impl=impl, window=window), qkv, do)
    assert len(calls) == 1
    assert_same(ours, with_gradients(lambda *x: slow(*x, cu_q, cu_k, kv_rows, window), qkv, do))


def test_a_window_that_hides_nothing_is_none_to_a_library(library):
    impl, _ = library
    cu = torch.tensor([0, 8, 13], dtype=torch.int32)
    qkv = random_qkv(13)
    wide = varlen_attention(*qkv, cu, cu, impl=impl, window=8)  # a stand-in refuses all windows but 9
    assert_same({"o": wide}, {"o": slow(*qkv, cu, cu)})


@pytest.mark.parametrize("segments", [PLAIN[:6], SHARED[:4]], ids=["plain", "shared"])
def test_the_attention_of_a_pack_is_that_of_its_segments_in_every_layer(segments, library):
    impl, calls = library
    cu_q, cu_k, kv_rows = layout(segments)
    zeros = torch.zeros(int(cu_q[-1]), dtype=torch.long)
    names = ("positions", "rows", "targets", "ce_w", "pg_w", "adv", "logp_old", "reply")
    counted = {"max_q": int(cu_q.diff().max()), "max_k": int(cu_k.diff().max())}
    if kv_rows is not None:
        counted |= {"kv_rows": kv_rows, "kv_order": kv_rows.argsort(stable=True), "kv_readers": kv_rows.bincount()}
    pack = Pack(tokens=zeros, cu_q=cu_q, cu_k=cu_k, owner=[], **counted, **dict.fromkeys(names, zeros))
    through, plain = attend_pack(pack, impl=impl), attend_pack(pack)
    for layer in (0, 1):
        qkv = random_qkv(len(zeros))
        do = torch.randn_like(qkv[0])
        exact = with_gradients(lambda *x: slow(*x, cu_q, cu_k, kv_rows), qkv, do)
        for attend in (through, plain):
            assert_same(with_gradients(lambda *x: attend(layer, *x), qkv, do), exact)  # noqa: B023
    assert len(calls) == 2


def test_shared_keys_are_kept_once_and_gathered_again(library, monkeypatch):
    impl, _ = library
    saved = []

    class Save(torch.autograd.Function):
        """What a library does: its backward starts from the keys and values it saved."""

        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return q * 1

        @staticmethod
        def backward(ctx, do):
            saved.append(ctx.saved_tensors)
            return do, *(torch.ones_like(x) for x in ctx.saved_tensors[1:])

    monkeypatch.setitem(attention.LIBRARIES, impl, lambda q, k, v, *_: Save.apply(q, k, v))
    cu_q, cu_k, kv_rows = layout(SHARED)
    q, k, v = random_qkv(int(cu_q[-1]))
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(
        torch.autograd.graph, "saved_tensors_hooks",
        lambda pack, unpack: hooks(lambda x: (packed.append(pack(x)), packed[-1])[1], unpack),
    )  # fmt: skip
    out = varlen_attention(q, k, v, cu_q, cu_k, kv_rows, impl=impl)
    monkeypatch.undo()
    kept = [x for x in packed if isinstance(x, tuple)]
    assert [x[0].data_ptr() for x in kept] == [k.data_ptr(), v.data_ptr()]
    dk = torch.autograd.grad(out.sum(), k)[0]
    assert torch.equal(saved[0][1], k[kv_rows])
    assert torch.equal(saved[0][2], v[kv_rows])
    assert torch.equal(dk[:, 0, 0], kv_rows.bincount(minlength=len(k)).double())


def modes():
    """What torch's kernels look at: whether to be deterministic, and then whether to write NaN into new memory."""
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


class Modes(torch.autograd.Function):
    """A library's attention, whose backward writes down torch's modes, as its kernel reads them."""

    seen = None  # a list

    @staticmethod
    def forward(ctx, q, k, v):
        return q * 2

    @staticmethod
    def backward(ctx, do):
        Modes.seen.append(modes())
        return do * 2, None, None


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("mode", ["default", "warn", "error"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_torchs_varlen_backward_is_deterministic_and_nothing_else_is_made_so(
    mode, fill, checkpointed, deterministic, monkeypatch
):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, *_, **__: Modes.apply(q, k, v))
    monkeypatch.setattr(Modes, "seen", [])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)
    around = []
    cu = torch.tensor([0, 8], dtype=torch.int32)

    def layer(q, k, v):
        q = q * 1
        q.register_hook(lambda _: around.append(modes()))  # after attention's backward
        out = varlen_attention(q, k, v, cu, cu, impl="torch-varlen", deterministic=deterministic) * 1
        out.register_hook(lambda _: around.append(modes()))  # before it
        return out

    torch.set_deterministic_debug_mode(mode)
    expected = modes()
    q, k, v = random_qkv(8, heads=2)
    out = torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False) if checkpointed else layer(q, k, v)
    assert torch.equal(*torch.autograd.grad(out.sum(), q), torch.full_like(q, 2))
    assert Modes.seen == [(2, False) if deterministic else expected]
    assert around == [expected] * 2
    assert modes() == expected


def test_the_backward_of_torchs_own_op_is_what_the_mode_is_set_around(monkeypatch):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(dtype == torch.bfloat16)

    modes, set_mode = [], torch.set_deterministic_debug_mode
    monkeypatch.setattr(torch, "set_deterministic_debug_mode", lambda mode: (modes.append(mode), set_mode(mode))[1])
    qkv, cu = (empty(8, 4, 16), empty(8, 2, 16), empty(8, 2, 16)), empty(2, dtype=torch.int32)
    out = attention.LIBRARIES["torch-varlen"](*qkv, attention.Lengths(cu, cu, 8, 8), True)
    assert "varlen_attn" in type(out.grad_fn).__name__
    torch.autograd.grad(out.sum(), qkv)
    assert modes == ["error", torch.get_deterministic_debug_mode()]


def test_the_gradient_of_shared_keys_waits_for_no_number():
    shared = attention._shared(torch.tensor([0, 0, 3, 1, 0]), 4)
    x = torch.randn(4, 2, 6, requires_grad=True)
    y = attention._Gather.apply(x, *shared)
    with torch.profiler.profile() as profile:
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[:, 0, 0].tolist() == [3, 1, 0, 1]
    # what a GPU would hand to the host: .item() ends there, in C++ too
    assert not [e.name for e in profile.events() if e.name == "aten::_local_scalar_dense"]


def test_activation_checkpointing_still_keeps_nothing():
    cu_q, cu_k, kv_rows = layout(SHARED)
    qkv = random_qkv(int(cu_q[-1]))
    saved = []

    def run(*qkv):
        return varlen_attention(*qkv, cu_q, cu_k, kv_rows)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = run(*qkv)
    # the batches that attention itself saves, (B, heads, m, C): ours do not hide them from the hooks on top
    assert any(x.ndim == 4 and x.is_floating_point() for x in saved)
    plain = torch.autograd.grad(out.square().sum(), qkv)
    again = torch.utils.checkpoint.checkpoint(run, *qkv, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), qkv), plain, strict=True):
        assert torch.equal(a, b)


def test_a_pack_takes_the_path_of_the_dtype_that_comes(library, monkeypatch):
    impl, calls = library
    monkeypatch.setattr(launch, "attention_path", lambda q: impl if q.dtype == torch.bfloat16 else "sdpa")
    cu_q, cu_k, kv_rows = layout(SHARED[:4])
    attend = attention.SegmentAttention(cu_q, cu_k, kv_rows)
    for dtype, seen in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float32, 1)):
        attend(0, *random_qkv(int(cu_q[-1]), dtype=dtype))
        assert len(calls) == seen


def on(device, dtype):
    """What a choice of path looks at, of a tensor there."""
    return types.SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(
    ("installed", "capability", "path"),
    [
        (["flash_attn_interface", "flash_attn"], (9, 0), "flash-attn-3"),
        (["flash_attn_interface"], (9, 0), "flash-attn-3"),
        (["flash_attn_interface", "flash_attn"], (8, 0), "flash-attn"),
        (["flash_attn_interface"], (10, 0), "torch-varlen"),
        (["flash_attn"], (9, 0), "flash-attn"),
        ([], (9, 0), "torch-varlen"),
    ],
)
def test_a_cpu_takes_sdpa_and_a_gpu_what_is_installed_where_that_takes_the_dtype(
    installed, capability, path, monkeypatch
):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(launch, "has", launch.has.__wrapped__)
    monkeypatch.setattr(launch.torch.cuda, "get_device_capability", lambda device: capability)
    for dtype in (torch.bfloat16, torch.float16):
        assert launch.attention_path(on("cuda", dtype)) == path
        assert launch.attention_path(on("cpu", dtype)) == "sdpa"
    for dtype in (torch.float32, torch.float64):
        assert launch.attention_path(on("cuda", dtype)) == "sdpa"
    # a run's record says both: trainer and engine may differ in dtype
    monkeypatch.setattr(launch.torch, "empty", lambda n, dtype=torch.float32, device=None: on(device, dtype))
    assert launch.paths("cuda") == {"attention": f"{path}, in fp32 sdpa", "rows": "triton"}


def test_rows_of_fp64_on_a_gpu_take_torch_for_the_kernels_do_not():
    assert launch.row_path(on("cuda", torch.float64)) == "torch"
    assert {launch.row_path(on("cuda", t)) for t in (torch.float32, torch.bfloat16, torch.float16)} == {"triton"}
