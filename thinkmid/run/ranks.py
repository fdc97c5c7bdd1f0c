"""The ranks of a run: process group and the few collectives of a step."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from thinkmid.errors import UserError

# a rank may wait for the slowest rollout of another
TIMEOUT = timedelta(hours=2)
# packs differ in length, and cached blocks are given back at every wake: segments of fixed size fragment
ALLOCATOR = "expandable_segments:True"
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
Result = TypeVar("Result")
Given = ParamSpec("Given")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; one process without torchrun."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    neighbours: dist.ProcessGroup | None = None  # gloo, the ranks that share this one's engine; None: it shares none

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """The payload of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [payload]
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(payload)
        dist.all_reduce(sizes)
        mine = torch.frombuffer(bytearray(payload.ljust(max(1, int(sizes.max())), b"\0")), dtype=torch.uint8)
        all_of = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_of, mine)
        return [x[:n].numpy().tobytes() for x, n in zip(all_of, sizes.tolist(), strict=True)]

    def run_on_all(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """work(...) of this rank. Collective: a UserError or OSError of one rank is a UserError on all, so that none
        waits."""
        result, fault = None, ""
        try:
            result = work(*args, **kwargs)
        except (UserError, OSError) as error:
            fault = str(error) or repr(error)
        for answer in filter(None, self.gather_bytes(fault.encode())):
            raise UserError(answer.decode())
        return cast(Result, result)

    def run_on_first(self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result | None:
        """run_on_all() of rank 0 alone; None on the others."""
        return self.run_on_all(lambda: work(*args, **kwargs) if self.rank == 0 else None)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool, group: dist.ProcessGroup | None = None) -> bool:
        """True on every rank if it is true on one; with a group, among the ranks of that."""
        if self.world == 1:
            return flag
        seen = torch.tensor(int(flag))
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
        return bool(seen)

    def sum(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums over ranks, maxima for names ending in _max; the one transfer to the host of a step."""
        if not values:
            return {}
        names = sorted(values)
        host = torch.stack([values[n].detach().double() for n in names]).cpu()
        if self.world > 1:
            most = host.clone()
            dist.all_reduce(host)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            host = torch.where(torch.tensor([n.endswith("_max") for n in names]), most, host)
        return dict(zip(names, host.tolist(), strict=True))


def start_ranks(share: int = 1) -> Ranks:
    """Joins torchrun's process group, or makes one of a single process; on the GPU of the local rank, else the CPU.

    share: neighbouring ranks that hold one engine together.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % share:
        raise UserError(f"engine.tensor_parallel {share} does not divide {world} ranks")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        # with a shared engine not: vLLM's all-reduce opens its neighbours' graph buffers by CUDA IPC, which takes no
        # expandable segment (vllm#42609)
        if share == 1:
            set_allocator()
        torch.cuda.set_device(device)
    fresh = not dist.is_initialized()
    if fresh:
        # gloo for the host's tensors on every machine, NCCL for the device's
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            alone = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, timeout=TIMEOUT, store=alone, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (world,))
    if fresh:
        atexit.register(_leave, mesh)
    neighbours = dist.new_subgroups(share, backend="gloo", timeout=TIMEOUT)[0] if share > 1 else None
    return Ranks(rank, world, device, mesh, neighbours)


def set_allocator() -> None:
    """ALLOCATOR, unless the user chose settings. Before CUDA's first allocation.

    The pools that vLLM puts to sleep cannot be expandable: it switches the setting off for those, and on again after.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # both: vLLM 0.32 asks torch, versions near it read the variable of this name alone; torch may have read the
        # variables when it was imported
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = ALLOCATOR
        # the name that all of torch 2.11 to 2.14 have; newer ones deprecate it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.cuda.memory._set_allocator_settings(ALLOCATOR)


def _leave(mesh: DeviceMesh) -> None:
    """At an orderly exit: gloo's threads, left alive, now and then abort the process, and its exit code is lost.

    They end with the last reference to their group. DTensor's caches hold the mesh for ever, and the mesh its groups.
    """
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        getattr(mesh, "_pg_registry", {}).clear()
        dist.destroy_process_group()
        gc.collect()
