import pytest
import torch
from conftest import random_model

from thinkmid.run import checkpoint
from thinkmid.run.ranks import start_ranks
from thinkmid.train import fsdp, optim


def step(model, optimizer, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        local = p.to_local() if hasattr(p, "to_local") else p
        grad = torch.randn(local.shape, generator=rng)
        p.grad = torch.zeros_like(p)
        (p.grad.to_local() if hasattr(p, "to_local") else p.grad).copy_(grad)
    optimizer.step()


@pytest.mark.parametrize("sharded", [False, True])
def test_moments_that_were_away_are_the_same_bit_for_bit(sharded, tmp_path):
    states = []
    for away in (False, True):
        model = random_model()
        if sharded:
            fsdp.shard(model, start_ranks(), compute_dtype=torch.float32)
        optimizer = optim.adamw(model, optim.OptimConfig(lr=0.1))
        moments = optim.Offload(optimizer)
        for seed in range(3):
            if away:
                moments.offload()
                moments.offload()  # twice is once
                assert moments.is_offloaded
                held = [x for s in optimizer.state.values() for x in (s["exp_avg"], s["exp_avg_sq"])]
                local = [x.to_local() if hasattr(x, "to_local") else x for x in held]
                assert all(x.untyped_storage().nbytes() == 0 for x in local)
                moments.restore()
            step(model, optimizer, seed)
            checkpoint.save(tmp_path, seed, optim.state_tensors(model, optimizer), {}, keep=1)  # takes hold of none
        states.append({name: t.clone() for name, t in optim.state_tensors(model, optimizer).items()})
    for name, want in states[0].items():
        got = states[1][name]
        want, got = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (want, got))
        assert torch.equal(got, want), name
