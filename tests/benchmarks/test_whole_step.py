"""The benchmark of whole RL steps: prompts of exactly so many tokens, contenders that draw what they are told to."""

import pytest
import torch
from world import sft_flags

from benchmarks import rlmt
from thinkmid.files import read_rows, write_rows
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import sft

SETTING = rlmt.Setting(prompts=3, siblings=4, prefix=9, new=5, dead=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    assert sft.main(sft_flags(folder)) == 0
    return folder / "sft" / "export"


@pytest.fixture
def prepared(trained, tmp_path, monkeypatch):
    texts = [{"question": f"Ana has {i} coins and Ben finds {i + 1} more of them today."} for i in range(30)]
    write_rows(tmp_path / "texts.jsonl", texts)
    monkeypatch.setattr(rlmt, "MINI", trained)
    monkeypatch.setattr(rlmt, "TEXTS", tmp_path / "texts.jsonl")
    rlmt.prepare(SETTING, tmp_path)
    return tmp_path


def test_prompts_have_exactly_so_many_tokens_in_text_too(prepared, trained):
    rows, tokenizer = read_rows(prepared / "prompts.jsonl"), Tokenizer.load(trained)
    assert [len(row["tokens"]) for row in rows] == [9, 9, 9]
    assert [tokenizer.encode(row["prompt"]) for row in rows] == [row["tokens"] for row in rows]
    assert [row["is_dead"] for row in rows] == [True, False, False]


@pytest.mark.parametrize("contender", [rlmt.run_ours, rlmt.run_plain])
def test_a_contender_takes_its_steps(prepared, contender):
    torch.use_deterministic_algorithms(False)
    assert len(contender(SETTING, prepared, 2)) == 2  # each asserts that it drew 5 tokens a sample


def test_medians_and_ratios_are_those_of_the_timings(tmp_path):
    seconds = {"thinkmid": [2.0, 1.0, 9.0], "TRL": [10.0, 20.0, 30.0], "plain loop": [5.0, 5.0, 5.0]}
    lines = rlmt.describe("a", seconds, 40)
    assert "2.000 s a step (1.000 to 9.000)" in lines[1]
    assert "20 drawn tokens/s" in lines[1]
    assert lines[2].endswith("ours is 10.00 times as fast")
    rlmt.draw({"seconds": {"a": seconds}}, tmp_path / "bars.svg")
    assert all(f"<!-- {bar} -->" in (tmp_path / "bars.svg").read_text() for bar in ("1.0", "10.0", "2.5"))
