"""The probe: an engine that is known to read its thought is found to read it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, exchange, exit_code, random_model

from thinkmid.eval import generate, run, thoughts
from thinkmid.eval.conditions import IDLE, thought_of
from thinkmid.model import weights
from thinkmid.rollout.engine.protocol import seed
from thinkmid.rollout.judge.rule import numbers_of
from thinkmid.thoughts import CLOSE, OPEN
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.types import Sample

K = 4
RIGHT = 7  # questions whose gold answer is thought of, in three of four samples; FLOOR in all others
QUESTIONS = [{"id": f"q{i}", "question": f"How many are {i} and {i + 1}?", "answer": str(2 * i + 1)} for i in range(12)]
FLOOR = 7  # what is said after a thought without a number: the answer of one question


def thought(i, k):
    """q11's last sample never closes its thought."""
    return f" so {2 * i + 1 if i < RIGHT and k else FLOOR}." + (CLOSE if (i, k) != (11, 3) else "")


class Reader:
    """Thinks of a number, and says the number that the thought before the answer ends with, FLOOR where it has none."""

    def __init__(self, text):
        self.text, self.drawn, self.longest, self.stop_after = text, [], 0, 10**9
        self.of_seed = {seed(0, 0, f"q{i}/{k}", 0): (i, k) for i in range(12) for k in range(K)}

    def load_weights(self, named, version):
        list(named)

    def generate(self, requests, sampling):
        self.longest = sampling.max_new
        assert sampling.stop == ("\nQuestion:",)
        for request in requests:
            prompt, s = request.prompt, request.seed
            if len(self.drawn) >= self.stop_after:
                raise KeyboardInterrupt
            asked = self.text.decode(prompt.tokens)
            self.drawn.append((s, prompt.tokens))
            if s in self.of_seed:
                ids = [i for c in self.first(asked, *self.of_seed[s]) for i in self.one_by_one(c)]
            else:
                ids = self.text.encode(self.answer(asked))
            n = len(ids)
            sample = Sample(
                tokens=np.array(ids, np.int32), logp=np.zeros(n, np.float32), drawn=np.ones(n, bool), finish="eos",
                num_think=self.text.split_at_close(ids).num_think or n, versions=np.zeros(n, np.int32),
            )  # fmt: skip
            yield [(request, sample)]

    def first(self, asked, i, k):
        head = "" if asked.endswith(OPEN) else f" Hm. {OPEN}"
        return [*head.partition(OPEN), *thought(i, k).partition(CLOSE), self.answer(thought(i, k))]

    def answer(self, asked):
        numbers = numbers_of(asked.rpartition(OPEN)[2].removesuffix(CLOSE).removesuffix("."))
        return f" They are {numbers[-1] if numbers else FLOOR}. Or 5."

    def one_by_one(self, piece):
        """Ids that no encoder gives: a token for each character. A tag has its own."""
        tags = {OPEN: self.text.open_ids, CLOSE: self.text.close_ids}
        return tags.get(piece) or [i for c in piece for i in self.text.encode(c)]


@pytest.fixture
def world(tmp_path, monkeypatch):
    train_tokenizer([q["question"] for q in QUESTIONS] + [" so 17. They are"] * 9, 290, tmp_path / "tokenizer")
    text = Tokenizer.load(tmp_path / "tokenizer")
    cfg = TINY.__class__(**{**TINY.__dict__, "vocab": text.vocab_size, "eos_ids": text.eos_ids, "max_positions": 256})
    named = weights.stream(random_model(cfg))
    weights.save(tmp_path / "model", cfg, named, dtype=torch.float32, extra_files=tmp_path / "tokenizer")
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    engine = Reader(text)
    monkeypatch.setattr(generate, "make_engine", lambda *_, **__: engine)
    monkeypatch.chdir(tmp_path)
    return engine


FLAGS = [
    *("--run.folder=out", f"--run.samples={K}", "--run.ks=1", "--model.folder=model", "--verify.kind=first-sentence"),
    *("--data.sets=own:questions=set.jsonl", "--sampling.max_think=30", "--sampling.max_suffix=20"),
]


def evaluated(world, template, *flags):
    assert exit_code(run, [*FLAGS, f"--data.template={template}", *flags]) == 0
    world.drawn.clear()


def probe(template, *flags):
    return exit_code(thoughts, [*FLAGS, f"--data.template={template}", *flags])


def results():
    return json.loads(Path("out/thoughts.json").read_text())


def rows(folder):
    return [json.loads(line) for line in Path(f"out/{folder}/own-000.jsonl").read_text().splitlines()]


def accuracy(correct):
    """Mean over questions of the mean over those of their samples that have a closed thought."""
    pairs = [(i, k) for i in range(12) for k in range(K) if CLOSE in thought(i, k)]
    return np.mean([np.mean([correct(i, k) for j, k in pairs if j == i]) for i in range(12)])


@pytest.mark.parametrize("template", ["plain", "plain-think"])
def test_accuracies_after_each_thought_are_those_of_what_the_engine_reads(world, template, capsys):
    evaluated(world, template)
    assert probe(template) == 0
    found = results()["sets"]["own"]
    assert (found["num_samples"], found["num_thoughts"], found["reencoded"], found["same_gold"]) == (48, 47, 0, 0)
    means = {name: c["mean"] for name, c in found["conditions"].items()}
    assert means["own"] == pytest.approx(accuracy(lambda i, k: (i < RIGHT and k > 0) or 2 * i + 1 == FLOOR))
    assert means["blank"] == means["generic"] == pytest.approx(accuracy(lambda i, k: 2 * i + 1 == FLOOR))
    donors = {(r["id"], r["sample"]): r["donor"] for r in rows("thoughts") if r["condition"] == "swapped"}

    def meets(i, k):
        donor, sample = donors[f"q{i}", k]
        assert donor != f"q{i}"
        return numbers_of(thought(int(donor[1:]), sample)) == [2 * i + 1]

    assert means["swapped"] == pytest.approx(accuracy(meets)) != 0
    for name, difference in found["own_minus"].items():
        assert difference["mean"] == pytest.approx(means["own"] - means[name])
    assert results()["mean"]["own_minus"]["blank"]["mean"] == found["own_minus"]["blank"]["mean"]
    assert f"{means['own']:8.3f} {means['blank']:8.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["plain", "plain-think"])
def test_prompts_hold_the_sampled_ids_and_thoughts_as_defined(world, template):
    evaluated(world, template)
    sampled = {(r["id"], r["sample"]): r["ids"][: r["num_think"]] for r in rows("generations")}
    assert probe(template) == 0
    assert world.longest == 20  # tokens of an answer
    asked, text = dict(world.drawn), world.text
    assert len(asked) == len(world.drawn) == 4 * 47  # every draw has a seed of its own
    head = [] if template == "plain-think" else sampled["q0", 0][: sampled["q0", 0].index(text.open_ids[0])]
    tag = OPEN if template == "plain" else ""
    for r in rows("thoughts"):
        tokens = asked[seed(0, 0, f"{r['condition']}/{r['id']}/{r['sample']}", 0)]
        own = sampled[r["id"], r["sample"]]
        said = text.decode(tokens)
        assert said.count(OPEN) == said.count(CLOSE) == 1
        assert said.endswith(r["thought"])
        assert QUESTIONS[int(r["id"][1:])]["question"] in said
        if r["condition"] == "own":
            assert tokens[-len(own) :] == own != text.encode(text.decode(own))
        if r["condition"] == "swapped":
            assert tokens[-r["given"] :] == sampled[tuple(r["donor"])][len(head) :]
        if r["condition"] == "blank":
            assert r["thought"] == tag + CLOSE
        if r["condition"] == "generic":
            assert r["given"] == len(own) - len(head)
            assert (IDLE * 9).startswith(r["thought"].removeprefix(tag).removesuffix(CLOSE))


def test_what_follows_the_last_closing_tag_alone_is_graded(world, monkeypatch):
    evaluated(world, "plain")
    monkeypatch.setattr(Reader, "answer", lambda self, asked: f" 1. {OPEN} hm{CLOSE}")
    assert probe("plain") == 0
    found = results()["sets"]["own"]["conditions"]["own"]
    assert (found["mean"], found["unparsed"]) == (0, 47)


def test_stopped_and_started_again_it_gives_the_same_file_and_draws_nothing_twice(world):
    evaluated(world, "plain")
    assert probe("plain") == 0
    whole = Path("out/thoughts.json").read_bytes(), Path("out/graded-thoughts/own.jsonl").read_bytes()
    for path in (Path("out/thoughts/own-000.jsonl"), Path("out/thoughts.json")):
        path.unlink()
    world.drawn.clear()
    world.stop_after = 60
    assert probe("plain") == 130
    file = Path("out/thoughts/own-000.jsonl")
    file.write_text(file.read_text()[:-10])  # the last row is torn
    world.stop_after = 10**9
    assert probe("plain") == 0
    assert len(world.drawn) == 4 * 47 + 1
    assert (Path("out/thoughts.json").read_bytes(), Path("out/graded-thoughts/own.jsonl").read_bytes()) == whole
    assert probe("plain", "--run.regrade=true") == 0
    assert len(world.drawn) == 4 * 47 + 1


def test_a_generation_that_has_changed_is_asked_again(world):
    evaluated(world, "plain-think")
    assert probe("plain-think") == 0
    world.drawn.clear()
    (file,) = Path("out/generations").glob("*.jsonl")
    changed = [r | {"text": r["text"].replace(" so 13.", " so 99.")} for r in rows("generations")]
    assert sum(r["text"] != old["text"] for r, old in zip(changed, rows("generations"), strict=True)) == 3
    file.write_text("".join(json.dumps(r) + "\n" for r in changed))
    assert probe("plain-think") == 0
    # three own thoughts, three idle ones of another length, and three samples of another question
    assert len(world.drawn) == 9
    assert results()["sets"]["own"]["reencoded"] == 3  # their ids say something else


def test_generations_without_ids_are_encoded_again_and_counted(world):
    evaluated(world, "plain")
    assert probe("plain") == 0
    with_ids = results()["sets"]["own"]
    (file,) = Path("out/generations").glob("*.jsonl")
    file.write_text("".join(json.dumps(r | {"ids": []}) + "\n" for r in rows("generations")))
    assert probe("plain", "--run.regrade=true") == 2  # idle thoughts are as long as the encoded ones: others
    assert probe("plain") == 0
    assert results()["sets"]["own"] == with_ids | {"reencoded": 47}


def test_one_question_has_nothing_to_swap_and_a_note(world, capsys):
    Path("set.jsonl").write_text(json.dumps(QUESTIONS[3]) + "\n")
    evaluated(world, "plain")
    assert probe("plain") == 0
    found = results()["sets"]["own"]
    assert found["conditions"].keys() == {"own", "blank", "generic"}
    assert found["own_minus"]["blank"]["low"] is None  # no interval from one question
    assert "own: nothing to swap, fewer than two questions have a thought" in capsys.readouterr().out


def test_a_model_that_does_not_think_has_no_thoughts_to_probe(world, monkeypatch):
    monkeypatch.setattr(Reader, "first", lambda self, asked, i, k: [" They are 7."])
    evaluated(world, "plain")
    assert probe("plain") == 0
    found = results()
    assert (found["sets"]["own"]["thoughts"], found["mean"]) == (0, {"conditions": {}, "own_minus": {}})
    assert not world.drawn


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--sampling.max_suffix=0", "sampling.max_suffix 0 leaves nothing to draw after a thought"),
        ("--run.samples=5", "48 of 60 samples of own"),
        ("--run.seed=1", "drawn with run.seed = 0, now 1; take another folder"),
        ("--run.folder=none", "0 of 48 samples of own"),
    ],
)
def test_a_probe_without_its_evaluation_is_one_line(world, capsys, flag, line):
    evaluated(world, "plain")
    assert probe("plain", flag) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not Path("none").exists()


@pytest.mark.parametrize("part", ["weights", "tokenizer", "config"])
@pytest.mark.parametrize("probed", [False, True])
def test_thoughts_of_one_model_are_not_put_to_another(world, capsys, part, probed):
    evaluated(world, "plain")
    if probed:
        assert probe("plain") == 0
        world.drawn.clear()
    exchange(Path("model"), part)
    assert probe("plain") == 2
    assert f"(changed: {part} of model)" in capsys.readouterr().err
    assert not world.drawn


@pytest.mark.parametrize("tags", ["added", "plain"])
def test_thoughts_end_at_the_first_closing_tag_whatever_the_tokens_are(tmp_path, tags):
    train_tokenizer([f"It is.{OPEN} so 3.{CLOSE} They are 3.", f"{OPEN}{CLOSE}"] * 9, 320, tmp_path, tags)
    text = Tokenizer.load(tmp_path)

    def split(words, opened=False, **row):
        ids = text.encode(words)
        row = {"text": words, "ids": ids, "num_think": text.split_at_close(ids).num_think or len(ids)} | row
        found = thought_of(row, text, opened)
        return found and (text.decode(found.head), text.decode(found.ids), found.exact)

    # "></" is one token where tags have none of their own
    assert split(f"{OPEN}{CLOSE} 3.") == ("", f"{OPEN}{CLOSE}", tags == "added")
    assert split(f"It is.{OPEN} so 3.{CLOSE} They are.")[:2] == ("It is.", f"{OPEN} so 3.{CLOSE}")
    assert split(f"It{OPEN} a{CLOSE} b{OPEN} c{CLOSE} d")[:2] == ("It", f"{OPEN} a{CLOSE}")
    assert split(f"{OPEN} a{OPEN} b{CLOSE}c")[:2] == ("", f"{OPEN} a{OPEN} b{CLOSE}")
    assert split(f" so{CLOSE} They", opened=True)[:2] == ("", f" so{CLOSE}")
    assert split(f"{OPEN} so{CLOSE}", ids=[]) == ("", f"{OPEN} so{CLOSE}", False)
    assert split(f" so{CLOSE} They") is split(f"{OPEN} so") is split(f" so{CLOSE} {OPEN} a{CLOSE}") is None
    assert split(" so", opened=True) is None
