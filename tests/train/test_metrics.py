import pytest

from thinkmid.train.metrics import advice, summary


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
    lines = advice({"reward": reward, "dead_groups": dead, "unclosed": unclosed})
    assert len(lines) == len(words)
    assert all(line.startswith(word) for line, word in zip(lines, words, strict=True))


def test_a_row_without_a_number_is_left_out_of_the_summary(tmp_path):
    told = '{"reward": 0.5, "thinking_tokens": 8}\n{"reward": null}\n{}\n{"reward": "a"}\n'
    (tmp_path / "metrics.jsonl").write_text(told)
    assert summary(tmp_path).startswith("reward 0.500 -> nan (nan times), thinking 8.0 -> nan tokens")
