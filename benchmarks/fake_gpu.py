"""A GPU that computes nothing and counts what it is asked: kernels, uploads, waits of the host.

Its tensors are meta tensors that call themselves "cuda" in Python, so that the trainer takes the path it takes on a
GPU; the host's own tensors stay real. What the host reads from it is all ones. Not seen: what torch's CUDA code does
inside an op, streams, time. What it cannot answer raises.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.attention.varlen  # its ops have names from here on
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import thinkmid
from thinkmid.kernels import launch, streams

CUDA, META = torch.device("cuda", 0), torch.device("meta")
H100 = SimpleNamespace(multi_processor_count=132)
HOME = Path(thinkmid.__file__).parent
_ENGINE = torch.autograd.Variable._execution_engine
aten = torch.ops.aten
# memory and bookkeeping; like views they run no kernel
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


class Count(TorchDispatchMode):
    """Numbers of what happened, by (kind, what): "wait" by op and line of ours, "upload" pinned or pageable, "kernel"
    by phase. A kernel is an op that runs one or more, or a launch of Triton's."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.phase = ""
        self._pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that none is given out twice

    def kernel(self, *args, **kwargs) -> None:
        self.seen["kernel", self.phase] += 1

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        self._pinned[x.untyped_storage().data_ptr()] = x
        return x

    def is_pinned(self, x: torch.Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # code of torch's below sees meta
            return self._run(func, args, kwargs or {})

    def _run(self, func, args, kwargs):
        if func is aten._to_copy.default:
            return self._copy(func, args, kwargs, args[0], torch.device(kwargs.get("device") or args[0].device))
        if func is aten.copy_.default:
            return self._copy(func, args, kwargs, args[1], args[0].device)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(x.is_meta for x in tensors) and kwargs.get("device") != META:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait(func)
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.equal.default:
            self._wait(func)
            return True
        if not func.is_view and func.overloadpacket.__name__ not in ALLOCATE:
            self.kernel()
        # the host waits for the size of these, which is taken to be the largest that it can be
        if func is aten.nonzero.default:
            self._wait(func)
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if func is aten.bincount.default:
            self._wait(func)
            minlength = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
            return args[0].new_empty(max(1, minlength), dtype=torch.int64)
        if func in (aten.index.Tensor, aten.index_put_.default):
            masks = [i is not None and i.dtype == torch.bool for i in args[1]]
            if any(masks):
                self._wait(func)
                rows = [torch.empty_like(i, dtype=torch.int64) if m else i for i, m in zip(args[1], masks, strict=True)]
                args = (args[0], rows, *args[2:])
        return func(*args, **kwargs)

    def _copy(self, func, args, kwargs, source, target):
        there = target == META
        if there or source.is_meta:
            self.kernel()
        if there == source.is_meta:
            return func(*args, **kwargs)
        pinned = there and self.is_pinned(source)
        if there:
            self.seen["upload", "pinned" if pinned else "pageable"] += 1
        # a copy from pageable memory is staged while the host waits, whatever it was told
        if not (kwargs.get("non_blocking") or True in args[2:]) or (there and not pinned):
            self._wait(func)
        if there:
            return func(*args, **kwargs)
        ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return args[0].copy_(ones) if func is aten.copy_.default else ones

    def _wait(self, func):
        """Under the innermost of our lines; an op of autograd's own shows that of the backward."""
        frame = sys._getframe()
        while frame and not frame.f_code.co_filename.startswith(str(HOME)):
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).relative_to(HOME)}:{frame.f_lineno}" if frame else "elsewhere"
        self.seen["wait", f"{func.overloadpacket.__name__} at {line}"] += 1


class _Name(TorchFunctionMode):
    """To Python, meta is cuda; pinned memory is memory that is remembered."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return CUDA if args[0].is_meta else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if func is torch.Tensor.is_pinned:
            return self.count.is_pinned(args[0])
        if func is torch.Tensor.pin_memory:
            return self.count.pin(args[0].clone())
        if func is torch.Tensor.backward:
            # the backward of our ops asks where it runs; this mode is off in here, and in torch.autograd.backward
            with self:
                return _ENGINE.run_backward((args[0],), (torch.ones_like(args[0]),), False, False, (), True, True)
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(META if _is_cuda(x) else x for x in args)
        kwargs = {name: META if _is_cuda(x) else x for name, x in kwargs.items()}
        if kwargs.pop("pin_memory", False):
            return self.count.pin(func(*args, **kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            # on meta, torch drops the values and no copy is seen
            return func(*args, **kwargs | {"device": "cpu"}).to(META)
        return func(*args, **kwargs)


def _is_cuda(x):
    return isinstance(x, torch.device) and x.type == "cuda"


@contextmanager
def fake_gpu():
    """The fake is CUDA, for all that runs inside; yields its Count. Attention is torch's varlen attention."""
    from triton.runtime.jit import KernelInterface

    count = Count()
    with ExitStack() as stack:
        for context in (
            mock.patch.object(KernelInterface, "__getitem__", return_value=count.kernel),
            mock.patch.object(torch.cuda, "device", nullcontext),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=H100),
            mock.patch.object(launch, "attention_path", return_value="torch-varlen"),
            # torch asks it of a tensor's C++ device
            mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", return_value=["meta", "cuda"]),
            # what is saved inside torch's own functions says meta, recomputed it may say cuda
            mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, {"default": lambda x: x.shape}),
            count,
            _Name(count),
        ):
            stack.enter_context(context)
        stack.callback(streams.on_device.cache_clear)  # it keeps tensors of the fake
        yield count
