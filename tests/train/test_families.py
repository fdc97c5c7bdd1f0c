"""RLMT of the families that the miniature does not run: from a folder to one that transformers reads."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, exit_code, random_model
from world import rlmt_flags, sft_flags

from thinkmid.model import weights
from thinkmid.model.transformer import Yarn
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import rlmt, sft

SHAPE = replace(TINY, kv_heads=1, rope_theta=1e4)
FAMILIES = {
    "mistral": replace(SHAPE, kind="mistral", window=20, windowed_layers=(0, 1)),
    "smollm3": replace(SHAPE, kind="smollm3", tied=True, no_rope_layers=(1,)),
    "olmo2": replace(SHAPE, kind="olmo2"),
    "olmo3": replace(
        SHAPE, kind="olmo3", window=20, windowed_layers=(0,),
        rope_scaling=Yarn(factor=4.0, attention_factor=1.2, original_max_positions=32),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a corpus, and a tokenizer in sft/export."""
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, sft_flags(folder)) == 0
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_rlmt_move_a_model_that_transformers_reads_back(world, tmp_path, family):
    transformers = pytest.importorskip("transformers")
    text = Tokenizer.load(world / "sft/export")
    cfg = replace(FAMILIES[family], vocab=text.vocab_size, eos_ids=text.eos_ids)
    before, start = random_model(cfg), tmp_path / family
    weights.save(start, cfg, weights.stream(before), dtype="float32", extra_files=world / "sft/export")
    flags = [f"--model.folder={start}", "--reward.gain=1", "--engine.check_every=1", "--loss.next-token=0.1"]
    assert exit_code(rlmt, [*rlmt_flags(world, f"run-{family}", steps=2), *flags]) == 0
    rows = [json.loads(line) for line in (world / f"run-{family}/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["dead_groups"] < 1 and row["grad_norm"] > 0 for row in rows)
    # every tensor was trained, and is found under the name that transformers knows
    after = weights.load_model(world / f"run-{family}/export")
    assert after.cfg == cfg
    moved = {name: not torch.equal(p, dict(before.named_parameters())[name]) for name, p in after.named_parameters()}
    assert all(moved.values()), moved
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        world / f"run-{family}/export", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens = torch.arange(60) * 7 % cfg.vocab
    with torch.no_grad():
        torch.testing.assert_close(after.logits(tokens), theirs(tokens[None]).logits[0], rtol=0, atol=2e-5)
