"""The adapters of a model, sharded or not: drawn from a seed, and written as the folder that `peft` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import thinkmid
from thinkmid import hub
from thinkmid.files import digest, write_json
from thinkmid.model import weights
from thinkmid.model.init import ModelSection
from thinkmid.model.lora import adapted
from thinkmid.model.transformer import Transformer
from thinkmid.model.weight_files import ADAPTER, ADAPTER_CONFIG, SEAL

PREFIX = "base_model.model.model."  # peft's, before a projection's path


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """A uniform in +-1/sqrt(in), B zero: the start is the base. The same for a seed on any number of ranks; global RNG
    untouched."""
    rng = torch.Generator("cpu").manual_seed(seed)
    for module in adapted(model).values():
        bound = module.lora_a.shape[1] ** -0.5
        whole = torch.empty(module.lora_a.shape, dtype=torch.float32, device="cpu")
        whole.uniform_(-bound, bound, generator=rng)
        local, start = weights.local_rows(module.lora_a)
        local.copy_(whole[start : start + len(local)])
        weights.local_rows(module.lora_b)[0].zero_()


@torch.no_grad()
def save(folder: str | Path, model: Transformer, section: ModelSection) -> None:
    """Write the adapters alone, in their own dtype, as a PEFT folder. Collective: every rank calls it, rank 0 writes.

    An older export at the same place is replaced as by weights.save.
    """
    folder, many = weights.replaceable(folder), dist.is_available() and dist.is_initialized()
    weights.reshard(model)
    tensors = {}
    for path, module in adapted(model).items():
        for name, factor in (("lora_A", module.lora_a), ("lora_B", module.lora_b)):
            tensors[f"{PREFIX}{path}.{name}.weight"] = weights.whole_tensor(factor.detach()).cpu().contiguous()
    if not many or dist.get_rank() == 0:
        tmp = weights.fresh_folder(folder)
        save_file(tensors, tmp / ADAPTER, metadata={"format": "pt"})
        write_json(tmp / ADAPTER_CONFIG, peft_config(section))
        write_json(tmp / SEAL, {"thinkmid": thinkmid.__version__, "sha256": {ADAPTER: digest(tmp / ADAPTER)}})
        weights.promote(tmp, folder)
    if many:
        dist.barrier()


def peft_config(section: ModelSection) -> dict[str, Any]:
    """adapter_config.json. It names the base by its folder, or as the Hub does, at its commit."""
    named = section.folder if isinstance(section.folder, hub.Snapshot) else None
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": section.lora_rank,
        "base_model_name_or_path": named.pinned.rpartition("@")[0] if named else section.folder,
        "revision": named.commit if named else None,
        "lora_alpha": section.lora_alpha, "target_modules": sorted(section.lora_targets), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "inference_mode": True,
    }  # fmt: skip
