"""What tests share: a tiny model, random groups, two comparisons, ranks, NaN in unwritten memory."""

import json
import os
import re
import signal
import sys
from contextlib import contextmanager

# on tensors this small threads cost more than they bring; before torch is imported, here and in children
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton's interpreter stands in for a GPU. It wraps kernels as they are defined, so it is chosen before
    assert "triton" not in sys.modules or "TRITON_INTERPRET" in os.environ, "imported before it was told to interpret"
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch.distributed as dist

from thinkmid import config
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.types import Group, Prompt, Sample

TINY = ModelConfig(
    kind="qwen3", vocab=37, width=24, layers=2, heads=4, kv_heads=2, head_dim=10, ffn=19, rope_theta=500.0,
    norm_eps=1e-6, tied=False, max_positions=128, eos_ids=(0,),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded_and_unwritten_memory_is_nan():
    torch.manual_seed(0)
    # torch.empty fills with NaN in this mode
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_outlives_its_module():
    yield
    # a child forked by a later module would wait for gloo's threads, which a fork does not copy
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def signal_handlers_put_back():
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _signal_handlers_are_put_back():
    with signal_handlers_put_back():
        yield


def exit_code(program, argv) -> int:
    """Of a program, as its command line would end."""
    with signal_handlers_put_back(), pytest.raises(SystemExit) as end:
        config.run(program.main, list(argv))
    return end.value.code


def plan_of(said) -> dict[str, dict[str, float]]:
    """{phase: {owner: bytes}} of a --dry-run's memory plan, as precise as it was printed."""
    phases, units = {}, {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}
    for line in said.splitlines():
        if found := re.match(r"#   (sync|rollout|training) +[\d.]+ [KMG]?B$", line):
            phases[found[1]] = {}
        elif found := re.match(r"# +([\d.]+) ([KMG]?B)  (.+)$", line):
            phases[list(phases)[-1]][found[3]] = float(found[1]) * units[found[2]]
    return phases


def random_model(cfg=TINY, seed=0, dtype=torch.float32, **flags):
    """A model in which every parameter, norms and biases too, is told apart by the result."""
    model, rng = Transformer(cfg, **flags), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.3 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.to(dtype)


def exchange(folder, part):
    """Replace a part of the model in an export: another valid one stands there, that loads."""
    from thinkmid.model import weights

    told = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer", "config")}
    if part == "weights":
        cfg = weights.read_config(folder)
        weights.save(folder, cfg, weights.stream(random_model(cfg, seed=5)), dtype="float32", extra_files=folder)
    elif part == "tokenizer":
        told[part]["model"]["merges"].pop()
    else:
        told[part]["rope_theta"] = told[part]["rope_parameters"]["rope_theta"] = 777.0
    if part != "weights":
        (folder / f"{part}.json").write_text(json.dumps(told[part]))


def flip_bit(path):
    """One bit of the last tensor of a safetensors file."""
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


def random_groups(rewards_P_G, seed=0, *, max_prefix=9, max_reply=7, version=0):
    """Groups with these rewards; lengths from 1 up, log-probs of an unsure model, a fifth of the tokens forced."""
    rng = np.random.default_rng(seed)

    def sample():
        n = int(rng.integers(1, max_reply + 1))
        return Sample(
            tokens=rng.integers(0, TINY.vocab, n).astype(np.int32), logp=rng.normal(-4, 1, n).astype(np.float32),
            drawn=rng.random(n) < 0.8, finish="eos", num_think=n, versions=np.full(n, version, np.int32),
        )  # fmt: skip

    groups = []
    for p, rewards in enumerate(rewards_P_G):
        prefix = rng.integers(0, TINY.vocab, rng.integers(1, max_prefix + 1)).tolist()
        samples = [sample() for _ in rewards]
        groups.append(Group(prompt=Prompt(id=f"prompt {p}", tokens=prefix), samples=samples, rewards=list(rewards)))
    return groups


def assert_no_worse(ours, exact, naive):
    """Our error against fp64 is at most twice that of the honest alternative in the same dtype."""
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, naive))
    assert error <= 2 * allowed + torch.finfo(torch.float32).tiny, f"error {error} against {allowed}"


def assert_same(ours, exact):
    """Two named sets of fp64 tensors are equal but for the order of sums."""
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        error, scale = (ours[name] - want).abs().max().item(), want.abs().max().item()
        assert error <= 1e-11 * max(scale, 1e-3), f"{name}: error {error}, largest value {scale}"


def spawn(work, world, *args):
    """work(rank, *args) in a process per rank; raises what one of them raises."""
    torch.multiprocessing.spawn(_work, (work, *args), nprocs=world)


def _work(rank, work, *args):
    work(rank, *args)
    # DTensor's caches keep gloo's threads alive, and at an orderly exit those now and then abort the process
    sys.stdout.flush()
    os._exit(0)


def join_ranks(rank, world, folder):
    """For a process of spawn(): gloo through a file, then the trainer's own start()."""
    from thinkmid.run.ranks import start_ranks

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    return start_ranks()
