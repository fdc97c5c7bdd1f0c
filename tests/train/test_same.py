"""A run resumes as what it began as: what was exchanged is refused, what only moved is not, what changes is said."""

import json
import math
import os
import shutil

import pytest
from conftest import exit_code
from safetensors.torch import load_file, save_file
from world import rlmt_flags, sft_flags

from thinkmid.model import weight_files, weights
from thinkmid.train import rlmt, rlpt, sft, supervised
from thinkmid.train.loss import logprobs


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A corpus, an SFT run of two steps, and an RLMT run of two steps with KL to where it started."""
    folder = tmp_path_factory.mktemp("origin")
    assert exit_code(sft, [*sft_flags(folder), "--optim.schedule=cosine"]) == 0
    assert exit_code(rlmt, [*rlmt_flags(folder, "kl", steps=2), "--loss.kl=0.1"]) == 0
    return folder


@pytest.fixture
def home(origin, tmp_path):
    """A copy, so all that the runs read has moved."""
    shutil.copytree(origin, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def call(capsys):
    """Runs a program: (exit code, lines of stdout, stderr)."""

    def call(program, argv):
        capsys.readouterr()
        code = exit_code(program, argv)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def sft_argv(home, *flags):
    return [*sft_flags(home), "--optim.schedule=cosine", *flags]


def kl_argv(home, *flags):
    return [*rlmt_flags(home, "kl", steps=3), "--loss.kl=0.1", *flags]


def edit_weights(folder, sealed):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if sealed:
        seal = json.loads((folder / "thinkmid.json").read_text())
        seal["sha256"] = {"model.safetensors": weight_files.digest(folder / "model.safetensors")}
        (folder / "thinkmid.json").write_text(json.dumps(seal))
    else:
        (folder / "thinkmid.json").unlink()


@pytest.mark.parametrize("sealed", [True, False])
def test_a_frozen_model_exchanged_under_a_run_is_refused(home, call, sealed):
    model = home / "sft" / "export"
    edit_weights(model, sealed)
    line = f"error: {model}: not the weights that this run began with; --run.fresh starts over\n"
    assert call(rlmt, kl_argv(home))[::2] == (2, line)
    # without a frozen model only the checkpoint's weights count
    assert exit_code(rlmt, rlmt_flags(home, "free", steps=1)) == 0
    edit_weights(model, False) if sealed else None
    assert exit_code(rlmt, rlmt_flags(home, "free", steps=2)) == 0


def test_a_frozen_model_that_moved_is_the_same(home, call):
    os.rename(home / "sft" / "export", home / "elsewhere")
    (home / "elsewhere" / "thinkmid.json").unlink()  # hashed then, and found equal
    code, _, err = call(rlmt, kl_argv(home, f"--model.folder={home}/elsewhere"))
    assert (code, err) == (0, "")


def test_another_start_is_refused_and_the_same_one_elsewhere_is_not(home, call):
    """Of a run that reads its weights no more. What it began with is known by the export's seal."""
    argv = rlmt_flags(home, "free", steps=1)
    assert call(rlmt, argv)[0] == 0
    for name in ("other", "moved"):
        shutil.copytree(home / "sft" / "export", home / name)
    edit_weights(home / "other", sealed=True)
    line = f"error: {home}/other: not the weights that this run began with; --run.fresh starts over\n"
    argv = [*rlmt_flags(home, "free", steps=2)]
    assert call(rlmt, [*argv, f"--model.folder={home}/other"])[::2] == (2, line)
    assert call(rlmt, [*argv, f"--model.folder={home}/moved"])[::2] == (0, "")
    # without a seal at the start nobody knows
    (home / "moved" / "thinkmid.json").unlink()
    argv = [*rlmt_flags(home, "bare", steps=2), f"--model.folder={home}/moved"]
    assert call(rlmt, argv)[0] == 0
    code, _, err = call(rlmt, [*argv, f"--model.folder={home}/sft/export"])
    assert (code, "sft/export: not the weights that this run began with" in err) == (2, True)


def test_no_weights_are_hashed_for_a_run_without_a_frozen_model(home, monkeypatch):
    read, of_file = [], weight_files.digest
    for module in (weight_files, weights):
        monkeypatch.setattr(module, "digest", lambda path: read.append(path.parent.name) or of_file(path))
    assert exit_code(rlmt, rlmt_flags(home, "free", steps=1)) == 0
    assert read == ["export", "export.tmp"]  # compared with its seal, and sealed
    (home / "sft" / "export" / "thinkmid.json").unlink()
    assert exit_code(rlmt, rlmt_flags(home, "bare", steps=1)) == 0
    assert exit_code(rlmt, rlmt_flags(home, "bare", steps=2)) == 0
    assert read[2:] == ["export.tmp"] * 2


def test_another_shape_of_the_same_parameters_is_refused(home, call):
    path = home / "sft" / "export" / "config.json"
    told = json.loads(path.read_text())
    told["rope_theta"] = told["rope_parameters"]["rope_theta"] = 7.0
    path.write_text(json.dumps(told))
    line = f"error: {path.parent}: not the config.json that this run began with; --run.fresh starts over\n"
    assert call(rlmt, kl_argv(home))[::2] == (2, line)


def test_a_longer_schedule_is_said_with_both_lengths_and_an_equal_one_not(home, call):
    code, out, _ = call(sft, sft_argv(home))
    assert (code, [line for line in out if line.startswith("warning")]) == (0, [])
    assert "nothing is left to do: 2 steps are done, the run has 2" in out
    said = [line for line in call(sft, sft_argv(home, "--run.steps=4"))[1] if line.startswith("warning")]
    assert said == ["warning: schedule 'cosine' over 4 steps; it began over 2"]
    _, out, _ = call(sft, sft_argv(home, "--run.steps=0", "--data.epochs=2"))
    said = [line for line in out if line.startswith("warning")]
    assert said == ["warning: schedule 'cosine' over 6 steps; it began over 4"]


def test_a_run_whose_steps_were_lowered_is_done(home, call):
    code, out, _ = call(rlmt, [*rlmt_flags(home, "kl", steps=1), "--loss.kl=0.1"])
    assert (code, "nothing is left to do: 2 steps are done, the run has 1" in out) == (0, True)


@pytest.mark.parametrize("length", ["--data.epochs=1", "--data.tokens=900"])
def test_a_run_by_epochs_or_tokens_is_found_done_and_resumed(home, call, length):
    argv = sft_argv(home, "--run.steps=0", f"--run.folder={home}/run", length)
    assert call(sft, argv)[0] == 0
    rows = (home / "run" / "metrics.jsonl").read_bytes()
    config = (home / "run" / "config.toml").read_text()
    code, out, _ = call(sft, argv)
    assert (code, any(line.startswith("nothing is left to do: ") for line in out)) == (0, True)
    assert (home / "run" / "metrics.jsonl").read_bytes() == rows
    assert length.partition(".")[2].replace("=", " = ").removesuffix("1") in config.replace(".0", "")


def test_a_renamed_checkpoint_is_not_resumed_from(home, call):
    checkpoints = home / "sft" / "checkpoints"
    os.rename(checkpoints / "step-000002", checkpoints / "step-000007")
    code, out, err = call(sft, sft_argv(home, "--run.steps=9"))
    assert code == 2
    assert [line for line in out if "renamed" in line] == [
        f"warning: skipped a broken checkpoint: {checkpoints}/step-000007: its manifest says step 2; "
        "was it renamed from step-000002?"
    ]
    assert err == f"error: {home}/sft/checkpoints: no checkpoint is whole; --run.fresh starts over\n"


# data: compared by content, wherever it lies and whenever it was touched


def test_data_that_moved_is_the_same_and_draws_the_same(home, origin, call):
    """The copy lies elsewhere, and its prompts are named after the rows' own ids or, here, after the old path."""
    texts = [json.loads(line)["text"] for line in (home / "corpus.jsonl").read_text().splitlines()]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("old", "new"):
        (home / name).mkdir()
        (home / name / "c.jsonl").write_text(rows)
    os.utime(home / "new" / "c.jsonl", ns=(1, 1))
    argv = rlmt_flags(home, "still", steps=3)
    assert exit_code(rlmt, [*argv, f"--data.paths={home}/old/c.jsonl"]) == 0
    argv = [*rlmt_flags(home, "moved", steps=2), f"--data.paths={home}/old/c.jsonl"]
    assert exit_code(rlmt, argv) == 0
    argv = [*rlmt_flags(home, "moved", steps=3), f"--data.paths={home}/new/c.jsonl"]
    assert call(rlmt, argv)[::2] == (0, "")
    for name in ("rollouts/step-000003.jsonl", "export/model.safetensors"):
        assert (home / "moved" / name).read_bytes() == (home / "still" / name).read_bytes()
    (home / "new" / "c.jsonl").write_text(rows.replace("coins", "cards"))
    line = f"error: {home}/moved: the data has changed since this run began; --run.fresh starts over\n"
    assert call(rlmt, argv)[::2] == (2, line)


def test_held_out_text_that_was_exchanged_is_refused(home, call):
    val = home / "val.jsonl"
    val.write_text((home / "corpus.jsonl").read_text())
    line = "the held-out data has changed since this run began; --run.fresh starts over\n"
    for program, argv in ((sft, sft_argv(home)), (rlmt, rlmt_flags(home, "val", steps=1))):
        argv += [f"--data.val_paths={val}", f"--run.folder={home}/{program.__name__}-val"]
        assert call(program, argv)[0] == 0
        assert call(program, argv)[0] == 0
        whole = val.read_text()
        val.write_text(whole.replace("coins", "cards"))
        code, _, err = call(program, argv)
        assert (code, err.partition("-val: ")[2]) == (2, line)
        val.write_text(whole)


def test_an_answer_exchanged_under_a_run_is_refused(home, call):
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    path = home / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*rlmt_flags(home, "rlpt", steps=1)[1:], "--run.steps=1", f"--model.folder={home}/sft/export"]
    argv += [f"--data.path={path}", "--data.template=plain-think", "--sampling.max_think=6", "--sampling.max_suffix=4"]
    argv += ["--batch.prompts=2", "--batch.siblings=2", "--batch.pack_tokens=256", "--loss.denom=10", "--optim.lr=1e-2"]
    assert call(rlpt, argv)[0] == 0
    path.write_text(path.read_text().replace('"answer": "3"', '"answer": "4"'))
    line = f"error: {home}/rlpt: the data has changed since this run began; --run.fresh starts over\n"
    assert call(rlpt, argv)[::2] == (2, line)


@pytest.mark.parametrize("program", [sft, rlmt], ids=["sft", "rlmt"])
def test_a_flipped_bit_in_the_store_stops_the_run(home, call, program):
    folder = home / "flipped"
    argv = [*(sft_flags(home) if program is sft else rlmt_flags(home, "")[:1]), f"--run.folder={folder}"]
    assert call(program, [*argv, "--run.steps=1"])[0] == 0
    [part] = (folder / "store").glob("*.bin")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)
    line = f"error: {part}: its bytes changed since it was written; without {part.parent} "
    line += "the same command writes it anew\n"
    assert call(program, [*argv, "--run.steps=5"])[::2] == (2, line)
    shutil.rmtree(folder / "store")
    assert call(program, [*argv, "--run.steps=5"])[::2] == (0, "")


# weights that are not finite


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flag", ["--optim.lr=3e38", "--optim.weight_decay=1e42"])
@pytest.mark.parametrize("program", [sft, rlmt], ids=["sft", "rlmt"])
def test_weights_that_are_not_finite_are_not_saved_and_a_lower_rate_resumes_before_them(home, call, program, flag):
    argv = sft_flags(home) if program is sft else rlmt_flags(home, "")[:1]
    folder = home / "broken"
    argv += [f"--run.folder={folder}", "--run.save_every=1", "--run.keep=1"]
    assert call(program, [*argv, "--run.steps=2"])[0] == 0
    exported = (folder / "export" / "model.safetensors").read_bytes()
    code, out, err = call(program, [*argv, "--run.steps=6", flag])
    assert code == 2
    assert any(line.startswith(f"warning: {flag[2:].split('=')[0]} is ") for line in out)
    assert err.startswith("error: step 3: weights or Adam's moments are not finite after this update (optim.lr ")
    assert err.endswith("the same command resumes from step 2\n")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert (folder / "export" / "model.safetensors").read_bytes() == exported
    assert call(program, [*argv, "--run.steps=4"])[::2] == (0, "")
    assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4]
    assert all(x.isfinite().all() for x in load_file(folder / "export" / "model.safetensors").values())


def test_no_checkpoint_is_deleted_while_losses_are_not_finite(home, call, monkeypatch):
    """Weights may be finite, and as lost."""
    argv = [*sft_flags(home), f"--run.folder={home}/broken", "--run.save_every=1", "--run.keep=1"]
    assert call(sft, [*argv, "--run.steps=2"])[0] == 0
    monkeypatch.setattr(supervised, "text_loss", lambda model, pack: (logprobs(model, pack).sum() * math.nan, {}))
    assert call(sft, [*argv, "--run.steps=4"])[0] == 0
    assert sorted(path.name for path in (home / "broken" / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
        "step-000004",
    ]
