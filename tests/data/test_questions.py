"""thinkmid.data.questions and layouts: all layouts of a set give the same questions; what is wrong is named."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from thinkmid.data import questions
from thinkmid.data.layouts import kind_of
from thinkmid.data.questions import TASKS, Question, Task, base_answer, load, posed
from thinkmid.errors import UserError
from thinkmid.eval.config import EvalData, load_sets

# what each set holds, and one writer of a row for each layout it is distributed in
GSM8K = [(f"Ann has {n} pens,\nthen {n} more. How many?", str(2 * n), n) for n in (9, 700, 21000)]
MATH = [("What is $1/2+1/3$?", "\\frac{5}{6}"), ("Solve $|x|=2$.", "2,-2"), ("A point?", "\\left( 3, 4 \\right)")]
OLYMPIAD = [
    ("Find $n$.", "$2^{1009}$", "Numerical", False, "number"),
    ("All $x$.", "$69$,$84$", "Numerical", True, "set"),
    ("Where is $f<0$?", "$(-\\infty, 0)$.", "Interval", False, "interval"),
    ("Find all $f$.", "$f(x)=2 x$", "Expression", False, "expr"),
    ("Which pair?", "(6,5)", "Tuple", False, "tuple"),
]
GPQA = [(f'What, said "X",\nis {n}?', f"right {n}", [f"wrong {n}{w}" for w in "abc"]) for n in range(198)]
DAPO_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'


def gsm8k_row(question, gold, n):
    return {"question": question, "answer": f"<<{n}+{n}={gold}>>\nIt is #### no.\n#### {int(gold):,}"}


def olympiad_row(question, gold, answer_type, several, _):
    rest = {"subfield": "Algebra", "context": None, "unit": None, "error": None, "id": 7 + len(question)}
    rest |= {"solution": ["Clear."], "answer_type": answer_type, "is_multiple_answer": several}
    return {"question": question, "final_answer": [gold]} | rest


def gpqa_row(question, right, wrong):
    return {
        "Record ID": "rec" + right,
        "Explanation": "a\n\nb",
        "Question": question + "\n",
        "Correct Answer": right,
    } | {f"Incorrect Answer {n}": option + "\n" for n, option in enumerate(wrong, start=1)}


def dapo_raw(question, gold):
    truth = {"ground_truth": gold, "style": "rule-lighteval/MATH_v2"}
    prompt = [{"content": DAPO_HEAD + question + DAPO_TAIL, "role": "user"}]
    return {"data_source": "math_dapo", "prompt": prompt, "reward_model": truth, "extra_info": {"index": "u"}}


LAYOUTS = {
    "gsm8k": [[gsm8k_row(*row) for row in GSM8K], [gsm8k_row(*row) | {"idx": n} for n, row in enumerate(GSM8K)]],
    "gsm8k-train": [[gsm8k_row(*row) for row in GSM8K]],
    "math500": [
        [
            {
                "problem": q,
                "solution": "\\boxed{0}",
                "answer": a,
                "subject": "Algebra",
                "level": 2,
                "unique_id": f"u{n}",
            }
            for n, (q, a) in enumerate(MATH)
        ],
        [{"problem": q, "answer": a, "difficulty": None} for q, a in MATH],
    ],
    "amc23": [
        [{"id": n, "problem": f"{n}?", "answer": float(n), "url": "u", "question": f"{n}?"} for n in (27, -1, 3159)],
        [{"id": n, "question": f"{n}?", "answer": f"{n}"} for n in (27, -1, 3159)],
    ],
    "olympiadbench": [
        [olympiad_row(*row) for row in OLYMPIAD],
        [{"problem": row[0], "answer": [row[1]]} for row in OLYMPIAD],
        [{"question": row[0], "final_answer": row[1]} for row in OLYMPIAD],
    ],
    "gpqa-diamond": [[gpqa_row(*row) for row in GPQA]],
    "dapo": [
        [dapo_raw("What is $2$?", "2"), dapo_raw("What is\n\nthis?", "-3")],
        [
            {"prompt": "What is $2$?", "solution": "2", "source_prompt": []},
            {"prompt": "What is\n\nthis?", "solution": "-3"},
        ],
        [
            {"prompt": dapo_raw("What is $2$?", "2")["prompt"], "label": "2"},
            {"prompt": "What is\n\nthis?", "label": -3},
        ],
    ],
    "questions": [
        [{"question": "1+1?", "answer": 2, "id": "a"}, {"question": "2+2?", "answer": "4", "set": "easy", "id": 7}]
    ],
}
GOLDS = {
    "gsm8k": [gold for _, gold, _ in GSM8K],
    "math500": [gold for _, gold in MATH],
    "amc23": ["27", "-1", "3159"],
    "olympiadbench": [row[1] for row in OLYMPIAD],
    "dapo": ["2", "-3"],
    "questions": ["2", "4"],
}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match "".join(path.suffixes):
        case ".jsonl":
            path.write_text(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".jsonl.zst":
            path.write_bytes(pytest.importorskip("zstandard").compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case ".csv":
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return path


def identity(question: Question):
    """What two layouts must agree on; not where it stood, and not what only one of them tells."""
    return question.id, question.question, question.gold, question.meta.get("options")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet"])
@pytest.mark.parametrize("task", LAYOUTS)
def test_every_layout_in_every_kind_of_file_gives_the_same_questions(tmp_path, task, suffix):
    loaded = []
    for n, rows in enumerate(LAYOUTS[task]):
        if suffix == ".parquet" and len({str(row.keys()) + str(type(row.get("prompt"))) for row in rows}) > 1:
            continue  # a column has one type
        loaded.append(load(task, write(tmp_path / f"{n}{suffix}", rows)))
    plain = load(task, write(tmp_path / "plain.jsonl", LAYOUTS[task][0]))
    for other in loaded:
        assert [*map(identity, other.questions)] == [*map(identity, plain.questions)]
        assert other.sha256 == plain.sha256
    if task in GOLDS:
        assert [q.gold for q in plain.questions] == GOLDS[task]
    assert [q.meta["where"] for q in plain.questions[:2]] == [f"{tmp_path}/plain.jsonl:{n}" for n in (1, 2)]


def test_the_content_hash_knows_neither_order_nor_white_space_but_every_answer(tmp_path):
    rows = LAYOUTS["gsm8k"][0]
    hashes = {
        name: load("gsm8k", write(tmp_path / f"{name}.jsonl", changed)).sha256
        for name, changed in {
            "same": rows,
            "order": rows[::-1],
            "space": [row | {"question": row["question"].replace("\n", "  ")} for row in rows],
            "answer": [*rows[1:], rows[0] | {"answer": "#### 19"}],
            "question": [*rows[1:], rows[0] | {"question": "Ann?"}],
            "fewer": rows[1:],
        }.items()
    }
    assert hashes["same"] == hashes["order"] == hashes["space"]
    assert len(set(hashes.values())) == 4


def test_a_file_unlike_the_public_copies_is_noted_and_refused_when_strict(tmp_path, monkeypatch):
    path = write(tmp_path / "test.jsonl", LAYOUTS["gsm8k"][0])
    assert load("gsm8k", path).notes == [f"{path}: 3 questions; gsm8k has 1319"]
    with pytest.raises(UserError, match="3 questions; gsm8k has 1319"):
        load("gsm8k", path, strict=True)
    true = load("gsm8k", path).sha256
    for begin, noted in ((true[:16], False), ("", False), ("0" * 16, True)):
        monkeypatch.setitem(TASKS, "gsm8k", Task(TASKS["gsm8k"].fields, {3: begin, 4: ""}))
        assert bool(load("gsm8k", path).notes) is noted
    assert load("gsm8k", path).notes == [
        f"{path}: content sha256 {true[:16]} is not that of the public gsm8k, {'0' * 16}"
    ]
    assert {task: sum(TASKS[task].known) for task in ("math500", "amc23", "gpqa-diamond")} == {
        "math500": 500, "amc23": 40, "gpqa-diamond": 198
    }  # fmt: skip


def test_kinds_come_from_the_file_or_else_from_the_form(tmp_path):
    read = load("olympiadbench", write(tmp_path / "a.jsonl", LAYOUTS["olympiadbench"][0])).questions
    assert [q.kind for q in read] == [row[-1] for row in OLYMPIAD]
    forms = {
        "1,234": "number",
        "-0.5": "number",
        "\\$32,\\!348": "number",
        "$.5$": "number",
        "1,-2": "set",
        "3, 5, 7": "set",
    }
    forms |= {"(1,2)": "tuple", "(3,4]": "interval", "[0,1)": "interval", "(-\\infty, 0]": "interval", "1,2345": "set"}
    forms |= {
        "(2,\\infty)": "interval",
        "(a,b)+(c,d)": "expr",
        "p-q": "expr",
        "-": "expr",
        "(a+5)(b+2)": "expr",
        "": "expr",
    }
    assert {gold: kind_of(gold) for gold in forms} == forms


def test_context_units_and_tolerances_of_olympiad_rows_are_kept(tmp_path):
    row = olympiad_row("How far?", "4.2", "Numerical", False, "") | {
        "context": "A cart rolls.",
        "unit": "%",
        "error": "1e-1",
    }
    (question,) = load("olympiadbench", write(tmp_path / "a.json", [row])).questions
    assert question.question == "A cart rolls.\nHow far?"
    assert (question.meta["unit"], question.meta["tolerance"], question.meta["own_id"]) == ("%", "1e-1", "15")
    two = load("olympiadbench", write(tmp_path / "b.json", [row | {"final_answer": ["1", "2"]}])).questions[0]
    assert (two.gold, two.kind) == ("1,2", "set")


def test_ids_of_benchmarks_are_by_content_and_a_users_own_are_kept(tmp_path):
    a, b = (load("amc23", write(tmp_path / f"{n}.jsonl", LAYOUTS["amc23"][0][n:])).questions for n in (0, 1))
    assert [q.id for q in a[1:]] == [q.id for q in b]
    assert [q.id for q in load("questions", write(tmp_path / "q.jsonl", LAYOUTS["questions"][0])).questions] == [
        "a",
        "7",
    ]
    (nameless,) = load("questions", write(tmp_path / "n.jsonl", [{"question": "1?", "answer": 1}])).questions
    assert nameless.id.startswith("questions-")


# --- repeated, contradicting


def test_repeated_rows_count_once_and_contradicting_ones_not_at_all(tmp_path):
    rows = [("a?", 1), ("b?", 2), ("a? ", 1), ("c?", 3), ("b?", 5), ("b?", 2)]
    path = write(tmp_path / "a.jsonl", [{"question": q, "answer": a} for q, a in rows])
    loaded = load("questions", path)
    assert [q.question for q in loaded.questions] == ["a?", "c?"]
    assert loaded.notes == [f"{path}:5: another answer than at {path}:2; left out", f"{path}: 2 repeated rows left out"]
    many = load("dapo", write(tmp_path / "b.jsonl", [{"prompt": "a?", "solution": "1"}] * 5), strict=True)
    assert (len(many.questions), many.notes) == (1, [])


def test_one_id_for_two_questions_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": 1, "question": f"{q}?", "answer": 1} for q in "aab"])
    with pytest.raises(UserError, match=rf"^{path}:3: id '1' stands also at {path}:1$"):
        load("questions", path)


# --- GPQA


@pytest.fixture
def gpqa(tmp_path):
    return load("gpqa-diamond", write(tmp_path / "gpqa_diamond.csv", LAYOUTS["gpqa-diamond"][0]), strict=True).questions


def test_csv_cells_with_line_breaks_are_read_and_rows_found_again(gpqa, tmp_path):
    path = tmp_path / "gpqa_diamond.csv"
    assert [q.question for q in gpqa] == [question for question, _, _ in GPQA]
    raw = path.read_bytes().decode("utf-8-sig").split("\n")
    for q in gpqa[::50]:
        line = int(q.meta["where"].rpartition(":")[2])
        assert raw[line - 1].startswith(q.meta["own_id"])
    other = load("gpqa-diamond", write(tmp_path / "a.parquet", LAYOUTS["gpqa-diamond"][0])).questions
    assert [*map(identity, other)] == [*map(identity, gpqa)]


def test_over_any_four_samples_every_letter_is_right_once_for_every_question(gpqa):
    for q in gpqa:
        golds = [posed(q, sample).gold for sample in range(16)]
        assert Counter(golds) == dict.fromkeys("ABCD", 4)
        assert all(sorted(golds[n : n + 4]) == list("ABCD") for n in range(13))
        assert posed(q).gold == q.gold


def test_first_letters_are_even_over_the_questions(gpqa):
    counts = Counter(q.gold for q in gpqa)
    assert sum((counts[letter] - 198 / 4) ** 2 / (198 / 4) for letter in "ABCD") < 16.3  # chi-square, 3 df, p = 0.001


def test_the_gold_letter_stands_before_the_right_option_and_all_options_are_shown(gpqa):
    for q, (question, right, wrong) in zip(gpqa, GPQA, strict=True):
        for sample in range(5):
            text, gold = posed(q, sample)
            listed = dict(line.split(". ") for line in text.removeprefix(question + "\n\n").split("\n"))
            assert listed[gold] == right
            assert sorted(listed.values()) == sorted([right, *wrong])
            assert list(listed) == list("ABCD")


def test_orders_depend_neither_on_the_rows_around_nor_on_the_columns_order(gpqa, tmp_path):
    rows = [row | {"Incorrect Answer 1": row["Incorrect Answer 3"], "Incorrect Answer 3": row["Incorrect Answer 1"]}
            for row in LAYOUTS["gpqa-diamond"][0][100:]]  # fmt: skip
    few = load("gpqa-diamond", write(tmp_path / "few.csv", rows)).questions
    assert [*map(identity, few)] == [*map(identity, gpqa[100:])]


def test_letters_are_turned_back_so_that_samples_can_vote(gpqa):
    q = gpqa[3]
    for sample in range(9):
        text, _ = posed(q, sample)
        listed = dict(line.split(". ") for line in text.rpartition("\n\n")[2].split("\n"))
        for letter, option in listed.items():
            assert q.meta["options"]["ABCD".index(base_answer(q, sample, letter))] == option
    assert base_answer(q, 1, "E") == "E"
    assert base_answer(q, 1, "42") == "42"


# --- what is wrong

GOOD = {name: rows[0][0] for name, rows in LAYOUTS.items()}


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("gsm8k", {"answer": "18"}, '"answer" does not end with "#### " and a number'),
        ("gsm8k", {"answer": "so 18\n#### "}, '"answer" does not end with'),
        ("gsm8k", {"answer": 18}, '"answer" must be a string, not a number'),
        ("gsm8k", {"question": None}, 'no "question" in this row; it has question, answer'),
        ("gsm8k", {"question": " \n"}, '"question" is blank'),
        ("math500", {"answer": ["1"]}, '"answer" must be a string, not a list'),
        ("math500", {"answer": True}, '"answer" must be a string, not a boolean'),
        ("math500", {"unique_id": {}}, '"unique_id" must be a string or an integer, not an object'),
        ("amc23", {"answer": math.nan}, '"answer" is nan'),
        ("amc23", {"problem": None, "question": None}, 'no "problem" or "question" in this row; it has id, problem'),
        ("olympiadbench", {"final_answer": []}, '"final_answer" must be a string, not a list'),
        ("olympiadbench", {"final_answer": ["1", None]}, 'no "final_answer"'),
        ("olympiadbench", {"final_answer": None}, 'no "answer"'),
        ("gpqa-diamond", {"Incorrect Answer 2": ""}, '"Incorrect Answer 2" is blank'),
        ("gpqa-diamond", {"Incorrect Answer 2": "right 0 "}, "a wrong option is the right one"),
        ("dapo", {"prompt": [{"role": "system", "content": "x"}]}, '"prompt" must hold one message of the user, not 0'),
        ("dapo", {"prompt": DAPO_HEAD + DAPO_TAIL}, '"prompt" holds nothing but its instruction'),
        ("dapo", {"reward_model": {}}, 'no "ground_truth" or "solution" or "label" or "answer"'),
        ("questions", {"question": "a <think> b"}, "the question or its answer contains <think>"),
        ("questions", {"answer": "</think>"}, "the question or its answer contains </think>"),
        ("questions", {"id": 1.5}, '"id" must be a string or an integer, not a number'),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_with_its_file_and_row(tmp_path, task, change, says):
    for suffix in (".jsonl", ".json"):
        path = write(tmp_path / f"a{suffix}", [LAYOUTS[task][0][1], GOOD[task] | change])
        with pytest.raises(UserError) as caught:
            load(task, path)
        assert str(caught.value).startswith(f"{path}:2: {says}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"question,answer\na?,1\nb?\n", ":3: a row of 1 cells under a header of 2"),
        ("a.csv", b'question,answer\n"a\nb?",1\n"b"?,2\n', ":4: not CSV"),
        ("a.csv", b'question,answer\na?,1\n"b\n', ":3: not CSV"),
        ("a.csv", b"question,answer\na?,\xff\n", ":2: not UTF-8"),
        ("a.csv", b"question,answer\n", ": no question"),
        ("a.csv", b"", ": no question"),
        ("a.json", b'{"question": "a"}', ": must be a list of rows, not an object"),
        ("a.json", b'{"question": "a"}\n{"question": "b"}', ": not JSON"),
        ("a.json", b'[{"question": "a", "answer": 1}, 3]', ":2: a row must be an object, not a number"),
        ("a.json", b"[" * 100_000, ": not JSON"),
        ("a.jsonl", b'{"question": "a", "answer": 1}\n{"question"', ":2: not JSON"),
        ("a.xlsx", b"", ": unknown kind of file"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load("questions", tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}{says}")
    assert "\n" not in str(caught.value)


def test_a_folder_of_shards_is_one_set_without_its_readme(tmp_path):
    rows = LAYOUTS["questions"][0]
    for n, row in enumerate(rows):
        write(tmp_path / "data" / f"test-0000{n}.jsonl", [row])
    (tmp_path / "data" / "README.md").write_text("# A set of questions")
    found = load("questions", tmp_path / "data", strict=True)
    assert [q.gold for q in found.questions] == ["2", "4"]
    left = f"{tmp_path / 'data'}: 1 file left out: README.md (1), such as README.md"
    assert found.notes == [left]
    for shard in (tmp_path / "data").glob("*.jsonl"):
        shard.rename(shard.with_suffix(".json"))
    with pytest.raises(UserError, match=r"data: no question; .*3 files left out: \*.json \(2\), README.md"):
        load("questions", tmp_path / "data")


def test_every_set_is_told_by_the_first_rank_alone(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data" / "a.jsonl", LAYOUTS["questions"][0])
    (tmp_path / "data" / "b.csv").touch()
    sets = EvalData(sets=(f"questions={tmp_path / 'data'}",))
    for rank, line in (("0", "questions: 2 questions; "), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert list(load_sets(sets)) == ["questions"]
        out = capsys.readouterr().out
        assert out.startswith(line)
        assert ("*.csv (1)" in out) == bool(line)


def test_an_unknown_task_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(UserError, match=r"unknown task 'math-500'; did you mean 'math500'\?"):
        load("math-500", tmp_path)
    with pytest.raises(UserError, match=r"none.csv: no such file or folder"):
        load("gsm8k", tmp_path / "none.csv")


def test_the_tasks_of_the_papers_tables_are_there():
    assert {"gsm8k", "math500", "olympiadbench", "amc23", "gpqa-diamond"} <= set(questions.TASKS)
