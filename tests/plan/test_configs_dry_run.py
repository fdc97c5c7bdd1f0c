"""The configurations for H100s: every one is read, fits its GPUs by the plan, and begins where another one ends."""

import json
import math
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import exit_code, plan_of

from thinkmid import config
from thinkmid.augment import annotate
from thinkmid.eval import run as eval_run
from thinkmid.eval.config import EvalConfig
from thinkmid.model.weights import read_config
from thinkmid.plan import memory
from thinkmid.tokenizer import train_tokenizer
from thinkmid.train import rlmt, rlpt, sft

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))}
REAL = {name: path for name, path in CONFIGS.items() if not name.startswith(("mini-", "smol-"))}
DOCS = (Path(__file__).parents[2] / "docs" / "h100.md").read_text()
PROGRAMS = {"sft": sft, "rlmt": rlmt, "rlpt": rlpt, "eval": eval_run, "annotate": annotate}
# as their makers publish them: layers, width, heads, key/value heads, feed-forward, vocabulary, head, tied, positions
SHAPES = {
    "llama3-8b": ("llama", 32, 4096, 32, 8, 14336, 128256, 128, False, 8192),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 12288, 151936, 128, False, 32768),
    "llama3.2-1b": ("llama", 16, 2048, 32, 8, 8192, 128256, 64, True, 131072),
}
PARAMETERS = {"llama3-8b": 8_030_261_248, "qwen3-8b": 8_190_735_360, "llama3.2-1b": 1_235_814_400}  # on their cards
GPUS = {"llama3-8b": 8, "qwen3-8b": 8, "llama3.2-1b": 1, "lora": 1}
SHOWN = 84.9e9  # bytes of an 80 GB H100: 81559 MiB less what the driver keeps
FITS = 0.96 * SHOWN  # the rest is for fragmentation and what the plan estimates only


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    train_tokenizer(["a b c"], 260, folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch, tokenizer):
    """A place in which every model folder that a configuration names holds a config.json and a tokenizer."""
    for name, path in REAL.items():
        told = tomllib.loads(path.read_text())
        for folder in {told.get(section, {}).get("folder") for section in ("model", "writer", "judge")} - {None, ""}:
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
    monkeypatch.setenv("WORLD_SIZE", str(GPUS["lora" if name.endswith("-lora") else model_of(name)]))
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
    wanted = {"sft": {"training"}, "sft-lora": {"training"}, "annotate-engine": {"rollout"}}
    assert found.keys() == wanted.get(name.removeprefix(model_of(name) + "-"), {"sync", "rollout", "training"})
    assert all(0.05 * FITS < size < FITS for size in found.values()), found
    assert "an estimate and no measurement" in said
    hours = re.findall(r"([\d,.]+) h for ([\d,]+) steps$", said, re.MULTILINE)
    row = next(line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |"))
    assert f" {max(found.values()) / 1e9:.1f} GB" in row
    assert all(row.endswith(f"| {steps} | {float(told):.0f} |") for told, steps in hours)
    assert len(hours) == 1 or "a thousand answers of a rank" in said


def test_who_has_the_memory_when_is_line_by_line_what_the_plan_of_llama3_8b_rlmt_says(home, monkeypatch, capsys):
    said = dry_run("llama3-8b-rlmt", monkeypatch, capsys)
    plan = plan_of(said)
    want = {owner: [] for owners in plan.values() for owner in owners}
    for owner, cells in want.items():
        cells += [f"{owners[owner] / 1e9:.1f}" if owner in owners else "" for owners in plan.values()]
    table = DOCS[DOCS.index("| owner |") :].split("\n\n")[0].splitlines()[2:]
    *rows, last = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in table)
    assert {owner.replace("`", ""): cells for owner, *cells in rows} == want
    assert last[1:] == [f"{size / 1e9:.1f}" for size in phases(said).values()]


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
    cfg = config.load(EvalConfig, [str(REAL[name])], prog="p", description="d")[0]
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
        if f"{family}-sft-lora" in told:
            sft_lora, rlmt_lora = told[f"{family}-sft-lora"], told[f"{family}-rlmt-lora"]
            assert rlmt_lora["model"]["folder"] == sft_lora["run"]["folder"] + "/export"
        annotated = {told[name]["run"]["folder"] for name in told if "-annotate" in name}
        assert {path.rsplit("/", 1)[0] for path in sft["data"]["paths"] + rlmt["data"]["paths"]} <= annotated
        for stage in (rlmt, rlpt):
            assert stage["loss"]["denom"] == stage["sampling"]["max_think"] + stage["sampling"]["max_suffix"]
            longest = stage["data"].get("max_prefix", 0) + stage["data"].get("max_prompt", 0) + stage["loss"]["denom"]
            assert longest <= stage["batch"]["pack_tokens"]


def test_the_training_phase_of_llama3_8b_is_what_a_hand_computes(home, monkeypatch, capsys):
    # GB. 8.03 billion weights, a copy, two moments and gradients in fp32, an eighth each
    shards = 4 * 4 * 8.030 / 8
    # KB a token and block in bf16: residual stream twice and normed twice; q, k, v and output; three of 14336. Then
    # two fp32 norm statistics and 32 of the attention; once for all blocks the last residual, 64 cosines and sines
    block = 2 * (4 * 4.096 + (4.096 + 2 * 1.024 + 4.096) + 3 * 14.336) + 4 * 34 / 1000
    token = 32 * block + 8.192 + 4 * 128 / 1000
    # the head's 0.5253 billion weights gathered and in FSDP's buffer, their gradient in fp32; 2 GiB of scores, half of
    # that for their gradient; hidden rows and their gradient
    head = 2 * 0.5253 * 2 + 4 * 0.5253 + 1.5 * 2.147
    for name, tokens, more in (("llama3-8b-sft", 8192, 0), ("llama3-8b-rlmt", 10_240, 3)):
        hand = shards + tokens * (token + 2 * 8.192) / 1e6 + head + 2 + more  # context and NCCL; a sleeping engine
        assert phases(dry_run(name, monkeypatch, capsys))["training"] == pytest.approx(hand * 1e9, abs=6e7)


def test_the_training_phase_of_llama3_8b_rlmt_lora_is_what_a_hand_computes(home, monkeypatch, capsys):
    # GB. Weights in bf16; rank 32 times in and out of seven projections in 32 blocks: with moments and gradients, fp32
    both = 4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    frozen, adapters = 2 * 8.030, 16 * 32 * 32 * both / 1e9
    # KB a token and block as without adapters, and 32 numbers between the factors of each
    block = 2 * (4 * 4.096 + (4.096 + 2 * 1.024 + 4.096) + 3 * 14.336 + 7 * 0.032) + 4 * 34 / 1000
    token = 32 * block + 8.192 + 4 * 128 / 1000
    # the head gathered, without gradient: on one rank there is no buffer. Scores and their gradient
    head = 2 * 0.5253 + 1.5 * 2.147
    hand = frozen + adapters + 8192 * (token + 2 * 8.192) / 1e6 + head + 1 + 3  # context; a sleeping engine
    found = phases(dry_run("llama3-8b-rlmt-lora", monkeypatch, capsys))
    assert found["training"] == pytest.approx(hand * 1e9, abs=6e7)
    # a KL asks the same weights without their adapters
    assert phases(dry_run("llama3-8b-rlmt-lora", monkeypatch, capsys, "--loss.kl=0.01")) == found


def test_adapters_make_what_takes_a_node_fit_one_gpu(home, monkeypatch, capsys):
    for stage in ("sft", "rlmt"):
        assert "an 80 GB H100 has" not in dry_run(f"llama3-8b-{stage}-lora", monkeypatch, capsys)
        whole = dry_run(f"llama3-8b-{stage}-lora", monkeypatch, capsys, "--model.lora_rank=0")
        assert "an 80 GB H100 has" in whole


def test_the_hours_of_adapters_are_what_a_hand_computes(home, monkeypatch, capsys):
    # forward and the gradient of what came in, 4 FLOPs a parameter and token; attention as ever
    matrices = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    flops = 2000 * 2**18 * (4 * matrices + 12 * 32 * 4096 * 4096)
    [said] = re.findall(r"([\d.]+) h for 2,000 steps", dry_run("llama3-8b-sft-lora", monkeypatch, capsys))
    assert float(said) == pytest.approx(flops / (0.4 * 989e12) / 3600, rel=4e-3)


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
    [(seconds, rows)] = re.findall(r"([\d.]+) s a step +decoding, (\d+) sequences at a time", said)
    # 256 samples a rank all fit: 42 GB hold 320 000 tokens, and half-way each has 576 of its own and 64 of its prefix
    assert int(rows) == 256
    token = 2 * 32 * 1024 * 2
    a_step = (2 * 8_030_261_248 + 256 * (1024 + 576) * token) / (0.6 * 3.35e12)
    assert float(seconds) == pytest.approx(1152 * a_step, abs=0.06)


def test_a_plan_warns_where_the_cache_thrashes_and_says_what_to_set(home, monkeypatch, capsys):
    # 131 072 bytes a token: 42 GB hold 320 435. Of 4096 new tokens half are written on average, and 16 share 1024
    held, token = 320_435, 131_072
    said = dry_run("llama3-8b-rlpt", monkeypatch, capsys, "--sampling.max_batch=256")
    [line] = [line for line in said.splitlines() if "exceed the KV cache" in line]
    fits, enough = held // 2112, math.ceil(256 * 2112 * token / 1e9)
    assert line.startswith(f"# warning: 256 sequences of full length exceed the KV cache, which holds {held // 4160}")
    assert f"sampling.max_batch {fits} or engine.kv_gb {enough} " in line
    # what it says to set silences it
    for flag in (f"--sampling.max_batch={fits}", f"--engine.kv_gb={enough}"):
        said = dry_run("llama3-8b-rlpt", monkeypatch, capsys, "--sampling.max_batch=256", flag)
        assert "exceed the KV cache" in said
        assert not re.search("warning.*KV cache", said)


@pytest.mark.parametrize("name", REAL)
def test_no_configuration_thrashes_the_cache(home, monkeypatch, capsys, name):
    more = ("--data.sets", "questions=q.jsonl") if "-eval" in name else ()
    assert "warning" not in dry_run(name, monkeypatch, capsys, *more)


def test_a_plan_says_which_device_it_is_for(home, monkeypatch, capsys):
    assert "# memory per rank on a GPU" in dry_run("llama3-8b-sft", monkeypatch, capsys)
    assert "# memory per rank on the CPU" in dry_run("llama3-8b-sft", monkeypatch, capsys, "--model.dtype=float32")


def test_a_frozen_copy_and_a_second_loss_are_counted(home, monkeypatch, capsys):
    alone = phases(dry_run("llama3-8b-rlmt", monkeypatch, capsys))
    gathered = 2 * 128_256 * 4096
    # fp32 shards of a second model, whose head stays gathered after its forward
    beside = phases(dry_run("llama3-8b-rlmt", monkeypatch, capsys, "--loss.kl=0.01"))
    for phase, size in beside.items():
        assert size - alone[phase] == pytest.approx(4 * PARAMETERS["llama3-8b"] / 8 + gathered, abs=2e8)
    # gradients of head and hidden rows from one loss wait for those from the other
    beside = phases(dry_run("llama3-8b-rlmt", monkeypatch, capsys, "--loss.next_token=0.1"))
    assert beside["training"] - alone["training"] == pytest.approx(gathered + 2 * 10_240 * 4096, abs=2e8)
    assert beside["rollout"] == alone["rollout"]


def test_moments_that_wait_on_the_host_are_there_for_training_alone(home, monkeypatch, capsys):
    alone = phases(dry_run("llama3-8b-rlmt", monkeypatch, capsys))
    beside = phases(dry_run("llama3-8b-rlmt", monkeypatch, capsys, "--optim.offload=true"))
    gone = {phase: alone[phase] - beside[phase] for phase in alone}
    assert gone == pytest.approx({"sync": 8.03e9, "rollout": 8.03e9, "training": 0}, abs=1.1e8)


def test_a_plan_that_does_not_fit_an_h100_says_so(home, monkeypatch, capsys):
    assert "an 80 GB H100 has" not in dry_run("llama3-8b-rlmt", monkeypatch, capsys)
    monkeypatch.setitem(GPUS, "llama3-8b", 1)
    [line] = [x for x in dry_run("llama3-8b-rlmt", monkeypatch, capsys).splitlines() if "an 80 GB H100 has" in x]
    assert line.startswith("# warning: 1")
    assert "(1 ranks; WORLD_SIZE)" in line
