"""Law 16 on a GPU that computes nothing: no wait inside a pack, one a step; FLOPs; collectives."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import counters
from benchmarks.fake_gpu import CUDA, HOME, fake_gpu
from thinkmid.data.pack import Reply, Unit
from thinkmid.run.ranks import Ranks
from thinkmid.train.config import LossConfig
from thinkmid.train.loss import policy_loss, text_loss

DOCS = Path(__file__).parents[2] / "docs" / "h100.md"
TWO_LAYERS = replace(counters.LLAMA, layers=2)
GROUP = counters.blank_group(prefix=1024, siblings=8, reply=896)


@pytest.fixture(scope="module")
def tables():
    return counters.figures()


def with_policy(model, pack, *, first_update=True, reference=False, **options):
    cfg = LossConfig(denom=8, **options)
    reference = model if reference else None
    return policy_loss(model, pack, cfg, temperature=0.7, first_update=first_update, reference=reference)


LOSSES = {
    "first update": with_policy,
    "later update": partial(with_policy, first_update=False),
    "weights of whole replies": partial(with_policy, is_level="sequence"),
    "text in the same pack": partial(with_policy, next_token=0.5),
    "KL and entropy": partial(with_policy, kl=0.1, entropy=0.1, reference=True),
    "text alone": text_loss,
}


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_no_pack_makes_the_host_wait_and_a_step_does_once(loss_of):
    # rows of text have no policy loss, and the other way round
    text = Unit(name="text", prefix=np.zeros(1, np.int64), replies=[Reply.text(np.zeros(9, np.int64), 0.5)])
    pack, step = counters.by_pack(partial(counters.device_counts, loss_of, 2, beside=(text,)))
    waits_of = [{what: n for what, n in counts.items() if what[0] == "wait" and n} for counts in (pack, step)]
    assert waits_of[0] == {}
    assert list(waits_of[1].values()) == [1], waits_of[1]
    assert (pack["upload", "pinned"], pack["upload", "pageable"]) == (1, 0)


def waits_of(work):
    with fake_gpu() as count:
        work(torch.ones(3, device=CUDA, requires_grad=True))
    return [what.split(" at ")[0] for kind, what in count.seen.elements() if kind == "wait"]


def hooked(x):
    y = (x * 2).sum()
    x.register_hook(lambda grad: grad.sum().item() and None)
    y.backward()


WAITS = {
    "item": (lambda x: x.sum().item(), ["_local_scalar_dense"]),
    "if": (lambda x: 1 if x.sum() > 0 else 0, ["_local_scalar_dense"]),
    "tolist": (lambda x: x.detach().cpu().tolist(), ["_to_copy"]),
    "equal": (lambda x: torch.equal(x, x), ["equal"]),
    "nonzero": (lambda x: x.nonzero(), ["nonzero"]),
    "mask": (lambda x: x[x > 0], ["index"]),
    "assignment under a mask": (lambda x: x.detach().__setitem__(x > 0, x), ["index_put_"]),
    "list to the device": (lambda x: torch.tensor([1, 2], device=CUDA), ["_to_copy"]),
    "pageable": (lambda x: torch.ones(3).to(CUDA, non_blocking=True), ["_to_copy"]),
    "pinned, blocking": (lambda x: torch.ones(3).pin_memory().to(CUDA), ["_to_copy"]),
    "pinned": (lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True), []),
    "onto the device": (lambda x: x.detach().copy_(torch.ones(3)), ["copy_"]),
    "on the host": (lambda x: torch.ones(3).nonzero().sum().item(), []),
    "on the device": (lambda x: x.detach()[torch.zeros(2, dtype=torch.int64, device=CUDA)].bfloat16(), []),
    "in the backward": (hooked, ["_local_scalar_dense"]),
}


@pytest.mark.parametrize(("work", "expected"), WAITS.values(), ids=WAITS)
def test_what_would_wait_is_counted_and_nothing_else(work, expected):
    assert waits_of(work) == expected


def test_a_wait_is_named_by_our_line():
    ranks = Ranks(0, 1, CUDA, None)
    with fake_gpu() as count:
        assert ranks.sum({"loss": torch.zeros((), device=CUDA)}) == {"loss": 1.0}
    [what] = [what for kind, what in count.seen if kind == "wait"]
    file, line = what.removeprefix("_to_copy at ").split(":")
    assert ".cpu()" in (HOME / file).read_text().splitlines()[int(line) - 1]


def test_no_more_flops_than_needed_shared_or_not(tables):
    ratios = [ratio for name, (ratio,) in tables["FLOPs"].items() if "8 replies" in name or "unshared: " in name]
    assert len(ratios) == 2
    assert all(1 <= ratio <= 1.02 for ratio in ratios)


def test_flops_beyond_the_needed_show():
    assert counters.flops(TWO_LAYERS, [GROUP], checkpointing=True).ratio > 1.05
    longest = counters.blank_group(prefix=1024, siblings=16, reply=1152)
    assert counters.flops(TWO_LAYERS, [longest]).ratio > 1.02  # its prefix runs once for each of three packs


def test_dead_groups_cost_no_flops():
    alone, dead, live = (counters.flops(counters.SMALL, counters.small_units(*n)) for n in ((1,), (4, 1), (4,)))
    assert dead == alone
    assert live.executed == 4 * alone.executed


@pytest.mark.parametrize("world", counters.WORLDS)
@pytest.mark.parametrize("layers", [2, 3])
def test_collectives_and_their_bytes_are_those_of_the_formula(world, layers):
    cfg = replace(counters.SMALL, layers=layers)
    assert counters.network(cfg, world) == pytest.approx(counters.network_by_formula(cfg, world), rel=1e-9)


def test_the_docs_have_these_figures(tables):
    section = DOCS.read_text().split("## What a step does, counted\n")[1].split("\n## ")[0]
    said = [line for line in section.splitlines() if line.startswith("|")]
    # another torch runs other kernels
    skip = () if torch.__version__.startswith("2.13.") else ("| kernels",)
    counted = counters.markdown(tables)
    assert [line for line in said if not line.startswith(skip)] == [
        line for line in counted if not line.startswith(skip)
    ]
