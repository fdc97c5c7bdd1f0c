"""The `thinkmid` command: what it calls, what it copies, what it prints, and what a wheel holds for it."""

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import world

from thinkmid import cli, config
from thinkmid.train import sft

ROOT = Path(cli.__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        with pytest.raises(SystemExit) as end:
            config.run(cli.main, list(argv))
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def stand_ins(monkeypatch):
    """Every program replaced by one that records its arguments and returns 75."""
    calls = []

    def import_module(name):
        return types.SimpleNamespace(main=lambda argv: calls.append((name, argv)) or 75)

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    return calls


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model after two steps of SFT."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.raises(SystemExit):
        config.run(sft.main, world.sft_flags(folder))
    return folder / "sft" / "export"


@pytest.mark.parametrize("name", [name for name, (module, _) in cli.PROGRAMS.items() if module])
def test_a_command_is_its_module_with_the_same_arguments_and_exit_code(name, call, stand_ins):
    assert call(name, "a.toml", "--x.y", "1")[0] == 75
    assert stand_ins == [(cli.PROGRAMS[name][0], ["a.toml", "--x.y", "1"])]


@pytest.mark.parametrize("name", [*cli.PROGRAMS, "--help", "--version"])
def test_help_needs_no_torch(name):
    program = (
        "import sys, thinkmid.cli\n"
        f"sys.argv[1:] = {[name] if name.startswith('--') else [name, '--help']}\n"
        "try:\n    thinkmid.cli.entry()\n"
        "finally:\n    assert 'torch' not in sys.modules and 'vllm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 10


def test_python_m_thinkmid_is_the_command():
    done = subprocess.run([sys.executable, "-m", "thinkmid", "sfd"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'sfd'; did you mean 'sft'?\n")


def test_without_a_command_every_command_is_listed(call):
    code, out, _ = call()
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(cli.PROGRAMS)


def test_a_users_mistake_in_a_program_keeps_its_line_and_code(call):
    assert call("sft", "nowhere.toml") == (2, "", "error: nowhere.toml: no such file\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_finds_the_program_by_the_configs_sections(path, call, stand_ins):
    kind = path.stem.removeprefix("qwen3-8b-").split("-")
    expected = {"annotate": "annotate", "eval": "eval", "rlpt": "rlpt", "sft": "sft", "base": "sft", "rlmt": "rlmt"}
    expected |= {"vllm": "rlmt", "text": "rlmt"}
    name = "sft" if kind[-1] == "base" else next(expected[word] for word in kind if word in expected)
    code, out, _ = call("plan", str(path), "--run.folder", "x")
    assert (code, stand_ins) == (75, [(cli.PROGRAMS[name][0], [str(path), "--run.folder", "x", "--dry-run"])])
    assert out.startswith(f"# thinkmid {name} --dry-run: {path} has ")


def test_plan_reads_all_files_of_a_run(call, stand_ins, tmp_path):
    (tmp_path / "a.toml").write_text('[model]\nfolder = "m"\n')
    (tmp_path / "b.toml").write_text('[data]\nsets = ["gsm8k=x"]\n')
    call("plan", "a.toml", "b.toml")
    assert stand_ins[0][0] == "thinkmid.eval.run"


def test_plan_of_a_config_for_no_program_is_one_line(call, tmp_path):
    (tmp_path / "a.toml").write_text('[model]\nfolder = "m"\n')
    line = "error: a.toml: no section names a program; run it as thinkmid PROGRAM CONFIG --dry-run\n"
    assert call("plan", "a.toml") == (2, "", line)
    assert call("plan")[0] == 2


def test_init_lists_every_config_with_its_first_comment(call):
    code, out, _ = call("init")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert list(lines) == [path.stem for path in CONFIGS]
    assert lines["mini-rlmt"] == "RL mid-training in the miniature world, CPU, two to three minutes on two cores"


@pytest.mark.parametrize("target", [[], ["mine.toml"], ["folder"], ["folder/mine.toml"]])
def test_init_copies_a_config(target, call, tmp_path):
    (tmp_path / "folder").mkdir()
    code, out, _ = call("init", "mini-rlmt", *target)
    assert code == 0
    assert Path(out.strip()).read_bytes() == (ROOT / "configs" / "mini-rlmt.toml").read_bytes()


def test_init_overwrites_nothing(call, tmp_path):
    (tmp_path / "mini-rlmt.toml").write_text("mine")
    line = "error: mini-rlmt.toml: exists already and is not overwritten; name another PATH\n"
    assert call("init", "mini-rlmt") == (2, "", line)
    assert (tmp_path / "mini-rlmt.toml").read_text() == "mine"
    assert call("init", "mini-rlm")[2] == "error: unknown config 'mini-rlm'; did you mean 'mini-rlmt'?\n"
    assert call("init", "mini-sft", "nowhere/a.toml")[2] == "error: nowhere: no such folder\n"


def test_sample_shows_thought_and_continuation_apart_and_repeats_itself(model, call):
    argv = ("sample", str(model), "Ana has 2 coins.", "--n", "3", "--max-think", "8", "--max-suffix", "4")
    code, out, _ = call(*argv)
    assert code == 0
    heads = [line for line in out.splitlines() if line.startswith("--- ")]
    assert heads == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]
    assert out.count("thought (") == out.count("continuation (") == 3
    assert call(*argv)[1] == out
    assert call(*argv, "--seed", "1")[1] != out


def test_sample_takes_a_tokenizer_that_spells_the_tags_in_ordinary_tokens(call, tmp_path):
    call("sft", *world.sft_flags(tmp_path), "--fresh.tags=plain")
    capped = ("--max-think", "9", "--max-suffix", "4", "--temperature", "0")
    code, out, _ = call("sample", str(tmp_path / "sft" / "export"), "Ana has 2 coins.", *capped)
    assert code == 0
    assert out.startswith("thought (")


def test_samples_seed_does_not_depend_on_how_many_are_drawn(model, call):
    argv = ("sample", str(model), "Ana has 2 coins.", "--max-think", "8", "--max-suffix", "4")
    assert call(*argv, "--n", "2")[1].startswith("--- 1 of 2\n" + call(*argv)[1])


def test_sample_shows_a_continuation_up_to_a_stop_text(model, call):
    argv = ("sample", str(model), "Ana has 2 coins.", "--n", "64", "--max-think", "60", "--max-suffix", "30")
    whole = [re.split(r"(continuation .*)", one) for one in call(*argv)[1].split("\n--- ")]
    stop = next(letter for _, _, body in whole for letter in body[1:] if letter.isascii() and letter.isalnum())
    stopped = [re.split(r"(continuation .*)", one) for one in call(*argv, "--stop", stop)[1].split("\n--- ")]
    assert len(stopped) == len(whole) == 64
    for (thought, _, body), (same_thought, head, cut) in zip(whole, stopped, strict=True):
        assert same_thought == thought
        assert cut.strip() == body.partition(stop)[0].strip()
        assert head.endswith(", stop)") == (stop in body)
    assert any(cut.strip() and ", stop)" in head for _, head, cut in stopped)


def test_what_sample_cannot_do_is_one_line(model, call, tmp_path):
    assert call("sample", "nowhere", "x")[::2] == (
        2,
        "error: nowhere: no such folder; expected a Hugging Face model folder\n",
    )
    assert call("sample", str(model), "x")[2].endswith(" exceed the model's context of 128; lower --max-think\n")
    assert call("sample", str(model), "x", "--n", "0")[2] == "error: --n: expected at least 1, got 0\n"
    assert call("sample", str(model), "x", "--stop", "")[2].startswith("error: --stop holds '': a stop text has")
    assert call("sample", str(model), "x", "--max-think", "0")[2] == "error: --max-think must be at least 1, got 0\n"


def test_a_wheel_holds_configs_and_every_file_of_the_package(tmp_path):
    """Without csrc, which takes a compiler a minute."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "thinkmid", source / "thinkmid", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "configs", source / "configs")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = tmp_path / "built"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    there = {path.relative_to(built / "thinkmid").as_posix() for path in built.rglob("*") if path.is_file()}
    files = {path for path in (source / "thinkmid").rglob("*") if path.is_file()}
    expected = {path.relative_to(source / "thinkmid").as_posix() for path in files}
    assert {"py.typed", "report/page.css"} <= expected
    assert there == expected | {f"configs/{path.name}" for path in CONFIGS}
    # the installed command finds them where no checkout is
    found = "import thinkmid.cli; print(*thinkmid.cli.configs(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", found], cwd=built, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [path.stem for path in CONFIGS]


def test_letters_in_another_order_are_the_command_that_has_them(call):
    assert "did you mean 'rlmt'?" in call("rmlt")[2]
    assert "did you mean 'rlpt'?" in call("rptl")[2]


@pytest.mark.parametrize("name", ["sft", "rlmt", "rlpt", "eval", "thoughts", "annotate", "compare", "report"])
def test_help_shows_the_command_that_was_typed(name, call):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert out.lower().startswith(f"usage: thinkmid {name} ")


def test_a_config_given_to_another_program_names_its_own(call):
    configs = {"eval": "mini-eval", "rlpt": "mini-rlpt", "rlmt": "mini-rlmt", "sft": "mini-base"}
    for other, config_name in configs.items():
        for name in configs.keys() - {other}:
            code, _, err = call(name, str(ROOT / "configs" / f"{config_name}.toml"))
            assert code == 2
            assert err.endswith(f"; the config is one for thinkmid {other}\n"), (name, other, err)
    # a mistake in the right program's config stays that
    assert call("sft", str(ROOT / "configs" / "mini-base.toml"), "--data.pats=x")[2].endswith(
        "did you mean 'data.paths'?\n"
    )


def test_a_runs_folder_given_as_a_model_names_its_export(call, model):
    said = f"error: {model.parent}: a run's folder; did you mean {model.parent}/export?\n"
    assert call("sample", str(model.parent), "text")[2] == said
    flags = ["--run.folder=r", "--run.steps=1", "--data.paths=x", "--optim.lr=1", f"--model.folder={model.parent}"]
    assert call("rlmt", *flags, "--loss.denom=1")[2] == said
