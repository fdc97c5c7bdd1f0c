"""What a run learns from is tokenised once, is never another run's, and a mistake in it leaves nothing behind."""

import errno
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import join_ranks, spawn

from thinkmid.data import store
from thinkmid.data.sequences import Sequences, read_sequences
from thinkmid.data.source import read_documents
from thinkmid.errors import UserError
from thinkmid.run.config import RunConfig
from thinkmid.run.ranks import Ranks
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train import corpus
from thinkmid.train.config import SFTData

ALONE = Ranks(0, 1, torch.device("cpu"), None)
TEXTS = [f"{n} apples.<think> {n} - 5 = {n - 5}</think> So {n - 5} remain." for n in range(6, 30)]


@pytest.fixture
def home(tmp_path):
    train_tokenizer(TEXTS, 300, tmp_path / "tokenizer")
    write(tmp_path, TEXTS)
    return tmp_path


def write(home, texts):
    (home / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def sequences(home, ranks=ALONE, folder="run", fresh=False, interrupt=None):
    data, text = SFTData(paths=(str(home / "corpus.jsonl"),), max_len=16), Tokenizer.load(home / "tokenizer")
    run = RunConfig(folder=str(home / folder), steps=1, fresh=fresh)
    interrupt = interrupt or SimpleNamespace(requested=False)
    stored = corpus.stored_documents(data, text, run, ranks, interrupt)
    found, digest = Sequences(stored, 16), stored.digest
    return [found[i].tolist() for i in range(len(found))], digest


def in_memory(home):
    text = Tokenizer.load(home / "tokenizer")
    return [tokens.tolist() for tokens, _ in read_sequences([home / "corpus.jsonl"], text, 16)]


def names(home, folder="run"):
    return sorted(path.name for path in (home / folder).rglob("*") if path.name != ".train.lock")


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
    second, before = sequences(home), names(home)
    assert second[0] == in_memory(home) != first[0]
    assert second[1] != first[1]
    assert len(before) == 4  # the folder, one part, its index, the manifest
    (home / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    write(home, TEXTS)
    with pytest.raises(UserError, match=r"run: the data has changed since this run began; --run.fresh starts over"):
        sequences(home)
    assert names(home) == sorted([*before, "checkpoints", "step-000001"])
    write(home, TEXTS[:-1])
    assert sequences(home) == second
    write(home, TEXTS)
    assert sequences(home, fresh=True) == first


def test_files_that_moved_or_were_touched_are_compared_by_content_once(home, monkeypatch):
    first = sequences(home)
    (home / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    hashed, of_file = [], corpus.digest
    monkeypatch.setattr(corpus, "digest", lambda path: hashed.append(path) or of_file(path))
    monkeypatch.setattr(corpus, "read_documents", unread)
    os.rename(home / "corpus.jsonl", home / "moved.jsonl")
    (home / "corpus.jsonl").symlink_to("moved.jsonl")
    os.utime(home / "moved.jsonl", ns=(1, 1))
    assert [sequences(home) for _ in range(2)] == [first] * 2
    assert len(hashed) == 1


def test_other_content_of_the_same_size_and_date_is_seen(home):
    sequences(home)
    (home / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    stat = os.stat(home / "corpus.jsonl")
    write(home, [text.replace("apples", "plums ") for text in TEXTS])
    os.utime(home / "corpus.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(home / "corpus.jsonl").st_size == stat.st_size
    with pytest.raises(UserError, match="the data has changed since this run began"):
        sequences(home)


def test_another_tokenizer_makes_another_store(home):
    first = sequences(home)
    train_tokenizer(TEXTS[:3], 280, home / "tokenizer")
    second = sequences(home)
    assert second[0] == in_memory(home)
    assert second[1] != first[1]


@pytest.mark.parametrize("manifest", [b"{", b"{}", b"[]"])
def test_a_damaged_store_is_written_anew(home, manifest):
    first = sequences(home)
    (home / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    (home / "run" / "store" / "store.json").write_bytes(manifest)
    assert sequences(home) == first


def test_a_store_on_another_disk_is_kept_there(home):
    (home / "big").mkdir()
    (home / "run").mkdir()
    (home / "run" / "store").symlink_to(home / "big")
    sequences(home)
    write(home, TEXTS[:-1])
    assert sequences(home)[0] == in_memory(home)
    assert (home / "run" / "store").is_symlink()
    assert len(list((home / "big").iterdir())) == 3


def test_a_full_disk_leaves_nothing_behind_and_nothing_of_others_goes(home, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save", full)
    line = r"run/store: cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=line):
        sequences(home)
    assert not (home / "run").exists()
    (home / "run" / "store").mkdir(parents=True)
    for name in ("run/thesis.txt", "run/store/thesis.txt"):
        (home / name).write_text("years of work")
    with pytest.raises(UserError, match=line):
        sequences(home)
    assert names(home) == ["store", "thesis.txt", "thesis.txt"]


def test_a_stop_while_documents_are_read_ends_with_75_and_leaves_nothing_behind(home, monkeypatch, capsys):
    monkeypatch.setattr(store, "BLOCK_DOCUMENTS", 1)
    interrupt = corpus.Interrupt()

    def interrupted(paths, column):
        for number, doc in enumerate(read_documents(paths)):
            assert number < 7, "it reads on"
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield doc

    monkeypatch.setattr(corpus, "read_documents", interrupted)
    with pytest.raises(SystemExit) as end:
        sequences(home, interrupt=interrupt)
    assert end.value.code == 75
    assert capsys.readouterr().out == "stopped before the first step; the same command begins again\n"
    assert not (home / "run").exists()


def test_what_a_killed_run_left_goes_before_more_is_written(home, monkeypatch):
    left = home / "run" / "store" / "0123abcd-00000.bin"
    left.parent.mkdir(parents=True)
    left.touch()
    monkeypatch.setattr(corpus, "read_documents", lambda paths, column: [] if left.exists() else read_documents(paths))
    assert sequences(home)[0] == in_memory(home)


def test_long_work_says_how_far_it_is(home, monkeypatch, capsys):
    monkeypatch.setattr(store, "BLOCK_DOCUMENTS", 10)
    monkeypatch.setattr(corpus, "REPORT_S", -1)
    sequences(home)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" documents")[0] for line in said] == ["data: 10", "data: 20", "data: 24"]


def two_ranks_worker(rank, home):
    store.BLOCK_DOCUMENTS = 5
    ranks = join_ranks(rank, 2, home)
    (home / f"found-{rank}.json").write_text(json.dumps(sequences(home, ranks)))
    before = names(home)
    # only rank 1 encodes the seventh document
    if rank == 0:
        write(home, [*TEXTS[:6], "a stray </think>", *TEXTS[7:] * 100])
    ranks.barrier()
    read = []

    def slowly(paths, column):
        for doc in read_documents(paths):
            read.append(doc)
            time.sleep(0.01 if rank == 0 else 0)
            yield doc

    corpus.read_documents = slowly
    for folder, stays in (("run", before), ("other", [])):
        with pytest.raises(UserError, match=r"corpus.jsonl:7: .*</think>"):
            sequences(home, ranks, folder)
        ranks.barrier()
        assert len(read) < 1000, "it read to the end"
        assert names(home, folder) == stays
        assert (home / folder).exists() is bool(stays)


def test_two_ranks_share_the_work_and_what_one_finds_wrong_both_say(home, monkeypatch):
    spawn(two_ranks_worker, 2, home)
    write(home, TEXTS)
    monkeypatch.setattr(store, "BLOCK_DOCUMENTS", 5)
    want = json.loads(json.dumps(sequences(home, folder="alone")))
    assert [json.loads((home / f"found-{rank}.json").read_text()) for rank in (0, 1)] == [want, want]
