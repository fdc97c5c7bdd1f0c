"""Runs that train adapters: what they export, what reads it, what they are refused."""

import json
import shutil

import pytest
import torch
from conftest import exit_code
from safetensors.torch import load_file
from world import rlmt_flags, sft_flags

from thinkmid import sample
from thinkmid.train import rlmt, sft

RANK, ALPHA = 3, 6.0
LORA = [f"--model.lora_rank={RANK}", f"--model.lora_alpha={ALPHA}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and on it a run of SFT with adapters, exported in both ways."""
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, [*sft_flags(folder), "--fresh.max_positions=64"]) == 0
    assert exit_code(sft, lora_flags(folder)) == 0
    (folder / "lora/export").rename(folder / "merged")
    # a finished run may be exported again in the other way
    assert exit_code(sft, [*lora_flags(folder), "--export.lora=adapter"]) == 0
    return folder


def lora_flags(folder, name="lora"):
    return [*sft_flags(folder), f"--model.folder={folder}/sft/export", f"--run.folder={folder}/{name}", *LORA]


def refused(capsys, program, argv) -> str:
    capsys.readouterr()
    assert exit_code(program, argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_the_merged_export_is_the_base_and_the_products_of_the_exported_factors(home):
    base, merged = (load_file(home / name / "model.safetensors") for name in ("sft/export", "merged"))
    factors = load_file(home / "lora/export/adapter_model.safetensors")
    config = json.loads((home / "lora/export/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert base.keys() == merged.keys()
    products = {}
    for name in (n for n in factors if n.endswith("lora_A.weight")):
        a, b = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
        products[name.removeprefix("base_model.model.").replace("lora_A.", "")] = ALPHA / RANK * b @ a
    assert len(products) == 2 * 7
    for name, whole in merged.items():
        if name in products:
            assert products[name].abs().max() > 1e-4
            torch.testing.assert_close(whole.double(), base[name].double() + products[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(whole, base[name])


def test_the_next_stage_and_a_sample_read_the_merged_export(home, capsys):
    flags = [*rlmt_flags(home, "next", steps=1), f"--model.folder={home}/merged"]
    assert exit_code(rlmt, flags) == 0
    assert exit_code(sample, [str(home / "merged"), "Ana has 2 coins.", "--max-think=4", "--max-suffix=4"]) == 0
    assert "thought (" in capsys.readouterr().out


def test_a_folder_of_adapters_is_named_where_a_model_is_read(home, capsys):
    said = refused(capsys, rlmt, [*rlmt_flags(home, "wrong"), f"--model.folder={home}/lora/export"])
    assert f"{home}/lora/export: holds adapters and no model; export.lora 'merged'" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainer_and_engine_agree_to_rounding_at_every_step(home, capsys, dtype):
    kind = [f"--model.dtype={dtype}", f"--engine.dtype={dtype}", "--engine.check_every=1", "--engine.max_gap=0.05"]
    flags = [*rlmt_flags(home, f"agree-{dtype}", steps=3), *kind, *LORA, "--loss.kl=0.1", "--reward.gain=1"]
    assert exit_code(rlmt, [*flags, "--reward.scorer=policy", "--reward.baseline=frozen"]) == 0
    rows = [json.loads(line) for line in (home / f"agree-{dtype}/metrics.jsonl").read_text().splitlines()]
    assert all(row["probe_tokens"] > 20 and row["grad_norm"] > 0 for row in rows)
    assert all(row["probe_gap_max"] < (1e-5 if dtype == "float32" else 0.05) for row in rows)
    factors = load_file(home / "lora/export/adapter_model.safetensors").values()
    whole = load_file(home / "merged/model.safetensors").values()
    trained, frozen = (sum(x.numel() for x in tensors) for tensors in (factors, whole))
    assert f"adapters: {trained:,} numbers are trained, {frozen:,} are frozen in {dtype}" in capsys.readouterr().out
    # the reference is the base: no adapter is off zero before the first update
    assert abs(rows[0]["kl"]) < 1e-12
    assert rows[-1]["kl"] > 1e-9


def test_other_adapters_are_another_run(home, capsys, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    said = refused(capsys, sft, [*lora_flags(tmp_path / "home"), "--model.lora_alpha=5"])
    assert "model.lora_alpha = 6.0, now 5.0" in said


@pytest.mark.parametrize(
    ("program", "flags", "named"),
    [
        (sft, ["--model.folder=", *LORA], "model.lora_rank needs model.folder"),
        (sft, ["--export.lora=adapter"], "export.lora 'adapter' needs model.lora_rank"),
        (rlmt, ["--export.lora=adapter"], "export.lora 'adapter' needs model.lora_rank"),
        (rlmt, [*LORA, "--reward.gain=1", "--reward.baseline=ema"], "model.lora_rank with reward.scorer or baseline"),
        (rlmt, [*LORA, "--model.lora_targets=q_proj,head"], "or 'down_proj', got 'head'"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(home, capsys, program, flags, named):
    argv = [*sft_flags(home), f"--run.folder={home}/no"] if program is sft else rlmt_flags(home, "no")
    assert named in refused(capsys, program, [*argv, *flags])
    assert not (home / "no").exists()
