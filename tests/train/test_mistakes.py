"""More of what a person meets who runs the programs: odd flags, rows and text, a damaged model, a full disk."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import drill
import pytest

from thinkmid import config
from thinkmid.data import store
from thinkmid.errors import UserError
from thinkmid.files import read_rows
from thinkmid.model import weights
from thinkmid.run import checkpoint
from thinkmid.run.config import ExportConfig
from thinkmid.run.folder import LOCK
from thinkmid.run.ranks import Ranks
from thinkmid.train import corpus, job, rlmt, sft

RLMT, BASE = (rlmt, "rlmt.toml"), (sft, "base.toml")
DOCUMENT = '{"text": "Is it? <think>a</think>Yes."}\n'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The drill's corpus and configs, and a base model after two steps."""
    folder = tmp_path_factory.mktemp("home")
    drill.write_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            config.run(sft.main, ["base.toml", "--run.steps=2"])
    assert end.value.code == 0
    return folder


@pytest.fixture
def world(home, tmp_path, monkeypatch):
    """A copy to work in."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(world, capsys):
    """Runs a program: (exit code, stdout, stderr)."""

    def call(program, *argv):
        with pytest.raises(SystemExit) as end:
            config.run(program.main, list(argv))
        return end.value.code, *capsys.readouterr()

    return call


def tree(folder):
    # a store notes which files it found equal by content, a copy's for one
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK, store.MANIFEST)]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def refused(call, world, program, *argv):
    """The one line that a mistake earns; nothing on disk has changed."""
    before = tree(world)
    code, _, err = call(program, *argv)
    assert (code, err.count("\n"), err[:7], err[-1]) == (2, 1, "error: ", "\n")
    assert tree(world) == before
    return err[7:-1]


FLAGS = [
    (RLMT, ["--run.seed=-1"], "run: seed must be at least 0, got -1"),
    (RLMT, ["--run.trackers=x"], "--run.trackers: expected 'tensorboard' or 'wandb' or 'trackio', got 'x'"),
    (RLMT, ["--sampling.temperature=0"], "sampling.temperature 0 draws the same sample each time"),
    (RLMT, ["--model.folder="], "missing key 'model.folder': the Hugging Face folder to start from"),
    (RLMT, ["--run.folder=base"], "model.folder base/export lies in run.folder base, which the run writes to"),
    (RLMT, ["--run.folder="], "run: folder is empty; --run.folder FOLDER"),
    (RLMT, ["--judge.folder=run/export"], "judge.folder run/export lies in run.folder run, which the run writes to"),
    (
        BASE,
        ["--data.paths=think.jsonl,base/rollouts", "--run.fresh"],
        "data.paths base/rollouts lies in run.folder base",
    ),
    (BASE, ["--data.probe_paths=no.jsonl", "--run.folder=run", "--model.folder=base/export"], "no.jsonl: no such file"),
    (BASE, ["--data.epochs=1e300", "--run.steps=0"], "data: epochs 1e+300 or tokens 0: more than 1e4 or 1e15 have no"),
    (BASE, ["--fresh.layers=5000", "--run.folder=run"], "fresh: layers must lie in [1, 4096], got 5000"),
    (RLMT, ["--run.folder=think.jsonl/x"], "[Errno 20] Not a directory: 'think.jsonl/x'"),
    (RLMT, ["--data.max_prefix=60"], "a prefix of 60 tokens + sampling.max_think 24 + sampling.max_suffix 8 exceed"),
    (RLMT, ["--batch.pack_tokens=33"], "a prefix of 2 tokens + sampling.max_think 24 + sampling.max_suffix 8 exceed"),
    (RLMT, ["--data.prefix=sentence", "--data.max_prefix=3"], "a prefix of 3 tokens has no room for text"),
    (RLMT, ["--sampling.max_think=2"], "sampling.force_close: max_think 2 cannot hold the 3 tokens of </think>"),
    (BASE, ["--data.paths="], "data: paths is empty; --data.paths FILE or FOLDER"),
    (BASE, ["--data.max_len=1"], "data: max_len must be at least 2, got 1"),
    (BASE, ["--fresh.heads=3", "--fresh.kv_heads=2", "--dry-run"], "fresh: kv_heads 2 must divide heads 3"),
]


@pytest.mark.parametrize(("program", "flags", "line"), FLAGS, ids=[flags[0] for _, flags, _ in FLAGS])
def test_a_value_that_cannot_be_is_refused(call, world, program, flags, line):
    assert refused(call, world, *program, *flags).startswith(line)


ROWS = [
    ("a.jsonl", "", "a.jsonl: no document with text"),
    ("a.jsonl", DOCUMENT + '{"txt": "b"}\n', 'a.jsonl:2: no "text" in this row; it has txt'),
    ("a.jsonl", DOCUMENT + '{"text": \n', "a.jsonl:2: not JSON"),
    ("a.jsonl", '{"text": "Is it? </think>Yes."}\n', "a.jsonl:1: </think> without <think> at character 7"),
    ("a.txt", "Is it? <think>Yes.", "a.txt:1: <think> is never closed at character 7"),
]


@pytest.mark.parametrize("program", [RLMT, BASE], ids=["rlmt", "sft"])
@pytest.mark.parametrize(("name", "text", "line"), ROWS, ids=[line for *_, line in ROWS])
def test_a_broken_row_is_named_by_file_and_line(call, world, program, name, text, line):
    (world / name).write_text(text)
    # of a model that exists: a fresh start trains its tokenizer before tags matter
    flags = [] if program is RLMT else ["--model.folder=base/export", "--run.folder=run"]
    assert refused(call, world, *program, *flags, f"--data.paths={name}").startswith(line)


def test_files_of_a_folder_that_are_not_read_are_named_once(call, world):
    (world / "mixed").mkdir()
    for name, text in (("a.jsonl", DOCUMENT * 40), ("README.md", "# A card"), ("b.csv", "text\na\n")):
        (world / "mixed" / name).write_text(text)
    line = "mixed: 2 files left out: *.csv (1), README.md (1), such as b.csv\n"
    flags = ["--model.folder=base/export", "--run.folder=run", "--run.steps=1"]
    code, out, _ = call(*BASE, "--data.paths=mixed", *flags)
    assert (code, out.count(line)) == (0, 1)
    code, out, _ = call(*RLMT, "--data.paths=mixed", "--data.prefix=sentence", "--run.folder=rl")  # a tag in raw text
    assert (code, out.count(line)) == (2, 1)


def test_the_first_rank_alone_names_what_is_left_out(world, capsys):
    (world / "b.csv").touch()
    for rank, lines in ((0, 1), (1, 0)):
        corpus.name_left_out([str(world)], Ranks(rank, 1, "cpu", None))
        assert capsys.readouterr().out.count("*.csv (1)") == lines


TEXTS = [
    ("thought", "Is it? " * 60 + "<think>a</think>Yes.", "the model's context leaves 32 for prefixes"),
    ("thought", "One. Two.", "a.jsonl: no prefix (data.prefix = 'thought')"),
    ("thought", "One. <think>Two.</think>  ", "a.jsonl: no prefix (data.prefix = 'thought')"),
    ("sentence", "One", "a.jsonl: no prefix (data.prefix = 'sentence')"),
    ("sentence", "One. </think> Two.", "a.jsonl:1: raw text contains </think> at character 5"),
]


@pytest.mark.parametrize(("prefix", "text", "line"), TEXTS, ids=[text[-20:] for _, text, _ in TEXTS])
def test_text_without_a_usable_prefix_is_refused(call, world, prefix, text, line):
    (world / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert line in refused(call, world, *RLMT, "--data.paths=a.jsonl", f"--data.prefix={prefix}")


def forget_a_byte(model):
    spec = json.loads((model / "tokenizer.json").read_text())
    spec["model"]["vocab"]["\u2603"] = spec["model"]["vocab"].pop("/")
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "/" not in "".join(pair)]
    (model / "tokenizer.json").write_text(json.dumps(spec))


def shrink_vocabulary(model):
    told = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(told | {"vocab_size": 100}))


MODELS = [
    (lambda model: (model / "model.safetensors").unlink(), "base/export/model.safetensors: No such file or directory"),
    (lambda model: (model / "tokenizer_config.json").write_text("[" * 10**5), "base/export/tokenizer_config.json: not"),
    (lambda model: (model / "config.json").unlink(), "base/export/config.json: no such file"),
    (forget_a_byte, "base/export/tokenizer.json: cannot spell </think>"),
    (shrink_vocabulary, "base/export/tokenizer.json: 301 tokens, but config.json has vocab_size 100"),
]


@pytest.mark.parametrize(("damage", "line"), MODELS, ids=[line[12:40] for _, line in MODELS])
def test_a_model_folder_that_does_not_fit_together_is_refused(call, world, damage, line):
    damage(world / "base" / "export")
    assert refused(call, world, *RLMT).startswith(line)


@pytest.mark.parametrize("program", [RLMT, BASE], ids=["rlmt", "sft"])
def test_a_run_goes_on_only_with_the_config_and_the_data_it_began_with(call, world, program):
    folder, corpus = "run" if program is RLMT else "base", world / "think.jsonl"
    assert call(*program, "--run.steps=2")[0] == 0
    line = refused(call, world, *program, "--run.steps=2", "--optim.warmup=7")
    assert line == f"{folder}: this run began with optim.warmup = 0, now 7; --run.fresh starts over"
    whole = corpus.read_text()
    corpus.write_text(whole.replace("Is 11 ", "Is 12 "))
    line = refused(call, world, *program, "--run.steps=3")
    assert line == f"{folder}: the data has changed since this run began; --run.fresh starts over"
    corpus.write_text(whole)
    assert call(*program, "--run.steps=3")[0] == 0
    assert [row["step"] for row in read_rows(f"{folder}/metrics.jsonl")] == [1, 2, 3]


def test_a_run_goes_on_under_another_spelling_of_its_folder(call, world):
    assert call(*BASE, "--run.steps=3", "--run.folder=./texts/../base")[0] == 0
    assert [row["step"] for row in read_rows("base/metrics.jsonl")] == [1, 2, 3]


DAMAGED = [
    ("config.toml", b"\xff", "base/config.toml: not UTF-8 text"),
    ("config.toml", b"run = [", "base/config.toml:1: malformed TOML"),
    ("metrics.jsonl", b'{"step": "a"}\n', 'base/metrics.jsonl: step "a" is no number'),
    ("checkpoints/step-000002/state.json", b"{}", "base/checkpoints: no checkpoint is whole; --run.fresh starts over"),
]


@pytest.mark.parametrize(("name", "content", "line"), DAMAGED, ids=[line[:30] for *_, line in DAMAGED])
def test_a_run_does_not_go_on_from_a_damaged_folder(call, world, name, content, line):
    (world / "base" / name).write_bytes(content)
    assert refused(call, world, *BASE, "--run.steps=2").startswith(line)


def test_a_fresh_run_does_not_care_what_is_damaged(call, world):
    for name, content, _ in DAMAGED:
        (world / "base" / name).write_bytes(content)
    assert call(*BASE, "--run.steps=1", "--run.fresh")[0] == 0


@pytest.mark.parametrize("program", [RLMT, BASE], ids=["rlmt", "sft"])
def test_a_fresh_run_forgets_the_old_one_only_when_its_data_is_right(call, world, program):
    assert call(*program, "--run.steps=2")[0] == 0
    (world / "broken.jsonl").write_text(DOCUMENT * 3 + "{\n")
    (world / "blank.jsonl").write_text('{"text": " "}\n')
    for name in ("nowhere.jsonl", "broken.jsonl", "blank.jsonl"):
        for folder in ([], ["--run.folder=new"]):
            assert name in refused(call, world, *program, "--run.fresh", f"--data.paths={name}", *folder)
    assert not (world / "new").exists()
    assert call(*program, "--run.steps=1", "--run.fresh")[0] == 0
    folder = "run" if program is RLMT else "base"
    assert [row["step"] for row in read_rows(f"{folder}/metrics.jsonl")] == [1]


@pytest.mark.parametrize("flags", [[], ["--run.fresh"]])
def test_what_is_not_of_a_training_run_is_left_alone(call, world, flags):
    (world / "eval").mkdir()
    (world / "eval" / "config.toml").write_text("[data]\n")
    line = refused(call, world, *BASE, "--run.folder=eval", *flags)
    assert line == "eval/config.toml: not of a training run (no metrics.jsonl); name another run.folder"
    (world / "notes" / "export").mkdir(parents=True)
    (world / "notes" / "export" / "thesis.txt").write_text("years of work")
    assert "is not an export of ours" in refused(call, world, *BASE, "--run.folder=notes", *flags)
    (world / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links: 'loop" in refused(call, world, *BASE, "--run.folder=loop", *flags)


def test_a_folder_has_one_run_at_a_time(call, world):
    hold = f"import fcntl; f = open('base/{LOCK}', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        line = refused(call, world, *BASE, "--run.steps=3", "--run.fresh")
        other.communicate(b"\n")
    assert line == "base: another process trains here"
    assert call(*BASE, "--run.steps=3")[0] == 0


@pytest.mark.parametrize("saved_step", [0, 2])
def test_an_export_that_fails_says_where_the_run_goes_on(tmp_path, monkeypatch, saved_step):
    def full(*args, **flags):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(weights, "save", full)
    monkeypatch.setattr(weights, "stream", lambda model, dtype: [])
    run = SimpleNamespace(
        folder=tmp_path, source=SimpleNamespace(folder=tmp_path), model=SimpleNamespace(cfg=None), saved_step=saved_step
    )
    run.cfg, run.same, run.export_dtype = SimpleNamespace(export=ExportConfig()), None, "float32"
    run.ranks = SimpleNamespace(rank=1)  # rank 0 has the card
    run.refuse_broken = lambda step: None
    with pytest.raises(UserError, match=rf"resumes from step {saved_step}$"):
        job.Job.export(run)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(call, world, monkeypatch):
    write = checkpoint._write

    def full(path, chunks):
        if "step-000002" in str(path):
            return write(path, chunks)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "_write", full)
    code, out, err = call(*RLMT, "--run.steps=5")
    assert (code, err, drill.saved("run"), drill.num_steps("run")) == (0, "", ["step-000002"], 5)
    for step in (4, 5):
        assert f"warning: checkpoint of step {step} is not saved: [Errno 28] No space left on device" in out
    assert checkpoint.latest("run/checkpoints").name == "step-000002"


def test_text_as_it_comes_needs_no_care(call, world):
    folder = world / "texts"
    folder.mkdir()
    sentences = [f"Line {i} ends here. Another one begins; it ends too!" for i in range(20)]
    (folder / "windows.txt").write_bytes("\r\n".join(sentences).encode())
    (folder / "one-line.txt").write_text(" ".join(sentences * 50))
    (folder / "nul.txt").write_bytes(b"a\0b. c\0\0d. e. " * 20)
    (folder / "latin.txt").write_bytes(b"caf\xe9. na\xefve. \xff\xfe. " * 20)
    (folder / "odd.md").write_text("\ufeff🦆. 漢字。かな. e\u0301. \u202eright to left. \u2028 " * 20)
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "empty.txt").write_text("")
    (folder / "lines.txt").write_text("\n" * 5000 + "end.\n\nx")
    (folder / "rows.jsonl").write_text('{"text": "A lone \\ud800 surrogate. And text."}\r\n\r\n')
    assert call(*BASE, "--run.folder=text-base", "--run.steps=2", "--data.paths=texts")[0] == 0
    flags = ["--model.folder=text-base/export", "--data.paths=texts", "--data.prefix=sentence", "--run.steps=1"]
    code, _, err = call(*RLMT, *flags)
    assert (code, err) == (0, "")
    named = {row["prompt_id"].split("#")[0] for row in read_rows("run/rollouts/step-000001.jsonl")}
    assert named <= {f"texts/{name}:1" for name in os.listdir(folder)}


@pytest.mark.parametrize("program", ["sft", "rlmt"])
def test_help_and_a_wrong_key_wait_for_no_torch(program):
    code = f"import sys\nfrom thinkmid import config\nfrom thinkmid.train import {program} as program\n"
    code += "try: config.run(program.main)\nfinally: assert 'torch' not in sys.modules"
    for flag, end in (("--help", 0), ("--run.stepz=1", 2)):
        assert subprocess.run([sys.executable, "-c", code, flag], capture_output=True).returncode == end
