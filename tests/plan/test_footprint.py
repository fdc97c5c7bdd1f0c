"""The memory plan of training against what autograd saves, what FSDP2 holds, and what a process on the CPU takes."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import growth
import pytest
import torch
import torch.distributed as dist
from conftest import exit_code, plan_of
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.shapes import LLAMA3_8B, LLAMA32_1B
from thinkmid.kernels import attention, head, launch
from thinkmid.kernels.attention import SegmentAttention
from thinkmid.kernels.gpu import rmsnorm, rope, rows, swiglu
from thinkmid.kernels.streams import Stats
from thinkmid.model import lora
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.plan import footprint, memory, time
from thinkmid.run.ranks import Ranks
from thinkmid.train import fsdp, loss, optim, rlmt, sft
from thinkmid.train.config import LossConfig, ModelSection
from thinkmid.types import Pack

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ModelConfig(
    kind="llama", vocab=64, width=96, layers=3, heads=6, kv_heads=2, head_dim=16, ffn=250, rope_theta=500.0,
    norm_eps=1e-5, tied=False, max_positions=1024, eos_ids=(0,),
)  # fmt: skip
WIDE = replace(SMALL, width=160, layers=2, heads=4, kv_heads=4, head_dim=40, ffn=331)
BF16 = ModelSection(dtype="bfloat16")
QWEN3_8B = replace(LLAMA3_8B, kind="qwen3", vocab=151936, layers=36, ffn=12288)


class Varlen(torch.autograd.Function):
    """What flash-attn and torch's varlen attention save and allocate, without the attention."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def nothing(*given, **options):
    """A kernel that leaves its outputs as they are."""


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The GPU's paths on the CPU's memory: every op allocates and saves as it does there, and no kernel runs."""
    monkeypatch.setattr(launch, "row_path", lambda x: "triton" if x.ndim > 1 else "torch")
    for module, name in ((rmsnorm, "rms_norm_forward"), (rope, "rotate"), (swiglu, "swiglu_forward")):
        monkeypatch.setattr(module, name, nothing)
    monkeypatch.setattr(swiglu, "swiglu_backward", nothing)
    monkeypatch.setattr(rmsnorm, "rms_norm_backward", lambda h, weight, *given, **options: torch.empty_like(weight))
    monkeypatch.setattr(rows, "row_policy", lambda z, *_: Stats(z.new_empty(len(z)), z.new_empty(len(z)), None))
    monkeypatch.setitem(attention.LIBRARIES, "torch-varlen", lambda q, k, v, *given: Varlen.apply(q, k, v))
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", head.CHUNK_BYTES["cuda"])
    monkeypatch.setattr(head, "_scores_and_room", scores_and_room)
    monkeypatch.setattr(head._Grads, "add", add)


def scores_and_room(h, weight, dtype):
    """On a GPU scores are fp32 and their gradient lies apart."""
    z = torch.empty(len(h), len(weight), dtype=dtype)
    return z, torch.empty_like(z, dtype=h.dtype)


def add(self, at, h, dz):
    """The tensors of _Grads.add on a GPU: the weight's gradient is added in place."""
    self._dhidden[at] = dz @ self.weight
    self._first = False


@contextmanager
def saved_storages(model, monkeypatch):
    """{address: storage} of what autograd saves of activations, hooks of our own attention included."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, hooks = {}, torch.autograd.graph.saved_tensors_hooks

    def note(kept):
        for x in kept if isinstance(kept, tuple) else (kept,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in parameters:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return kept

    class Noting(hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda x: note(pack(x)), unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Noting)
    # attention asks whether somebody's hooks are on top of its own; these here do not count
    monkeypatch.setattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    with hooks(note, lambda kept: kept):
        yield found


def segments(prefix, replies):
    """cu_q, cu_k and kv_rows of a prefix and replies that share it, as data.pack lays them out."""
    cu_q, cu_k, kv = [0, prefix], [0, prefix], [torch.arange(prefix)]
    for n in replies:
        kv += [torch.arange(prefix), torch.arange(cu_q[-1], cu_q[-1] + n)]
        cu_q.append(cu_q[-1] + n)
        cu_k.append(cu_k[-1] + prefix + n)
    return torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32), torch.cat(kv)


def saved_bytes(shape, dtype, attend, tokens, monkeypatch, section=None):
    model = Transformer(shape).to(dtype)
    if section:
        lora.attach(model, section)
        model.to(dtype)  # factors too, as FSDP2 gathers them
    ids = torch.zeros(tokens, dtype=torch.long)
    with saved_storages(model, monkeypatch) as found:
        out = model(ids, torch.arange(tokens), attend, head=lambda hidden, weight: hidden)
    assert out.grad_fn is not None
    return sum(storage.nbytes() for storage in found.values())


SHAPES = pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
KINDS = pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "olmo2", "smollm3"])
REPLIES = [40, 61, 33, 57]


@SHAPES
@KINDS
def test_activations_on_a_gpu_are_what_autograd_saves(as_on_a_gpu, monkeypatch, kind, shape):
    shape, attend = replace(shape, kind=kind), SegmentAttention(*segments(101, REPLIES), impl="torch-varlen")
    tokens = 101 + sum(REPLIES)
    saved = saved_bytes(shape, torch.bfloat16, attend, tokens, monkeypatch)
    assert tokens * footprint.activation_bytes(shape, BF16) == pytest.approx(saved, rel=0.03)


@SHAPES
def test_repeated_keys_are_saved_repeated(as_on_a_gpu, monkeypatch, shape):
    """The attention that torch has before 2.12."""

    def repeated(q, k, v, *lengths):
        return Varlen.apply(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)))

    monkeypatch.setitem(attention.LIBRARIES, "torch-varlen", repeated)
    tokens = sum(REPLIES)
    cu = torch.tensor([0, *REPLIES]).cumsum(0).int()
    attend = SegmentAttention(cu, cu, impl="torch-varlen")
    saved = saved_bytes(shape, torch.bfloat16, attend, tokens, monkeypatch)
    planned = tokens * footprint.activation_bytes(shape, BF16, grouped=False)
    assert planned == pytest.approx(saved, rel=0.03)


@SHAPES
@KINDS
@pytest.mark.parametrize("prefix", [0, 101])
def test_activations_in_fp32_are_what_autograd_saves(monkeypatch, kind, shape, prefix):
    """The attention is sdpa on padded buckets, with masks where a prefix is shared: within 5 % instead of 3 %."""
    shape, tokens = replace(shape, kind=kind), prefix + sum(REPLIES)
    cu_q, cu_k, kv_rows = segments(101, REPLIES)
    if not prefix:
        cu_q = cu_k = torch.tensor([0, *REPLIES]).cumsum(0).int()
        kv_rows = None
    saved = saved_bytes(shape, torch.float32, SegmentAttention(cu_q, cu_k, kv_rows), tokens, monkeypatch)
    span = sum(n * (prefix + n) for n in REPLIES) // tokens if prefix else 0
    planned = tokens * footprint.activation_bytes(shape, ModelSection(), span)
    assert planned == pytest.approx(saved, rel=0.05)


TARGETS = [ModelSection().lora_targets, ("q_proj", "v_proj"), ("o_proj", "up_proj"), ("down_proj",)]


@pytest.mark.parametrize("targets", TARGETS, ids=["all", "q v", "o up", "down"])
@SHAPES
@KINDS
def test_activations_beside_adapters_are_what_autograd_saves(as_on_a_gpu, monkeypatch, kind, shape, targets):
    # many layers: the first saves less, for nothing before its first adapter has a gradient
    shape, attend = replace(shape, kind=kind, layers=40), SegmentAttention(*segments(101, REPLIES), impl="torch-varlen")
    tokens, section = 101 + sum(REPLIES), replace(BF16, lora_rank=48, lora_targets=targets)
    saved = saved_bytes(shape, torch.bfloat16, attend, tokens, monkeypatch, section)
    assert tokens * footprint.activation_bytes(shape, section) == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("targets", TARGETS, ids=["all", "q v", "o up", "down"])
def test_activations_beside_adapters_in_fp32_are_what_autograd_saves(monkeypatch, targets):
    cu, tokens = torch.tensor([0, *REPLIES]).cumsum(0).int(), sum(REPLIES)
    section = ModelSection(lora_rank=48, lora_targets=targets)
    shape, attend = replace(WIDE, layers=24), SegmentAttention(cu, cu, None)
    saved = saved_bytes(shape, torch.float32, attend, tokens, monkeypatch, section)
    assert tokens * footprint.activation_bytes(shape, section) == pytest.approx(saved, rel=0.05)


def test_adapters_have_as_many_numbers_as_the_plan_counts():
    for targets in TARGETS:
        section = ModelSection(lora_rank=5, lora_targets=targets)
        with torch.device("meta"):
            lora.attach(model := Transformer(WIDE), section)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert footprint.adapter_parameters(WIDE, section) == trained


@pytest.mark.parametrize(("window", "layers"), [(20, (0,)), (20, (0, 1)), (900, (0, 1))])
@pytest.mark.parametrize("prefix", [0, 301])
def test_masks_of_windowed_layers_are_counted_in_fp32(monkeypatch, window, layers, prefix):
    shape = replace(SMALL, kind="olmo3", layers=2, windowed_layers=layers, window=window)
    replies = [400, 410, 390, 405]
    tokens, (cu_q, cu_k, kv_rows) = prefix + sum(replies), segments(301, replies)
    if not prefix:
        cu_q, kv_rows = torch.tensor([0, *replies]).cumsum(0).int(), None
        cu_k = cu_q
    saved = saved_bytes(shape, torch.float32, SegmentAttention(cu_q, cu_k, kv_rows), tokens, monkeypatch)
    full = sum(n * (prefix + n) for n in replies) // tokens
    span = footprint.mask_span(shape, full * bool(prefix), full + prefix**2 // tokens, prefix + max(replies))
    planned = tokens * footprint.activation_bytes(shape, ModelSection(), span)
    assert planned == pytest.approx(saved, rel=0.05)


def test_a_windowed_layer_computes_no_more_pairs_than_its_window():
    plain = replace(LLAMA32_1B, kind="olmo3")
    windowed = replace(plain, windowed_layers=(0, 1, 2), window=100)
    exact = plain.layers - 3 + 3 * 100 / 400
    assert time.pair_flops(windowed, 400) == pytest.approx(time.pair_flops(plain, 400) / plain.layers * exact)
    assert time.pair_flops(windowed, 99) == time.pair_flops(plain)


@pytest.mark.parametrize(
    ("shape", "tokens", "world", "checkpointing"),
    [
        pytest.param(LLAMA3_8B, 10_240, 8, False, marks=pytest.mark.slow, id="llama3-8b"),
        pytest.param(QWEN3_8B, 9216, 8, False, marks=pytest.mark.slow, id="qwen3-8b"),
        pytest.param(LLAMA3_8B, 16_384, 8, True, marks=pytest.mark.slow, id="llama3-8b checkpointing"),
        pytest.param(LLAMA32_1B, 16_384, 1, False, marks=pytest.mark.slow, id="llama3.2-1b"),
        pytest.param(replace(LLAMA3_8B, layers=2), 10_240, 8, False, id="two layers"),
        pytest.param(replace(LLAMA3_8B, layers=4, vocab=640), 10_240, 8, False, id="small vocabulary"),
        pytest.param(replace(LLAMA3_8B, layers=4, vocab=640), 10_240, 8, True, id="small vocabulary checkpointing"),
    ],
)
def test_the_training_phase_is_the_peak_that_a_tracker_of_fsdp_sees(
    as_on_a_gpu, monkeypatch, shape, tokens, world, checkpointing
):
    check_tracked(shape, replace(BF16, checkpointing=checkpointing), tokens, world, monkeypatch)


@pytest.mark.parametrize(
    ("shape", "tokens", "world", "checkpointing"),
    [
        pytest.param(LLAMA3_8B, 8192, 1, False, marks=pytest.mark.slow, id="llama3-8b"),
        pytest.param(LLAMA3_8B, 8192, 1, True, marks=pytest.mark.slow, id="llama3-8b checkpointing"),
        pytest.param(LLAMA32_1B, 16_384, 8, False, marks=pytest.mark.slow, id="llama3.2-1b"),
        pytest.param(replace(LLAMA3_8B, layers=2), 8192, 1, False, id="two layers"),
        pytest.param(replace(LLAMA3_8B, layers=4, vocab=640), 8192, 8, True, id="small vocabulary checkpointing"),
    ],
)
def test_the_training_phase_of_adapters_is_the_peak_that_a_tracker_of_fsdp_sees(
    as_on_a_gpu, monkeypatch, shape, tokens, world, checkpointing
):
    section = replace(BF16, checkpointing=checkpointing, lora_rank=64)
    check_tracked(shape, section, tokens, world, monkeypatch)


def check_tracked(shape, section, tokens, world, monkeypatch):
    owners = memory.training_phase(shape, section, tokens, world)
    planned = sum(owners.values()) - sum(footprint.outside("cuda", world).values())
    tracked = tracked_peak(shape, section, tokens, world, monkeypatch)
    assert planned == pytest.approx(tracked, rel=0.1)


def tracked_peak(shape, section, tokens, world, monkeypatch) -> int:
    """Bytes at the peak of a later pack's forward and backward: gradients of an earlier one are there.

    The optimiser's step is not tracked: fused AdamW works in place on a device, and as a fake it does not.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    ranks = Ranks(0, world, torch.device("cpu"), init_device_mesh("cpu", (world,)))
    monkeypatch.setattr(loss, "attend_pack", lambda pack, **options: lambda layer, q, k, v: Varlen.apply(q, k, v))
    with FakeTensorMode():
        with torch.device("meta"):
            # fake parameters cannot be converted
            torch.set_default_dtype(torch.bfloat16 if section.lora_rank else torch.float32)
            model = Transformer(shape, checkpointing=section.checkpointing)
            torch.set_default_dtype(torch.float32)
            if section.lora_rank:
                lora.attach(model, section)
        fsdp.shard(model, ranks, compute_dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        optimizer = optim.adamw(model, optim.OptimConfig(lr=1e-6))
        for p in optimizer.state:
            p.grad = torch.zeros_like(p)
        ids, floats = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens)
        streams = {"ce_w": floats, "pg_w": floats, "adv": floats, "logp_old": floats, "reply": ids, "owner": []}
        lengths = {"cu_q": None, "cu_k": None, "kv_rows": None}
        pack = Pack(tokens=ids, positions=ids, rows=ids, targets=ids, max_q=1, max_k=1, **lengths, **streams)
        with FSDPMemTracker(model, optimizer) as tracker:
            share, _ = loss.policy_loss(model, pack, LossConfig(denom=1), temperature=1.0, first_update=True)
            share.backward()
        [snapshot] = tracker.get_tracker_snapshot("peak").values()
    dist.destroy_process_group()
    return snapshot["Total"]


SFT = """
[run]
folder = "{folder}/{name}"
steps = 1
[fresh]
vocab = 640
width = {width}
layers = {layers}
heads = 8
kv_heads = 2
head_dim = 32
ffn = {ffn}
[data]
paths = ["{folder}/data/general.jsonl"]
batch_tokens = {batch_tokens}
pack_tokens = {pack_tokens}
max_len = 64
[optim]
lr = 1e-3
"""
SIZES = {
    "7M": {"width": 256, "layers": 8, "ffn": 704, "pack_tokens": 4096, "batch_tokens": 8192},
    "16M": {"width": 512, "layers": 6, "ffn": 1408, "pack_tokens": 2048, "batch_tokens": 4096},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small corpus of the miniature world and, trained on it for one step, the miniature's base model."""
    folder = tmp_path_factory.mktemp("home")
    few = {"general": 1500, "documents": 60, "rl": 200, "heldout": 40, "questions": 5, "train-questions": 5}
    argv = [str(folder / "data"), *(f"--{name}={n}" for name, n in few.items())]
    subprocess.run([sys.executable, "-m", "thinkmid.mini.make", *argv], check=True, capture_output=True)
    for name, sizes in SIZES.items():
        (folder / f"{name}.toml").write_text(SFT.format(folder=folder, name=name, **sizes))
    texts = f"{folder}/data/general.jsonl"
    base = ["--run.steps=1", f"--data.paths={texts}", f"--fresh.tokenizer_data={texts}", f"--run.folder={folder}/base"]
    assert exit_code(sft, [str(CONFIGS / "mini-base.toml"), *base]) == 0
    return folder


def planned_and_grown(program, argv, capsys, **env):
    """{phase: {owner: bytes}} that --dry-run says, bytes by which a process that runs the same grows, its packs."""
    capsys.readouterr()
    assert exit_code({"sft": sft, "rlmt": rlmt}[program], [*argv, "--dry-run"]) == 0
    owners = plan_of(capsys.readouterr().out)
    command = [sys.executable, growth.__file__, program, *argv]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | env)
    found = json.loads(run.stdout.splitlines()[-1])
    return owners, found["peak"] - found["before"], found["packs"]


def total(owners, *, without="nothing"):
    return max(sum(size for owner, size in phase.items() if without not in owner) for phase in owners.values())


# glibc then gives tensors that are freed back to the system: what is left is what is in use
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_process_on_the_cpu_grows_by_what_the_plan_says(home, capsys, name):
    argv = [str(home / f"{name}.toml")]
    planned, grown, packs = planned_and_grown("sft", argv, capsys, **NO_HOLES)
    assert len(packs) == 2
    assert min(packs) > 0.95 * SIZES[name]["pack_tokens"]
    assert total(planned, without="holes") == pytest.approx(grown, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "without", "rel"),
    # holes are another share in another run: 20 % of what is resident
    [(NO_HOLES, "holes", 0.1), ({}, "nothing", 0.2)],
    ids=["in use", "resident"],
)
def test_the_miniature_grows_by_what_its_plan_says(home, capsys, tmp_path, env, without, rel):
    # entropy in the loss: an untrained model's groups are dead, and would not be forwarded. Thoughts run to their end
    argv = [
        str(CONFIGS / "mini-rlmt.toml"), f"--run.folder={tmp_path}/run", "--run.steps=4", "--loss.entropy=1e-3",
        f"--model.folder={home}/base/export", f"--data.paths={home}/data/rl.jsonl", "--data.val_paths=",
    ]  # fmt: skip
    planned, grown, _ = planned_and_grown("rlmt", argv, capsys, **env)
    assert total(planned, without=without) == pytest.approx(grown, rel=rel)


@pytest.mark.slow
def test_a_process_that_trains_adapters_grows_by_what_the_plan_says(home, capsys, tmp_path):
    assert exit_code(sft, [str(home / "16M.toml"), f"--run.folder={home}/16M-base"]) == 0
    flags = [f"--model.folder={home}/16M-base/export", "--model.lora_rank=8", f"--run.folder={tmp_path}/run"]
    planned, grown, _ = planned_and_grown("sft", [str(home / "16M.toml"), *flags], capsys, **NO_HOLES)
    assert total(planned, without="holes") == pytest.approx(grown, rel=0.1)
