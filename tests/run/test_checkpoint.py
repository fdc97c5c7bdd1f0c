import builtins
import errno
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import spawn
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thinkmid.errors import UserError
from thinkmid.run import checkpoint
from thinkmid.run.checkpoint import CheckpointError, latest, load, save


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(13, 5, generator=g)
    return {
        "fp32": noise,
        "bf16": torch.randn(7, 3, generator=g).to(torch.bfloat16),
        "step": torch.tensor(float(seed)),
        "rng": torch.randint(0, 256, (11,), dtype=torch.uint8, generator=g),  # odd, so what follows would be unaligned
        "columns": noise.double().t(),  # not contiguous
        "nan": torch.tensor([0x7FC00001, -0x400000, seed], dtype=torch.int32).view(torch.float32),  # payloads survive
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "id": torch.tensor([-(2**63), 2**63 - 1]),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and bits(a[n]) == bits(b[n]) for n in a)


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


def refuse(line: str) -> None:
    raise AssertionError(line)


def save_seed(root: Path, step: int, seed: int, keep: int = 9) -> Path:
    return save(root, step, make_tensors(seed), {"seed": seed, "lr": 0.1, "cursor": [3, None]}, keep=keep)


def load_seed(folder: Path) -> int:
    """Which seed's checkpoint this is; fails unless it is that one in every bit."""
    tensors = blank(make_tensors(0))
    state = load(folder, tensors)
    assert state == {"seed": state["seed"], "lr": 0.1, "cursor": [3, None]}
    assert same(tensors, make_tensors(state["seed"]))
    return state["seed"]


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    folder = save_seed(tmp_path / "run" / "checkpoints", 40, seed=3)
    assert folder == tmp_path / "run" / "checkpoints" / "step-000040"
    assert load_seed(folder) == 3
    assert same(load_file(folder / "rank-00000.safetensors"), {n: t for n, t in make_tensors(3).items() if t.numel()})


def test_every_tensor_in_a_file_is_aligned(tmp_path):
    data = (save_seed(tmp_path, 1, seed=1) / "rank-00000.safetensors").read_bytes()
    num_header = int.from_bytes(data[:8], "little")
    widths = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "U8": 1, "BOOL": 1}
    starts = [(e["data_offsets"][0], widths[e["dtype"]]) for e in json.loads(data[8 : 8 + num_header]).values()]
    assert len(starts) == 8
    assert all((8 + num_header + start) % width == 0 for start, width in starts)


def test_parameters_that_require_grad_are_filled_in_place(tmp_path):
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save(tmp_path, 1, dict(layer.named_parameters()), {}, keep=1)
    load(tmp_path / "step-000001", dict(other.named_parameters()))
    assert same(dict(other.named_parameters()), dict(layer.named_parameters()))


def test_without_checkpoints_there_is_no_latest(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-000012").write_text("a file")
    assert latest(tmp_path, warn=refuse) is None


def test_keep_deletes_only_older_checkpoints(tmp_path):
    others = ["step-7", "step-000002.bak", "my-step-000003", "notes.txt"]
    for name in others:
        (tmp_path / name).mkdir()
    for step in (1, 2, 3, 999_999, 1_000_000):
        save_seed(tmp_path, step, seed=step, keep=2)
    assert names(tmp_path) == sorted([*others, "step-999999", "step-1000000"])
    save_seed(tmp_path, 5, seed=5, keep=1)  # rewound: what came later is not older
    assert names(tmp_path) == sorted([*others, "step-000005", "step-999999", "step-1000000"])
    assert latest(tmp_path, warn=refuse) == tmp_path / "step-1000000"


def test_a_planted_symlink_is_neither_followed_nor_deleted_through(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    precious = save_seed(elsewhere, 1, seed=1)
    root.mkdir()
    for link in ("step-000001", ".tmp-step-000003", ".old-step-000004", "step-000003"):
        (root / link).symlink_to(precious)
    assert latest(root, warn=refuse) is None
    save_seed(root, 2, seed=2, keep=1)
    save_seed(root, 3, seed=3, keep=1)
    assert latest(root, warn=refuse) == root / "step-000003"
    assert load_seed(root / "step-000003") == 3
    assert not (root / "step-000003").is_symlink()
    assert (root / "step-000001").is_symlink()
    assert load_seed(precious) == 1


def test_one_flipped_bit_anywhere_and_the_older_checkpoint_is_used(tmp_path):
    old, new = save_seed(tmp_path, 1, seed=1), save_seed(tmp_path, 2, seed=2)
    for name in names(new):
        data = (new / name).read_bytes()
        for at in range(0, len(data), 1 + len(data) // 150):
            flipped = bytearray(data)
            flipped[at] ^= 1 << at % 8
            (new / name).write_bytes(flipped)
            lines = []
            assert latest(tmp_path, warn=lines.append) == old, (name, at)
            assert len(lines) == 1
            assert str(new / name) in lines[0]
        with pytest.raises(UserError, match=name):
            load(new, blank(make_tensors(0)))
        (new / name).write_bytes(data)
    assert latest(tmp_path, warn=refuse) == new


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-00000.safetensors"])
def test_a_truncated_or_missing_file_and_the_older_checkpoint_is_used(tmp_path, name):
    old, new = save_seed(tmp_path, 1, seed=1), save_seed(tmp_path, 2, seed=2)
    size = (new / name).stat().st_size
    for length in (size - 1, size // 2, 1, 0):
        os.truncate(new / name, length)
        assert latest(tmp_path, warn=lambda line: None) == old
    (new / name).unlink()
    lines = []
    assert latest(tmp_path, warn=lines.append) == old
    assert name in lines[0]


def test_a_renamed_checkpoint_and_the_older_one_is_used(tmp_path):
    old, new = save_seed(tmp_path, 1, seed=1), save_seed(tmp_path, 2, seed=2)
    new.rename(tmp_path / "step-000007")
    lines = []
    assert latest(tmp_path, warn=lines.append) == old
    assert lines == [
        f"warning: skipped a broken checkpoint: {tmp_path}/step-000007: its manifest says step 2; "
        "was it renamed from step-000002?"
    ]
    (tmp_path / "step-000007").rename(new)
    assert latest(tmp_path, warn=refuse) == new
    assert checkpoint.step(new) == 2


def forge(folder: Path, change) -> None:
    """Edits the manifest and seals it again, as whoever made the folder could."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest.pop("sha256")
    change(manifest)
    (folder / "manifest.json").write_bytes(checkpoint._seal(manifest))


def rename_file(name):
    return lambda m: m["files"].update({name: m["files"]["state.json"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_file("../state.json"), r"'\.\./state\.json'"),
        (rename_file("/etc/passwd"), "'/etc/passwd'"),
        (rename_file("sub/state.json"), "'sub/state.json'"),
        (rename_file("rank-00000.safetensors\n"), r"safetensors\\n"),
        (lambda m: m.update(format=2), "format 2"),
        (lambda m: m.update(step="1"), "step '1'"),
        (lambda m: m.update(step=-1), "step -1"),
        (lambda m: m.pop("tensors"), "'tensors'"),
        (lambda m: m["files"].pop("state.json"), "state.json"),
        (lambda m: m["files"]["state.json"].pop("bytes"), "state.json"),
        (lambda m: m["tensors"]["fp32"]["rows"].append(["rank-00000.safetensors", 0, 13]), "fp32"),
        (lambda m: m["tensors"]["fp32"].update(rows=[["rank-00000.safetensors", 1, 13]]), "fp32"),
        (lambda m: m["tensors"]["fp32"].update(rows=[["rank-00007.safetensors", 0, 13]]), "fp32"),
        (lambda m: m["tensors"].update(fp32=m["tensors"]["nan"]), "fp32"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, change, words):
    folder = save_seed(tmp_path, 1, seed=1)
    forge(folder, change)
    wanted = blank(make_tensors(0)) | ({"fp32": torch.zeros(3)} if "nan" in change.__code__.co_consts else {})
    with pytest.raises(UserError, match=words) as e:
        load(folder, wanted)
    assert str(folder) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-00000.safetensors"])
def test_links_and_fifos_in_place_of_files_are_refused(tmp_path, name):
    folder = save_seed(tmp_path, 1, seed=1)
    target = shutil.move(folder / name, tmp_path / "target")
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name}: not a plain file"):
        load(folder, blank(make_tensors(0)))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: not a plain file"):
        load(folder, blank(make_tensors(0)))


def test_names_shapes_and_dtypes_that_differ_are_named(tmp_path):
    folder = save_seed(tmp_path, 1, seed=1)
    wanted = blank(make_tensors(0))
    wanted |= {"more": torch.zeros(1), "fp32": torch.zeros(13, 6), "bf16": torch.zeros(7, 3), "step": torch.zeros(1)}
    del wanted["rng"]
    with pytest.raises(UserError) as e:
        load(folder, wanted)
    for words in (
        "more is missing",
        "rng is not wanted",
        "fp32 is F32 (13, 5), here F32 (13, 6)",
        "bf16 is BF16 (7, 3), here F32 (7, 3)",
        "step is F32 (), here F32 (1,)",
    ):
        assert words in str(e.value)
    assert not any(t.any() for t in wanted.values())  # nothing was filled


def watched(tick) -> dict:
    """os functions and `open` that call tick(name, path) first; a file's write does so twice, the second time torn."""

    def watch(name, real):
        def call(*args, **kwargs):
            tick(name, args[0])
            return real(*args, **kwargs)

        return call

    class File:
        def __init__(self, path, mode):
            tick("open", path)
            self.path, self.file = path, builtins.open(path, mode)  # noqa: SIM115

        def write(self, data):
            tick("write", self.path)
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            tick("write", self.path)
            self.file.write(data[len(data) // 2 :])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    steps = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")
    return {name: watch(name, getattr(os, name)) for name in steps}, File


def killed_at(k: int, work) -> bool:
    """Runs work() in a child that dies before its k-th step on the file system; whether it died."""
    pid = os.fork()
    if pid == 0:
        count = itertools.count(1)
        calls, checkpoint.open = watched(lambda *_: next(count) == k and os._exit(9))
        vars(os).update(calls)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), f"step {k}: exit code {code}"
    return code == 9


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step that exists"])
def test_killed_anywhere_in_a_save_the_old_or_the_new_is_whole(tmp_path, step):
    before = tmp_path / "before"
    save_seed(before, 1, seed=1, keep=2)
    save_seed(before, 2, seed=2, keep=2)
    seen, k = set(), 0
    while True:
        k += 1
        root = tmp_path / f"{k}"
        shutil.copytree(before, root)
        if not killed_at(k, lambda root=root: save_seed(root, step, seed=7, keep=2)):
            break
        found = load_seed(latest(root, warn=refuse))
        assert found in (2, 7), f"killed at step {k}"
        seen.add(found)
        for folder in root.glob("step-*"):
            load_seed(folder)
        assert save_seed(root, 4, seed=4, keep=2) == latest(root, warn=refuse)
        assert names(root)[-1] == "step-000004"
        assert all(name.startswith("step-") for name in names(root)), names(root)
    assert load_seed(latest(root, warn=refuse)) == 7
    assert seen == {2, 7}
    assert k > 25, "the kills did not reach the save's steps"


def test_every_byte_is_on_disk_before_the_rename_that_shows_it(tmp_path, monkeypatch):
    dirty, renames = set(), []

    def tick(name, path):
        if name == "fsync":
            dirty.discard(os.readlink(f"/proc/self/fd/{path}"))
        elif name in ("write", "mkdir"):
            dirty.update((str(path), str(Path(path).parent)))
        elif name in ("rename", "replace"):
            renames.append((str(path), sorted(d for d in dirty if d.startswith(str(path)))))
            dirty.add(str(tmp_path))

    calls, opener = watched(tick)
    monkeypatch.setattr(checkpoint, "open", opener, raising=False)
    for name, call in calls.items():
        monkeypatch.setattr(os, name, call)
    save_seed(tmp_path, 1, seed=1)
    assert str(tmp_path) not in dirty, "the rename itself may be lost"
    assert [Path(path).name for path, _ in renames] == [".tmp-step-000001"]
    assert all(unsynced == [] for _, unsynced in renames)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(small_disk):
    save_seed(small_disk, 1, seed=1, keep=1)
    with pytest.raises(CheckpointError, match=r"step 2 is not saved: .*No space left.*rank-00000.safetensors") as e:
        save(small_disk, 2, {"big": torch.zeros(1 << 20)}, {}, keep=1)
    assert "\n" not in str(e.value)
    assert names(small_disk) == ["step-000001"]
    assert load_seed(latest(small_disk, warn=refuse)) == 1
    save_seed(small_disk, 3, seed=3, keep=1)  # and training goes on
    assert names(small_disk) == ["step-000003"]


def test_an_error_at_any_step_of_a_save_costs_at_most_that_save(tmp_path, monkeypatch):
    before = tmp_path / "before"
    save_seed(before, 1, seed=1)
    save_seed(before, 2, seed=2)
    for k in itertools.count(1):
        root = tmp_path / f"{k}"
        shutil.copytree(before, root)
        count = itertools.count(1)

        def fail_kth(*_, count=count, k=k):
            if next(count) == k:
                raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            calls, opener = watched(fail_kth)
            patch.setattr(checkpoint, "open", opener, raising=False)
            for name, call in calls.items():
                patch.setattr(os, name, call)
            try:
                save_seed(root, 2, seed=7, keep=1)
                saved = True
            except CheckpointError:
                saved = False
            if next(count) <= k:
                break
        assert load_seed(latest(root, warn=refuse)) in ((7,) if saved else (2, 7))
        assert not list(root.glob(".old-*"))
        assert save_seed(root, 4, seed=4, keep=1) == latest(root, warn=refuse)
        assert names(root) == ["step-000004"]
    assert saved
    assert names(root) == ["step-000002"]
    assert k > 25, "the errors did not reach the save's steps"


def test_a_bug_is_not_dressed_as_a_failed_disk(tmp_path):
    with pytest.raises(KeyError, match="complex64"):
        save(tmp_path, 1, {"x": torch.zeros(2, dtype=torch.complex64)}, {}, keep=1)
    with pytest.raises(TypeError, match="set"):
        save(tmp_path, 1, {}, {"x": {1}}, keep=1)
    assert names(tmp_path) == []


def run_rank(rank: int, folder: Path, turns: list) -> None:
    """Work by work in a world of its own size; whoever has no part in one waits for the next."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for turn, (world, work, *args) in enumerate(turns):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{turn}", rank=rank, world_size=world)
            work(rank, *args)
            dist.barrier()
            dist.destroy_process_group()


def make_sharded(mesh, seed: int) -> dict[str, torch.Tensor]:
    """Parameters and Adam moments of 7, 3 and 1 rows, after one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1))
    if mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optim = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 5)).square().sum().backward()
    optim.step()
    tensors = dict(model.named_parameters())
    for name, p in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optim.state[p].items()}
    return tensors | {"rng": torch.arange(5, dtype=torch.uint8)}


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
    return {n: t.detach().numpy() for n, t in full.items()}


def equal(tensors: dict[str, torch.Tensor], truth: Path) -> bool:
    ours, theirs = whole(tensors), np.load(truth)
    return set(ours) == set(theirs.files) and all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)


def save_on_two(rank: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensors = make_sharded(mesh, seed=1)
    full = whole(tensors)
    if rank == 0:
        np.savez(root / "truth.npz", **full)
    folder = save(root, 1, tensors, {"of": f"rank {rank}"}, keep=5)

    again = make_sharded(mesh, seed=2)
    assert not equal(again, root / "truth.npz")
    assert load(folder, again) == {"of": "rank 0"}
    assert equal(again, root / "truth.npz")

    fail_on_one(rank, root, again)
    skip_on_two(rank, root, again)


def fail_on_one(rank: int, root: Path, tensors: dict) -> None:
    real = os.fsync

    def full_disk(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    os.fsync = full_disk if rank == 1 else real
    with pytest.raises(CheckpointError, match=r"step 2 is not saved: .*No space left on device.*rank-00001"):
        save(root, 2, tensors, {}, keep=1)
    os.fsync = real
    wrong = tensors | ({"rng": torch.zeros(5, dtype=torch.complex64), "w": tensors["0.weight"].cfloat()})
    with pytest.raises(KeyError if rank == 1 else CheckpointError, match="complex64"):
        save(root, 2, wrong if rank == 1 else tensors, {}, keep=1)
    dist.barrier()
    assert names(root) == ["step-000001", "truth.npz"]


def skip_on_two(rank: int, root: Path, tensors: dict) -> None:
    for step in (2, 3):
        save(root, step, tensors, {}, keep=5)
    if rank == 0:
        shard = root / "step-000003" / "rank-00001.safetensors"
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    lines = []
    assert latest(root, warn=lines.append) == root / "step-000002"
    assert ["rank-00001" in line for line in lines] == ([True] if rank == 0 else [])
    with pytest.raises(UserError, match="rank-00001"):
        load(root / "step-000003", tensors)
    with pytest.raises(UserError, match="more is missing"):
        load(root / "step-000002", tensors | {"more": torch.zeros(1)})
    assert equal(tensors, root / "truth.npz")


def load_on_more(rank: int, mesh_shape: tuple, root: Path) -> None:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    tensors = make_sharded(mesh, seed=2)
    assert load(root / "step-000001", tensors) == {"of": "rank 0"}
    assert equal(tensors, root / "truth.npz")
    save(root, 100 + len(mesh_shape), tensors, {}, keep=9)


def test_saved_on_two_ranks_it_resumes_bitwise_on_any_number(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    turns = [(2, save_on_two, root), (3, load_on_more, (3,), root), (4, load_on_more, (2, 2), root)]
    spawn(run_rank, 4, tmp_path, turns)
    for step in (1, 2, 101, 102):  # of two ranks twice, three, and two by two
        tensors = make_sharded(None, seed=3)
        load(root / f"step-{step:06d}", tensors)
        assert equal(tensors, root / "truth.npz"), step
    sizes = [f.stat().st_size for f in sorted((root / "step-000102").glob("rank-*"))]
    assert sizes[2] < 100, "a replica is not written twice"
