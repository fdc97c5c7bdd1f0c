import json
import random

import numpy as np
import pytest

from thinkmid.data import store
from thinkmid.data.prompts import StoredPrompts, at_thoughts, record
from thinkmid.data.sequences import Sequences, num_pieces, read_sequences, records
from thinkmid.data.source import Document, read_documents
from thinkmid.text import Text, train_tokenizer

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


def stored(folder, docs, world, made_of=MADE_OF):
    folder.mkdir()
    for rank in range(world):
        store.write(folder, rank, world, iter(docs), encode)
    store.seal(folder, world, made_of, [])
    return store.Store(folder)


@pytest.mark.parametrize("num", [0, 1, 2, 3, 40])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_records_come_back_in_the_order_of_the_documents_from_any_number_of_ranks(tmp_path, small_blocks, num, world):
    docs = documents(num)
    want, found = list(encode(docs)), stored(tmp_path / "s", docs, world)
    assert [bytes(found[i]) for i in range(len(found))] == [data for data, _ in want]
    assert found.sizes.tolist() == [len(data) for data, _ in want]
    assert list(map(tuple, found.numbers.tolist())) == [numbers for _, numbers in want]


def test_the_digest_is_of_the_records_and_of_what_decides_them_alone(tmp_path, small_blocks):
    docs = documents(40)
    digest = stored(tmp_path / "one", docs, 1).digest
    assert stored(tmp_path / "three", docs, 3).digest == digest
    other = [*docs[:20], Document(id="20", text="other", where=""), *docs[21:]]
    others = [
        stored(tmp_path / "a", docs[:-1], 1),
        stored(tmp_path / "b", other, 2),
        stored(tmp_path / "c", [docs[0], docs[2], docs[1], *docs[3:]], 2),
        stored(tmp_path / "d", docs, 1, {"tokenizer": "y"}),
    ]
    assert len({digest, *(found.digest for found in others)}) == 5


def test_blocks_are_bounded_by_documents_and_by_characters(small_blocks):
    docs = documents(40)
    found = list(store.blocks(docs))
    assert [doc for block in found for doc in block] == docs
    assert {len(block) for block in found} >= {1, 2, 3}
    for block in found:
        assert len(block) <= 3
        assert sum(len(doc.text) for doc in block[:-1]) < 150


def test_a_store_is_used_again_only_whole_and_for_the_same(tmp_path, small_blocks):
    folder = tmp_path / "s"
    assert not store.is_store_of(folder, MADE_OF, [])
    stored(folder, documents(20), 2)
    assert store.is_store_of(folder, MADE_OF, [])
    assert not store.is_store_of(folder, {"tokenizer": "y"}, [])
    assert not store.is_store_of(folder, MADE_OF, [["x.jsonl", 3, 4]])
    part, index, manifest = folder / "rank-00001.bin", folder / "rank-00001.npz", folder / store.MANIFEST
    damages = ((part, b"short"), (part, None), (index, b"x"), (index, None), (manifest, b"{"), (manifest, b"[]"))
    for file, damage in damages:
        whole = file.read_bytes()
        file.unlink() if damage is None else file.write_bytes(damage)
        assert not store.is_store_of(folder, MADE_OF, [])
        file.write_bytes(whole)
    assert store.is_store_of(folder, MADE_OF, [])


STORY = "Mia has 12 apples.<think> 12 - 5 = 7</think> So 7 remain.<think> none</think> É ok. "


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([STORY], 300, folder)
    return Text.load(folder)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = [STORY * k + "tail" for k in (1, 2, 1, 3, 1)] + ["a"]
    path.write_text("".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.mark.parametrize("max_len", [2, 3, 7, 50, 10_000])
def test_sequences_of_a_store_are_those_in_memory(tmp_path, small_blocks, text, corpus, max_len):
    folder = tmp_path / "s"
    folder.mkdir()
    for rank in range(2):
        store.write(folder, rank, 2, read_documents([corpus]), lambda docs: records(docs, text))
    store.seal(folder, 2, MADE_OF, [])
    found = Sequences(store.Store(folder), max_len)
    want = [tokens for tokens, _ in read_sequences([corpus], text, max_len)]
    assert [found[i].tolist() for i in range(len(found))] == [tokens.tolist() for tokens in want]
    assert found.lengths.tolist() == list(map(len, want))


def test_pieces_hold_every_target_once():
    for max_len in (2, 3, 4, 9):
        for num in range(30):
            starts = np.arange(num_pieces(num, max_len)) * (max_len - 1)
            targets = [t for at in starts for t in range(at + 1, min(at + max_len, num))]
            assert targets == list(range(1, num)), (max_len, num)
            assert all(num - at >= 2 for at in starts)


def test_prompts_of_a_store_are_those_in_memory(tmp_path, small_blocks, text, corpus):
    docs = [*read_documents([corpus]), Document(id="lone", text="a \ud800<think>t</think> b\ud800", where="y:1")]
    folder = tmp_path / "s"
    folder.mkdir()
    for rank in range(2):
        store.write(folder, rank, 2, docs, lambda docs: map(record, at_thoughts(docs, text, max_prefix=1000)))
    store.seal(folder, 2, MADE_OF, [])
    found, want = StoredPrompts(store.Store(folder)), list(at_thoughts(docs, text, max_prefix=1000))
    assert [found[i] for i in range(len(found))] == want
    assert found.longest == max(len(p.tokens) for p in want)
    for p in want:  # encoded together or alone
        doc = next(doc for doc in docs if doc.id == p.id.split("#")[0])
        before = doc.text.split("<think>")
        assert text.decode(p.tokens).count("<think>") <= len(before)
