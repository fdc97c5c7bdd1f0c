"""Config: what wins over what, which line each mistake earns, and that a saved config comes back equal."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import thinkmid
from thinkmid.config import environment, load, save_run, to_toml
from thinkmid.errors import UserError

PROGRAM = '''
from dataclasses import dataclass
from typing import Literal
from thinkmid.config import load, run, to_toml

@dataclass(frozen=True, kw_only=True)
class Loss:
    denom: float  # tokens that a full answer has
    kind: Literal["clip", "plain"] = "clip"

@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW."""

    lr: float = 1e-6  # peak learning rate, > 0
    # Adam's two decay rates,
    # first and second moment
    betas: tuple[float, ...] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be > 0,\\nnot {self.lr}")

@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 1.0  # of the softmax
    num_samples: int = 8
    greedy: bool = False
    stop: str = "."

@dataclass(frozen=True, kw_only=True)
class Config:
    loss: Loss
    optim: Optim = Optim()
    sampling: Sampling = Sampling()

def main(argv):
    cfg, dry_run = load(Config, argv, prog="python -m tiny", description="A tiny program.")
    print(to_toml(cfg))

run(main)
'''


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str = "part"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Deep:
    rate: float = 0.5
    note: str = ""
    part: Part = Part()


@dataclass(frozen=True, kw_only=True)
class Nested:
    steps: int
    on: bool = False
    word: str = ""
    mode: Literal["a", "b", "3"] = "a"
    rates: tuple[float, ...] = ()
    counts: tuple[int, ...] = (1, 16)
    words: tuple[str, ...] = ("one", "two")
    modes: tuple[Literal["a", "b"], ...] = ()
    deep: Deep = Deep(rate=0.25, note="kept", part=Part(name="own"))


def read(*argv, cls=Nested):
    return load(cls, argv, prog="p", description="d")[0]


@pytest.fixture
def tiny(tmp_path):
    """Runs the tiny program in an empty folder: tiny(*argv, file=text, env=...)."""
    (tmp_path / "tiny.py").write_text(PROGRAM)
    (tmp_path / "configs").mkdir()
    root = str(Path(thinkmid.__file__).parents[1])

    def run(*argv, files=(), **env):
        for name, text in files:
            (tmp_path / name).write_text(textwrap.dedent(text))
        env = {**os.environ, "PYTHONPATH": root, **env}
        return subprocess.run([sys.executable, "tiny.py", *argv], capture_output=True, text=True, cwd=tmp_path, env=env)

    return run


A = "configs/a.toml"
OK = "[loss]\ndenom = 3\n"
MISTAKES = [
    (
        OK + "[sampling]\ntemprature = 1",
        (),
        f"{A}: unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?",
    ),
    (OK + "[samplng]", (), f"{A}: unknown key 'samplng'; did you mean 'sampling'?"),
    (OK, ("--lr", "1"), "--lr: unknown key 'lr'; did you mean 'optim.lr'?"),
    (OK, ("--optim.lr", "fast"), "--optim.lr: expected a number, got 'fast'"),
    (OK, ("--optim.lr=nan",), "--optim.lr: expected a finite number, got nan"),
    (OK, ("--optim.lr",), "--optim.lr: expected a value"),
    (OK, ("--optim", "3"), "--optim: expected a table, got '3'"),
    (OK, ("--optim.betas", "0.9,fast"), "--optim.betas: expected a number, got 'fast'"),
    (OK, ("--optim.betas", "[1, 2"), "--optim.betas: expected a list, got '[1, 2'"),
    (OK + "[optim]\nbetas = 0.9", (), f"{A}: optim.betas: expected a list, got 0.9"),
    (OK + "[optim]\nbetas = [0.9, true]", (), f"{A}: optim.betas[1]: expected a number, got True"),
    (OK + "[optim]\nlr = inf", (), f"{A}: optim.lr: expected a finite number, got inf"),
    (OK + "[optim]\nlr = -1", (), "optim: lr must be > 0, not -1.0"),
    (OK + "[sampling]\nnum_samples = 2.0", (), f"{A}: sampling.num_samples: expected an integer, got 2.0"),
    (OK + "[sampling]\ngreedy = 1", (), f"{A}: sampling.greedy: expected true or false, got 1"),
    (OK + "[sampling]\nstop = 1", (), f"{A}: sampling.stop: expected a string, got 1"),
    (OK + "[sampling]\nstop = 07:30:00", (), f"{A}: sampling.stop: expected a string, got datetime.time(7, 30)"),
    (OK + 'kind = "ppo"', (), f"{A}: loss.kind: expected 'clip' or 'plain', got 'ppo'"),
    ("", (), "missing key 'loss.denom': tokens that a full answer has"),
    (OK, ("configs/b.toml",), "configs/b.toml: no such file"),
    (OK, ("configs",), "configs: cannot read it: Is a directory"),
    ('"a\\n\\u001b[2J" = 1', (), f"{A}: unknown key 'a [2J'"),
    (
        "\n" * 6 + "[loss]]\n",
        (),
        f"{A}:7: malformed TOML: Expected newline or end of document after a statement (at line 7, column 7)",
    ),
    ("\n\nx = [1,", (), f"{A}:3: malformed TOML: Invalid value (at end of document)"),
    (
        OK + f"[sampling]\nnum_samples = 0x{'f' * 5000}",
        (),
        f"{A}: sampling.num_samples: expected an integer of 64 bits, got thousands of digits",
    ),
    (OK + '[sampling]\nstop = "\\u0000"', (), f"{A}: sampling.stop: expected a string without NUL, got '\\x00'"),
    (OK, ("--optim.betas=" + "[" * 5000,), f"--optim.betas: expected a list, got '{'[' * 76}..."),
]


@pytest.mark.parametrize(("text", "argv", "line"), MISTAKES, ids=[line[:40] for *_, line in MISTAKES])
def test_a_mistake_earns_one_line_and_exit_code_2(tiny, text, argv, line):
    done = tiny(A, *argv, files=[(A, text)])
    assert (done.stderr, done.stdout, done.returncode) == (f"error: {line}\n", "", 2)


def shell(code, redirect, **env):
    command = f"set -o pipefail; {sys.executable} -c '{code}' {redirect}"
    env = {**os.environ, "PYTHONPATH": str(Path(thinkmid.__file__).parents[1]), **env}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)


FULL = "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("main", "redirect", "code", "err"),
    [
        ("print(1)", ">&-", 0, ""),
        ("print(1)", ">/dev/full", 2, FULL),
        ("print(1)", "| sleep 0", 141, ""),
        ("print(chr(233))", "| cat", 0, ""),
        ('open("/no/file")', "", 2, "error: /no/file: No such file or directory\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(main, redirect, code, err):
    program = f"from time import sleep; from thinkmid.config import run; run(lambda argv: (sleep(.1), {main}) and 0)"
    done = shell(program, redirect, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (code, err)


@pytest.mark.parametrize("redirect", [">&-", ">/dev/full", "| sleep 0"])
def test_a_run_does_not_end_because_nobody_reads_its_lines(tmp_path, redirect):
    lines = 'log.write(step, {"loss": 0.5}), log.say(chr(233))'
    main = f'with Log("{tmp_path}") as log: return [None for step in (1, 2, 3) if ({lines}) == 0] or 0'
    program = f"from thinkmid.config import run; from thinkmid.run.log import Log\ndef main(argv):\n {main}\nrun(main)"
    done = shell(program, redirect, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_each_of_several_ranks_says_its_own_error_by_number(tiny):
    alone, among = tiny("no.toml", RANK="0", WORLD_SIZE="1"), tiny("no.toml", RANK="1", WORLD_SIZE="2")
    assert (alone.stderr, among.stderr) == tuple(f"error{who}: no.toml: no such file\n" for who in ("", " (rank 1)"))
    assert alone.returncode == among.returncode == 2


def test_ctrl_c_exits_with_130(tmp_path):
    code = "import time; from thinkmid.config import run; run(lambda argv: (print('up', flush=True), time.sleep(60)))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.readline()
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=20) == 130
        assert program.stderr.read() == b""


def test_help_shows_every_key_with_its_comment_and_default(tiny):
    done = tiny("--help", COLUMNS="200")
    words = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0
    for phrase in (
        "python -m tiny",
        "A tiny program.",
        "--loss.denom FLOAT tokens that a full answer has (required)",
        "--loss.kind clip|plain (default: clip)",
        "--optim.lr FLOAT peak learning rate, > 0 (default: 1e-06)",
        "--optim.betas FLOAT,... Adam's two decay rates, first and second moment (default: 0.9,0.95)",
        "--sampling.num_samples INT (default: 8)",
        "--sampling.greedy true|false (default: false)",
        "--dry-run",
    ):
        assert phrase in words


def test_importing_config_imports_nothing_heavy():
    code = "import sys, thinkmid.config; print([m for m in ('torch', 'tyro', 'rich', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_later_files_win_over_earlier_and_flags_over_files(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 1\nword = 'a'\nrates = [1, 2]\n[deep]\nrate = 1\nnote = 'a'")
    (tmp_path / "b.toml").write_text("word = 'b'\nrates = [3]\n[deep]\nrate = 2")
    a, b = str(tmp_path / "a.toml"), str(tmp_path / "b.toml")
    cfg = read("--deep.rate", "3", a, "--on", b)
    assert (cfg.steps, cfg.word, cfg.rates, cfg.on) == (1, "b", (3.0,), True)
    assert (cfg.deep.rate, cfg.deep.note) == (3.0, "a")
    assert read(b, a).word == "a"
    assert read(a, "--steps=1", "--steps", "2").steps == 2


def test_a_partly_given_section_keeps_the_rest_of_its_own_default():
    assert read("--steps", "1", "--deep.rate", "9").deep == Deep(rate=9.0, note="kept", part=Part(name="own"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--on"], {"on": True}),
        (["--on", "--word", "x"], {"on": True, "word": "x"}),
        (["--on", "false"], {"on": False}),
        (["--on=true"], {"on": True}),
        (["--word", "3"], {"word": "3"}),
        (["--word=--a=b"], {"word": "--a=b"}),
        (["--mode", "3"], {"mode": "3"}),
        (["--modes", "b,a"], {"modes": ("b", "a")}),
        (["--counts", "3"], {"counts": (3,)}),
        (["--rates", "-1,2e3"], {"rates": (-1.0, 2000.0)}),
        (["--rates", "[1, 2.5]"], {"rates": (1.0, 2.5)}),
        (["--words="], {"words": ()}),
        (["--words", '["a,b"]'], {"words": ("a,b",)}),
        (["--deep.part.name", "x"], {"deep": Deep(rate=0.25, note="kept", part=Part(name="x"))}),
        (["--deep.note", "none"], {"deep": Deep(rate=0.25, note="none", part=Part(name="own"))}),
    ],
)
def test_flags_are_read_by_the_type_of_their_field(argv, expected):
    assert read("--steps", "1", *argv) == replace(Nested(steps=1), **expected)


def test_dashes_stand_for_underscores_and_dry_run_is_reported(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Flat:
        max_new_tokens: int = 1

    loaded = load(Flat, ["--max-new-tokens", "7", "--dry-run"], prog="p", description="d")
    assert loaded == (Flat(max_new_tokens=7), True)
    assert load(Flat, [], prog="p", description="d") == (Flat(), False)


def test_a_byte_order_mark_is_none_of_the_text(tmp_path):
    (tmp_path / "a.toml").write_text("\ufeffsteps = 1")
    assert read(str(tmp_path / "a.toml")).steps == 1


def test_integers_that_no_float_or_register_holds_are_refused():
    with pytest.raises(UserError, match=r"--deep.rate: expected a finite number, got inf"):
        read("--steps", "1", "--deep.rate", "1" + "0" * 400)
    with pytest.raises(UserError, match=r"--steps: expected an integer of 64 bits, got 9223372036854775808"):
        read("--steps", str(2**63))
    assert read("--steps", str(2**63 - 1)).steps == 2**63 - 1


@pytest.mark.parametrize("value", ["3", "3.0", "true", "'c'", "['a']"])
def test_a_choice_is_taken_by_value_and_type(tmp_path, value):
    (tmp_path / "a.toml").write_text(f"steps = 1\nmode = {value}")
    with pytest.raises(UserError, match="expected 'a' or 'b' or '3', got"):
        read(str(tmp_path / "a.toml"))


TEXT = st.text(max_size=20).filter(lambda s: "\0" not in s)
INTEGERS = st.integers(1 - 2**63, 2**63 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
DEEPS = st.builds(Deep, rate=FINITE, note=TEXT, part=st.builds(Part, name=TEXT, weight=FINITE))
NESTEDS = st.builds(
    Nested,
    steps=INTEGERS,
    on=st.booleans(),
    word=TEXT,
    mode=st.sampled_from(["a", "b", "3"]),
    rates=st.lists(FINITE, max_size=4).map(tuple),
    counts=st.lists(INTEGERS, max_size=4).map(tuple),
    words=st.lists(TEXT, max_size=4).map(tuple),
    modes=st.lists(st.sampled_from(["a", "b"]), max_size=2).map(tuple),
    deep=DEEPS,
)


@given(NESTEDS)
def test_a_saved_config_loads_into_an_equal_one(tmp_path_factory, cfg):
    path = tmp_path_factory.getbasetemp() / "saved.toml"
    path.write_text(to_toml(cfg), encoding="utf-8", newline="\n")
    assert read(str(path)) == cfg


def test_a_saved_run_says_how_to_repeat_it(tmp_path):
    cfg = Nested(steps=3, word="é\x7f")
    save_run(tmp_path / "run", cfg, environment())
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert read(str(tmp_path / "run" / "config.toml")) == cfg
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.toml", "env.json"]
    assert env["versions"]["python"] == sys.version.split()[0]
    assert env["versions"]["thinkmid"] == thinkmid.__version__
    assert env["argv"] == sys.orig_argv


def test_the_git_state_of_the_working_tree_is_recorded(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *args], check=True)

    monkeypatch.setattr("thinkmid.config.__file__", str(tmp_path / "config.py"))
    assert (environment()["git_revision"], environment()["git_dirty"]) == (None, None)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    head = (tmp_path / ".git" / (tmp_path / ".git" / "HEAD").read_text().split()[1]).read_text().strip()
    assert (environment()["git_revision"], environment()["git_dirty"]) == (head, False)
    (tmp_path / "new").write_text("")
    assert environment()["git_dirty"] is True
