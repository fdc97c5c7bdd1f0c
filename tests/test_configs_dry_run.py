"""The configurations for H100s: every one is read, fits its GPUs by the plan, and begins where another one ends."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import exit_code

from thinkmid import config
from thinkmid.augment import annotate
from thinkmid.eval import run as eval_run
from thinkmid.eval.config import EvalConfig
from thinkmid.model.weights import read_config
from thinkmid.text import train_tokenizer
from thinkmid.train import memory, rlmt, rlpt, sft

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))}
REAL = {name: path for name, path in CONFIGS.items() if not name.startswith("mini-")}
DOCS = (Path(__file__).parents[1] / "docs" / "h100.md").read_text()
PROGRAMS = {"sft": sft, "rlmt": rlmt, "rlpt": rlpt, "eval": eval_run, "annotate": annotate}
# as their makers publish them: layers, width, heads, key/value heads, feed-forward, vocabulary, head, tied, positions
SHAPES = {
    "llama3-8b": ("llama", 32, 4096, 32, 8, 14336, 128256, 128, False, 8192),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 12288, 151936, 128, False, 32768),
    "llama3.2-1b": ("llama", 16, 2048, 32, 8, 8192, 128256, 64, True, 131072),
}
PARAMETERS = {"llama3-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360, "llama3.2-1b": 1_235_814_400}  # on their cards
GPUS = {"llama3-8b": 8, "qwen3-8b": 8, "llama3.2-1b": 1}
FITS = 80e9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    train_tokenizer(["a b c"], 260, folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch, tokenizer):
    """A place in which every model folder that a configuration names holds a config.json and a tokenizer."""
    for name, path in REAL.items():
        told = tomllib.loads(path.read_text())
        for folder in {told.get("model", {}).get("folder"), told.get("writer", {}).get("folder")} - {None}:
            family = model_of(name)
            shutil.copytree(tokenizer, tmp_path / folder, dirs_exist_ok=True)
            (tmp_path / folder / "config.json").write_text(json.dumps(published(family)))
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_of(name):
    return next(family for family in SHAPES if name.startswith(family + "-"))


def published(family):
    kind, layers, width, heads, kv_heads, ffn, vocab, head, tied, positions = SHAPES[family]
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[kind]], "model_type": kind, "num_hidden_layers": layers, "hidden_size": width,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab,
        "head_dim": head, "tie_word_embeddings": tied, "max_position_embeddings": positions, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip


def dry_run(name, monkeypatch, capsys, *more):
    """What a configuration's program says of it, on the machine that it is for."""
    monkeypatch.setenv("WORLD_SIZE", str(GPUS[model_of(name)]))
    program = next(PROGRAMS[stage] for stage in PROGRAMS if f"-{stage}" in name)
    capsys.readouterr()
    code = exit_code(program, [str(REAL[name]), *more, "--dry-run"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def phases(said):
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
    found = re.findall(r"^#   (sync|rollout|training) +([\d.]+) (KB|MB|GB)$", said, re.MULTILINE)
    return {phase: float(size) * units[unit] for phase, size, unit in found}


def test_every_family_has_every_stage():
    stages = ("sft", "rlmt", "rlpt", "eval")
    assert {f"{family}-{stage}" for family in SHAPES for stage in stages} <= REAL.keys()
    assert {"llama3-8b-annotate", "qwen3-8b-annotate", "qwen3-8b-annotate-engine"} <= REAL.keys()


@pytest.mark.parametrize("family", SHAPES)
def test_the_shapes_are_the_published_ones(home, family):
    folder = tomllib.loads(REAL[f"{family}-sft"].read_text())["model"]["folder"]
    assert read_config(folder).num_parameters == PARAMETERS[family]


@pytest.mark.parametrize("name", [name for name in REAL if "-eval" not in name and not name.endswith("annotate")])
def test_each_plan_fits_its_gpus_and_is_the_one_in_the_docs(home, monkeypatch, capsys, name):
    said = dry_run(name, monkeypatch, capsys)
    found = phases(said)
    wanted = {"sft": {"training"}, "annotate-engine": {"rollout"}}
    assert found.keys() == wanted.get(name.removeprefix(model_of(name) + "-"), {"sync", "rollout", "training"})
    assert all(0.05 * FITS < size < FITS for size in found.values()), found
    assert "an estimate and no measurement" in said
    hours = re.findall(r"([\d,.]+) h for ([\d,]+) steps$", said, re.MULTILINE)
    row = next(line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |"))
    assert f" {max(found.values()) / 1e9:.1f} GB" in row
    assert all(row.endswith(f"| {steps} | {float(told):.0f} |") for told, steps in hours)
    assert len(hours) == 1 or "a thousand answers of a rank" in said


def test_a_resident_judge_is_counted_in_every_phase(home, monkeypatch, capsys):
    name, folder = "llama3-8b-rlmt", "models/llama3.2-1b"
    alone, num = phases(dry_run(name, monkeypatch, capsys)), PARAMETERS["llama3.2-1b"]
    # rows, tokens, keys and values, bytes, layers, heads, head size
    cache = 512 * (640 + 4 * 128) * 2 * 2 * 16 * 8 * 64
    for engine, kept, at_work in (("native", 0, cache), ("vllm", 4e9 + 3e9, 4e9 + 3e9)):
        flags = ["--judge.kind=resident", f"--judge.folder={folder}", f"--judge.engine={engine}"]
        beside = phases(dry_run(name, monkeypatch, capsys, *flags))
        more = {phase: beside[phase] - alone[phase] for phase in alone}
        assert more["sync"] == pytest.approx(2 * num + kept, abs=2e8), more
        assert more["training"] == pytest.approx(2 * num + kept, abs=2e8)
        assert more["rollout"] == pytest.approx(2 * num + at_work + 512 * 128_256 * 24, abs=2e8)


@pytest.mark.parametrize("name", [name for name in REAL if "-eval" in name])
def test_each_evaluation_is_the_papers_and_fits_one_gpu(home, monkeypatch, capsys, name):
    dry_run(name, monkeypatch, capsys, "--data.sets", "questions=q.jsonl")
    cfg = config.load(EvalConfig, [str(REAL[name])], prog="p", description="d").config
    assert (cfg.run.samples, cfg.sampling.temperature, cfg.sampling.top_p, cfg.sampling.max_new) == (
        16,
        0.6,
        0.95,
        4096,
    )
    assert len(cfg.data.sets) == 5
    shape = read_config(cfg.model.folder)
    assert sum(memory.rollout_phase(shape, cfg.sampling, cfg.engine, 1024, cfg.sampling.max_batch).values()) < FITS


@pytest.mark.parametrize("name", [name for name in REAL if name.endswith("annotate")])
def test_each_annotation_by_an_endpoint_asks_the_papers_annotator_to_name_places(home, monkeypatch, capsys, name):
    told = tomllib.loads(dry_run(name, monkeypatch, capsys))
    assert (told["annotator"]["kind"], told["endpoint"]["model"]) == ("openai", "openai/gpt-oss-120b")
    assert told["annotator"]["strategy"] == "insert"
    assert told["split"]["control"] > 0


def test_each_stage_begins_with_what_the_one_before_it_writes():
    told = {name: tomllib.loads(path.read_text()) for name, path in REAL.items()}
    for family in SHAPES:
        sft, rlmt, rlpt, evaluated = (told[f"{family}-{stage}"] for stage in ("sft", "rlmt", "rlpt", "eval"))
        for before, after in ((sft, rlmt), (rlmt, rlpt), (rlpt, evaluated)):
            assert after["model"]["folder"] == before["run"]["folder"] + "/export"
        annotated = {told[name]["run"]["folder"] for name in told if "-annotate" in name}
        assert {path.rsplit("/", 1)[0] for path in sft["data"]["paths"] + rlmt["data"]["paths"]} <= annotated
        for stage in (rlmt, rlpt):
            assert stage["loss"]["denom"] == stage["sampling"]["max_think"] + stage["sampling"]["max_suffix"]
            longest = stage["data"].get("max_prefix", 0) + stage["data"].get("max_prompt", 0) + stage["loss"]["denom"]
            assert longest <= stage["batch"]["pack_tokens"]


def test_the_training_phase_of_llama3_8b_is_what_a_hand_computes(home, monkeypatch, capsys):
    blocks = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    head = 128256 * 4096
    everything = blocks + 2 * head + 4096
    master_moments_gradients = (4 + 8 + 4) * everything / 8
    gathered = 2 * (blocks / 16 + 2 * head)
    # of a token in a block: 4 widths, 3 of the queries, 4 of the keys, 4 of the feed-forward, two bytes each
    activations = 8192 * 32 * 2 * (4 * 4096 + 3 * 4096 + 4 * 1024 + 4 * 14336)
    head_work = 3 * 2**31 + 4 * head
    hand = master_moments_gradients + gathered + activations + head_work
    assert phases(dry_run("llama3-8b-sft", monkeypatch, capsys))["training"] == round(hand / 1e8) * 1e8
    assert phases(dry_run("llama3-8b-rlmt", monkeypatch, capsys))["training"] == round((hand + 3e9) / 1e8) * 1e8


def test_the_hours_of_llama3_8b_sft_are_what_a_hand_computes(home, monkeypatch, capsys):
    # 6 FLOPs a parameter and token, the embedding looked up, and 12 for each of the 4096 keys that a token sees
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    flops = 10_000 * 2**20 * (6 * matrices + 12 * 32 * 4096 * 4096)
    hours = flops / (8 * 0.4 * 989e12) / 3600
    [said] = re.findall(r"([\d.]+) h for 10,000 steps", dry_run("llama3-8b-sft", monkeypatch, capsys))
    assert float(said) == pytest.approx(hours, rel=2e-3)
    assert 30 < hours < 60


def test_writing_takes_as_long_as_reading_weights_and_cache_does(home, monkeypatch, capsys):
    said = dry_run("llama3-8b-rlmt", monkeypatch, capsys)
    [(seconds, rows)] = re.findall(r"([\d.]+) s a step +writing, (\d+) at a time", said)
    # 256 samples a rank all fit: 36 GB hold 275 000 tokens, and half-way each has 576 of its own and 64 of its prefix
    assert int(rows) == 256
    token = 2 * 32 * 1024 * 2
    a_step = (2 * 8_030_261_248 + 256 * (1024 + 576) * token) / (0.6 * 3.35e12)
    assert float(seconds) == pytest.approx(1152 * a_step, abs=0.06)
