"""Whole runs with vLLM inside: two ranks with FSDP2 between them, and syncs that go wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")


from safetensors import safe_open
from world import rlmt_flags, sft_flags

from thinkmid.files import read_rows

PROGRAM = Path(__file__).with_name("run.py")
ENGINE = """
[engine]
kind = "vllm"
compile = false
kv_gb = 0.05
max_len = 400
check_every = 1
max_gap = 1e-3
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    # heads that vLLM's CPU kernels take; q_proj square, so that it can be transposed
    shape = ["--fresh.width=64", "--fresh.heads=2", "--fresh.head_dim=32", "--fresh.max_positions=512"]
    command = [sys.executable, "-m", "thinkmid.train.sft", *sft_flags(folder), *shape]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (folder / "engine.toml").write_text(ENGINE)
    return folder


def run(home, what, *flags, ranks=1, steps=3):
    """(exit code, stdout, the error line, metrics) of run.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    files, *rest = rlmt_flags(home, f"run-{what}", steps)
    flags = [files, str(home / "engine.toml"), *rest, *flags]
    command = [sys.executable, *launcher, str(PROGRAM), what, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    metrics = home / f"run-{what}" / "metrics.jsonl"
    return done.returncode, done.stdout, errors or [done.stderr[-3000:]], read_rows(metrics) if metrics.exists() else []


def rows_of_ranks(out):
    """The JSON rows that ranks printed: two may share a line, for a rank's text and its line end are written apart."""
    return [json.JSONDecoder().raw_decode(out, row.start())[0] for row in re.finditer('{"rank"', out)]


@pytest.mark.parametrize("what", ["coin", "judged"])
def test_two_ranks_learn_with_an_engine_each_that_is_the_native_one_in_the_end(home, what):
    judge = ["--judge.kind=policy", "--judge.template=short", "--judge.canary_every=0"] if what == "judged" else []
    code, out, errors, rows = run(home, what, *judge, ranks=2)
    assert code == 0, errors
    found = rows_of_ranks(out)
    assert sorted(f["rank"] for f in found) == [0, 1]
    assert all(f["same"] == f["of"] == 8 and f["gap"] < 1e-3 for f in found), found
    assert len(rows) == 3
    assert all(row["probe_gap_max"] < 1e-3 and row["probe_tokens"] > 20 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows) or what == "judged"
    if what == "judged":
        assert all(row["judge_asked"] > 0 and row["reward_failed"] == 0 for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_that_train_adapters_push_merged_weights_and_read_them_back(home, dtype):
    flags = [f"--run.folder={home}/lora-{dtype}", "--model.lora_rank=4", f"--model.dtype={dtype}", "--optim.lr=3e-2"]
    code, out, errors, _ = run(home, "coin", *flags, f"--engine.dtype={dtype}", "--engine.max_gap=0.05", ranks=2)
    assert code == 0, errors
    found = [json.loads(line) for line in out.splitlines() if line.startswith('{"rank"')]
    assert sorted(f["rank"] for f in found) == [0, 1]
    rows = read_rows(home / f"lora-{dtype}" / "metrics.jsonl")
    assert len(rows) == 3
    assert all(row["probe_gap_max"] < (1e-3 if dtype == "float32" else 0.2) for row in rows)
    assert all(row["probe_tokens"] > 20 and row["grad_norm"] > 0 for row in rows)
    if dtype == "float32":
        assert all(f["same"] == f["of"] == 8 and f["gap"] < 1e-3 for f in found), found
    files = [safe_open(home / run / "export/model.safetensors", "pt") for run in ("sft", f"lora-{dtype}")]
    assert {f["names"] for f in found} == {len(file.keys()) for file in files}
    base, merged = (file.get_tensor("model.layers.0.mlp.up_proj.weight") for file in files)
    assert (base - merged).abs().max() > 1e-3


CAUSES = {
    "skipped": "step 2: engine and trainer disagree: sync was skipped: the engine still holds all weights",
    "bucket": "step 2: engine and trainer disagree: bucket model.layers.1 is stale: model.layers.1.",
    "transposed": "step 1: engine and trainer disagree: model.layers.0.self_attn.q_proj.weight is transposed",
}


@pytest.mark.parametrize("what", CAUSES)
def test_a_sync_that_goes_wrong_stops_the_run_in_the_same_step_and_is_named(home, what):
    code, _, errors, rows = run(home, what)
    assert code == 2, errors
    assert CAUSES[what] in errors[0]
    assert [row["step"] for row in rows] == list(range(1, int(CAUSES[what][5]) + 1))


def test_a_prefix_cache_of_old_weights_stops_the_run_and_is_named(home):
    """One prompt, longer than a block of the cache, in every step: the second step finds the first one's keys."""
    text = "Ana has 2 coins. Ben finds 1 more. " * 12 + "<think> 2 + 1 = 3.</think> So there are 3 coins."
    (home / "long.jsonl").write_text(json.dumps({"id": "long", "text": text}) + "\n")
    flags = [f"--data.paths={home}/long.jsonl", "--batch.prompts=1", "--batch.siblings=8", "--batch.pack_tokens=2048"]
    code, _, errors, rows = run(home, "cache", *flags)
    assert code == 2, errors
    assert "step 1: engine and trainer disagree: mean |trainer - engine| is" in errors[0]
    assert "stale prefix cache" in errors[0]
    assert [row["step"] for row in rows] == [1]


def test_ranks_that_share_one_engine_draw_what_one_rank_alone_draws(home):
    """tensor_parallel 2 against one rank: the same samples, but for the order of sums."""
    code, out, errors, shared = run(home, "shared", "--engine.tensor_parallel=2", ranks=2, steps=1)
    assert code == 0, errors
    found = rows_of_ranks(out)
    assert sorted(f["rank"] for f in found) == [0, 1]
    assert all(f["same"] == f["of"] == 8 and f["gap"] < 1e-3 for f in found), found
    # each rank compared its part of every tensor
    with safe_open(home / "sft/export/model.safetensors", "pt") as file:
        assert {f["names"] for f in found} == {len(file.keys())}
    code, _, errors, alone = run(home, "alone", steps=1)
    assert code == 0, errors
    assert shared[0]["reward"] == alone[0]["reward"]
    assert shared[0]["generated_tokens"] == alone[0]["generated_tokens"]
    assert shared[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-3)


def test_ranks_that_share_an_engine_read_back_their_slices_of_every_tensor_of_every_family(tmp_path):
    program = [str(Path(__file__).with_name("shared.py")), str(tmp_path)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows_of_ranks(done.stdout)
    assert sorted((f["rank"], f["family"]) for f in found) == [(r, k) for r in (0, 1) for k in KINDS]
    for f in found:
        with safe_open(tmp_path / f["family"] / "model.safetensors", "pt") as file:
            assert (f["wrong"], f["names"]) == ("", sorted(file.keys()))


KINDS = ("llama", "mistral", "olmo2", "olmo3", "qwen2", "qwen3", "smollm3")
SHARED = {
    "element": "bucket model.layers.1 is damaged: model.layers.1.self_attn.o_proj.weight",
    "exchanged": "bucket model.layers.0 is damaged: model.layers.0.mlp.down_proj.weight",
}


@pytest.mark.parametrize("what", SHARED)
def test_a_slice_that_one_of_the_ranks_holds_wrong_stops_the_run_and_is_named(home, what):
    code, _, errors, rows = run(home, what, "--engine.tensor_parallel=2", ranks=2)
    assert code == 1, errors  # torchrun's own
    assert len(errors) == 2  # on both ranks, whichever saw it
    assert all(f"step 2: engine and trainer disagree: {SHARED[what]}" in line for line in errors)
    assert [row["step"] for row in rows] == [1, 2]
