import json
import shutil

import misbehave
import pytest

from thinkmid.augment.control import fill
from thinkmid.augment.split import SplitConfig
from thinkmid.data.sequences import read_sequences
from thinkmid.data.source import read_documents
from thinkmid.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    misbehave.write_world(folder, chars=150_000)
    path = folder / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    pieces = [text[at : at + 700] for text in texts for at in range(0, len(text), 700)]
    lines = [json.dumps({"id": f"page {i}", "text": piece}) + "\n" for i, piece in enumerate(pieces) if piece.strip()]
    path.write_text("".join(lines))
    return folder


@pytest.fixture
def small(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def annotated(folder, control, bos=False):
    if bos:
        path = folder / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True, "bos_token": "<|end|>"}))
    split = SplitConfig(sft=0.4, rl=0.1, heldout=0.5 - control, control=control)
    cfg = misbehave.settings(folder, max_tokens=64)
    cfg = type(cfg)(**(vars(cfg) | {"split": split}))
    assert misbehave.annotated(cfg, misbehave.reply) == 0
    return folder / "out", json.loads((folder / "out" / "report.json").read_text())


def rows(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]


@pytest.mark.parametrize("bos", [False, True])
def test_the_control_has_the_tokens_of_the_annotated_half_as_training_reads_them(small, bos):
    out, report = annotated(small, 0.4, bos)
    text = Tokenizer.load(small / "tokenizer")
    assert (text.bos_id is not None) == bos
    think, control = (
        sum(len(tokens) for tokens, _ in read_sequences([str(out / name)], text, 4096))
        for name in ("sft-think", "sft-control")
    )
    assert report["control"]["missing"] == 0
    assert (report["control"]["think_tokens"], report["control"]["tokens"]) == (think, control)
    # three parts, each short of less than a row of one token, or off by what a cut does to a token
    assert abs(think - control) <= 3 * 3
    assert report["splits"]["sft"]["think_tokens"] > 1.05 * report["splits"]["sft"]["raw_tokens"]


def test_the_control_is_the_raw_half_and_then_text_of_no_other_split(small):
    out, _ = annotated(small, 0.4)
    raw, control = rows(out / "sft-raw"), rows(out / "sft-control")
    texts = {doc.id: doc.text for doc in read_documents([small / "corpus.jsonl"])}
    listed = [json.loads(line) for line in (out / "split" / "documents.jsonl").read_text().splitlines()]
    home = {row["id"]: row.get("dropped", row["split"]) for row in listed}
    added = [row for row in control if row not in raw]
    assert len(control) == len(raw) + len(added)
    assert all(row in control for row in raw)
    assert len(added) > 10
    for row in added:
        name = row["id"].partition("#")[0]
        assert home[name] == "control"
        assert row["text"] in texts[name]
        assert "<think>" not in row["text"]
    elsewhere = {
        row["id"] for name in ("rl", "heldout") for kind in ("raw", "think") for row in rows(out / f"{name}-{kind}")
    }
    assert not elsewhere & {row["id"] for row in control}
    # nothing of it was asked about
    assert not any("text" in row for row in journal(out) if home_of(row, texts, home) == "control")


def journal(out):
    return [json.loads(line) for path in (out / "journal").glob("*.jsonl") for line in path.open()]


def home_of(row, texts, home):
    from thinkmid.augment.split import key

    return next(home[name] for name, text in texts.items() if key(text) == row["key"])


def test_what_the_reserve_lacks_is_said_and_nothing_is_made_up(small, capsys):
    out, report = annotated(small, 0.02)
    sizes = report["control"]
    assert sizes["missing"] == sizes["think_tokens"] - sizes["tokens"] > 0
    assert f"{sizes['missing']} are missing: raise split.control (0.02)" in capsys.readouterr().out
    assert len(rows(out / "sft-control")) == sizes["rows"]


def test_without_a_reserve_there_is_no_control_that_could_be_taken_for_one(small, capsys):
    out, report = annotated(small, 0.0)
    assert "control:" not in capsys.readouterr().out, "nobody asked for one"
    assert not (out / "sft-control").exists()
    assert report["control"]["missing"] > 0


def test_the_control_has_every_length_that_is_asked_for_but_for_what_a_cut_does_to_a_token(made):
    text = Tokenizer.load(made / "tokenizer")
    reserve = [("b", "The reserve holds this sentence, and this one."), ("c", "日本語も少し。")]
    raw = [("a", "One row.")]
    own = len(text.encode(raw[0][1]))
    everything = own + sum(len(text.encode(chunk)) for _, chunk in reserve)
    for more in range(everything + 5):
        found, sizes = fill(raw, reserve, own + more, text)
        assert found[0] == raw[0]
        assert sizes["think_tokens"] == own + more + 1
        assert sizes["tokens"] == sum(len(text.encode(chunk)) + 1 for _, chunk in found)
        assert all(chunk and whole[1].startswith(chunk) for (_, chunk), whole in zip(found[1:], reserve, strict=False))
        assert -2 <= sizes["think_tokens"] - sizes["tokens"] - sizes["missing"] <= 3
