"""thinkmid.data.source: every file kind gives the same documents; what is wrong is named; orders resume."""

from __future__ import annotations

import builtins
import gzip
import importlib
import importlib.util
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkmid.data.source import Document, Order, left_out, read_documents, read_rows
from thinkmid.errors import UserError

ROWS = [
    {"id": "a", "text": "one\r\ntwo\u2028three\0 🦆", "url": "x", "score": 1.5},
    {"text": "no id", "tags": ["p", "q"]},
    {"id": 7, "text": "\ufeffnumbered"},
]


def write_jsonl(path: Path, rows: list, open_file=builtins.open) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_file(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=row.get("id") == "a") + "\n" for row in rows)
    return path


def write_parquet(path: Path, rows: list) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def expected(path: Path, rows: list) -> list[Document]:
    """Documents by hand."""
    documents = []
    for n, row in enumerate(rows, start=1):
        where = f"{path}:{n}"
        documents.append(Document(id=str(row.get("id", where)), text=row["text"], where=where))
    return documents


def test_plain_gzipped_and_zstd_rows_are_the_same_documents(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    openers = {".jsonl": open, ".jsonl.gz": gzip.open, ".JSONL.zst": zstandard.open}
    for suffix, open_file in openers.items():
        path = write_jsonl(tmp_path / f"rows{suffix}", ROWS, open_file)
        assert list(read_documents([path])) == expected(path, ROWS)
        assert list(read_documents([str(path)])) == expected(path, ROWS)


def test_zstd_files_of_several_frames_are_read_to_the_end(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(json.dumps({"text": word}).encode() + b"\n") for word in ("one", "two", "three")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [document.text for document in read_documents([tmp_path / "a.jsonl.zst"])] == ["one", "two", "three"]


def test_parquet_rows_are_documents(tmp_path):
    rows = [{"id": str(n), "text": f"text {n}", "score": n / 2} for n in range(2500)]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    assert list(read_documents([path])) == expected(path, rows)


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0\xff\xef\xbb\xbf\n")
    (document,) = read_documents([tmp_path / "a.txt"])
    assert document.text == "one\r\ntwo\0\ufffd\ufeff\n"
    assert (document.id, document.where) == (f"{tmp_path}/a.txt:1", f"{tmp_path}/a.txt:1")


def files_of(folder: Path, *names: str) -> Path:
    """A folder of files that hold their names, in whatever form their endings ask for."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}).encode() if ".json" in name else name.encode()
        (folder / name).write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    return folder


def texts_of(folder: Path) -> list[str]:
    return [document.text for document in read_documents([folder])]


def test_a_folder_is_read_in_sorted_order_links_under_their_own_names(tmp_path):
    outside = write_jsonl(tmp_path / "outside" / "x.jsonl", [{"text": "outside"}])
    folder = tmp_path / "corpus"
    for name in ("b/z.md", "b/a.txt", "c.md", "A.md", "skipped.csv", ".hidden/a.txt", "b/.a.txt.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    write_jsonl(folder / "a.jsonl", [{"text": "row 1"}, {"text": "row 2"}])
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "b" / "loop").symlink_to(folder)
    texts = ["A.md", "row 1", "row 2", "b/a.txt", "b/z.md", "c.md", "outside", "outside"]
    found = list(read_documents([folder]))
    assert [document.text for document in found] == texts
    assert [document.where for document in found[-2:]] == [f"{folder}/link.jsonl:1", f"{folder}/linked/x.jsonl:1"]
    assert [document.text for document in read_documents([folder / "link.jsonl"])] == ["outside"]
    kinds = "links to folders already read (1), *.csv (1), such as b/loop"
    assert left_out([folder]) == [f"{folder}: 2 files left out: {kinds}"]


def test_a_snapshot_in_the_hubs_cache_is_read_by_the_names_of_its_links(tmp_path):
    blobs, data = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "data"
    files_of(blobs, "x.jsonl", "x.jsonl.gz", "x.txt")
    data.mkdir(parents=True)
    for blob in list(blobs.iterdir()):
        blob.rename(blobs / f"{blob.name[2:]}00")
        (data / blob.name).symlink_to(f"../../../blobs/{blob.name[2:]}00")
    assert texts_of(data.parent) == ["x.jsonl", "x.jsonl.gz", "x.txt"]
    assert left_out([data.parent]) == []


def test_links_in_a_circle_are_read_once_and_named(tmp_path):
    folder, beside = files_of(tmp_path / "a", "in/a.txt"), files_of(tmp_path / "b", "b.txt", "sub/c.txt")
    for link, target in (("again", beside), ("in/b", beside), ("inside", folder / "in"), ("up", tmp_path)):
        (folder / link).symlink_to(target)
    (beside / "back").symlink_to(folder)
    (beside / "sub" / "self").symlink_to(beside)
    assert sorted(set(texts_of(folder))) == sorted(texts_of(folder)) == ["b.txt", "in/a.txt", "sub/c.txt"]
    (folder / ".store").mkdir()
    (folder / ".store" / "d.txt").write_text("d.txt")
    (folder / "kept").symlink_to(".store")
    assert texts_of(folder)[-1] == "d.txt"
    [line] = left_out([folder])
    assert "5 files left out: links to folders already read (5), such as again/back" in line


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    folder = files_of(tmp_path / "a", "a.txt")
    (folder / "shards").symlink_to("/nowhere/shards")
    assert texts_of(folder) == ["a.txt"]
    assert left_out([folder]) == [f"{folder}: 1 file left out: broken links (1), such as shards"]
    (folder / "b.jsonl").symlink_to("/nowhere/b.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl: no such file or folder"):
        list(read_documents([folder]))


def test_what_is_left_out_of_a_folder_is_named_by_kind(tmp_path):
    strange = ("x.00-of-02.JSON.GZ", "y.json.gz", "d/z.csv", "LICENSE", ".git/config")
    folder = files_of(tmp_path / "a", "a.jsonl", "README.md", "d/README_zh.md", *strange)
    assert texts_of(folder) == ["a.jsonl"]
    kinds = "*.json.gz (2), without an ending (1), *.csv (1), README.md (1), README_zh.md (1)"
    assert left_out([folder]) == [f"{folder}: 6 files left out: {kinds}, such as x.00-of-02.JSON.GZ"]
    assert left_out([folder / "a.jsonl"]) == left_out([tmp_path / "nowhere"]) == []


def test_a_file_name_that_is_no_line_is_named_in_one(tmp_path):
    folder = files_of(tmp_path / "a", "a.txt", "x\n\x1b[2J.bin")
    os.rename(folder / "a.txt", os.fsencode(folder) + b"/\xff.bin")
    with pytest.raises(UserError, match=r"no document with text; .*/a: 2 files left out: \*.bin \(2\)") as caught:
        list(read_documents([folder]))
    assert str(caught.value).isprintable()
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (("README.md", "LICENSE.txt", "a.jsonl"), ["a.jsonl"]),
        (("README.md", "data/a.jsonl.gz", "data/notes.md"), ["data/a.jsonl.gz", "data/notes.md"]),
        # a folder of texts may call them so
        (("README.md", "a.txt", "b/README.md"), ["README.md", "a.txt", "b/README.md"]),
        (("README.md", "license.txt"), ["README.md", "license.txt"]),
        (("README.md", "a.md", "picture.png"), ["README.md", "a.md"]),
    ],
)
def test_a_card_is_a_document_among_texts_alone(tmp_path, names, texts):
    assert texts_of(files_of(tmp_path, *names)) == texts


@pytest.mark.parametrize("other", ["train.00000-of-01024.json.gz", "a.bin", "a.csv", "a.feather", "a.jsonl.xz"])
def test_a_card_beside_files_that_cannot_be_read_is_no_document(tmp_path, other):
    files_of(tmp_path, "README.md", other)
    kind = "*." + ".".join(other.split(".")[-2:] if other.endswith(("gz", "xz")) else other.split(".")[-1:])
    with pytest.raises(UserError) as caught:
        list(read_documents([tmp_path]))
    said = f"2 files left out: {kind} (1), README.md (1), such as {other}; known are .jsonl, "
    assert str(caught.value).startswith(f"{tmp_path}: no document with text; {tmp_path}: {said}")


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    files_of(tmp_path, "a.txt", "locked/b.txt")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"locked: cannot be read \(Permission denied\)"):
        list(read_documents([tmp_path]))


def test_paths_are_read_in_the_order_given_and_blank_texts_left_out(tmp_path):
    first = write_jsonl(tmp_path / "z.jsonl", [{"text": ""}, {"text": "z"}, {"text": " \n"}])
    second = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert [(d.text, d.where) for d in read_documents([first, second])] == [("z", f"{first}:2"), ("a", f"{second}:1")]


def test_line_numbers_count_blank_lines_and_a_mark_may_begin_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [d.where for d in read_documents([tmp_path / "a.jsonl"])] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 4)]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD + b'{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", GOOD + b"[" * 100_000, "a.jsonl:2: not JSON"),
        ("a.jsonl", GOOD + b'{"n": ' + b"1" * 5000 + b"}", "a.jsonl:2: not JSON"),
        ("a.jsonl", GOOD + b'"text"\n', "a.jsonl:2: a row must be an object, not a string"),
        ("a.jsonl", GOOD + b'{"txt": "", "url": 3}\n', 'a.jsonl:2: no "text" in this row; it has txt, url'),
        ("a.jsonl", GOOD + b"{}\n", 'a.jsonl:2: no "text" in this row; it has nothing'),
        ("a.jsonl", GOOD + b'\n{"text": null}\n', 'a.jsonl:3: "text" must be a string, not null'),
        ("a.jsonl", GOOD + b'{"text": ["a"]}\n', 'a.jsonl:2: "text" must be a string, not a list'),
        ("a.jsonl", GOOD + b'{"text": "a", "id": {}}\n', 'a.jsonl:2: "id" must be a string, not an object'),
        ("a.jsonl", b"", "a.jsonl: no document with text"),
        ("a.jsonl", b'{"text": ""}\n{"text": "  "}', "a.jsonl: no document with text"),
        ("a.txt", b"", "a.txt: no document with text"),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz:1: cannot be read"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "a.jsonl.gz:.*: cannot be read"),
        ("a.jsonl.zst", GOOD, "a.jsonl.zst:1: cannot be read"),
        ("a.parquet", GOOD, "a.parquet:1: cannot be read"),
        ("a.csv", GOOD, "a.csv: unknown kind of file; known are .jsonl, "),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        list(read_documents([str(tmp_path / name)]))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_parquet_rows_without_text_are_named(tmp_path):
    with pytest.raises(UserError, match=r'a.parquet:1: no "text" in this row; it has body'):
        list(read_documents([write_parquet(tmp_path / "a.parquet", [{"body": "x"}])]))
    with pytest.raises(UserError, match=r'b.parquet:2: "text" must be a string, not null'):
        list(read_documents([write_parquet(tmp_path / "b.parquet", [{"text": "x"}, {"text": None}])]))


@pytest.mark.parametrize(("kind", "value"), [("date32", 3_000_000), ("ns", 1), ("us", 2**62)])
def test_a_parquet_date_that_python_has_not_is_named_where_it_is_wanted(tmp_path, kind, value):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    if kind == "ns" and importlib.util.find_spec("pandas"):
        pytest.skip("pyarrow gives nanoseconds as what pandas has for them")
    when = pyarrow.array([value], pyarrow.int32() if kind == "date32" else pyarrow.int64())
    dates = when.cast(pyarrow.date32() if kind == "date32" else pyarrow.timestamp(kind))
    parquet.write_table(pyarrow.table({"text": ["a"], "at": dates}), tmp_path / "a.parquet")
    assert [document.text for document in read_documents([tmp_path / "a.parquet"])] == ["a"]
    with pytest.raises(UserError, match=r"a.parquet:1: cannot be read"):
        list(read_rows([tmp_path / "a.parquet"]))


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "hanging.jsonl").symlink_to("nowhere.jsonl")
    for path in (*tmp_path.iterdir(), tmp_path / ("x" * 5000), tmp_path / "\0"):
        with pytest.raises(UserError, match=r"(pipe.jsonl|loop.jsonl|hanging.jsonl|xx|\0): no such file or folder"):
            list(read_documents([path]))


def test_a_missing_path_is_named_before_anything_is_read(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"b.jsonl: no such file or folder"):
        next(read_documents([good, tmp_path / "b.jsonl"]))


def test_a_folder_without_documents_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no document with text"):
        list(read_documents([tmp_path]))


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, name, package):
    def no_module(name):
        raise ModuleNotFoundError(name)

    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(importlib, "import_module", no_module)
    with pytest.raises(UserError, match=rf"{name}: needs {package}; pip install thinkmid\[data\]"):
        list(read_documents([tmp_path / name]))


orders = st.tuples(st.integers(1, 40), st.integers(0, 2**63))


@given(orders, st.integers(0, 200), st.lists(st.integers(0, 60), max_size=6))
def test_an_order_taken_in_any_steps_is_one_order(order, cursor, counts):
    whole = Order(*order).take(cursor, sum(counts))
    resumed, stepwise = [], []
    alone = Order(*order)
    for count in counts:
        resumed += Order(*order).take(cursor, count)
        stepwise += alone.take(cursor, count)
        cursor += count
    assert resumed == stepwise == whole


@given(orders, st.integers(0, 5))
def test_every_epoch_takes_every_item_once(order, epoch):
    n, seed = order
    assert Counter(Order(n, seed).take(epoch * n, n)) == Counter(range(n))


def test_epochs_and_seeds_differ_and_places_are_even():
    assert Order(50, 0).take(0, 50) != Order(50, 0).take(50, 50)
    assert Order(50, 0).take(0, 50) != Order(50, 1).take(0, 50)
    first = Counter(Order(5, 3).take(5 * epoch, 1)[0] for epoch in range(1000))
    assert all(150 < first[item] < 250 for item in range(5))  # 200 expected, standard deviation 12.6


def test_an_order_is_pinned_so_that_old_checkpoints_resume():
    assert Order(10, 7).take(0, 12) == [8, 4, 3, 6, 2, 1, 0, 5, 9, 7, 7, 9]


def test_an_order_over_nothing_is_refused():
    with pytest.raises(UserError, match="not 0"):
        Order(0, 1)


@pytest.mark.parametrize("names", ["AB", "BA"])
def test_a_folder_that_two_links_lead_to_is_read_once(tmp_path, names):
    write_jsonl(tmp_path / "out" / "sub" / "a.jsonl", [{"text": "once"}])
    (tmp_path / "links").mkdir()
    for name, place in zip(names, ("out", "out/sub"), strict=True):
        (tmp_path / "links" / name).symlink_to(tmp_path / place)
    assert texts_of(tmp_path / "links") == ["once"]
    assert "links to folders already read (1)" in left_out([tmp_path / "links"])[0]


@pytest.mark.parametrize("data", [b"Caf\xe9 au lait", "A text.".encode("utf-16")])
def test_text_in_another_encoding_is_read_with_a_word(tmp_path, capsys, monkeypatch, data):
    (tmp_path / "a.txt").write_bytes(data)
    [(_, row)] = read_rows([tmp_path / "a.txt"])
    assert "\ufffd" in row["text"]
    assert f"warning: {tmp_path}/a.txt: not UTF-8 at byte " in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert list(read_rows([tmp_path / "a.txt"])) == [(f"{tmp_path}/a.txt:1", row)]
    assert capsys.readouterr().out == ""
