import json
import random

import pytest

from thinkmid.augment import split
from thinkmid.augment.split import SplitConfig

rng = random.Random(0)
VOCAB = [f"word{i}" for i in range(3000)]


def sentence(n):
    return " ".join(rng.choices(VOCAB, k=n))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def decided(folder, documents, **options):
    """{id: split, or why it was dropped}, and the manifest."""
    path = write(folder / "documents.jsonl", [{"id": name, "text": text} for name, text in documents.items()])
    split.ensure(folder / "out", (path,), SplitConfig(**options))
    rows = [json.loads(line) for line in (folder / "out" / "split" / "documents.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(documents)
    found = {row["id"]: row.get("dropped", row["split"]) for row in rows}
    return found, json.loads((folder / "out" / "split" / "manifest.json").read_text())


def runs(text, n):
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def test_shares_come_out_and_depend_on_words_and_seed_alone(tmp_path):
    documents = {str(i): sentence(30) for i in range(2000)}
    found, manifest = decided(tmp_path, documents, sft=0.5, rl=0.3, heldout=0.2)
    for name, share in (("sft", 0.5), ("rl", 0.3), ("heldout", 0.2)):
        assert abs(list(found.values()).count(name) / 2000 - share) < 0.04
        assert manifest["splits"][name] == list(found.values()).count(name)
    cfg = SplitConfig(sft=0.5, rl=0.3, heldout=0.2)
    for name, text in documents.items():
        assert split.assign("  " + text.upper().replace(" ", ",\n") + "!", cfg) == found[name]
    other = SplitConfig(sft=0.5, rl=0.3, heldout=0.2, seed=1)
    assert 0.3 < sum(split.assign(text, other) != found[name] for name, text in documents.items()) / 2000 < 0.9


@pytest.mark.parametrize("sample", [1, 3])
def test_near_duplicates_in_two_splits_lose_the_later_one_and_the_rest_stays(tmp_path, sample):
    originals = {f"a{i}": sentence(200) for i in range(40)}
    near = {f"b{i}": text.replace(" ", " . ", 5) + " " + sentence(20) for i, text in enumerate(originals.values())}
    far = {f"c{i}": text[: len(text) // 5] + " " + sentence(200) for i, text in enumerate(originals.values())}
    documents = originals | near | far
    found, manifest = decided(tmp_path, documents, sft=0.4, rl=0.3, heldout=0.3, sample=sample)
    rank = {name: i for i, name in enumerate(split.SPLITS)}
    home = {name: split.assign(text, SplitConfig(sft=0.4, rl=0.3, heldout=0.3)) for name, text in documents.items()}
    for name, text in documents.items():
        mine = runs(text, 13)
        ahead = set().union(
            *(
                runs(documents[o], 13)
                for o in documents
                if rank[home[o]] < rank[home[name]] and found[o] != "near-duplicate"
            )
        )
        share = len(mine & ahead) / len(mine)
        if sample == 1 or not 0.25 < share < 0.75:
            assert (found[name] == "near-duplicate") == (share >= 0.5), (name, share)
    assert manifest["dropped"]["near-duplicate"] > 10


def test_documents_that_share_13_words_with_an_evaluation_question_are_left_out(tmp_path):
    question, short, tiny = sentence(40), sentence(9), "What is two and two?"
    sets = [
        write(tmp_path / "a.jsonl", [{"question": question}, {"question": tiny}]),
        write(tmp_path / "b.jsonl", [{"problem": short, "answer": 3}]),
    ]
    words = question.split()
    documents = {
        "13 words": sentence(50) + ", " + " ".join(words[20:33]).upper() + "; " + sentence(50),
        "12 words": sentence(50) + " " + " ".join(words[20:32]) + " " + sentence(50),
        "all of a short one": sentence(5) + " " + short + "! " + sentence(5),
        "most of a short one": sentence(5) + " " + " ".join(short.split()[:8]) + " " + sentence(5),
        "tiny": sentence(20) + " " + tiny,
        "clean": sentence(60),
    }
    found, manifest = decided(tmp_path, documents, sft=1, rl=0, heldout=0, evals=tuple(sets))
    assert {name for name, fate in found.items() if fate != "sft"} == {"13 words", "all of a short one"}
    assert found["13 words"] == f"evaluation: {sets[0]}"
    assert manifest["evaluation"] == {
        sets[0]: {"texts": 2, "too_short": 1, "documents": 1},
        sets[1]: {"texts": 1, "too_short": 0, "documents": 1},
    }


def test_copies_are_left_out_and_the_first_stays(tmp_path):
    text = sentence(30)
    found, _ = decided(
        tmp_path, {"1": text, "2": text, "3": text.upper(), "4": "!!!", "5": "???"}, sft=1, rl=0, heldout=0
    )
    assert found == {"1": "sft", "2": "copy", "3": "same words", "4": "sft", "5": "sft"}
    kept = split.ensure(tmp_path / "out", (str(tmp_path / "documents.jsonl"),), SplitConfig(sft=1, rl=0, heldout=0))
    assert kept.dropped == {split.key(text.upper())}


def test_a_list_that_was_touched_is_made_again(tmp_path):
    _, manifest = decided(tmp_path, {"1": sentence(30), "2": sentence(30)})
    (tmp_path / "out" / "split" / "documents.jsonl").write_text("{}\n")
    assert split.read_manifest(tmp_path / "out" / "split") is None
    split.ensure(tmp_path / "out", (str(tmp_path / "documents.jsonl"),), SplitConfig())
    assert split.read_manifest(tmp_path / "out" / "split") == manifest


def test_each_character_of_a_script_without_spaces_is_a_word():
    assert split.split_words("Die Zahl 12 ist 十二である。OK") == ["die", "zahl", "12", "ist", *"十二である", "ok"]
