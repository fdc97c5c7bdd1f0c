"""The program: draws, grades, sums up; goes on where it was stopped; grades again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, exit_code, random_model

from thinkmid.errors import UserError
from thinkmid.eval import generate, run
from thinkmid.eval.conditions import KEYS
from thinkmid.model import weights
from thinkmid.rollout.engine import seed
from thinkmid.text import Text, train_tokenizer
from thinkmid.types import Sample

QUESTIONS = [{"id": f"q{i}", "question": f"How many are {i} and {i + 1}?", "answer": str(2 * i + 1)} for i in range(12)]
RIGHT = 7  # questions that the scripted model knows


class Scripted:
    """Right on the first RIGHT questions, in three of four samples; thinks for five tokens."""

    def __init__(self, text):
        self.text, self.drawn = text, []
        self.of_seed = {seed(0, 0, f"q{i}/{k}", 0): (i, k) for i in range(len(QUESTIONS)) for k in range(4)}

    def load_weights(self, named, version):
        list(named)

    def generate(self, prompts, seeds_P_G, sampling, stop=lambda: False):
        assert len({tuple(prompt.tokens) for prompt in prompts}) == len(prompts)  # each is read once
        for p, g, s in ((p, g, s) for p, seeds in enumerate(seeds_P_G) for g, s in enumerate(seeds)):
            i, k = self.of_seed[s]  # every sample has a seed of its own
            assert prompts[p].meta["id"] == f"q{i}"
            self.drawn.append((i, k))
            said = 2 * i + 1 if i < RIGHT and k % 4 else 99
            thought = self.text.encode("hm")
            tokens = [*thought, *self.text.close_ids, *self.text.encode(f" They are {said}. Or 5.")]
            n = len(tokens)
            sample = Sample(
                tokens=np.array(tokens, np.int32), logp=np.zeros(n, np.float32), drawn=np.ones(n, bool), finish="eos",
                num_think=len(thought) + len(self.text.close_ids), version=0,
            )  # fmt: skip
            yield p, g, sample


@pytest.fixture
def world(tmp_path, monkeypatch):
    train_tokenizer([q["question"] for q in QUESTIONS], 280, tmp_path / "tokenizer")
    text = Text.load(tmp_path / "tokenizer")
    cfg = TINY.__class__(**{**TINY.__dict__, "vocab": text.vocab_size, "eos_ids": text.eos_ids, "max_positions": 256})
    named = weights.stream(random_model(cfg))
    weights.save(tmp_path / "model", cfg, named, dtype=torch.float32, extra_files=tmp_path / "tokenizer")
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    engine = Scripted(text)
    monkeypatch.setattr(generate, "make_engine", lambda *_, **__: engine)
    monkeypatch.chdir(tmp_path)
    return engine


FLAGS = [
    *(
        "--run.folder=out",
        "--run.samples=4",
        "--run.ks=1,4",
        "--model.folder=model",
        "--data.sets=own:questions=set.jsonl",
    ),
    *("--data.template=plain-think", "--verify.kind=first-sentence", "--sampling.max_think=20"),
]


def call(*flags):
    return exit_code(run, [*FLAGS, *flags])


def results():
    return json.loads(Path("out/results.json").read_text())


def test_a_model_of_known_accuracy_gets_that_accuracy(world):
    assert call() == 0
    found = results()["sets"]["own"]
    assert found["mean"] == pytest.approx(RIGHT * 3 / (len(QUESTIONS) * 4))
    assert found["low"] < found["mean"] < found["high"]
    assert found["pass@4"] == pytest.approx(RIGHT / len(QUESTIONS))
    assert found["maj@4"] == pytest.approx(RIGHT / len(QUESTIONS))
    assert found["unparsed"] == found["truncated"] == found["unclosed"] == 0
    assert found["mean_think"] == len(world.text.encode("hm")) + len(world.text.close_ids)
    assert results()["mean"] == found["mean"]


def test_what_is_there_is_not_drawn_again_and_a_torn_line_is(world):
    assert call("--run.samples=2") == 0
    assert len(world.drawn) == 2 * len(QUESTIONS)
    assert call() == 0  # two more samples of each
    assert len(world.drawn) == 4 * len(QUESTIONS)
    whole = results()
    (file,) = Path("out/generations").glob("*.jsonl")
    file.write_text(file.read_text()[:-30])
    assert call() == 0
    assert len(world.drawn) == 4 * len(QUESTIONS) + 1
    assert results() == whole


def test_generations_are_graded_again_without_an_engine(world, capsys):
    assert call() == 0
    first, num = results(), len(world.drawn)
    (file,) = Path("out/generations").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"].replace("99", "x")  # no number in their answers any more
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert call("--run.regrade=true") == 0
    assert len(world.drawn) == num
    assert results()["sets"]["own"]["unparsed"] > first["sets"]["own"]["unparsed"]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]))
    assert call("--run.regrade=true") == 2
    assert "47 of 48 samples of own" in capsys.readouterr().err


ROW = {"id": "q", "sample": 0, "text": "", "finish": "eos", "num_think": 0, "ids": [5]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, None) for name in (*ROW, "condition", "thought", "given")],
        *[("id", 3), ("id", []), ("sample", "0"), ("sample", True), ("sample", -1), ("text", {}), ("finish", 1)],
        *[("num_think", 1.5), ("num_think", 10**400), ("ids", "5"), ("ids", ["5"]), ("ids", [-1]), ("ids", [2**40])],
    ],
)
def test_a_stored_row_that_nobody_wrote_so_is_named(tmp_path, field, value):
    row = ROW | {"condition": "own", "thought": "", "given": 0}
    older = {name: value for name, value in row.items() if name != "ids"}
    lines = (json.dumps(r) + "\n" for r in (older, row, row | {field: value}))
    (tmp_path / "a-000.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=f"a-000.jsonl:3: '{field}' is missing or not of its kind"):
        generate.stored(tmp_path, "a", KEYS)


def test_a_set_whose_name_begins_another_sets_name_has_its_own_rows_alone(tmp_path):
    for stem, sample in (("a-000", 0), ("a-001", 1), ("a-2-000", 2)):
        (tmp_path / f"{stem}.jsonl").write_text(json.dumps(ROW | {"sample": sample}) + "\n")
    assert [r["sample"] for r in generate.stored(tmp_path, "a")] == [0, 1]
    assert [r["sample"] for r in generate.stored(tmp_path, "a-2")] == [2]


def test_generations_of_another_sampling_are_not_mixed_in(world, capsys):
    assert call() == 0
    assert call("--sampling.temperature=1.0") == 2
    line = "error: out: drawn with sampling.temperature = 0.6, now 1.0; take another folder\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("mark", ["", "{", "\xff", '{"run.seed": 0}', None])
def test_a_damaged_mark_is_named_as_what_it_is(world, capsys, mark):
    path = Path("out/drawn-by.json")
    path.parent.mkdir()
    path.mkdir() if mark is None else path.write_text(mark, "latin-1")
    assert call() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out/drawn-by.json: ")
    assert err.count("\n") == 1


def test_a_second_process_is_refused_and_the_first_goes_on(world, capsys, monkeypatch):
    draw, codes = world.generate, []

    def meanwhile(*args):
        codes.append(call())
        yield from draw(*args)

    monkeypatch.setattr(world, "generate", meanwhile)
    assert call() == 0
    assert codes == [2]
    assert capsys.readouterr().err == "error: out: another process works there\n"
    assert len(world.drawn) == 4 * len(QUESTIONS)


def tree():
    return {path: path.is_file() and path.read_bytes() for path in Path("..").rglob("*")}


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--data.sets=set.jsonl", "sets: 'set.jsonl' must be LAYOUT=PATH or NAME:LAYOUT=PATH"),
        ("--data.sets=own:gsm9k=set.jsonl", "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
        ("--data.template=boxt", "unknown template 'boxt'"),
        ("--run.samples=0", "samples 0"),
        ("--data.sets=a:questions=none.jsonl", "none.jsonl"),
        ("--data.sets=a:questions=" + "x" * 5000, "no such file or folder"),
        ("--data.sets=questions=", "sets: 'questions=' must be LAYOUT=PATH or NAME:LAYOUT=PATH"),
        *[
            (f"--data.sets={name}:questions=set.jsonl", "a name is 1 to 60 letters")
            for name in ("", "../../b", "a/b", "a[x]*", ".a", "-a", "a" * 61)
        ],
        ("--run.seed=-1", "run: seed must be at least 0, got -1"),
        ("--run.regrade=true", "0 of 48 samples of own; eval.run without regrade draws them"),
        ("--model.folder=nope", "nope/config.json"),
        ("--run.folder=set.jsonl", "set.jsonl: cannot be written (File exists)"),
        ("--run.folder=theirs", "theirs: holds the run of another program; take another folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(world, capsys, flag, line):
    Path("theirs").mkdir()
    Path("theirs/config.toml").touch()
    before = tree()
    assert call(flag) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert tree() == before
    assert call() == 0
