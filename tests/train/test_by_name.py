"""Runs whose model, data and questions come from the Hub by name: the numbers of local folders, at one commit."""

import json
import shutil

import pytest
from conftest import exit_code
from world import rlmt_flags, sft_flags

from thinkmid import hub, sample
from thinkmid.errors import UserError
from thinkmid.eval import run
from thinkmid.files import read_json, read_rows
from thinkmid.run.folder import claim_folder
from thinkmid.run.ranks import Ranks
from thinkmid.train import rlmt, sft

pytest_plugins = ["fake_hub"]  # web

NAMES = ["--model.folder=org/tiny", "--data.paths=hf://datasets/org/texts/corpus.jsonl"]


def pushed(repo, folder):
    return repo.push({path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture
def world(web, tmp_path):
    assert exit_code(sft, sft_flags(tmp_path)) == 0
    (tmp_path / "texts").mkdir()
    shutil.copy(tmp_path / "corpus.jsonl", tmp_path / "texts")
    pushed(web.repo("org/tiny"), tmp_path / "sft" / "export")
    pushed(web.repo("org/texts", "datasets"), tmp_path / "texts")
    return web


def losses(folder):
    kept = ("step", "reward", "loss", "grad_norm", "think_tokens")
    return [{name: row.get(name) for name in kept} for row in read_rows(folder / "metrics.jsonl")]


def test_a_run_by_name_has_the_numbers_of_one_by_folder_and_resumes_what_it_began_with(world, tmp_path, capsys):
    assert exit_code(rlmt, rlmt_flags(tmp_path, "local", steps=4)) == 0
    assert exit_code(rlmt, [*rlmt_flags(tmp_path, "named", steps=2), *NAMES]) == 0
    commits = {"org/tiny": world.repo("org/tiny").refs["main"]}
    commits |= {"hf://datasets/org/texts/corpus.jsonl": world.repo("org/texts", "datasets").refs["main"]}
    record = read_json(tmp_path / "named" / "hub.json")
    assert {name: found["commit"] for name, found in record.items()} == commits
    assert f"org/tiny: commit {commits['org/tiny']}\n" in capsys.readouterr().out
    written = (tmp_path / "named" / "config.toml").read_text()
    assert f'folder = "org/tiny@{commits["org/tiny"]}"' in written
    assert str(tmp_path / "cache") not in written

    # the branches move: another model, other texts
    (tmp_path / "texts" / "corpus.jsonl").write_text(json.dumps({"text": "A.<think> b</think> C."}) + "\n")
    pushed(world.repo("org/tiny"), tmp_path / "local" / "export")
    pushed(world.repo("org/texts", "datasets"), tmp_path / "texts")
    world.close()
    assert exit_code(rlmt, [*rlmt_flags(tmp_path, "named", steps=4), *NAMES]) == 0
    assert losses(tmp_path / "named") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "named")) == 4


def test_another_revision_is_another_model_and_is_refused(world, tmp_path, capsys):
    flags = rlmt_flags(tmp_path, "named", steps=2)
    assert exit_code(rlmt, [*flags, *NAMES]) == 0
    folder = tmp_path / "sft" / "export"
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"rms_norm_eps": 1e-3}))
    pushed(world.repo("org/tiny"), folder)
    capsys.readouterr()
    assert exit_code(rlmt, [*flags, NAMES[1], "--model.folder=org/tiny@main"]) == 2
    assert "not the config.json that this run began with; --run.fresh starts over" in capsys.readouterr().err


def test_a_sample_is_drawn_from_a_model_by_name(world, capsys):
    argv = ["org/tiny", "Ana has", "--max-think=4", "--max-suffix=3", "--temperature=0"]
    assert exit_code(sample, argv) == 0
    named = capsys.readouterr().out
    assert exit_code(sample, [str(hub.model("org/tiny")), *argv[1:]]) == 0
    assert named == capsys.readouterr().out != ""
    assert exit_code(sample, ["hf://org/nmae", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: hf://org/nmae: no such repository")


def test_an_evaluation_by_name_keeps_its_model_and_is_graded_again_without_network(
    world, tmp_path, capsys, monkeypatch
):
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]
    sets = world.repo("org/sums", "datasets")
    sets.push({"test.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    flags = [f"--run.folder={tmp_path}/eval", "--run.samples=2", "--model.folder=org/tiny", "--sampling.max_think=5"]
    flags += [
        "--sampling.max_suffix=5",
        "--data.sets=sums:questions=hf://datasets/org/sums",
        "--data.template=plain-think",
    ]
    with monkeypatch.context() as patch:  # stopped when all is drawn
        patch.delattr(run, "grade")
        with pytest.raises(NameError):
            run.main(flags)
    assert set(read_json(tmp_path / "eval" / "hub.json")) == {"org/tiny", flags[5].partition("sets=")[2]}
    assert exit_code(run, flags) == 0
    results = read_json(tmp_path / "eval" / "results.json")
    assert results["model"] == "org/tiny"
    assert read_json(tmp_path / "eval" / "drawn-by.json")["model.folder"] == "org/tiny"
    sets.push({"test.jsonl": json.dumps(rows[0]) + "\n"})
    world.close()
    assert exit_code(run, [*flags, "--run.regrade=true"]) == 0
    assert read_json(tmp_path / "eval" / "results.json") == results
    assert exit_code(run, [*flags, "--run.samples=3"]) == 0  # more samples of the same model and questions
    assert read_json(tmp_path / "eval" / "results.json")["samples"] == 3
    shutil.rmtree(tmp_path / "cache" / "models--org--tiny")
    assert exit_code(run, [*flags, "--run.samples=3", "--run.regrade=true"]) == 0
    capsys.readouterr()
    assert exit_code(run, [*flags, "--run.samples=4"]) == 2
    assert "org/tiny: no such folder; on the Hub: not in the cache" in capsys.readouterr().err


class Two(Ranks):
    """A rank beside which another one found something else."""

    def gather_bytes(self, payload):
        return [payload, payload.replace(b"a", b"b")]


def test_ranks_that_found_other_commits_do_not_start(world, tmp_path):
    from thinkmid import config
    from thinkmid.train.config import RLMTConfig

    cfg, _ = config.load(RLMTConfig, [*rlmt_flags(tmp_path, "run"), *NAMES], prog="x", description="")
    with pytest.raises(UserError, match=r"a branch moves; the same command tries again"):
        claim_folder(cfg, Two(0, 2, None, None))
    local, _ = config.load(RLMTConfig, rlmt_flags(tmp_path, "run"), prog="x", description="")
    claim_folder(local, Two(0, 2, None, None))


def test_adapters_name_their_base_as_the_hub_does_at_its_commit(world, tmp_path, capsys):
    flags = [*sft_flags(tmp_path), *NAMES, f"--run.folder={tmp_path}/lora"]
    assert exit_code(sft, [*flags, "--model.lora_rank=2", "--export.lora=adapter"]) == 0
    config = read_json(tmp_path / "lora/export/adapter_config.json")
    commit = world.repo("org/tiny").refs["main"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit)
    assert "SFT of org/tiny: " in capsys.readouterr().out


def test_prefixes_have_the_same_names_and_draws_in_another_cache(world, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    texts = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
    world.repo("org/texts", "datasets").push({"corpus.jsonl": texts})
    found = []
    for name in ("here", "there"):
        assert exit_code(rlmt, [*rlmt_flags(tmp_path, name, steps=2), *NAMES]) == 0
        found.append(losses(tmp_path / name))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere").is_dir()
    assert found[0] == found[1]
