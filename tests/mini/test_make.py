import json
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import exit_code
from interpreter import run

from thinkmid import thoughts
from thinkmid.errors import UserError
from thinkmid.mini import make, world
from thinkmid.mini.make import Sieve, main

TINY = [f"--{name}=1" for name in ("general", "documents", "rl", "heldout", "questions", "train-questions")]
SIZES = ["--general=400", "--documents=1500", "--rl=300", "--heldout=200", "--questions=150", "--train-questions=300"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "world"
    main([str(out), *SIZES])
    return out


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def files(folder):
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def asked(text):
    """Every result of a text as what must not leak: start, steps and thing, in no wording."""
    return {(r.start, r.values[0], tuple(r.steps), r.thing) for r in run(text)}


def test_two_runs_write_the_same_bytes_and_another_seed_does_not(folder, tmp_path):
    main([str(tmp_path / "again"), *SIZES])
    main([str(tmp_path / "other"), *SIZES, "--seed", "1"])
    assert files(tmp_path / "again") == files(folder)
    other = files(tmp_path / "other")
    assert other.keys() == files(folder).keys()
    assert not set(other.values()) & set(files(folder).values())


def test_the_manifest_tells_what_is_there(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: file["sha256"] for name, file in manifest["files"].items()} == {
        name: digest for name, digest in files(folder).items() if name != "manifest.json"
    }
    for name, file in manifest["files"].items():
        ids = [row["id"] for row in rows(folder, Path(name).stem)]
        split = Path(name).stem.removeprefix("questions-")
        assert ids == [f"{split}-{i}" for i in range(file["rows"])]
    assert manifest["files"]["sft-think.jsonl"]["rows"] == 1500
    assert manifest["files"]["questions-held-out-c.jsonl"]["rows"] == 150


def test_no_document_stands_in_two_files(folder):
    texts = {name: [row["text"] for row in rows(folder, name)] for name in ("general", "sft-raw", "rl", "heldout")}
    raw = [thoughts.strip(text) for split in texts.values() for text in split]
    assert len(raw) == len(set(raw))


def test_the_raw_control_has_the_same_documents_and_as_many_words(folder):
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    think = [thoughts.strip(row["text"]) for row in rows(folder, "sft-think")]
    assert [row["text"] for row in rows(folder, "sft-raw")][: len(think)] == think
    assert 0 <= manifest["sft-raw.jsonl"]["words"] - manifest["sft-think.jsonl"]["words"] < 100


def test_no_evaluation_question_is_answered_in_training(folder):
    evaluation = [asked(row["question"]) for kind in world.SETS for row in rows(folder, f"questions-{kind}")]
    assert len(set.union(*evaluation)) == len(evaluation) == 150 * len(world.SETS)
    texts = [
        thoughts.strip(row["text"]) for name in ("general", "sft-raw", "rl", "heldout") for row in rows(folder, name)
    ]
    texts += [row["question"] for row in rows(folder, "questions-train")]
    assert all(asked(text).isdisjoint(set.union(*evaluation)) for text in texts)


@pytest.mark.parametrize(
    ("facts", "result", "new"),
    [
        ("Ana owns 9 pens. Snow falls on the roof. On Monday Ana loses 2 pens.", "Now Ana has 7 pens.", False),
        (
            "Let p be 3. So p is 3. Ana has 9 pens. On Monday Ana sells 2.",
            "So Ana has 7 pens.",
            False,
        ),
        ("Question: Ana owns 9 pens. On Monday Ana sells 2. How many pens does Ana have?", "Answer: It is 7.", False),
        ("Ana owns 9 pens. On Monday Ana loses 2 pens.", "", True),
        ("Ana owns 9 pens. On Friday Ana loses 2 pens.", "Now Ana has 7 pens.", True),
        ("Ana owns 9 books. On Monday Ana loses 2 books.", "Now Ana has 7 books.", True),
        ("Ana owns 9 pens. On Monday Ana loses 2 pens. On Tuesday Ana sells 1.", "Now Ana has 6 pens.", True),
    ],
)
def test_a_reserved_question_is_recognised_in_any_wording(facts, result, new, monkeypatch):
    asked = "Question: Ana has 9 pens. On Monday Ana gives 2 to Jo. How many pens does Ana have? Answer:"
    monkeypatch.setattr(world, "questions", lambda kind, seed, n: iter([{"question": asked, "answer": "7"}] * 3))
    sieve, row = Sieve(), {"text": f"{facts} {result}".strip()}
    sieve.reserve("1-step", "0", 1)
    assert sieve.take(iter([row]), 1) == [row] * new
    assert sieve.removed["leaks"] == (not new)
    with pytest.raises(UserError, match="only 0"):
        sieve.reserve("1-step", "0", 1)


def test_a_repeated_text_is_dropped_and_counted():
    sieve = Sieve()
    assert len(sieve.take(iter([{"text": "It rains all day."}] * 3), 3)) == 1
    assert sieve.removed == {"duplicates": 2, "leaks": 0}


def test_the_second_call_changes_nothing_and_a_damaged_folder_is_written_anew(folder):
    before, inode = files(folder), folder.stat().st_ino
    main([str(folder), *SIZES])
    assert folder.stat().st_ino == inode
    (folder / "rl.jsonl").write_text("{}\n")
    main([str(folder), *SIZES])
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert exit_code(make, [str(tmp_path), *SIZES]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} exists and was not written by")
    assert files(tmp_path).keys() == {"thesis.txt"}


def test_a_foreign_file_in_a_world_is_not_lost(tmp_path, capsys):
    out = tmp_path / "out"
    main([str(out), *TINY])
    (out / "thesis.txt").write_text("years of work")
    before = files(out)
    assert not exit_code(make, [str(out), *TINY])  # nothing to write
    assert exit_code(make, [str(out), *TINY, "--seed=1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out}: holds thesis.txt, which thinkmid.mini.make did not write")
    assert files(out) == before


def test_a_link_stays_a_link_and_what_a_killed_call_left_is_swept(tmp_path):
    (tmp_path / "link").symlink_to("there")
    (tmp_path / ".there.new").mkdir()
    (tmp_path / ".there.new" / "rl.jsonl").write_text("torn")
    for seed in ("0", "1"):
        main([str(tmp_path / "link"), *TINY, "--seed", seed])
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "there"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"files": [1]}, 2),
        ({"files": 3}, 2),
        ({"files": {"rl.jsonl": 3}}, 2),
        ({"removed": 3}, 0),
        ({"removed": {}}, 0),
    ],
)
def test_a_manifest_that_was_edited_is_refused_or_written_anew(tmp_path, capsys, change, code):
    main([str(tmp_path / "out"), *TINY])
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert (exit_code(make, [str(tmp_path / "out"), *TINY]) or 0) == code
    assert capsys.readouterr().err.count("\n") == (code == 2)


@pytest.mark.parametrize("wrong", [["--mix", "1", "1", "1"], ["--rl", "-3"], ["--questions", "many"]])
def test_a_wrong_argument_ends_with_code_2_and_leaves_no_folder(tmp_path, wrong):
    assert exit_code(make, [str(tmp_path / "out"), *SIZES, *wrong]) == 2
    assert list(tmp_path.iterdir()) == []
