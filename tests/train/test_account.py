import pytest

from thinkmid.train.account import advice


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
