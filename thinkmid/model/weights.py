"""Read and write Hugging Face model folders, for plain and FSDP2-sharded models."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import thinkmid
from thinkmid.errors import UserError
from thinkmid.files import digest, fsync, read_json, swap_in, write_json
from thinkmid.model import lora, weight_files
from thinkmid.model.hf_config import config_dict, read_config, token_ids
from thinkmid.model.transformer import ModelConfig, Transformer
from thinkmid.model.weight_files import INDEX, SEAL, SINGLE, Sources, Stamp

# what an export keeps of the folder that the run began with, byte by byte: nothing in them depends on the weights
KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# computed from config.json; older versions of transformers and other trainers wrote them beside the weights
BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
MAX_SHARD_BYTES = 5e9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Dtype = str | torch.dtype
Device = str | torch.device


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    return name if name == HEAD else f"model.{name}"


def build(cfg: ModelConfig, dtype: Dtype = "float32", device: Device = "cpu") -> Transformer:
    """Transformer in dtype with uninitialised weights; without memory where device is "meta"."""
    with torch.device("meta"):
        model = Transformer(cfg).to(_dtype(dtype))
    return materialise(model, device)


def materialise(model: Transformer, device: Device) -> Transformer:
    """Give a meta model, sharded or not, uninitialised memory on a device; returns the model."""
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    embedding = model.embed_tokens.weight
    # to_empty gives each name of a plain parameter memory of its own; a DTensor is swapped in place, both names with it
    if model.cfg.tied and not isinstance(embedding, DTensor):
        model.lm_head.weight = embedding
    assert model.cfg.tied == (model.lm_head.weight is embedding), "the head must share the embedding iff it is tied"
    return model


def load_model(folder: str | Path, dtype: Dtype = "float32", device: Device = "cpu") -> Transformer:
    """The model in a Hugging Face folder, weights rounded to dtype, in eval mode. UserErrors as in load_into."""
    model = build(read_config(folder), dtype, "meta")
    matched(model, folder)
    load_into(materialise(model, device), folder)
    return model.eval()


def matched(model: Transformer, folder: str | Path) -> tuple[dict[str, Tensor], Sources]:
    """A model's parameters by Hugging Face name, and the open file of each tensor in a folder.

    RoPE's buffers are left out, as transformers and vLLM do. UserError unless the other tensors are the model's. A meta
    model will do: a wrong config.json asks for no memory.
    """
    parameters: dict[str, Tensor] = {hf_name(name): p for name, p in lora.base_parameters(model)}
    sources = {name: at for name, at in weight_files.open_all(Path(folder)).items() if not BUFFER.fullmatch(name)}
    twin = {HEAD: parameters[EMBEDDING]} if model.cfg.tied and HEAD in sources else {}
    _compare(Path(folder), parameters | twin, sources)
    return parameters, sources


@torch.no_grad()
def load_into(model: Transformer, folder: str | Path) -> None:
    """Fill a model from a folder's safetensors; of a sharded model every rank reads its own rows only.

    Values are rounded to the parameter's dtype where that is narrower than the file's. UserError, naming file or
    tensor, for anything missing, left over, misplaced, mis-shaped, damaged or not finite.
    """
    folder = Path(folder)
    reshard(model)
    parameters, sources = matched(model, folder)
    sharded = any(isinstance(p, DTensor) for p in parameters.values())
    if weight_files.is_export(folder):
        weight_files.stamps(folder, *((dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)))
    for name, p in parameters.items():
        local, start = local_rows(p)
        local.copy_(_rows(*sources[name], name, start, len(local)))
        _check_finite(sources[name][0], name, local)
    if HEAD in sources.keys() - parameters.keys():
        _check_twin(folder, sources, *local_rows(parameters[EMBEDDING]))


def dtype_of(folder: str | Path) -> str:
    """The dtype of a folder's weights; where they have several, the narrowest that holds all. UserErrors as in
    matched."""
    _, sources = matched(build(read_config(folder), device="meta"), folder)
    found = {handle.get_slice(name).get_dtype() for name, (_, handle) in sources.items()}
    return name_of(reduce(torch.promote_types, (FILE_DTYPES[dtype] for dtype in found)))


def stream_folder(
    folder: str | Path, dtype: Dtype, known: Mapping[str, Stamp] | None = None, *, are_finite: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor in dtype) in layer order, one read at a time; UserErrors as in load_into.

    known: weight_files.stamps() of all files, taken earlier. A file that is unchanged since is not hashed again;
    UserError names one whose bytes differ. are_finite: these bytes were streamed before, their values are not checked.
    """
    folder = Path(folder)
    parameters, sources = matched(build(read_config(folder), device="meta"), folder)
    if known is not None:
        weight_files.check_same(folder, known)
    elif weight_files.is_export(folder):
        weight_files.stamps(folder)
    if HEAD in sources.keys() - parameters.keys():
        _check_twin(folder, sources, parameters[EMBEDDING], 0)
    for name, p in parameters.items():
        tensor = _rows(*sources[name], name, 0, len(p)).to(_dtype(dtype))
        if not are_finite:
            _check_finite(sources[name][0], name, tensor)
        yield name, tensor


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    # one pass without a temporary; NaN wins both ends
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise UserError(f"{path}: {name} holds values that are not finite, as {tensor.dtype}")


def _check_twin(folder: Path, sources: Sources, local: Tensor, start: int) -> None:
    """The head that a tied model's folder holds too must be the embedding; rows from start on, as many as local has."""
    twins = [_rows(*sources[name], name, start, len(local)) for name in (HEAD, EMBEDDING)]
    if not torch.equal(*twins):
        raise UserError(f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")


def _compare(folder: Path, expected: dict[str, Tensor], sources: Sources) -> None:
    shared = {name: sources[name][1].get_slice(name) for name in expected.keys() & sources.keys()}
    mis_shaped = {
        f"{name} {t.get_shape()} instead of {list(expected[name].shape)}"
        for name, t in shared.items()
        if t.get_shape() != list(expected[name].shape)
    }
    odd = {f"{name} {t.get_dtype()}" for name, t in shared.items() if t.get_dtype() not in FILE_DTYPES}
    problems = {
        "missing": expected.keys() - sources.keys(),
        "unexpected": sources.keys() - expected.keys(),
        "mis shaped": mis_shaped,
        "of unsupported dtype": odd,
    }
    if any(problems.values()):
        raise UserError(f"{folder}: {weight_files.summary(problems)}")


def _rows(path: Path, handle: Any, name: str, start: int, count: int) -> Tensor:
    try:
        rows: Tensor = handle.get_slice(name)[start : start + count]
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: cannot read {name}: {weight_files.one_line(e)}") from None
    return rows


def local_rows(p: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor, and the row of the whole at which it starts."""
    if not isinstance(p, DTensor):
        return p, 0
    assert all(x.is_replicate() or x.is_shard(0) for x in p.placements), f"only rows may be sharded, got {p.placements}"
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), offset[0] if offset else 0


def whole_tensor(x: Tensor) -> Tensor:
    """All rows of a tensor, gathered where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def reshard(model: nn.Module) -> None:
    """Back to shards in the master dtype: a unit that a forward left whole shows copies, no optimiser knows them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def stream(model: Transformer, dtype: Dtype | None = None, *, tied_twice: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) in layer order; dtype None keeps each parameter's own.

    One tensor at a time is gathered, already in dtype, from the master weights. Collective for a sharded model: every
    rank must exhaust it. Tensors of a plain model may be the parameters themselves: copy what should outlive a step.
    tied_twice yields a tied head under its own name too, as engines want it. Adapters are merged into their
    projections, in fp32 before dtype.
    """
    reshard(model)
    adapted = {f"{path}.weight": module for path, module in lora.adapted(model).items()}
    for name, p in lora.base_parameters(model):
        if module := adapted.get(name):
            whole = module.merged(*(whole_tensor(x.detach()) for x in (p, module.lora_a, module.lora_b)))
            whole = whole if dtype is None else whole.to(_dtype(dtype))
        else:
            whole = whole_tensor(p.detach() if dtype is None else p.detach().to(_dtype(dtype)))
        yield hf_name(name), whole
        if tied_twice and model.cfg.tied and hf_name(name) == EMBEDDING:
            yield HEAD, whole


def replaceable(folder: str | Path) -> Path:
    """The folder with links resolved, if save() may write there. UserError if it holds anything but an export."""
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and not (folder / SEAL).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not an export of ours ({SEAL} is missing); it will not be replaced")
    return folder


def save(
    folder: str | Path,
    cfg: ModelConfig,
    named: Iterable[tuple[str, Tensor]],
    *,
    dtype: Dtype,
    extra_files: str | Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a Hugging Face folder from stream()'s tensors. Collective: every rank calls it, rank 0 writes.

    Values are rounded to dtype, to nearest even; UserError names a tensor that has values beyond its range.
    An older export at the same place stays until the new one is whole; UserError for a folder that is not an export.
    extra_files: a folder whose KEPT files, as far as it has them, come along; texts: others, by name, on rank 0.
    """
    folder, many = replaceable(folder), dist.is_available() and dist.is_initialized()
    if many and dist.get_rank():
        for _ in named:
            pass
    else:
        tmp = fresh_folder(folder)
        files = _write_shards(tmp, named, _dtype(dtype))
        hashes = {file: digest(tmp / file) for file in files}
        write_json(tmp / SEAL, {"thinkmid": thinkmid.__version__, "sha256": hashes})
        source = Path(extra_files or tmp)
        if extra_files is not None:
            _keep(source, tmp)
        _write_configs(tmp, cfg, name_of(dtype), source)
        for name, text in (texts or {}).items():
            (tmp / name).write_text(text, encoding="utf-8")
        promote(tmp, folder)
    if many:
        dist.barrier()


def _keep(source: Path, tmp: Path) -> None:
    for path in (path for pattern in KEPT for path in source.glob(pattern) if path.is_file()):
        place = tmp / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def _write_configs(tmp: Path, cfg: ModelConfig, dtype: str, source: Path) -> None:
    """config.json, and generation_config.json where the source has none. Padding is as in the source."""
    was = source / "config.json"
    pad = {"pad_token_id": read_json(was).get("pad_token_id")} if was.is_file() else {}
    ids = {key: value for key, value in (token_ids(cfg) | pad).items() if value is not None}
    write_json(tmp / "config.json", config_dict(cfg) | ids | {"dtype": dtype, "torch_dtype": dtype})
    if not (tmp / "generation_config.json").exists():
        write_json(tmp / "generation_config.json", ids)


def _write_shards(tmp: Path, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> list[str]:
    """Write tensors to model*.safetensors as they come, one file in memory at a time; file names, index written too."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tmp, named, dtype):
        save_file(shard, tmp / f"{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(t.nbytes for t in shard.values())
    count = len(shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    for i, file in enumerate(files):
        (tmp / f"{i}").rename(tmp / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(tmp / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _shards(tmp: Path, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Group tensors, on the CPU and in dtype, into dicts of at most MAX_SHARD_BYTES, or of one tensor."""
    shard: dict[str, Tensor] = {}
    for name, tensor in named:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        _check_finite(tmp, name, tensor)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def fresh_folder(folder: Path) -> Path:
    """An empty folder.tmp. Puts back an older export that a crash left half renamed."""
    tmp, old = folder.with_name(folder.name + ".tmp"), _aside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (tmp, old):
        shutil.rmtree(left, ignore_errors=True)
    tmp.mkdir(parents=True)
    return tmp


def promote(tmp: Path, folder: Path) -> None:
    """Make tmp durable, then put it in folder's place."""
    for path in (*tmp.rglob("*"), tmp):
        fsync(path)
    swap_in(tmp, folder, _aside(folder))
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where an older export stands for the moment between two renames."""
    return folder.with_name(folder.name + ".replaced")


def name_of(dtype: Dtype) -> str:
    """Its name in DTYPES."""
    return str(_dtype(dtype)).removeprefix("torch.")


def _dtype(dtype: Dtype) -> torch.dtype:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype
