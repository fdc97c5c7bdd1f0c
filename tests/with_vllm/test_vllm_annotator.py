"""vLLM as annotator, the whole program, by models that write noise, that keep to the form, that do so at times."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

pytest.importorskip("vllm")

from conftest import TINY, exit_code, random_model

from thinkmid import thoughts
from thinkmid.augment import annotate
from thinkmid.model import weights
from thinkmid.tokenizer import Tokenizer, train_tokenizer

TEMPLATE = "{{ bos_token }}<|end|>{% for m in messages %}{{ m.content | trim }}<|end|>{% endfor %}"
BASE = replace(TINY, head_dim=32, width=96, ffn=48, max_positions=4096)
MARKS = ("=== answer ===\n", "\n=== end ===")
THOUGHT = "This sets a scene."
SNOW = "Snow fell all night"
TEXTS = [SNOW, *(f"Rain fell on day {n}. We stayed in until {n + 1}.\n" for n in range(27))]
INSERTED = f"@1\t{THOUGHT}"
REWRITTEN = f"<think>{THOUGHT}</think>{SNOW}"
REFUSAL = "I would rather not"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus, and folders of models: noise/, insert/ and rewrite/ give one answer to all, moody/ one of two."""
    folder = tmp_path_factory.mktemp("annotate")
    rows = [{"id": f"page {n}", "text": text} for n, text in enumerate(TEXTS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([*TEXTS, THOUGHT, REFUSAL] * 2, 400, folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = RawTokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.save(str(path))
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    text = Tokenizer.load(folder / "tokenizer")
    shape = replace(BASE, vocab=text.vocab_size, eos_ids=text.eos_ids)
    noise = random_model(shape)
    with torch.no_grad():
        noise.lm_head.weight[text.eos_ids[0]] *= 16  # far from 0 either way: some answers end, some never
    good, moody = {body: text.encode(body.join(MARKS)) for body in (INSERTED, REWRITTEN)}, text.encode(REFUSAL)
    models = {
        "noise": noise,
        "insert": certain(shape, [(1.0, good[INSERTED])]),
        "rewrite": certain(shape, [(1.0, good[REWRITTEN])]),
        "moody": certain(shape, [(0.5, good[INSERTED]), (0.5, moody)]),
    }
    for name, model in models.items():
        tensors = weights.stream(model)
        weights.save(folder / name, shape, tensors, dtype="float32", extra_files=folder / "tokenizer")
    return folder


def certain(shape, answers):
    """A model that writes, with its probability, each of the answers (p, ids) after the end of a prompt. The next token
    depends on the newest alone, so none may stand in two places."""
    model, [end] = random_model(shape), shape.eos_ids
    seen = [end, *(i for _, ids in answers for i in ids)]
    assert len(set(seen)) == len(seen) < shape.width
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                p.zero_()
            elif name.endswith("norm.weight"):
                p.fill_(1.0)
        embedding, head, unit = model.embed_tokens.weight, model.lm_head.weight, shape.width**-0.5
        embedding[:, -1] = 1.0  # what stands in no answer
        for place, i in enumerate(seen):
            embedding[i] = torch.eye(shape.width)[place]
        for p, ids in answers:
            for i, following in zip([end, *ids], [*ids, end], strict=True):
                head[following, seen.index(i)] = (40 + math.log(p) * (i == end)) * unit
    return model


def flags(world, out, model, *more):
    path = world / "a.toml"
    path.write_text(
        f'run = {{parts = 4}}\ndata = {{paths = ["{world}/corpus.jsonl"]}}\n'
        f'chunks = {{tokenizer = "{world}/tokenizer", max_tokens = 400}}\n'
        "writer = {max_tokens = 60, max_batch = 6, temperature = 0}\n"
        'annotator = {kind = "engine", retries = 1}\nengine = {kind = "vllm", compile = false, kv_gb = 0.05}\n'
        "split = {sft = 0.5, rl = 0.4, heldout = 0.1, near = 0.0}\n"
    )
    return [str(path), "--run.folder", str(world / out), "--writer.folder", str(world / model), *more]


def start(argv, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "thinkmid.augment.annotate", *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(argv, ranks=1, code=0):
    """What the program says, run to its end in a process of its own: vLLM keeps a process group that the next
    module's tests no longer have."""
    process = start(argv, ranks)
    said, errors = process.communicate(timeout=400)
    assert process.returncode == code, errors
    return said


def rows(folder, pattern):
    return [json.loads(line) for path in sorted(folder.glob(pattern)) for line in path.open()]


def journal(folder):
    found = rows(folder, "journal/*.jsonl")
    assert len({(row["key"], row["chunk"]) for row in found}) == len(found) == len(TEXTS)
    return sorted(found, key=lambda row: (row["key"], row["chunk"]))


def check_accounts(folder):
    """What report.json says is what the journal and the files hold, and no file holds an altered text."""
    told, found = json.loads((folder / "report.json").read_text()), journal(folder)
    accepted = [row for row in found if "text" in row]
    assert (told["chunks"], told["accepted"]) == (len(found), len(accepted))
    assert told.get("refused", 0) == len(found) - len(accepted)
    assert told.get("refused_by", {}) == Counter(row["refused"] for row in found if "refused" in row)
    for name in ("calls", "written_tokens", "prompt_tokens"):
        assert told[name] == sum(row[name] for row in found) > 0
    think, raw = (rows(folder, f"*-{kind}/part-*.jsonl") for kind in ("think", "raw"))
    assert Counter(row["text"] for row in think) == Counter(row["text"] for row in accepted)
    assert [thoughts.strip(row["text"]) for row in think] == [row["text"] for row in raw]
    assert {row["text"] for row in raw} <= set(TEXTS)
    return told


@pytest.mark.parametrize("strategy", ["insert", "rewrite"])
@pytest.mark.parametrize("model", ["noise", "same"])
def test_both_engines_write_the_same_and_the_same_becomes_of_it(world, model, strategy):
    model = strategy if model == "same" else model
    same = ["--annotator.strategy", strategy, "--engine.kind"]
    code = 2 if model == "noise" else 0  # nothing accepted is no success
    finish(flags(world, f"{model}-{strategy}-vllm", model, *same, "vllm"), code=code)
    assert exit_code(annotate, flags(world, f"{model}-{strategy}-native", model, *same, "native")) == code
    ours, theirs = (world / f"{model}-{strategy}-{kind}" for kind in ("vllm", "native"))
    assert journal(ours) == journal(theirs)
    told = check_accounts(ours)
    woven = {row["text"] for row in journal(ours) if "text" in row}
    if model == "noise":
        assert told["refused_by"].keys() == {"cut off", "no marked answer"} or strategy == "rewrite"
        assert len({row["said"] for row in journal(ours)}) > 3
        assert (told["calls"], woven) == (2 * len(TEXTS), set())
    elif model == "insert":
        assert woven == {f"<think>{THOUGHT}</think>{text}" for text in TEXTS}
        assert told["calls"] == len(TEXTS)
    else:  # the one text that it always writes
        assert woven == {REWRITTEN}
        assert told["refused_by"] == {"altered text": len(TEXTS) - 1}
        assert told["calls"] == 2 * len(TEXTS) - 1


@pytest.fixture(scope="module")
def moody(world):
    finish(flags(world, "moody-one", "moody", "--writer.temperature", "1"))
    return world / "moody-one"


def test_of_refused_answers_some_are_accepted_when_asked_for_again(moody):
    told, found = check_accounts(moody), journal(moody)
    first = [row for row in found if row["calls"] == 1]
    second = [row for row in found if "text" in row and row["calls"] == 2]
    never = [row for row in found if "text" not in row]
    assert min(len(first), len(second), len(never)) > 2
    assert all("text" in row for row in first)
    assert {row["refused"] for row in never} == {"no marked answer"}
    assert {row["said"] for row in never} == {REFUSAL}
    assert told["retried_by"] == {"no marked answer": len(second) + len(never)}


def test_killed_and_resumed_on_two_ranks_it_writes_the_same_and_nothing_twice(world, moody):
    out = world / "moody-killed"
    argv = flags(
        world, out.name, "moody", "--writer.temperature", "1", "--writer.max_batch", "1", "--run.progress_s", "0"
    )
    process = start(argv)
    while process.stdout.readline():
        if sum(path.read_bytes().count(b"\n") for path in out.glob("journal/*.jsonl")) >= 8:
            break
    process.kill()
    _, errors = process.communicate()
    assert 8 <= len(rows(out, "journal/*.jsonl")) < len(TEXTS), errors
    said = finish(argv, ranks=2)
    assert {"annotate 0/2", "annotate 1/2"} <= {line.partition(":")[0] for line in said.splitlines()}
    assert journal(out) == journal(moody)
    check_accounts(out)
    assert (out / "manifest.json").read_bytes() == (moody / "manifest.json").read_bytes()
