"""Which path an op takes: what is slow on a device is named."""

import torch

from thinkmid.kernels import launch


def test_bf16_is_named_on_a_cpu_without_its_units_alone(monkeypatch):
    dtypes = {"model.dtype": "bfloat16", "engine.dtype": "float32"}
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for has, num in ((False, 1), (True, 0)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        lines = launch.slow_dtypes(cpu, dtypes)
        assert len(lines) == num
        assert all(line.startswith("model.dtype bfloat16: ") and "--model.dtype float32" in line for line in lines)
        assert launch.slow_dtypes(gpu, dtypes) == []
