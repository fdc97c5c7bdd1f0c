"""Crash-safe checkpoints: named tensors with a JSON-able state, whole or absent.

    root/step-000040/rank-00000.safetensors   the rows that rank 0 holds, of every tensor
                     state.json
                     manifest.json            written last: size and hash of the others, which rows lie in which file

The folder is written under another name and appears by one rename, so what is called step-* is complete.
One job at a time saves to a root; others may read it meanwhile. Nothing that is read can run code.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinkmid.errors import UserError
from thinkmid.files import digest, fsync, swap_in
from thinkmid.model.weights import local_rows

State = dict[str, Any]  # what JSON holds
_FORMAT = 1
_STEP = re.compile(r"step-([0-9]{6,})")
_STEP_OR_OLD = re.compile(r"(?:\.old-)?step-([0-9]{6,})")
_UNFINISHED = re.compile(r"\.(tmp|old)-(step-[0-9]{6,})")
_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors|state\.json")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint could not be written, or older ones not deleted. The others are whole; training can continue."""


def save(root: str | Path, step: int, tensors: dict[str, Tensor], state: State, *, keep: int) -> Path:
    """Writes root/step-000040 and deletes all but the newest `keep` up to this step; collective, returns the folder.

    A DTensor (Shard(0) or Replicate on each mesh dimension, uneven and empty shards too) is saved by the ranks that
    hold it; plain tensors and `state` are taken from rank 0. `state` comes back as JSON gives it: tuples as lists.
    A step that exists is replaced once the new folder is complete. CheckpointError on every rank if any rank failed.
    """
    assert keep >= 1, f"keep is {keep}"
    root = Path(root)
    final, tmp = root / f"step-{step:06d}", root / f".tmp-step-{step:06d}"
    lost = f"checkpoint of step {step} is not saved: "
    try:
        state_json = _on_first(CheckpointError, lost, json.dumps, state)
        _on_first(CheckpointError, lost, _begin, tmp)
        reports = _on_all(CheckpointError, lost, _write_shard, tmp, tensors)
        _on_first(CheckpointError, lost, _publish, tmp, final, step, tensors, state_json, reports)
    except Exception:
        if _rank_world()[0] == 0:
            with contextlib.suppress(OSError):  # the next save sweeps again
                _sweep(root)
        raise
    _on_first(CheckpointError, f"{final} is saved, but older ones stay: ", _prune, root, step, keep)
    return final


def latest(root: str | Path, *, warn: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint folder whose every byte agrees with its manifest; None if there is none.

    Collective: the ranks share the hashing and return the same. `warn` gets a line for each folder skipped, on rank 0.
    Changes nothing on disk. After a crash while a step was replaced, its old folder may still be called .old-step-*.
    """
    folders: list[tuple[int, Path]] = _on_first(UserError, "", _step_folders, Path(root), _STEP_OR_OLD)
    for number, folder in folders:
        try:
            _on_first(UserError, "", _check_step, folder, number)
            _on_all(UserError, "", _check_files, folder)
            return folder
        except UserError as reason:
            if _rank_world()[0] == 0:
                warn(f"warning: skipped a broken checkpoint: {reason}")
    return None


def step(folder: str | Path) -> int:
    """The step of a checkpoint, whatever its folder is called."""
    return int(_read_manifest(Path(folder))["step"])


def load(folder: str | Path, tensors: dict[str, Tensor], *, verified: bool = False) -> State:
    """Fills `tensors` in place, bit by bit as saved by however many ranks, and returns the state; collective.

    Each rank reads its own rows only. UserError, the same on every rank, if a byte differs from the manifest, a name is
    missing or not wanted, a shape or dtype differs, or a file is not a plain one in this folder. verified: the folder
    comes from latest(), which has just compared the bytes.
    """
    folder = Path(folder)
    if not verified:
        _on_all(UserError, "", _check_files, folder)
    _on_all(UserError, "", _fill, folder, tensors)
    state: State = json.loads((folder / "state.json").read_bytes())
    return state


# The ranks agree: whatever one of them meets, all return or all raise.


def _rank_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _on_all(error: type[Exception], lead: str, work: Callable[..., Any], *args: Any) -> list[Any]:
    """[work(*args) of each rank]; if it failed on any, `error` with the first reason on every rank."""
    result = caught = None
    try:
        result = work(*args)
    except Exception as e:  # a bug too: the other ranks already wait for our answer
        caught = e
    answers = [(result, None if caught is None else str(caught) or repr(caught))]
    if dist.is_initialized():
        answers *= dist.get_world_size()
        dist.all_gather_object(answers, answers[0])
    if caught is not None and not isinstance(caught, OSError | UserError | SafetensorError):
        raise caught
    for _, reason in answers:
        if reason is not None:
            raise error(lead + reason) from caught
    return [result for result, _ in answers]


def _on_first(error: type[Exception], lead: str, work: Callable[..., Any], *args: Any) -> Any:
    """work(*args) of rank 0, on every rank; if it failed, `error` on every rank."""
    return _on_all(error, lead, work if _rank_world()[0] == 0 else lambda *_: None, *args)[0]


# Rows: where a tensor's lie, here and on disk. A 0-dim tensor counts as one row.


def _num_rows(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) else 1


def _span(tensor: Tensor) -> tuple[Tensor, int, int]:
    """This rank's part of a tensor, its first row and the row after its last."""
    local, first = local_rows(tensor)
    return local, first, first + _num_rows(local.shape)


def _saved_here(tensor: Tensor) -> bool:
    """Whether this rank saves its part: of ranks that hold the same rows, only the first does."""
    if not isinstance(tensor, DTensor):
        return _rank_world()[0] == 0
    at = tensor.device_mesh.get_coordinate()
    return at is not None and all(c == 0 for c, p in zip(at, tensor.placements, strict=True) if p.is_replicate())


def _covered(shape: Sequence[int], pieces: list[Any]) -> bool:
    """Whether [file, first row, row after the last] pieces, in order, are exactly the rows of a tensor."""
    edges = [0, *(stop for _, _, stop in pieces)]
    whole = all(start == edge < stop for edge, (_, start, stop) in zip(edges, pieces, strict=False))
    return whole and edges[-1] == _num_rows(shape)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file through to the disk; its size and hash."""
    hashed, size = hashlib.sha256(), 0
    try:
        with open(path, "xb") as f:
            for chunk in chunks:
                f.write(chunk)
                hashed.update(chunk)
                size += len(chunk)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e  # write and fsync do not name the file
    return {"bytes": size, "sha256": hashed.hexdigest()}


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; one tensor at a time is copied to the host, so a shard needs no second home."""
    # wide dtypes first, as readers want each tensor aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        # a copy on the host too: numpy would take hold of the storage, and moments could not leave theirs any more
        yield tensor.detach().to("cpu", copy=True).reshape(-1).view(torch.uint8).numpy().data


def _begin(tmp: Path) -> None:
    tmp.parent.mkdir(parents=True, exist_ok=True)
    _sweep(tmp.parent)
    tmp.mkdir()


def _write_shard(tmp: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes this rank's rows; the file's name, size, hash and {tensor: (first row, row after the last)}."""
    mine, rows = {}, {}
    for name, tensor in tensors.items():
        local, first, last = _span(tensor)
        if first < last and _saved_here(tensor):
            mine[name], rows[name] = local, (first, last)
    file = f"rank-{_rank_world()[0]:05d}.safetensors"
    return {"file": file, "rows": rows, "entry": _write(tmp / file, _safetensors(mine))}


def _seal(manifest: State) -> bytes:
    """The manifest's bytes, with their own hash: a flipped bit in a shape must not pass either."""
    own = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": own}).encode()


def _publish(
    tmp: Path, final: Path, step: int, tensors: dict[str, Tensor], state_json: str, reports: list[State]
) -> None:
    files = {r["file"]: r["entry"] for r in reports}
    for file, entry in files.items():
        if (tmp / file).stat().st_size != entry["bytes"]:
            raise OSError(f"{tmp / file} is not what its rank wrote: do all ranks share this folder?")
    files["state.json"] = _write(tmp / "state.json", [state_json.encode()])
    manifest: State = {"format": _FORMAT, "step": step, "world": len(reports), "files": files, "tensors": {}}
    for name, tensor in tensors.items():
        pieces = sorted(([r["file"], *r["rows"][name]] for r in reports if name in r["rows"]), key=lambda p: p[1])
        assert _covered(tensor.shape, pieces), f"{name} {tuple(tensor.shape)} is not covered by {pieces}"
        manifest["tensors"][name] = {"shape": list(tensor.shape), "dtype": _DTYPES[tensor.dtype], "rows": pieces}
    _write(tmp / "manifest.json", [_seal(manifest)])
    fsync(tmp)
    old = final.with_name(f".old-{final.name}")
    swap_in(tmp, final, old)  # killed between its renames, `latest` finds the old one aside
    _remove(old)


def _remove(path: Path) -> None:
    """Deletes a folder without following symlinks; of a symlink, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    """Deletes what an interrupted save left behind; a folder moved aside goes back if its successor never came."""
    for path in list(root.iterdir()):
        if match := _UNFINISHED.fullmatch(path.name):
            kind, name = match.groups()
            if kind == "old" and not os.path.lexists(root / name):
                os.rename(path, root / name)
            else:
                _remove(path)


def _prune(root: Path, step: int, keep: int) -> None:
    """Keeps this step and keep - 1 older; newer ones, of a run that was rewound, are not ours to judge."""
    older = [folder for number, folder in _step_folders(root, _STEP) if number < step]
    for folder in older[keep - 1 :]:
        doomed = folder.with_name(f".tmp-{folder.name}")
        os.rename(folder, doomed)  # never a half-deleted step-*
        _remove(doomed)


def _step_folders(root: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """(step, folder), newest first; a symlink is no checkpoint. Names break ties: step-* before .old-step-*."""
    paths = root.iterdir() if root.is_dir() else ()
    matches = [(pattern.fullmatch(path.name), path) for path in paths if not path.is_symlink()]
    return sorted(((int(m[1]), path) for m, path in matches if m and path.is_dir()), reverse=True)


def _plain(path: Path) -> Path:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UserError(f"{path}: not a plain file")
    return path


def _read_manifest(folder: Path) -> State:
    path = _plain(folder / "manifest.json")
    raw = path.read_bytes()
    try:
        manifest: State = json.loads(raw)
        _check_manifest(manifest, raw)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: damaged: {e!r}") from e
    return manifest


def _check_manifest(manifest: State, raw: bytes) -> None:
    """UserError, or Python's own error for a missing key, unless the rest of this file may rely on every field."""
    if _seal({k: v for k, v in manifest.items() if k != "sha256"}) != raw:
        raise UserError("its bytes changed since it was saved")
    if manifest["format"] != _FORMAT:
        raise UserError(f"format {manifest['format']!r}, this thinkmid reads {_FORMAT}")
    if type(manifest["step"]) is not int or manifest["step"] < 0:
        raise UserError(f"step {manifest['step']!r} is no step")
    for name, entry in manifest["files"].items():
        if not _FILE.fullmatch(name) or entry.keys() != {"bytes", "sha256"}:
            raise UserError(f"{name!r} is not a file of a checkpoint")
    shards = manifest["files"].keys() - {"state.json"}
    for name, entry in manifest["tensors"].items():
        if entry.keys() != {"shape", "dtype", "rows"} or not _covered(entry["shape"], entry["rows"]):
            raise UserError(f"the rows of {name} are not all there")
        if not {file for file, _, _ in entry["rows"]} <= shards:
            raise UserError(f"{name} lies in no file of this checkpoint")
    if "state.json" not in manifest["files"]:
        raise UserError("no state.json")


def _check_step(folder: Path, named: int) -> None:
    """UserError where a folder was renamed: a run would resume at another step than its weights are of."""
    if named != (saved := step(folder)):
        raise UserError(f"{folder}: its manifest says step {saved}; was it renamed from step-{saved:06d}?")


def _check_files(folder: Path) -> None:
    """Compares files with the manifest, each on one rank; UserError at the first that differs."""
    rank, world = _rank_world()
    files = _read_manifest(folder)["files"]
    for name in sorted(files)[rank::world]:
        path, entry = _plain(folder / name), files[name]
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if digest(path) != entry["sha256"]:
            raise UserError(f"{path}: its bytes changed since it was saved")


def _check_names(folder: Path, saved: dict[str, State], tensors: dict[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in tensors if name not in saved]
    faults += [f"{name} is not wanted here" for name in saved if name not in tensors]
    for name in saved.keys() & tensors.keys():
        there = (saved[name]["dtype"], tuple(saved[name]["shape"]))
        here = (_DTYPES[tensors[name].dtype], tuple(tensors[name].shape))
        if there != here:
            faults.append(f"{name} is {there[0]} {there[1]}, here {here[0]} {here[1]}")
    if faults:
        more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
        raise UserError(f"{folder}: " + "; ".join(faults[:8]) + more)


@torch.no_grad()
def _fill(folder: Path, tensors: dict[str, Tensor]) -> None:
    manifest = _read_manifest(folder)
    saved = manifest["tensors"]
    _check_names(folder, saved, tensors)
    with contextlib.ExitStack() as stack:
        names = [name for name in manifest["files"] if name != "state.json"]
        shards = {name: stack.enter_context(safe_open(folder / name, framework="pt")) for name in names}
        for name, tensor in tensors.items():
            local, first, last = _span(tensor)
            for file, start, stop in saved[name]["rows"]:
                a, b = max(first, start), min(last, stop)
                if a >= b:
                    continue
                source = shards[file].get_slice(name)
                shape = [stop - start, *saved[name]["shape"][1:]] if local.dim() else []
                if (source.get_dtype(), list(source.get_shape())) != (saved[name]["dtype"], shape):
                    raise UserError(f"{folder / file}: {name} is not what the manifest says")
                if local.dim() == 0:
                    local.copy_(shards[file].get_tensor(name))
                else:
                    local[a - first : b - first].copy_(source[a - start : b - start])
