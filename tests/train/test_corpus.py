"""What a run learns from is tokenised once, is never another run's, and a mistake in it leaves nothing behind."""

import errno
import json
import os

import pytest
import torch
from conftest import join_ranks, spawn

from thinkmid.data import store
from thinkmid.data.sequences import read_sequences
from thinkmid.errors import UserError
from thinkmid.text import Text, train_tokenizer
from thinkmid.train import corpus
from thinkmid.train.shard import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), None)
TEXTS = [f"{n} apples.<think> {n} - 5 = {n - 5}</think> So {n - 5} remain." for n in range(6, 30)]


@pytest.fixture
def home(tmp_path):
    train_tokenizer(TEXTS, 300, tmp_path / "tokenizer")
    write(tmp_path, TEXTS)
    return tmp_path


def write(home, texts):
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def sequences(home, ranks=ALONE, folder="run"):
    found, digest = corpus.stored_sequences(
        [str(home / "corpus.jsonl")], Text.load(home / "tokenizer"), 16, str(home / folder), ranks
    )
    return [found[i].tolist() for i in range(len(found))], digest


def in_memory(home):
    text = Text.load(home / "tokenizer")
    return [tokens.tolist() for tokens, _ in read_sequences([home / "corpus.jsonl"], text, 16)]


def unread(*_):
    raise AssertionError("the documents are read again")


def test_a_run_that_goes_on_reads_no_document(home, monkeypatch):
    first = sequences(home)
    assert first[0] == in_memory(home)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", unread)
        assert sequences(home) == first
    os.utime(home / "corpus.jsonl", ns=(1, 1))  # it may have changed
    assert sequences(home) == first


def test_other_documents_take_the_place_of_the_old_until_a_run_has_begun(home):
    first = sequences(home)
    write(home, TEXTS[:-1])
    second = sequences(home)
    assert second[0] == in_memory(home) != first[0]
    assert second[1] != first[1]
    (home / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    write(home, TEXTS)
    with pytest.raises(UserError, match=r"run: the data has changed since this run began; --run.fresh starts over"):
        sequences(home)
    assert not (home / "run" / ".store").exists()
    write(home, TEXTS[:-1])
    assert sequences(home) == second


def test_another_tokenizer_makes_another_store(home):
    first = sequences(home)
    train_tokenizer(TEXTS[:3], 280, home / "tokenizer")
    second = sequences(home)
    assert second[0] == in_memory(home)
    assert second[1] != first[1]


def test_what_a_killed_run_left_is_written_anew(home):
    (home / "run" / ".store").mkdir(parents=True)
    (home / "run" / ".store" / "rank-00003.bin").write_bytes(b"x")
    assert sequences(home)[0] == in_memory(home)
    assert {path.name for path in (home / "run" / "store").iterdir()} == {
        "rank-00000.bin",
        "rank-00000.npz",
        "store.json",
    }


def test_a_full_disk_leaves_nothing_behind(home, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.np, "savez", full)
    with pytest.raises(UserError, match=r"run/.store: cannot be written \(No space left on device\)"):
        sequences(home)
    assert not (home / "run").exists()


def two_ranks_worker(rank, home):
    store.BLOCK_DOCUMENTS = 5
    ranks = join_ranks(rank, 2, home)
    (home / f"found-{rank}.json").write_text(json.dumps(sequences(home, ranks)))
    # only rank 1 encodes the sixth document
    if rank == 0:
        write(home, [*TEXTS[:6], "a stray </think>", *TEXTS[7:]])
    ranks.barrier()
    for folder, stays in (("run", True), ("other", False)):
        with pytest.raises(UserError, match=r"corpus.jsonl:7: .*</think>"):
            sequences(home, ranks, folder)
        ranks.barrier()
        assert (home / folder / "store" / "store.json").exists() is stays
        assert (home / folder).exists() is stays


def test_two_ranks_share_the_work_and_what_one_finds_wrong_both_say(home, monkeypatch):
    spawn(two_ranks_worker, 2, home)
    write(home, TEXTS)
    monkeypatch.setattr(store, "BLOCK_DOCUMENTS", 5)
    want = json.loads(json.dumps(sequences(home, folder="alone")))
    assert [json.loads((home / f"found-{rank}.json").read_text()) for rank in (0, 1)] == [want, want]
