"""thinkmid.data.source: tables that other libraries wrote: arrow, folders of save_to_disk, columns by name, globs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from thinkmid.data import questions
from thinkmid.data.source import left_out, read_documents, read_rows
from thinkmid.errors import UserError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

ROWS = [{"id": f"n{n}", "body": f"text {n} é\0", "score": n / 2, "text": "not this"} for n in range(2051)]


def told(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["id"], row["body"]) for row in rows]


def read(*paths: Path, column: str = "body") -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in read_documents(paths, column)]


def write_arrow(path: Path, opened) -> Path:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2000)  # larger than what is read at a time
    return path


@pytest.mark.parametrize("opened", ["new_stream", "new_file"])
def test_an_arrow_file_gives_its_rows_whichever_of_the_two_formats_it_has(tmp_path, opened):
    path = write_arrow(tmp_path / "rows.arrow", getattr(pyarrow.ipc, opened))
    assert read(path) == told(ROWS)
    assert list(read_rows([path]))[2049] == (f"{path}:2050", ROWS[2049])
    # a column alone is read, and all of them where it is not there, so that the error can list them
    assert next(read_rows([path], only=("id", "score")))[1] == {"id": "n0", "score": 0.0}
    with pytest.raises(UserError, match=r'rows.arrow:1: no "words" in this row; it has id, body, score, text'):
        read(path, column="words")


def test_a_damaged_arrow_file_is_one_line(tmp_path):
    path = write_arrow(tmp_path / "rows.arrow", pyarrow.ipc.new_stream)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"rows.arrow:2001: cannot be read \(") as error:
        read(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match=r"rows.arrow:1: cannot be read \("):
        read(path)


def test_a_folder_of_save_to_disk_is_read_without_what_map_left_beside_it(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder, num_shards=3)
    assert len(list(folder.glob("*.arrow"))) == 3
    shutil.copy(next(folder.glob("*.arrow")), folder / "cache-0123.arrow")
    assert read(folder) == told(ROWS)
    assert left_out([folder]) == [f"{folder}: 3 files left out: *.json (2), *.arrow (1), such as dataset_info.json"]
    assert read(tmp_path) == told(ROWS)  # below another folder too
    next(folder.glob("data-00001*")).unlink()
    with pytest.raises(UserError, match=r"saved/data-00001-of-00003.arrow: no such file; state.json names it"):
        read(folder)


def test_a_shuffled_data_set_is_saved_in_its_new_order(tmp_path):
    shuffled = datasets.Dataset.from_list(ROWS).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == told(list(shuffled)) != told(ROWS)


def test_a_mapping_of_indices_is_refused(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(UserError, match="saved: an older datasets saved it with a mapping"):
        read(folder)


def test_several_splits_are_named_and_one_of_them_is_read(tmp_path):
    both = {"train": datasets.Dataset.from_list(ROWS[:30]), "test": datasets.Dataset.from_list(ROWS[30:40])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"two: holds the splits train, test; name one: .*two/train"):
        read(tmp_path / "two")
    assert read(tmp_path / "two" / "test") == told(ROWS[30:40])
    datasets.DatasetDict(train=both["train"]).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == told(ROWS[:30])


def test_other_state_files_are_no_business_of_ours(tmp_path):
    (tmp_path / "state.json").write_text("[]")
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "body": "b"}\n')
    assert read(tmp_path) == [("a", "b")]


def test_a_column_is_for_rows_and_a_text_file_is_its_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "body": "b", "text": "c"}\n')
    (tmp_path / "b.txt").write_text("d")
    assert [text for _, text in read(tmp_path)] == ["b", "d"]
    assert [text for _, text in read(tmp_path / "a.jsonl", column="text")] == ["c"]
    (tmp_path / "c.jsonl").write_text('{"body": ["b"]}\n')
    with pytest.raises(UserError, match=r'c.jsonl:1: "body" must be a string, not a list'):
        read(tmp_path)


def test_rows_with_messages_pass_through_whole(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "source": "s"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for path in ("saved", "rows.parquet", "rows.jsonl"):
        ((_, row),) = read_rows([tmp_path / path], only=("id", "messages"))
        assert row["messages"] == rows[0]["messages"]
        ((_, row),) = read_rows([tmp_path / path])
        assert row == rows[0]


def test_a_star_stands_for_what_it_matches_in_order(tmp_path):
    for name in ("b/train-1.jsonl", "b/train-0.jsonl", "b/test-0.jsonl", "c/train-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"id": name, "body": "x", "question": name, "answer": "1"}) + "\n")
    assert [id for id, _ in read(tmp_path / "b" / "train-*.jsonl")] == ["b/train-0.jsonl", "b/train-1.jsonl"]
    assert [id for id, _ in read(tmp_path / "**" / "*-0.jsonl")] == [
        "b/test-0.jsonl", "b/train-0.jsonl", "c/train-0.jsonl"
    ]  # fmt: skip
    assert len(questions.load("questions", tmp_path / "*" / "train-*.jsonl").questions) == 3
    with pytest.raises(UserError, match=r"nothing-\*.jsonl: no such file or folder"):
        read(tmp_path / "nothing-*.jsonl")


def test_questions_are_read_from_arrow_and_save_to_disk(tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"so\n#### {n + 1}"} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved, listed = (questions.load("gsm8k", tmp_path / name) for name in ("saved", "rows.jsonl"))
    assert saved.sha256 == listed.sha256
