import json
import re

import pytest

from thinkmid import config
from thinkmid.train.config import RLMTConfig, RLPTConfig
from thinkmid.train.metrics import advice, summary

NEEDED = ("--run.folder=r", "--run.steps=1", "--model.folder=m", "--loss.denom=1", "--optim.lr=1")
RLMT, _ = config.load(RLMTConfig, [*NEEDED, "--data.paths=d"], prog="", description="")
RLPT, _ = config.load(RLPTConfig, [*NEEDED, "--data.path=d"], prog="", description="")


@pytest.mark.parametrize(
    ("reward", "dead", "unclosed", "words"),
    [
        (0.3, 0.2, 0.0, []),
        (0.01, 0.95, 0.1, ["95% of the groups have no right sample"]),
        (0.97, 0.95, 0.0, ["95% of the groups are right throughout"]),
        (0.0, 1.0, 0.8, ["80% of the thoughts do not close", "100% of the groups have no right sample"]),
        (0.4, 0.3, 0.6, ["60% of the thoughts do not close"]),
    ],
)
def test_a_start_from_which_nothing_can_be_learnt_is_named(reward, dead, unclosed, words):
    lines = advice({"reward": reward, "dead_groups": dead, "unclosed": unclosed}, RLMT)
    assert len(lines) == len(words)
    assert all(line.startswith(word) for line, word in zip(lines, words, strict=True))


def test_the_way_out_of_dead_groups_is_a_command_that_is_accepted_and_rlpt_is_not_given_it():
    row = {"reward": 0.0, "dead_groups": 1.0, "unclosed": 0.0}
    (line,) = advice(row, RLMT)
    flags = [f"--{key}={value.strip(chr(39))}" for key, value in re.findall(r"([a-z]+\.[a-z]+) = ([\w']+)", line)]
    cfg, _ = config.load(RLMTConfig, [*NEEDED, "--data.paths=d", *flags], prog="", description="")
    assert (cfg.reward.judge, cfg.reward.gain, cfg.loss.scope) == (0, 1, "thought")
    (line,) = advice(row, RLPT)
    assert "reward.gain" not in line
    # the reward that it names has no equal rewards for this reason
    (line,) = advice(row | {"likelihood": -3.0}, RLMT)
    assert "reward.gain" not in line


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"reward": 0.2}, "reward 0.200 -> 0.400 (2.00 times), "),
        ({"reward": 0.2, "likelihood": -4.0, "gain": 0.2}, "reward 0.200 -> 0.400, "),
        ({"reward": -0.2, "likelihood": -4.0}, "reward -0.200 -> -0.400, "),
        ({"reward": 0.0}, "reward 0.000 -> 0.000, "),
    ],
)
def test_a_ratio_is_one_of_shares(tmp_path, row, words):
    rows = [row | {"thinking_tokens": 8}, {name: 2 * value for name, value in row.items()} | {"thinking_tokens": 9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert summary(tmp_path).startswith(f"{words}thinking 8.0 -> 9.0 tokens (")


def test_a_row_without_a_number_is_left_out_of_the_summary(tmp_path):
    told = '{"reward": 0.5, "thinking_tokens": 8}\n{"reward": null}\n{}\n{"reward": "a"}\n'
    (tmp_path / "metrics.jsonl").write_text(told)
    assert summary(tmp_path).startswith("reward 0.500 -> none, thinking 8.0 -> none tokens")
