import itertools
import json
import os
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from thinkmid.data import store
from thinkmid.data.prompts import StoredPrompts, at_thoughts, in_raw_text
from thinkmid.data.prompts import records as prompt_records
from thinkmid.data.sequences import Sequences, num_pieces, read_sequences, records
from thinkmid.data.source import Document, read_documents
from thinkmid.errors import UserError
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.types import Prompt

MADE_OF = {"tokenizer": "x"}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK_DOCUMENTS", 3)
    monkeypatch.setattr(store, "BLOCK_CHARS", 150)


def documents(num, seed=0):
    rng = random.Random(seed)
    texts = ["é\ud800 " * rng.choice([1, 5, 60]) + str(i) for i in range(num)]
    return [Document(id=str(i), text=text, where=f"x:{i}") for i, text in enumerate(texts)]


def encode(docs):
    """No, one or two records of a document."""
    for doc in docs:
        for k in range(int(doc.id) % 3):
            yield f"{doc.id}.{k} {doc.text}".encode("utf-8", "surrogatepass") * k or b"one", (int(doc.id), k)


def stored(folder, docs, world, encode=encode, name="0123abcd"):
    folder.mkdir(exist_ok=True)
    for rank in range(world):
        list(store.write(folder, name, rank, world, iter(docs), encode))
    manifest = store.describe(folder, name, world, MADE_OF)
    store.publish(folder, manifest)
    return store.Store(folder, manifest)


@pytest.mark.parametrize("num", [0, 1, 2, 3, 40])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_records_come_back_in_the_order_of_the_documents_from_any_number_of_ranks(tmp_path, small_blocks, num, world):
    docs = documents(num)
    want, found = list(encode(docs)), stored(tmp_path / "s", docs, world)
    assert [bytes(found[i]) for i in range(len(found))] == [data for data, _ in want]
    assert found.sizes.tolist() == [len(data) for data, _ in want]
    assert list(map(tuple, found.numbers.tolist())) == [numbers for _, numbers in want]


def test_the_digest_is_of_the_records_alone(tmp_path, small_blocks):
    docs = documents(40)
    digest = stored(tmp_path / "one", docs, 1).digest
    assert stored(tmp_path / "three", docs, 3, name="00000000").digest == digest
    other = [*docs[:20], Document(id="20", text="other", where=""), *docs[21:]]
    others = [
        stored(tmp_path / "a", docs[:-1], 1),
        stored(tmp_path / "b", other, 2),
        stored(tmp_path / "c", [docs[0], docs[2], docs[1], *docs[3:]], 2),
    ]
    assert len({digest, *(found.digest for found in others)}) == 4


def test_blocks_are_bounded_by_documents_and_by_characters(small_blocks):
    docs = documents(40)
    found = list(store.blocks(docs))
    assert [doc for block in found for doc in block] == docs
    assert {len(block) for block in found} >= {1, 2, 3}
    for block in found:
        assert len(block) <= 3
        assert sum(len(doc.text) for doc in block[:-1]) < 150


def test_a_store_is_found_only_whole_and_made_of_the_same(tmp_path, small_blocks, monkeypatch):
    folder = tmp_path / "s"
    assert store.find(folder, MADE_OF) is None
    stored(folder, documents(20), 2)
    found = store.find(folder, MADE_OF)
    assert found == json.loads((folder / store.MANIFEST).read_text())
    assert store.find(folder, {"tokenizer": "y"}) is None
    part, index, manifest = (
        folder / name for name in ("0123abcd-00001.bin", "0123abcd-00001.safetensors", store.MANIFEST)
    )
    damages = [(part, b"short"), (part, None), (index, b"x"), (index, None)]
    damages += [(manifest, text) for text in (b"{", b"[]", b"{}", b"\xff", None)]
    damages += [(manifest, json.dumps(found | {"writing": "../../x"}).encode())]
    for file, damage in damages:
        whole = file.read_bytes()
        file.unlink() if damage is None else file.write_bytes(damage)
        assert store.find(folder, MADE_OF) is None
        file.write_bytes(whole)
    assert store.find(folder, MADE_OF) == found
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert store.find(folder, MADE_OF) is None


def made(file, kind):
    """Something else in the place of a file."""
    size = file.stat().st_size
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(bytes(size))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "zeros"])
@pytest.mark.parametrize("name", ["store.json", "0123abcd-00000.bin", "0123abcd-00000.safetensors"])
def test_what_is_no_file_of_a_store_is_not_waited_for(tmp_path, small_blocks, name, kind):
    stored(tmp_path, documents(20), 1)
    manifest = store.find(tmp_path, MADE_OF)
    made(tmp_path / name, kind)
    if (name[-4:], kind) != (".bin", "zeros"):  # as many bytes: records are compared when they are read
        assert store.find(tmp_path, MADE_OF) is None
    if name != "store.json":
        with pytest.raises(UserError, match=name):
            store.Store(tmp_path, manifest)[0]


EDITS = [
    lambda m: m.update(parts=[]),
    lambda m: m.update(parts=None),
    lambda m: m.update(parts=[[-1, "x"]]),
    lambda m: m["parts"][0].__setitem__(0, 10**400),
    lambda m: m.update(writing=7),
    lambda m: m.update(made_of=[]),
    lambda m: m.update(format="1"),
    lambda m: m.pop("parts"),
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_says_something_else_finds_no_store(tmp_path, small_blocks, edit):
    stored(tmp_path, documents(20), 2)
    manifest = store.find(tmp_path, MADE_OF)
    edit(manifest)
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    assert store.find(tmp_path, MADE_OF) is None


NUMBERS = [
    ("sizes", lambda x: -x),
    ("sizes", lambda x: x * 2**40),
    ("sizes", lambda x: x[:-1]),
    ("counts", lambda x: x + 1),
    ("counts", lambda x: x[::-1] * -1),
    ("numbers", lambda x: x[:-1]),
    ("digests", lambda x: x[:-1]),
    ("sizes", lambda x: x.astype(np.float64)),
]


@pytest.mark.parametrize(("name", "edit"), NUMBERS)
def test_numbers_that_do_not_fit_the_records_are_refused(tmp_path, small_blocks, name, edit):
    stored(tmp_path, documents(20), 1)
    manifest, path = store.find(tmp_path, MADE_OF), tmp_path / "0123abcd-00000.safetensors"
    index = load_file(path)
    index[name] = np.ascontiguousarray(edit(index[name]))
    save_file(index, path)
    with pytest.raises(UserError, match=r"0123abcd-00000.safetensors: its bytes changed since it was written"):
        store.Store(tmp_path, manifest)


@pytest.mark.parametrize("world", [1, 3])
def test_a_flipped_bit_is_found_in_its_block_and_in_no_other(tmp_path, small_blocks, world):
    docs = documents(40)
    want = [bytes(record) for record in stored(tmp_path, docs, world)]
    flipped = tmp_path / f"0123abcd-{world - 1:05d}.bin"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    found, refused = store.Store(tmp_path, store.find(tmp_path, MADE_OF)), []
    for i in random.Random(0).sample(range(len(want)), len(want)):
        try:
            assert bytes(found[i]) == want[i]
        except UserError:
            refused.append(i)
    with pytest.raises(UserError, match=f"{flipped.name}: its bytes changed since it was written; without {tmp_path} "):
        found[refused[0]]
    counts = np.cumsum([0, *(len(list(encode(block))) for block in store.blocks(docs))])
    spans = [list(range(*span)) for span in itertools.pairwise(counts)]
    assert sorted(refused) in spans


def test_a_block_is_hashed_once_in_any_order(tmp_path, small_blocks, monkeypatch):
    found, hashed, check = stored(tmp_path, documents(40), 2), [], store.Store._check
    monkeypatch.setattr(store.Store, "_check", lambda self, block: hashed.append(block) or check(self, block))
    for i in random.Random(0).choices(range(len(found)), k=500):
        found[i]
    assert sorted(hashed) == sorted({int(np.searchsorted(found._ends, i, side="right")) for i in range(len(found))})


def test_a_writing_replaces_the_one_before_and_touches_nothing_else(tmp_path, small_blocks):
    folder = tmp_path / "s"
    stored(folder, documents(20), 3)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "89abcdef-fault").touch()  # of a run that was killed
    docs = documents(7)
    found = stored(folder, docs, 2, name="4567cdef")
    parts = {f"4567cdef-0000{rank}.{kind}" for rank in (0, 1) for kind in ("bin", "safetensors")}
    assert {path.name for path in folder.iterdir()} == parts | {store.MANIFEST, "thesis.txt"}
    assert len(found) == len(list(encode(docs)))
    (folder / store.MANIFEST).unlink()
    store.sweep(folder)
    assert {path.name for path in folder.iterdir()} == {"thesis.txt"}
    store.sweep(tmp_path / "none")


def test_what_is_told_to_end_ends_at_the_next_block(tmp_path, small_blocks):
    docs = documents(40)
    told = list(itertools.islice(store.write(tmp_path, "0123abcd", 0, 2, iter(docs), encode), 3))
    ends = np.cumsum([len(block) for block in store.blocks(docs)])[:3]
    assert told == [(n, sum(len(doc.text) for doc in docs[:n])) for n in ends]
    assert not (tmp_path / "0123abcd-00000.safetensors").exists()


STORY = "Mia has 12 apples.<think> 12 - 5 = 7</think> So 7 remain.<think> none</think> É ok. "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([STORY], 300, folder)
    return Tokenizer.load(folder)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = [STORY * k + "tail" for k in (1, 2, 1, 3, 1)] + ["a"]
    path.write_text("".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.mark.parametrize("max_len", [2, 3, 7, 50, 10_000])
def test_sequences_of_a_store_are_those_in_memory(tmp_path, small_blocks, text, corpus, max_len):
    found = Sequences(stored(tmp_path / "s", read_documents([corpus]), 1, lambda docs: records(docs, text)), max_len)
    want = [tokens for tokens, _ in read_sequences([corpus], text, max_len)]
    assert [tokens.tolist() for tokens in found] == [tokens.tolist() for tokens in want]
    for i in (-1, len(want)):
        with pytest.raises(IndexError):
            found[i]
    assert found.lengths.tolist() == list(map(len, want))


def test_pieces_hold_every_target_once():
    for max_len in (2, 3, 4, 9):
        for num in range(30):
            starts = np.arange(num_pieces(num, max_len)) * (max_len - 1)
            targets = [t for at in starts for t in range(at + 1, min(at + max_len, num))]
            assert targets == list(range(1, num)), (max_len, num)
            assert all(num - at >= 2 for at in starts)


LONE = Document(id="lone", text="a \ud800<think>t</think> b\ud800", where="y:1")
MAKERS = {
    "thought": partial(at_thoughts, max_prefix=1000),
    "sentence": partial(in_raw_text, where="sentence", length=0, max_prefix=20, seed=1),
    "fixed": partial(in_raw_text, where="fixed", length=9, max_prefix=20, seed=1),
}


@pytest.mark.parametrize("where", MAKERS)
def test_prompts_of_a_store_are_those_in_memory(tmp_path, small_blocks, text, corpus, where):
    docs = [*read_documents([corpus]), LONE]
    if where != "thought":
        docs = [replace(doc, text=re.sub("</?think>", "", doc.text)) for doc in docs]
    make = partial(MAKERS[where], tokenizer=text)
    found = StoredPrompts(stored(tmp_path / "s", docs, 2, lambda docs: prompt_records(make(docs))))
    want = list(make(docs))
    assert len(want) >= 8
    assert list(found) == want
    for i in (-1, len(want)):
        with pytest.raises(IndexError):
            found[i]
    assert found.longest == max(len(p.tokens) for p in want)


def test_prompts_of_a_document_are_stored_once(text):
    def size(num):
        doc = Document(id="a", text=STORY * num + "tail", where="x:1")
        (data, (num_prompts, longest)), *more = prompt_records(at_thoughts([doc], text, max_prefix=10**6))
        assert (num_prompts, more) == (2 * num, [])
        assert longest <= len(data) / 4
        return len(data)

    assert size(64) < 2.2 * size(32)


def test_prompts_that_share_nothing_are_stored_apart():
    def prompt(tokens, reference, where="x"):
        return Prompt(id=f"{tokens}", tokens=tokens, meta={"reference": reference, "where": where})

    rows = [
        prompt([1], "abc"), prompt([1, 2], "bc"), prompt([1, 2], "c"),  # three together
        prompt([1, 3], "c"), prompt([1, 3, 4], "d"), prompt([1, 3, 4], "d", "y"), prompt([1, 3], "d", "y"),
    ]  # fmt: skip
    assert [numbers for _, numbers in prompt_records(rows)] == [(3, 2), (1, 2), (1, 3), (1, 3), (1, 2)]
