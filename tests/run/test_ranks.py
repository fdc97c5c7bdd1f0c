"""What start() sets up besides the process group."""

import json
import os

import pytest
import torch

from thinkmid.errors import UserError
from thinkmid.run.config import RunConfig
from thinkmid.run.folder import describe_run
from thinkmid.run.ranks import ALLOCATOR, Ranks, start_ranks
from thinkmid.train.config import OptimConfig, SFTConfig, SFTData

SET = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class CudaStarts(Exception):
    pass


@pytest.mark.parametrize(
    ("cuda", "share", "given", "found"),
    [
        (True, 1, {}, SET),
        (True, 2, {}, {}),
        (False, 1, {}, {}),
        (True, 1, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        (True, 1, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_cached_memory_grows_in_place_unless_the_user_or_a_shared_engine_says_otherwise(
    monkeypatch, cuda, share, given, found
):
    """Before CUDA starts."""
    told = []

    def starts(*_, **__):
        raise CudaStarts

    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2", "RANK": "0"} | given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "set_device", starts)
    monkeypatch.setattr(torch.distributed, "init_process_group", starts)
    with pytest.raises(CudaStarts):
        start_ranks(share)
    assert {name: value for name, value in os.environ.items() if "ALLOC" in name} == found
    assert told == (["expandable_segments:True"] if found == SET else [])


def test_torch_takes_the_allocator_settings():
    before = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings(ALLOCATOR)
    assert torch._C._accelerator_getAllocatorSettings() == ALLOCATOR
    torch._C._accelerator_setAllocatorSettings(before)


def test_ranks_that_share_an_engine_divide_all_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="tensor_parallel 3 does not divide 4 ranks"):
        start_ranks(3)


def test_env_json_holds_the_allocator_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)
    data, optim = SFTData(paths=("a.txt",)), OptimConfig(lr=1.0)
    alone = Ranks(0, 1, torch.device("cpu"), None)
    describe_run(SFTConfig(run=RunConfig(folder=str(tmp_path / "run"), steps=1), data=data, optim=optim), alone)
    assert json.loads((tmp_path / "run" / "env.json").read_text())["allocator"] == SET
