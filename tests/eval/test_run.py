"""The program: draws, grades, sums up; goes on where it was stopped; grades again."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, exchange, exit_code, flip_bit, random_model
from safetensors.torch import load_file, save_file

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.eval import generate, generations, run
from thinkmid.eval.conditions import KEYS
from thinkmid.eval.config import EvalRun, EvalSampling
from thinkmid.model import weights
from thinkmid.rollout.engine.build import make_engine
from thinkmid.rollout.engine.protocol import seed
from thinkmid.tokenizer import Tokenizer, train_tokenizer
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

    def generate(self, requests, sampling):
        prompts = {}
        for request in requests:
            # each is read once: the same tokens are one prompt
            assert prompts.setdefault(tuple(request.prompt.tokens), request.prompt) is request.prompt
            i, k = self.of_seed[request.seed]  # every sample has a seed of its own
            assert request.prompt.meta["id"] == f"q{i}"
            self.drawn.append((i, k))
            said = 2 * i + 1 if i < RIGHT and k % 4 else 99
            thought = self.text.encode("hm")
            tokens = [*thought, *self.text.close_ids, *self.text.encode(f" They are {said}. Or 5.")]
            n = len(tokens)
            sample = Sample(
                tokens=np.array(tokens, np.int32), logp=np.zeros(n, np.float32), drawn=np.ones(n, bool), finish="eos",
                num_think=len(thought) + len(self.text.close_ids), versions=np.zeros(n, np.int32),
            )  # fmt: skip
            yield [(request, sample)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    train_tokenizer([q["question"] for q in QUESTIONS], 280, tmp_path / "tokenizer")
    text = Tokenizer.load(tmp_path / "tokenizer")
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

HALF = ("--run.samples=2", "--run.ks=1")  # of the samples


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
    assert call(*HALF) == 0
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
        generations.stored(tmp_path, "a", KEYS)


def test_a_set_whose_name_begins_another_sets_name_has_its_own_rows_alone(tmp_path):
    for stem, sample in (("a-000", 0), ("a-001", 1), ("a-2-000", 2)):
        (tmp_path / f"{stem}.jsonl").write_text(json.dumps(ROW | {"sample": sample}) + "\n")
    assert [r["sample"] for r in generations.stored(tmp_path, "a")] == [0, 1]
    assert [r["sample"] for r in generations.stored(tmp_path, "a-2")] == [2]


def test_generations_of_another_sampling_are_not_mixed_in(world, capsys):
    assert call() == 0
    assert call("--sampling.temperature=1.0") == 2
    line = "error: out: drawn with sampling.temperature = 0.6, now 1.0; take another folder\n"
    assert capsys.readouterr().err == line


def test_generations_of_another_engine_are_not_mixed_in(world, capsys):
    assert call(*HALF) == 0
    assert call("--engine.dtype=bfloat16") == 2
    line = "error: out: drawn with engine.dtype = float32, now bfloat16; take another folder\n"
    assert capsys.readouterr().err == line


def test_other_questions_under_the_same_ids_are_not_given_the_old_answers(world, capsys):
    assert call() == 0
    before, num = results(), len(world.drawn)
    other = [q | {"question": f"What is {q['question'][9:]}", "answer": "7"} for q in QUESTIONS]
    Path("set.jsonl").write_text("".join(json.dumps(q) + "\n" for q in other))
    assert call() == 2
    line = "error: out/generations: own: q0 0 was asked in other words then; take another folder\n"
    assert capsys.readouterr().err == line
    assert (results(), len(world.drawn)) == (before, num)
    # gold answers alone may be mended
    Path("set.jsonl").write_text("".join(json.dumps(q | {"answer": "99"}) + "\n" for q in QUESTIONS))
    assert call() == 0
    assert (len(world.drawn), results() == before) == (num, False)


def test_a_config_that_was_written_anew_is_the_same_model(world):
    assert call(*HALF) == 0
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "9.9"}, indent=7))
    assert call() == 0
    assert len(world.drawn) == 4 * len(QUESTIONS)


@pytest.mark.parametrize("part", ["weights", "tokenizer", "config"])
def test_a_model_exchanged_in_its_folder_is_not_given_the_old_ones_score(world, capsys, part):
    assert call(*HALF) == 0
    before, num = results(), len(world.drawn)
    exchange(Path("model"), part)
    assert call() == 2
    line = f"error: out: drawn by another model (changed: {part} of model); take another folder\n"
    assert capsys.readouterr().err == line
    assert (results(), len(world.drawn)) == (before, num)
    assert before["content"].keys() == {"weights", "tokenizer", "config"}
    assert call(*HALF, "--run.regrade=true") == 0  # it reads no model; the numbers are of the old one
    assert results() == before


def test_other_end_of_text_ids_are_another_model(world, capsys):
    assert call() == 0
    Path("model/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.1}))
    assert call() == 0  # 5 is a word of this tokenizer, which names its end itself: 0
    path = Path("model/tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    assert call() == 2
    assert "(changed: tokenizer of model)" in capsys.readouterr().err


def test_the_same_model_in_another_place_or_touched_is_the_same_model(world):
    assert call(*HALF) == 0
    shutil.copytree("model", "moved")
    assert call("--model.folder=moved") == 0
    assert len(world.drawn) == 4 * len(QUESTIONS)
    for path in Path("model").iterdir():
        os.utime(path, (1, 1))
    assert call() == 0
    assert len(world.drawn) == 4 * len(QUESTIONS)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_model_is_not_evaluated(world, capsys, sealed):
    flip_bit(Path("model/model.safetensors"))
    if not sealed:
        tensors = load_file("model/model.safetensors")
        tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, "model/model.safetensors")
        Path("model/thinkmid.json").unlink()
    assert call() == 2
    why = "does not match its sha256" if sealed else "model.norm.weight holds values that are not finite"
    err = capsys.readouterr().err
    assert err.startswith(f"error: model/model.safetensors: {why}")
    assert err.count("\n") == 1
    assert not world.drawn


def test_a_model_without_hashes_of_its_own_is_hashed(world, capsys):
    Path("model/thinkmid.json").unlink()
    assert call(*HALF) == 0
    assert call() == 0
    flip_bit(Path("model/model.safetensors"))
    assert call() == 2
    assert "(changed: weights of model)" in capsys.readouterr().err


def test_generations_of_a_model_known_by_its_path_alone_are_graded_and_not_added_to(world, capsys):
    assert call() == 0
    budgets = "max_think=20, max_suffix=16, force_close=False, max_batch=256"
    sampling = f"Sampling(temperature=0.6, top_k=0, top_p=0.95, {budgets})"
    Path("out/drawn-by.json").write_text(json.dumps(["model", "plain-think", sampling, 0]))
    found = results()
    assert call() == 2
    line = "error: out: which weights drew what is there is unknown; run.regrade true grades it still\n"
    assert capsys.readouterr().err == line
    assert call("--run.regrade=true") == 0
    assert results() == found | {"content": None}
    assert call("--run.regrade=true", "--sampling.max_think=21") == 2
    assert call("--run.regrade=true", "--model.folder=moved") == 2


@pytest.mark.parametrize(("dtype", "num"), [("bfloat16", 1), ("float32", 0)])
def test_bf16_on_a_cpu_without_its_units_is_said_and_still_what_runs(world, capsys, monkeypatch, dtype, num):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert call(f"--engine.dtype={dtype}") == 0
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: engine.dtype bfloat16: ")
    ]
    assert len(said) == num
    assert json.loads(Path("out/drawn-by.json").read_text())["engine.dtype"] == dtype


def test_what_one_sample_cannot_tell_is_null_in_strict_json(world):
    assert call("--run.samples=1", "--run.ks=1") == 0
    found = json.loads(Path("out/results.json").read_text(), parse_constant=pytest.fail)
    assert found["sets"]["own"]["se_rerun"] is None
    assert found["sets"]["own"]["mean"] == 0.0  # the first samples are wrong


def test_the_table_explains_a_zero(world, capsys):
    world.text = replace(world.text, close_ids=[])
    assert call() == 0
    head, row = capsys.readouterr().out.splitlines()[1:3]
    assert head.split()[-4:] == ["unparsed", "truncated", "unclosed", "thinking"]
    assert row.split()[1] == "0.000"
    assert row.split()[-2] == f"{results()['sets']['own']['unclosed']:.1%}" == "100.0%"


@pytest.mark.parametrize(("template", "budget"), [("plain", 20 + 16), ("plain-think", 20)])
def test_an_answer_without_a_thought_has_the_budget_of_both(world, monkeypatch, template, budget):
    monkeypatch.setattr(generate, "make_engine", make_engine)
    flags = ["--run.samples=1", "--run.ks=1", "--sampling.temperature=0", f"--data.template={template}"]
    assert call(*flags) == 0  # a random model, which seldom ends
    (file,) = Path("out/generations").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    endless = [row for row in rows if row["finish"] != "eos" and not re.search("</?think>", row["text"])]
    assert len(endless) > 5
    assert {row["tokens"] for row in endless} == {budget}
    assert results().get("max_direct") == (36 if template == "plain" else None)
    graded = [json.loads(line) for line in Path("out/graded/own.jsonl").read_text().splitlines()]
    ids = {row["id"] for row in endless}
    assert {row["unclosed"] for row in graded if row["question"] in ids} == {template == "plain-think"}
    assert {row["truncated"] for row in graded if row["question"] in ids} == {True}


class GoesOn(Scripted):
    """Answers, then asks and answers the next question, as far as it is let."""

    before = "hm\n\nPuzzle: or not?</think>"
    after = "\nBecause they are.\n\nPuzzle: How many are 2 and 4?\nAnswer:<think>hm</think>\nAnswer: 6"

    def generate(self, requests, sampling):
        assert sampling.stop == ("\nQuestion:", "\n\nPuzzle:")
        for request in requests:
            i, _ = self.of_seed[request.seed]
            said = 2 * i + 1 if i < RIGHT else 99
            tokens = self.text.encode(f"{self.before} {said}{self.after}")
            n = len(tokens)
            sample = Sample(
                tokens=np.array(tokens, np.int32), logp=np.zeros(n, np.float32), drawn=np.ones(n, bool), finish="stop",
                num_think=n, versions=np.zeros(n, np.int32),
            )  # fmt: skip
            yield [(request, sample)]


@pytest.mark.parametrize("template", ["plain", "plain-think"])
def test_an_answer_is_graded_up_to_the_next_question_and_votes_and_shares_go_by_it(world, monkeypatch, template):
    engine = GoesOn(world.text)
    if template == "plain":
        engine.before = ""
    monkeypatch.setattr(generate, "make_engine", lambda *_, **__: engine)
    flags = ["--verify.kind=math", f"--data.template={template}", '--sampling.stop=["\\n\\nPuzzle:"]']
    assert call(*flags) == 0
    found = results()["sets"]["own"]
    assert found["mean"] == found["pass@4"] == found["maj@4"] == pytest.approx(RIGHT / len(QUESTIONS))
    assert found["unparsed"] == found["truncated"] == found["unclosed"] == 0
    assert results()["stop"] == ["\nQuestion:", "\n\nPuzzle:"]
    answers = [json.loads(line)["answer"] for line in Path("out/graded/own.jsonl").read_text().splitlines()]
    assert answers == [str(2 * i + 1 if i < RIGHT else 99) for i in sorted(range(12), key=str) for _ in range(4)]


def test_generations_of_before_stop_texts_are_graded_up_to_one_and_not_added_to(world, capsys):
    assert call(*HALF, "--data.template_stop=false") == 0
    assert "stop" not in results()
    mark = json.loads(Path("out/drawn-by.json").read_text())
    assert mark.pop("sampling.stop") is None  # as if it had never been there
    Path("out/drawn-by.json").write_text(json.dumps(mark))
    assert call() == 2
    assert "out: drawn with sampling.stop = None, now ['\\nQuestion:']; take" in capsys.readouterr().err
    assert call(*HALF, "--run.regrade=true") == 0
    assert results()["stop"] == ["\nQuestion:"]
    assert call("--data.template_stop=false") == 0
    assert call("--sampling.stop=Q:", "--data.template_stop=false") == 2
    assert "drawn with sampling.stop = None, now ['Q:']" in capsys.readouterr().err


def test_stop_texts_of_the_template_and_ones_own_are_all_stored(world, capsys):
    assert call('--sampling.stop=["\\n\\nQ:", "\\nQuestion:"]') == 0
    stop = ["\nQuestion:", "\n\nQ:"]
    assert results()["stop"] == json.loads(Path("out/drawn-by.json").read_text())["sampling.stop"] == stop
    assert call() == 2
    assert "drawn with sampling.stop = ['\\nQuestion:', '\\n\\nQ:'], now ['\\nQuestion:']" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["", "{", "{}", "\xff", '{"run.seed": 0}', None])
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


CHAT = "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}assistant:"


def write_shots(answer):
    Path("shots.jsonl").write_text(json.dumps({"question": "How many are 90 and 91?", "answer": answer}))


@pytest.mark.parametrize(
    ("flags", "other", "line"),
    [
        (["--data.template=chat", "--data.system=Count."], "--data.system=Think.", "drawn with data.system = Count."),
        (["--data.shots=shots.jsonl"], "--data.shots=", "drawn with data.shots = "),
        (["--data.shots=shots.jsonl"], "", "drawn with data.shots = "),
        (["--data.template=chat"], "--data.template=chat-think", "drawn with data.template = chat"),
    ],
)
def test_samples_asked_in_other_words_are_not_mixed(world, capsys, flags, other, line):
    Path("model/chat_template.jinja").write_text(CHAT)
    write_shots("181")
    assert call(*HALF, *flags) == 0
    num = len(world.drawn)
    if not other:  # the file is another one under its name
        write_shots("They are 181.")
    for more in ([], [*HALF, "--run.regrade=true"]):
        capsys.readouterr()
        assert call(*flags, *([other] if other else []), *more) == 2
        assert f"out: {line}" in capsys.readouterr().err
    assert len(world.drawn) == num
    write_shots("181")
    assert call(*flags) == 0
    assert len(world.drawn) == 2 * num


def test_a_mark_of_before_there_were_examples_still_fits(world):
    assert call(*HALF) == 0
    mark = json.loads(Path("out/drawn-by.json").read_text())
    assert mark.pop("data.shots") == mark.pop("data.system") == ""
    Path("out/drawn-by.json").write_text(json.dumps(mark))
    assert call() == 0


def test_a_chat_is_asked_through_the_models_template_and_graded(world, capsys):
    Path("model/chat_template.jinja").write_text(CHAT)
    Path("shots.jsonl").write_text(json.dumps({"question": QUESTIONS[3]["question"], "answer": "7"}))
    assert call("--data.template=chat-think", "--data.system=Count.", "--data.shots=shots.jsonl") == 0
    assert results()["sets"]["own"]["mean"] == pytest.approx(RIGHT * 3 / (len(QUESTIONS) * 4))
    assert results()["system"] == "Count."
    assert len(results()["shots"]) == 16
    assert "own: 1 of 12 questions are examples of shots.jsonl too" in capsys.readouterr().out
    text, end = world.text, [world.text.eos_ids[0]]
    asked = {row["id"]: row["asked"] for row in generations.stored(Path("out/generations"), "own")}
    for q in QUESTIONS:
        shot = [*text.encode(f"user:{QUESTIONS[3]['question']}"), *end, *text.encode("assistant:7"), *end]
        shot *= q is not QUESTIONS[3]
        words = [*text.encode("system:Count."), *end, *shot, *text.encode(f"user:{q['question']}"), *end]
        ids = [*words, *text.encode("assistant:"), *text.open_ids]
        assert asked[q["id"]] == generate.asked_of(generate.Prompt(id="", tokens=ids))


def test_a_thought_that_the_models_template_opens_counts_as_opened(world):
    Path("model/chat_template.jinja").write_text(CHAT + "<think>\n")
    world.text = replace(world.text, close_ids=[])  # it never closes a thought: all are wrong
    assert call("--data.template=chat") == 0
    assert results()["sets"]["own"]["unclosed"] == 1
    assert results()["sets"]["own"]["mean"] == 0
    assert call("--data.template=chat", "--run.regrade=true") == 0
    assert results()["sets"]["own"]["unclosed"] == 1


def tree():
    return {path: path.is_file() and path.read_bytes() for path in Path("..").rglob("*")}


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--data.sets=set.jsonl", "sets: 'set.jsonl' must be LAYOUT=PATH or NAME:LAYOUT=PATH"),
        ("--data.sets=own:gsm9k=set.jsonl", "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
        ("--data.template=boxt", "unknown template 'boxt'"),
        ("--data.template=chat", "model: no chat template in chat_template.jinja or tokenizer_config.json; expected"),
        ("--data.shots=none.jsonl", "none.jsonl: no such file or folder"),
        ("--run.samples=0", "run: samples must be at least 1, got 0"),
        ("--run.ks=1,5", "run: ks holds 5, samples is 4: pass@k needs k from 1 to samples; set run.ks"),
        ("--run.ks=0,4", "run: ks holds 0, samples is 4: pass@k needs k from 1 to samples; set run.ks"),
        ("--data.sets=a:questions=none.jsonl", "none.jsonl"),
        ("--data.sets=a:questions=" + "x" * 5000, "no such file or folder"),
        ("--data.sets=questions=", "sets: 'questions=' must be LAYOUT=PATH or NAME:LAYOUT=PATH"),
        *[
            (f"--data.sets={name}:questions=set.jsonl", "a name is 1 to 60 letters")
            for name in ("", "../../b", "a/b", "a[x]*", ".a", "-a", "a" * 61)
        ],
        ("--sampling.stop=<think>", "sampling: stop holds '<think>'"),
        ("--sampling.stop=\\n\\nQ:", "a backslash and an n, no line break"),
        ("--run.seed=-1", "run: seed must be at least 0, got -1"),
        ("--run.regrade=true", "0 of 48 samples of own; eval.run without regrade draws them"),
        ("--model.folder=nope", "nope: no such folder"),
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


def test_help_is_about_evaluation_and_not_about_training():
    comments = config._comments(EvalSampling) | config._comments(EvalRun)
    assert {"temperature", "top_k", "top_p", "force_close", "ks"} <= comments.keys()
    assert not re.search(r"gradient|\bratio|trainer", " ".join(comments.values()))
