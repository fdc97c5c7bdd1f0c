"""The program that compares evaluations: differences by hand, intervals against simulation, what it refuses."""

import json

import numpy as np
import pytest
from conftest import exit_code

from thinkmid.eval import compare, stats

A = {"one": {"a": [1, 1], "b": [1, 0], "c": [0, 0]}, "two": {"d": [1, 1], "e": [1, 1]}}
B = {"one": {"a": [1, 0], "b": [0, 0], "c": [0, 0]}, "two": {"d": [0, 1], "e": [1, 1]}}
ABOUT = {"template": "plain", "samples": 2, "temperature": 0.6, "top_p": 0.95, "max_new": 96}
HASHES = {"questions": {"one": "1f", "two": "2e"}}


def write(folder, sets, **about):
    """An evaluation's folder with these scores of the samples of each question of each set."""
    (folder / "graded").mkdir(parents=True)
    results = {**ABOUT, **HASHES, **about, "sets": {name: {} for name in sets}}
    (folder / "results.json").write_text(json.dumps(results))
    for name, questions in sets.items():
        rows = [
            {
                "question": q,
                "sample": k,
                "score": s,
                "answer": "1",
                "truncated": False,
                "num_think": 3,
                "unclosed": False,
            }
            for q, scores in questions.items()
            for k, s in enumerate(scores)
        ]
        (folder / "graded" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def call(tmp_path, *flags):
    return exit_code(compare, [str(tmp_path / "a"), str(tmp_path / "b"), *flags])


def test_differences_are_those_of_a_hand_computation(tmp_path, capsys):
    write(tmp_path / "a", A)
    write(tmp_path / "b", B)
    assert call(tmp_path, f"--json={tmp_path}/out.json") == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())["others"]
    one, two = found["sets"]["one"], found["sets"]["two"]
    # differences by question: 1/2 1/2 0, and 1/2 0
    assert (one["mean"], one["better"], one["worse"]) == (pytest.approx(1 / 3), 2, 0)
    assert one["se"] == pytest.approx(1 / 6)
    assert one["p"] == 2 / 4
    assert (two["mean"], two["se"], two["p"]) == (0.25, pytest.approx(0.25), 1)
    mean = found["mean"]
    assert (mean["mean"], mean["better"], mean["worse"]) == (pytest.approx((1 / 3 + 1 / 4) / 2), 3, 0)
    assert mean["se"] == pytest.approx(np.hypot(1 / 6, 1 / 4) / 2)
    assert mean["p"] == 2 / 8  # all three signs as they are, or all turned
    assert found["warnings"] == []
    assert "+0.292" in capsys.readouterr().out


def test_the_other_way_round_signs_turn_and_p_stays(tmp_path):
    write(tmp_path / "a", B)
    write(tmp_path / "b", A)
    write(tmp_path / "c", B)
    assert call(tmp_path, str(tmp_path / "c"), f"--json={tmp_path}/out.json") == 0
    to_b, to_c = json.loads((tmp_path / "out.json").read_text())["others"]
    assert (to_b["mean"]["mean"], to_b["mean"]["p"]) == (pytest.approx(-7 / 24), 2 / 8)
    assert (to_b["mean"]["better"], to_b["mean"]["worse"]) == (0, 3)
    assert (to_c["b"], to_c["mean"]["mean"], to_c["mean"]["p"]) == (str(tmp_path / "c"), 0, 1)


def test_a_question_of_a_small_set_weighs_more_in_p():
    def p(*differences):
        return stats.paired([(np.array(d, float), np.zeros(len(d))) for d in differences], seed=0).p

    assert p([1, 1, 1], [1]) == 2 / 16
    assert p([1, 1, 1], [-1]) == 1  # the sets' means cancel
    assert p([1, 1, 1, -1]) == 10 / 16


def test_in_simulation_intervals_cover_and_p_is_as_rare_as_it_says():
    """Sets of unlike size and difficulty; what is estimated is the mean of the sets, not of all questions."""
    rng, rounds, truth = np.random.default_rng(0), 600, (0.1 + 0.0) / 2
    covered = rare = 0
    for _ in range(rounds):
        sets, null = [], []
        for num, gain in ((25, 0.1), (100, 0.0)):
            hard = rng.uniform(0.2, 0.8, num)
            b, c = (rng.binomial(4, hard) / 4 for _ in range(2))
            sets.append((rng.binomial(4, hard + gain) / 4, b))
            null.append((c, b))
        found = stats.paired(sets, seed=1, rounds=50).difference
        covered += found.low <= truth <= found.high
        rare += stats.paired(null, seed=1, rounds=199).p <= 0.1
    # within three standard errors of 95 % and of 10 %
    assert abs(covered / rounds - 0.95) < 3 * np.sqrt(0.95 * 0.05 / rounds)
    assert abs(rare / rounds - 0.1) < 3 * np.sqrt(0.1 * 0.9 / rounds)


def wrong_rows():
    good = {"question": "a", "sample": 0, "score": 1, "answer": "1", "truncated": False, "num_think": 3}
    for wrong in ({"question": None}, {"question": []}, {"sample": "0"}, {"sample": {}}, {"num_think": 10**400}):
        yield json.dumps(good | {"unclosed": False} | wrong) + "\n"


def without(sets, name):
    return {key: value for key, value in sets.items() if key != name}


@pytest.mark.parametrize(
    ("sets", "about", "line"),
    [
        (without(B, "two"), {}, "b: has no set 'two', "),
        (B | {"three": B["one"]}, {}, "a: has no set 'three', "),
        (B | {"two": without(B["two"], "e")}, {}, "set 'two': 1 questions are in one run alone, 'e' for one"),
        (B, {"questions": {"one": "1f", "two": "99"}}, "set 'two' has other questions or answers than in "),
    ],
)
def test_other_questions_are_refused_in_one_line(tmp_path, capsys, sets, about, line):
    write(tmp_path / "a", A)
    write(tmp_path / "b", sets, **about)
    assert call(tmp_path) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({"template": "boxed"}, "warning: template is plain in "),
        ({"temperature": 1.0}, "warning: temperature is 0.6 in "),
        ({"questions": {}}, "warning: a run has no hash of its questions"),
    ],
)
def test_another_template_or_sampling_is_a_warning(tmp_path, capsys, about, line):
    write(tmp_path / "a", A)
    write(tmp_path / "b", B, **about)
    assert call(tmp_path) == 0
    out = capsys.readouterr().out
    assert line in out
    assert out.count("warning") == 1


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("results.json", None, "no such file"),
        ("results.json", "[]", "not a JSON object"),
        ("results.json", "[" * 100_000, "not JSON"),
        ("results.json", '{"sets": ["one"]}', "not the results of an evaluation"),
        ("results.json", '{"sets": {"one": {}}, "questions": null}', "not the results of an evaluation"),
        ("results.json", '{"sets": {"a\\u0000": {}}}', "not the results of an evaluation"),
        ("graded/one.jsonl", None, "no such file"),
        ("graded/one.jsonl", '{"question": "a"}\n', "one.jsonl:1: not a graded sample"),
        *[("graded/one.jsonl", row, "one.jsonl:1: '") for row in wrong_rows()],
    ],
)
def test_a_broken_folder_is_one_line_that_names_the_file(tmp_path, capsys, file, text, line):
    write(tmp_path / "a", A)
    write(tmp_path / "b", B)
    path = tmp_path / "b" / file
    path.unlink() if text is None else path.write_text(text)
    assert call(tmp_path) == 2
    err = capsys.readouterr().err
    assert str(path) in err
    assert line in err
    assert err.count("\n") == 1
