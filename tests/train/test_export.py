"""The folder that a run leaves: its dtype, its bytes, and its card, which names every stage."""

import json
import re
import shutil
import tomllib
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import exit_code, spawn
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from world import rlmt_flags, sft_flags

from thinkmid import config
from thinkmid.model import weights
from thinkmid.model.weights import load_model
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import Sampling
from thinkmid.run import checkpoint
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import card, rlmt, rlpt, sft
from thinkmid.train.config import RLMTConfig
from thinkmid.train.job import Job
from thinkmid.types import Prompt, Request


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A corpus, an SFT run of two steps, and a copy of its export in bf16: a base model from elsewhere."""
    folder = tmp_path_factory.mktemp("origin")
    assert exit_code(sft, sft_flags(folder)) == 0
    model = load_model(folder / "sft/export")
    for dtype in ("bfloat16", "float16"):
        named, home = weights.stream(model), folder / "sft/export"
        weights.save(folder / dtype, model.cfg, named, dtype=dtype, extra_files=home)
    return folder


@pytest.fixture
def home(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "home")
    return tmp_path / "home"


def tune(home, name, *flags, start="bfloat16"):
    """SFT from a folder of weights in bf16; its export."""
    folder = [f"--model.folder={home}/{start}", f"--run.folder={home}/{name}"]
    assert exit_code(sft, [*sft_flags(home), *folder, *flags]) == 0
    return home / name / "export"


def masters(folder):
    """The fp32 weights of a run's newest checkpoint, by Hugging Face name."""
    tensors = load_file(checkpoint.latest(folder / "checkpoints") / "rank-00000.safetensors")
    return {weights.hf_name(n.removeprefix("model.")): t for n, t in tensors.items() if n.startswith("model.")}


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# dtype


@pytest.mark.parametrize("start", ["bfloat16", "float16"])
def test_the_export_has_the_dtype_of_its_source_rounded_once_from_the_masters(home, capsys, start):
    export = tune(home, "tuned", start=start)
    written, exact = load_file(export / "model.safetensors"), masters(home / "tuned")
    assert written.keys() == exact.keys()
    assert any(not torch.equal(t, t.to(getattr(torch, start)).float()) for t in exact.values())  # there is to round
    for name, tensor in exact.items():
        assert torch.equal(written[name], tensor.to(getattr(torch, start))), name
    assert json.loads((export / "config.json").read_text())["dtype"] == start
    assert f"{export} holds the model in {start} (export.dtype = 'source')" in capsys.readouterr().out


def test_the_next_stage_and_its_evaluation_see_the_rounded_weights(home):
    export = tune(home, "tuned", "--optim.lr=0.1")
    rounded = load_model(home / "sft/export")
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            p.copy_(masters(home / "tuned")[weights.hf_name(name)].bfloat16())
    tokenizer, read = Tokenizer.load(export), load_model(export)
    tokens = torch.tensor(tokenizer.encode("Ana has 2 coins."))
    with torch.no_grad():
        assert torch.equal(read.logits(tokens), rounded.logits(tokens))
    drawn = []
    for source in (weights.stream_folder(export, "bfloat16"), weights.stream(rounded, "bfloat16")):
        engine = NativeEngine(read.cfg, tokenizer, dtype="bfloat16")
        engine.load_weights(source, 0)
        request = Request(prompt=Prompt(id="p", tokens=tokens.tolist(), meta={}), seed=3, key=(0,))
        [(_, sample)] = chain.from_iterable(engine.generate(iter([request]), Sampling(max_think=8, max_suffix=4)))
        drawn.append((sample.tokens.tolist(), sample.logp.tolist()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_may_be_chosen_and_chosen_anew(home, dtype):
    export = tune(home, "tuned", f"--export.dtype={dtype}")
    for name, tensor in masters(home / "tuned").items():
        assert torch.equal(load_file(export / "model.safetensors")[name], tensor.to(getattr(torch, dtype)))
    again = tune(home, "tuned", "--export.dtype=float32")  # the run is done: it exports again
    assert weights.dtype_of(again) == "float32"


def test_the_same_run_exports_the_same_bytes_again_resumed_elsewhere_and_without_its_source(home):
    whole = content(tune(home, "whole", "--run.steps=4", "--export.dtype=source"))
    tune(home, "parts", "--run.steps=2")
    (home / "bfloat16" / "model.safetensors").unlink()  # a checkpoint holds every weight, and the dtype they came in
    assert content(tune(home, "parts", "--run.steps=4")) == content(home / "parts/export")
    parts = content(home / "parts/export")
    assert {name for name in whole if whole[name] != parts[name]} == set()
    assert content(tune(home, "parts", "--run.steps=4")) == parts


def test_a_run_that_began_before_there_was_a_choice_exports_float32():
    cfg = SimpleNamespace(export=SimpleNamespace(dtype="source"))
    for parts, dtype in (({}, "float32"), ({"dtype": "bfloat16"}, "bfloat16")):
        assert Job.export_dtype.fget(SimpleNamespace(cfg=cfg, same={"model": parts})) == dtype


def _two_ranks(rank, folder):
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    tune(folder, "two")


def test_two_ranks_export_the_dtype_of_the_source(home):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        (home / "port").write_text(str(probe.getsockname()[1]))
    spawn(_two_ranks, 2, home)
    exact = {}
    for path in sorted(checkpoint.latest(home / "two/checkpoints").glob("rank-*.safetensors")):
        for name, rows in load_file(path).items():
            if name.startswith("model."):
                exact.setdefault(weights.hf_name(name.removeprefix("model.")), []).append(rows)
    written = load_file(home / "two/export/model.safetensors")
    assert written.keys() == exact.keys()
    for name, rows in exact.items():
        assert torch.equal(written[name], torch.cat(rows).bfloat16())


# the card


def rlpt_flags(home):
    questions = home / "questions.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*rlmt_flags(home, "rlpt", steps=1)[1:], "--run.steps=1", f"--model.folder={home}/rlmt/export"]
    argv += [f"--data.path={questions}", "--data.template=plain-think", "--sampling.max_think=6"]
    argv += ["--sampling.max_suffix=4", "--batch.prompts=2", "--batch.siblings=2", "--batch.pack_tokens=256"]
    return [*argv, "--loss.denom=10", "--optim.lr=1e-2"]


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def blocks(text, language):
    """Contents of the card's code blocks, as a Markdown reader sees them."""
    return [token.content for token in MarkdownIt().parse(text) if token.type == "fence" and token.info == language]


def headings(text):
    tokens = MarkdownIt().parse(text.split("---\n", 2)[2])
    return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]


def test_the_card_of_the_last_stage_names_all_with_their_configs_data_and_metrics(home):
    (home / "bfloat16" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A base model\n")
    tune(home, "tuned")
    argv = [*rlmt_flags(home, "rlmt", steps=21), f"--model.folder={home}/tuned/export"]
    argv += [f"--data.val_paths={home}/corpus.jsonl", "--data.val_prompts=2", "--data.val_every=7"]
    assert exit_code(rlmt, argv) == 0
    assert exit_code(rlpt, rlpt_flags(home)) == 0
    text = (home / "rlpt/export/README.md").read_text()
    assert head(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["thinkmid", "sft", "rlmt", "rlpt"],
    }
    assert headings(text)[1:] == ["Stage 1: `sft`", "Stage 2: `rlmt`", "Stage 3: `rlpt`"]
    for i, run in enumerate(("tuned", "rlmt", "rlpt")):
        written = tomllib.loads((home / run / "config.toml").read_text())
        shown = tomllib.loads(blocks(text, "toml")[i])
        assert shown["run"].pop("folder") == "FOLDER"
        written["run"].pop("folder")
        assert shown == written
        state = json.loads((checkpoint.latest(home / run / "checkpoints") / "state.json").read_text())
        assert state["data"] in text
        assert (f"held-out data: digest `{state['held_out']}`" in text) == (run == "rlmt")
    rows = [json.loads(line) for line in (home / "rlmt/metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "thinking_tokens"):
        assert f"`{name}` {(rows[-1][name] + rows[-2][name]) / 2:.4g}" in text
    assert f"`val_reward` {rows[-1]['val_reward']:.4g}" in text
    losses = [json.loads(line)["loss"] for line in (home / "tuned/metrics.jsonl").read_text().splitlines()]
    assert f"`loss` {losses[-1]:.4g}" in text


def test_the_commands_of_a_card_run_from_its_configs(home):
    argv = rlmt_flags(home, "rlmt", steps=1)
    assert exit_code(rlmt, argv) == 0
    text = (home / "rlmt/export/README.md").read_text()
    assert blocks(text, "sh")[1] == "thinkmid rlmt config.toml --run.folder FOLDER\n"
    (home / "again.toml").write_text(blocks(text, "toml")[1])
    assert config.load(RLMTConfig, [str(home / "again.toml")], prog="", description="")
    assert exit_code(rlmt, [str(home / "again.toml"), f"--run.folder={home}/again"]) == 0
    assert content(home / "again/export") == content(home / "rlmt/export")


@pytest.mark.parametrize(
    ("name", "folder", "base"),
    [
        ("org/model", "/x/hub/models--org--model/snapshots/abc", "org/model"),
        ("/x/hub/models--org--my--model/snapshots/abc", "/x/hub/models--org--my--model/snapshots/abc", "org/my--model"),
        ("org/model@v1.0", "/somewhere", "org/model"),
        ("hf://org/model@main", "/somewhere", "org/model"),
        ("runs/mini/export", "runs/mini/export", ""),
        ("/data/llama", "/data/llama", ""),
        ("", "/x/init", ""),
    ],
)
def test_a_model_of_the_hub_is_the_base_and_a_folder_is_none(tmp_path, name, folder, base):
    assert card.hub_id(name, tmp_path / folder) == base


def test_a_folder_that_looks_like_a_name_is_a_folder(home, monkeypatch):
    monkeypatch.chdir(home)
    assert card.hub_id("sft/export", home / "sft/export") == ""
    assert card.hub_id("sft/exports", home / "sft/export") == "sft/exports"


def test_the_base_is_named_by_every_later_card(home):
    stages = json.loads((home / "sft/export/stages.json").read_text()) | {"base": "org/base-1B"}
    (home / "bfloat16" / "stages.json").write_text(json.dumps(stages))
    text = (tune(home, "tuned") / "README.md").read_text()
    assert head(text)["base_model"] == "org/base-1B"
    assert headings(text)[1:] == ["Stage 1: `sft`", "Stage 2: `sft`"]


HOSTILE = [
    "a`<img src=x onerror=alert(1)>`b",
    "``` \n# owned\n<script>alert(1)</script>",
    "`x` <img src=x onerror=alert(1)> **b** [a](javascript:b) {{ 7*7 }} {% raw %} | a |",
    "---\nlicense: mit\n---",
    'x", "y: [1',
    "\x1b[31mred\u202e",
    "````\n</details><h1>out</h1>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_values_of_any_origin_stay_what_they_are(home, name):
    stages = json.loads((home / "sft/export/stages.json").read_text())
    stage = stages["stages"][0]
    stage |= dict.fromkeys(("model", "weights", "data_digest", "held_out_digest", "dtype", "thinkmid"), name)
    stage |= {"data": [name], "config": f"a = 1\n{name}", "metrics": {name: 1.5}}
    text = card.render({"base": name, "stages": [stage]}, f"me/{name}", {"license": name})
    assert head(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": name,
        "license": name,
        "tags": ["thinkmid", "sft"],
    }
    body = text.split("\n---\n", 1)[1]
    assert len(headings("---\n---\n" + body)) == 2
    html = MarkdownIt().render(body)
    assert (
        re.findall(r"<(?!/?(?:h1|h2|p|ul|li|code|pre|details|summary)\b)[^>]*>", html.replace(' class="language', ""))
        == []
    )
    assert "7*7" in html or "7*7" not in name
    assert "49" not in html


def test_passwords_in_addresses_are_left_out(home):
    flags = ["--judge.url=https://me:secret@host.org/v1", "--judge.model=m"]
    assert exit_code(rlmt, [*rlmt_flags(home, "rlmt", steps=1), *flags]) == 0
    for name in ("README.md", "stages.json"):
        text = (home / "rlmt/export" / name).read_text()
        assert "secret" not in text
        assert "https://host.org/v1" in text


@pytest.mark.parametrize(
    "text", ["", "[]", '{"stages": 3}', '{"base": 1, "stages": []}', '{"base": "", "stages": [{"program": "sft"}]}']
)
def test_stages_that_are_not_ours_are_left_out(home, text):
    (home / "bfloat16" / "stages.json").write_text(text)
    export = tune(home, "tuned")
    assert len(json.loads((export / "stages.json").read_text())["stages"]) == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: llama3.2\nlicense_link: https://x.org/LICENSE\n---\n", {"license": "llama3.2", "license_link": "https://x.org/LICENSE"}),
        ("---\nlicense: 'mit'\n---\nlicense: gpl\n", {"license": "mit"}),
        ("# no head\nlicense: mit\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
        ("---\nlicense: {{ 7*7 }}\n---\n", {}),
        ("---\nnot closed\nlicense: mit", {"license": "mit"}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_licence_is_read_from_the_head_of_the_bases_card(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert card.licence(tmp_path) == found
    assert card.licence(tmp_path / "nowhere") == {}
