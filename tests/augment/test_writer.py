"""A model in this process as annotator: a scripted engine that misbehaves, and a real one with a tiny model."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import misbehave
import numpy as np
import pytest
import torch
from conftest import TINY, exchange, exit_code, flip_bit, random_model

from thinkmid.augment import annotate, annotators, job
from thinkmid.augment.annotators import AnnotatorConfig
from thinkmid.augment.config import WriterConfig
from thinkmid.augment.engine import EngineWriter, blind
from thinkmid.augment.shards import Chunk
from thinkmid.data.chat import Chat
from thinkmid.model import weights
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.tokenizer import Tokenizer, clean
from thinkmid.types import Sample

TEMPLATE = "{{ bos_token }}<|end|>{% for m in messages %}{{ m.content | trim }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus, a tokenizer, and model/: one that writes noise and ends at times."""
    folder = tmp_path_factory.mktemp("writer")
    misbehave.write_world(folder, chars=60_000)
    told = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(told))
    text = Tokenizer.load(folder / "tokenizer")
    shape = replace(TINY, vocab=text.vocab_size, max_positions=4096, eos_ids=text.eos_ids)
    model = random_model(shape)
    with torch.no_grad():
        model.lm_head.weight[text.eos_ids[0]] *= 5  # far from 0 either way: some answers end, some never
    weights.save(folder / "model", shape, weights.stream(model), dtype="float32", extra_files=folder / "tokenizer")
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == TEMPLATE
    return folder


class Scripted:
    """Answers as the script does, 7 at a time in any order; every question is asked as an engine is: in tokens."""

    def __init__(self, text):
        self.text, self.calls, self.rng = text, [], random.Random(0)
        self.generations, self.running = 0, []

    def generate(self, requests, sampling):
        self.generations += 1
        running, source = [], iter(requests)
        while True:
            while len(running) < 7 and (request := next(source, None)):
                running.append(request)
            if not running:
                return
            self.running.append(len(running))
            yield [(request := running.pop(self.rng.randrange(len(running))), self.answer(request))]

    def answer(self, request):
        question = self.text.decode(request.prompt.tokens)
        self.calls.append((question, request.seed))
        reply = misbehave.reply(question)
        tokens = np.array(self.text.encode(reply.text) + [self.text.eos_ids[0]] * (not reply.cut), np.int32)
        n = len(tokens)
        return Sample(
            tokens=tokens, logp=np.zeros(n, np.float32), drawn=np.ones(n, bool), versions=np.zeros(n, np.int32),
            finish="unclosed" if reply.cut else "eos", num_think=n,
        )  # fmt: skip


def scripted_run(world, out, *, stop_after=0, retries=1):
    """Annotate with the scripted engine. Returns the exit code and the engine."""
    text = Tokenizer.load(world / "model")
    engine, cfg = Scripted(text), misbehave.settings(world, out=out)
    stopped = lambda: bool(stop_after) and len(engine.calls) >= stop_after  # noqa: E731
    write = EngineWriter(
        engine=engine, tokenizer=text, chat=Chat(world / "model", text, thinking=False), max_len=10**6,
        annotator=AnnotatorConfig(kind="engine", retries=retries), config=WriterConfig(),
    )  # fmt: skip
    stop = misbehave.Stop(stopped)
    return job.run(cfg, misbehave.Scripted(partial(write, interrupt=stop)), stop), engine


def files(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).glob("*-*/part-*.jsonl"))}


def journal(out):
    return [json.loads(line) for path in sorted((out / "journal").glob("*.jsonl")) for line in path.open()]


def counts(out):
    told = json.loads((out / "report.json").read_text())
    return {name: told[name] for name in ("chunks", "accepted", "refused", "calls", "refused_by", "retried_by")}


def test_an_engine_that_misbehaves_gives_the_files_and_counts_of_an_endpoint_that_does(world):
    def write(prompt):
        reply = misbehave.reply(prompt)
        return reply._replace(text=clean(reply.text))  # an engine has no lone surrogates

    code, engine = scripted_run(world, "engine")
    assert code == 0
    asked = []
    assert misbehave.annotated(misbehave.settings(world, out="endpoint"), lambda p: asked.append(p) or write(p)) == 0
    assert files(world / "engine") == files(world / "endpoint")
    assert counts(world / "engine") == counts(world / "endpoint")
    assert Counter(question for question, _ in engine.calls) == Counter(asked)
    # one call after the other would run empty at each end: here the engine is full until the corpus ends
    tries = 2
    assert engine.generations == 1
    assert engine.running == sorted(engine.running, reverse=True)
    assert engine.running.count(7) > len(engine.calls) - 7 * tries
    assert counts(world / "engine")["accepted"] > 100
    assert len(counts(world / "engine")["refused_by"]) > 10


def test_every_try_has_a_seed_of_its_own_and_stopping_changes_none(world):
    _, whole = scripted_run(world, "whole")
    assert len({seed for _, seed in whole.calls}) == len(whole.calls)
    codes, calls = [], []
    for stop_after in (1, 40, 100, 0):
        code, engine = scripted_run(world, "stopped", stop_after=stop_after)
        codes.append(code)
        calls += engine.calls
    assert codes == [75, 75, 75, 0]
    assert files(world / "stopped") == files(world / "whole")
    assert set(calls) == set(whole.calls)
    # asked twice: only what was refused and then cut off from its next try
    repeated = Counter(calls) - Counter(whole.calls)
    assert all("An earlier answer" not in question for question, _ in repeated)
    assert len(repeated) < len(whole.calls) / 10
    assert set(Counter((row["key"], row["chunk"]) for row in journal(world / "stopped")).values()) == {1}


def test_what_exceeds_the_context_is_refused_by_that_reason_and_the_rest_goes_on(world):
    text = Tokenizer.load(world / "model")
    chat = Chat(world / "model", text, thinking=False)
    chunks = ["Rain fell. It was cold.", "Snow fell. " * 200, " ", "Hail fell. It was bad."]
    items = [SimpleNamespace(place=Chunk("k", n), chunk=chunk) for n, chunk in enumerate(chunks)]
    needs = {n: len(chat(annotators.begin(chunks[n], AnnotatorConfig()).prompt)) + 50 for n in (0, 1, 3)}
    cfg, engine, answered = AnnotatorConfig(kind="engine", retries=0), Scripted(text), 0
    for max_len in (needs[0], needs[0] - 1, needs[1]):
        write = EngineWriter(
            engine=engine, tokenizer=text, chat=chat, max_len=max_len, annotator=cfg,
            config=WriterConfig(max_tokens=50),
        )  # fmt: skip
        found = {item.place.number: outcome for item, outcome in write(iter(items), misbehave.Stop())}
        fits = {n for n, need in needs.items() if need <= max_len}
        assert {n for n, outcome in found.items() if outcome.refused == "exceeds the context"} == needs.keys() - fits
        assert {n for n, outcome in found.items() if outcome.calls} == fits
        assert found[2].refused == "blank"
        answered += len(fits)
    assert len(engine.calls) == answered > 3


def as_engine(text, script):
    """A native engine whose model is certain of a script, token by token."""
    shape = replace(TINY, vocab=text.vocab_size, max_positions=4096)
    engine = NativeEngine(shape, blind(text))
    engine.load_weights(weights.stream(random_model(shape)), 0)

    def decode(cache, rows, families):
        logits = torch.zeros(rows.num, text.vocab_size)
        for row in range(rows.num):
            logits[row, script[int(rows.column("count")[row])]] = 1e4
        return logits

    engine._decode = decode
    return engine


@pytest.mark.parametrize("strategy", ["insert", "rewrite"])
def test_thoughts_written_by_a_real_engine_come_out_where_they_were_put(world, strategy):
    text = Tokenizer.load(world / "model")
    chunk = "Rain fell. It was cold. We stayed in.\n"
    woven = "<think>It sets a scene.</think>Rain fell. It was cold.<think>So what would we do?</think> We stayed in.\n"
    body = {"insert": "@1 It sets a scene.\n@3 <think>So what would we do?</think>", "rewrite": woven}[strategy]
    script = [*text.encode(misbehave.framed(body)), text.eos_ids[0]]
    write = EngineWriter(
        engine=as_engine(text, script), tokenizer=text, chat=Chat(world / "model", text, thinking=False), max_len=4096,
        annotator=AnnotatorConfig(kind="engine", strategy=strategy, retries=0),
        config=WriterConfig(max_tokens=len(script)),
    )  # fmt: skip
    [(_, outcome)] = write(iter([SimpleNamespace(place=Chunk("k", 0), chunk=chunk)]), misbehave.Stop())
    assert outcome.text == woven
    assert outcome.written_tokens == len(script)


def test_a_text_in_a_question_cannot_end_its_message(world):
    text = Tokenizer.load(world / "model")
    chat = Chat(world / "model", text, thinking=False)
    end = text.eos_ids[0]
    ids = chat("What is <|end|> for?")
    assert ids == [end, *text.encode("What is <|end|> for?"), end]
    assert ids.count(end) == 2


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "no chat template in chat_template.jinja or tokenizer_config.json; expected"),
        ("{{ eos_token }}", "its chat template holds a question 0 times, not once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "its chat template holds a question 2 times, not once"),
        ("{% for %}", "its chat template fails: Expected"),
        ("{{ raise_exception('no user turn') }}", "its chat template fails: no user turn"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "its chat template fails: access to attribute"),
        ("{{ cycler.__init__.__globals__.os.system('false') }}", "its chat template fails: access to attribute"),
        ("{{ messages.append(1) }}", "its chat template fails: access to attribute 'append'"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(world, tmp_path, template, line):
    told = {"chat_template": template} if template else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(Exception, match=line) as error:
        Chat(tmp_path, Tokenizer.load(world / "tokenizer"), thinking=False)
    assert type(error.value).__name__ == "UserError"
    assert str(error.value).startswith(str(tmp_path))


def flags(world, out, *more):
    path = world / "a.toml"
    path.write_text(
        f'run = {{parts = 4, progress_s = 0.0}}\ndata = {{paths = ["{world}/few.jsonl"]}}\n'
        f'chunks = {{tokenizer = "{world}/tokenizer", max_tokens = 24}}\n'
        'annotator = {kind = "engine", retries = 1}\n'
        f'writer = {{folder = "{world}/model", max_tokens = 12, max_batch = 6}}\n'
        "split = {sft = 0.5, rl = 0.4, heldout = 0.1}\n"
    )
    lines = (world / "corpus.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines[:24]]
    (world / "few.jsonl").write_text("".join(json.dumps(row | {"text": row["text"][:300]}) + "\n" for row in rows))
    return [str(path), "--run.folder", str(world / out), *more]


def start(argv, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "thinkmid.augment.annotate", *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(world):
    """What the tiny model makes of a few documents: refusals, with what it said."""
    assert exit_code(annotate, flags(world, "undisturbed")) == 2
    return world / "undisturbed"


def by_place(rows):
    return {(row["key"], row["chunk"]): row for row in rows}


def test_the_tiny_model_is_asked_again_and_what_it_says_does_not_depend_on_the_batch(world, undisturbed):
    rows = journal(undisturbed)
    assert len(rows) > 50
    assert Counter(row["calls"] for row in rows if row["refused"] != "blank").keys() == {2}
    assert len({row["said"] for row in rows}) > 20
    assert {row["refused"] for row in rows} >= {"cut off", "no marked answer"}
    assert exit_code(annotate, flags(world, "one", "--writer.max_batch", "1")) == 2
    assert by_place(journal(world / "one")) == by_place(rows)


def test_killed_and_resumed_on_two_ranks_the_tiny_model_says_the_same_and_nothing_twice(world, undisturbed):
    out, wanted = world / "killed", len(journal(undisturbed))
    process = start(flags(world, "killed"))
    deadline = time.monotonic() + 120
    while sum(path.read_bytes().count(b"\n") for path in out.glob("journal/*.jsonl")) < 8:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert 8 <= len(journal(out)) < wanted
    done = start(flags(world, "killed"), ranks=2)
    said, errors = done.communicate(timeout=180)
    assert "chunks accepted, most often: no marked answer" in errors
    rows = journal(out)
    assert len(rows) == len(by_place(rows)) == wanted
    assert by_place(rows) == by_place(journal(undisturbed))
    assert files(out) == files(undisturbed)
    assert (out / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    assert {"annotate 0/2", "annotate 1/2"} <= {line.partition(":")[0] for line in said.splitlines()}


@pytest.fixture
def copied(world, tmp_path):
    """The annotator's model and the tokenizer of chunks in another place, to be changed there: flags that name both."""
    for name in ("model", "tokenizer"):
        shutil.copytree(world / name, tmp_path / name)
    return ["--writer.folder", str(tmp_path / "model"), "--chunks.tokenizer", str(tmp_path / "tokenizer")]


def test_the_same_annotator_in_another_place_resumes(world, undisturbed, copied):
    before = files(undisturbed)
    assert exit_code(annotate, flags(world, "undisturbed", *copied)) == 2  # noise: none of its chunks was accepted
    assert files(undisturbed) == before


@pytest.mark.parametrize("part", ["weights", "tokenizer", "config", "chat template"])
def test_an_annotator_exchanged_in_its_folder_adds_nothing(world, undisturbed, copied, tmp_path, capsys, part):
    told, before = tmp_path / "model" / "tokenizer_config.json", files(undisturbed)
    if part == "chat template":
        config = json.loads(told.read_text())
        told.write_text(json.dumps(config | {"chat_template": "Well: " + config["chat_template"]}))
    else:
        exchange(tmp_path / "model", part)
    assert exit_code(annotate, flags(world, "undisturbed", *copied)) == 2
    line = (
        f"error: {undisturbed}: was begun with another model or tokenizer (changed: {part} of {tmp_path}/model); name"
    )
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert files(undisturbed) == before


def test_chunks_are_not_cut_by_another_tokenizer(world, undisturbed, copied, tmp_path, capsys):
    path = tmp_path / "tokenizer" / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["merges"].pop()
    path.write_text(json.dumps(told))
    assert exit_code(annotate, flags(world, "undisturbed", *copied)) == 2
    line = (
        f"error: {undisturbed}: was begun with another model or tokenizer (changed: tokenizer of {tmp_path}/tokenizer)"
    )
    assert capsys.readouterr().err.startswith(line)


def test_a_journal_that_does_not_know_its_model_is_not_added_to(world, undisturbed, capsys):
    shutil.copytree(undisturbed, world / "older")
    path = world / "older/made-of.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in told.items() if name != "writer.model"}))
    assert exit_code(annotate, flags(world, "older")) == 2
    line = f"error: {world}/older: was begun by a version that did not know models by their content; name another"
    assert capsys.readouterr().err.startswith(line)


def test_a_damaged_annotator_annotates_nothing(world, copied, tmp_path, capsys):
    flip_bit(tmp_path / "model" / "model.safetensors")
    assert exit_code(annotate, flags(world, "damaged", *copied)) == 2
    line = f"error: {tmp_path}/model/model.safetensors: does not match its sha256 in thinkmid.json"
    assert capsys.readouterr().err.startswith(line)
    assert not list((world / "damaged").glob("journal/*"))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--writer.folder", ""], "annotator.kind 'engine' needs writer.folder"),
        (["--writer.max_tokens", "4096"], "writer.max_tokens 4096 leave no room for a prompt in 4096 tokens"),
        (["--writer.max_tokens", "0"], "writer: max_tokens must be at least 1, got 0"),
        (["--writer.top_p", "2"], "writer: top_p must lie in (0, 1], got 2.0"),
        (["--engine.kind", "vllm", "--engine.tensor_parallel", "2"], "engine.tensor_parallel 2: here each rank has"),
        (["--writer.seed", "1"], "{world}/undisturbed: was begun with writer.seed = 0, now 1; name another run.folder"),
        (["--engine.kind", "vllm"], "engine.kind 'vllm': "),
    ],
)
def test_a_mistake_with_the_engine_is_one_line(world, undisturbed, capsys, more, line):
    if "kind" in more[0] and len(more) == 2 and __import__("importlib.util").util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    assert exit_code(annotate, flags(world, "undisturbed", *more)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: " + line.format(world=world))
    assert told.count("\n") == 1
