"""The examples of docs/loss-library.md, run as they stand there, and what they promise."""

import re
from pathlib import Path

import pytest
import torch
from conftest import assert_same, join_ranks, spawn

from thinkmid.kernels import dr_grpo_loss, fused_linear_dr_grpo, linear_logprob

PAGE = Path(__file__).parents[2] / "docs" / "loss-library.md"
BLOCKS = dict(
    zip(("loop", "transformers", "fsdp"), re.findall(r"```python.*?\n(.*?)```", PAGE.read_text(), re.S), strict=True)
)


def run(name, **given):
    exec(compile(BLOCKS[name], f"{PAGE.name}, {name}", "exec"), given)
    return given


def test_a_loop_of_ones_own(capsys):
    got = run("loop")
    assert re.fullmatch(r"loss -?\d+\.\d{3}, weights cut to the cap: \d+%\n", capsys.readouterr().out)
    assert all(p.grad.abs().max() > 0 for p in (got["head"].weight, got["trunk"].weight))


def test_a_transformers_model_gets_the_gradients_of_its_own_logits():
    pytest.importorskip("transformers")
    got = run("transformers")
    model, ids = got["model"], got["ids"]
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    loss, _ = dr_grpo_loss(logp, got["advantages"][:, 1:], mask=got["mask"][:, 1:], denom=4 * 7)
    loss.backward()
    torch.testing.assert_close(got["loss"], loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-6)


def fsdp_rank(rank, world, folder):
    join_ranks(rank, world, folder)
    got = run("fsdp", rank=rank, world_size=world)
    grad = got["sharded"].grad.full_tensor()
    with pytest.raises(ValueError, match="weight is a DTensor; pass gather_weight"):
        linear_logprob(got["hidden"], got["sharded"], got["targets"])
    weight = got["weight"].double().requires_grad_()
    inputs = (got["hidden"].double(), weight, got["targets"], got["advantages"].double())
    whole = torch.autograd.grad(fused_linear_dr_grpo(*inputs, denom=24).loss, weight)[0]
    torch.testing.assert_close(grad.double(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_sharded_head_gets_its_share_of_the_gradient_of_all_ranks(world, tmp_path):
    spawn(fsdp_rank, world, world, tmp_path)


def test_gather_weight_leaves_other_tensors_alone():
    from thinkmid.kernels import gather_weight

    weight = torch.randn(3, 2)
    assert gather_weight(weight) is weight
    assert_same({"w": gather_weight(weight.double())}, {"w": weight.double()})
