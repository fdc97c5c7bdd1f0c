"""A user's mistake is one line that names it, exit code 2, and nothing written over."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import exit_code
from world import TEXTS, rlmt_flags, sft_flags

from thinkmid import cli
from thinkmid.data.sequences import read_sequences
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import rlmt, sft


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus and a trained model; tests copy it before they spoil it."""
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, sft_flags(folder)) == 0
    return folder


@pytest.fixture
def spoilt(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home"


def refused(capsys, program, argv) -> str:
    """The one line that a refused program says."""
    capsys.readouterr()
    assert exit_code(program, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_run_leaves_a_row_per_step_and_a_model(home):
    assert exit_code(rlmt, rlmt_flags(home, "run", steps=3)) == 0
    rows = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"reward", "thinking_tokens", "dead_groups", "tokens_per_s", "rollout_s", "train_s"} <= rows[0].keys()
    samples = [json.loads(line) for line in (home / "run/rollouts/step-000001.jsonl").read_text().splitlines()]
    assert len(samples) == 5 * 4
    assert {"prompt", "thought", "suffix", "reference", "verdict"} <= samples[0].keys()
    assert all(s["prompt"].endswith("<think>") for s in samples)
    assert (home / "run/curves.png").stat().st_size > 1000
    # the same command again finds it done and changes nothing
    before = (home / "run/metrics.jsonl").read_bytes()
    assert exit_code(rlmt, rlmt_flags(home, "run", steps=3)) == 0
    assert (home / "run/metrics.jsonl").read_bytes() == before


def sft_for(folder, name, *flags):
    """Metrics of an SFT run of no steps but what the flags ask for."""
    argv = [*sft_flags(folder), "--run.steps=0", f"--run.folder={folder}/{name}", "--fresh.tokenizer_data=", *flags]
    assert exit_code(sft, argv) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_an_epoch_sees_every_token_once_and_a_token_budget_is_met(home):
    twice = sum(row["tokens"] for row in sft_for(home, "two", "--data.epochs=2"))
    once = sum(row["tokens"] for row in sft_for(home, "one", "--data.epochs=1"))
    lengths = [
        len(tokens) for tokens, _ in read_sequences([f"{home}/corpus.jsonl"], Tokenizer.load(home / "one/export"), 64)
    ]
    targets = sum(lengths) - len(lengths)
    # the last step takes a full batch, which reaches into the next epoch
    assert targets <= once < targets + 256
    assert 2 * targets <= twice < 2 * targets + 256
    budget = sft_for(home, "budget", "--data.tokens=1000")
    assert sum(row["tokens"] for row in budget[:-1]) < 1000 <= sum(row["tokens"] for row in budget) + len(lengths)


def test_a_length_given_twice_is_refused(home, capsys):
    said = refused(capsys, sft, [*sft_flags(home), "--data.epochs=1"])
    assert "run.steps 2, data.epochs 1.0" in said


def test_a_dry_run_prints_the_plan_and_writes_nothing(home, capsys):
    before = sorted(home.rglob("*"))
    assert exit_code(rlmt, [*rlmt_flags(home, "dry"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "5 * 4 * 10 = 200" in said
    assert "KV cache" in said
    assert exit_code(sft, [*sft_flags(home), "--dry-run"]) == 0
    assert [p for p in sorted(home.rglob("*")) if p.name != "rlmt.toml"] == [p for p in before if p.name != "rlmt.toml"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["no-such.toml"], "no-such.toml"),
        (["--sampling.temprature", "1"], "sampling.temperature"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--loss.denom", "0"], "denom"),
        (["--data.paths", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--sampling.max-think", "125"], "context"),
        (["--data.max-prefix", "8"], "corpus.jsonl:1"),
        (["--model.folder", "nowhere"], "nowhere: no such folder"),
        (["--batch.siblings", "1"], "siblings"),
    ],
)
def test_a_wrong_value_is_named(home, capsys, flags, named):
    assert named in refused(capsys, rlmt, [*rlmt_flags(home, "wrong"), *flags])
    assert not (home / "wrong").exists()


def test_denom_has_no_default(home, capsys):
    flags = rlmt_flags(home, "wrong")
    text = (home / "rlmt.toml").read_text().replace("[loss]\ndenom = 10\n", "")
    (home / "rlmt.toml").write_text(text)
    assert "loss.denom" in refused(capsys, rlmt, flags)


def test_malformed_toml_is_named_with_its_line(home, capsys):
    (home / "bad.toml").write_text("[run]\nsteps = = 3\n")
    assert "bad.toml:2" in refused(capsys, rlmt, [*rlmt_flags(home, "wrong"), str(home / "bad.toml")])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 64
    path.write_bytes(data)


def point_outside(path):
    path.rename(path.with_name("other.safetensors"))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../other.safetensors"}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("spoil", [truncate, flip, point_outside])
def test_spoilt_weights_are_named(spoilt, capsys, spoil):
    spoil(spoilt / "sft/export/model.safetensors")
    assert "safetensors" in refused(capsys, rlmt, rlmt_flags(spoilt, "wrong"))


def test_a_row_without_text_is_named_by_file_and_line(spoilt, capsys):
    with open(spoilt / "corpus.jsonl", "a") as file:
        file.write('{"words": "none"}\n')
    assert "corpus.jsonl:25" in refused(capsys, rlmt, rlmt_flags(spoilt, "wrong"))


def test_an_empty_corpus_is_named(spoilt, capsys):
    (spoilt / "corpus.jsonl").write_text("")
    assert "no document" in refused(capsys, rlmt, rlmt_flags(spoilt, "wrong"))


def test_a_run_folder_is_not_taken_over_by_another_run(spoilt, capsys):
    assert exit_code(rlmt, rlmt_flags(spoilt, "mine", steps=2)) == 0
    before = (spoilt / "mine/config.toml").read_bytes()
    assert "optim.warmup" in refused(capsys, rlmt, [*rlmt_flags(spoilt, "mine", steps=2), "--optim.warmup", "5"])
    assert (spoilt / "mine/config.toml").read_bytes() == before
    text = (spoilt / "corpus.jsonl").read_text().replace("coins", "cards")
    (spoilt / "corpus.jsonl").write_text(text)
    assert "data" in refused(capsys, rlmt, rlmt_flags(spoilt, "mine", steps=2))
    assert exit_code(rlmt, [*rlmt_flags(spoilt, "mine", steps=2), "--run.fresh", "true"]) == 0


def test_the_recipe_for_text_without_thoughts_has_no_dead_group_where_a_judge_has_many(home, tmp_path):
    texts = [re.sub("<think>.*</think>", "", text) for text in TEXTS]
    (tmp_path / "raw.txt").write_text("\n".join(texts))
    recipe = str(Path(cli.__file__).parents[1] / "configs" / "mini-text.toml")
    flags = [recipe, f"--data.paths={tmp_path}/raw.txt", f"--model.folder={home}/sft/export", "--data.max_prefix=64"]
    flags += ["--run.steps=2", "--batch.prompts=4"]
    rows = {}
    for name, more in (("recipe", []), ("judged", ["--reward.judge=1", "--reward.gain=0", "--loss.scope=all"])):
        assert exit_code(rlmt, [*flags, *more, f"--run.folder={tmp_path}/{name}"]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert [row["dead_groups"] for row in rows["recipe"]] == [0, 0]
    assert all(row["gain"] != 0 and row["reward"] != 0 and row["grad_norm"] > 0 for row in rows["recipe"])
    assert sum(row["dead_groups"] for row in rows["judged"]) > 0
