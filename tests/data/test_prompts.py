from dataclasses import dataclass

import pytest

from thinkmid.data.prompts import in_raw_text
from thinkmid.errors import UserError
from thinkmid.thoughts import OPEN
from thinkmid.tokenizer import Tokenizer, train_tokenizer

STORY = "Mia has 12 apples. Tom has 5; he wants more.  Does he? Yes.\nSo 7 remain, and nobody counts them again. " * 6


@dataclass(frozen=True)
class Doc:
    id: str
    text: str
    where: str = "x.jsonl:1"


DOCS = [
    Doc("a", STORY),
    Doc("b", "One. Two."),
    Doc("c", "word"),
    Doc("d", "  \n "),
    Doc("e", "é 漢字。\n\n好 — ok. Fine."),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([STORY], 300, folder)
    return Tokenizer.load(folder)


def prompts(text, where, length=0, docs=DOCS, max_prefix=40, seed=3):
    return list(in_raw_text(docs, text, where=where, max_prefix=max_prefix, length=length, seed=seed))


@pytest.mark.parametrize(("where", "length"), [("sentence", 0), ("fixed", 9), ("random", 0)])
def test_prefix_and_reference_are_the_chunk_and_every_prefix_ends_with_the_opened_tag(text, where, length):
    found = prompts(text, where, length)
    assert len(found) > 5
    room = 40 - len(text.open_ids)
    for p in found:
        doc = next(d for d in DOCS if d.id == p.id.split("#")[0])
        prefix = text.decode(p.tokens).removesuffix(OPEN)
        assert p.tokens[-len(text.open_ids) :] == text.open_ids
        assert prefix + p.meta["reference"] in doc.text
        assert 0 < len(p.tokens) - len(text.open_ids) <= room
        assert p.meta["reference"].strip()


def test_a_sentence_prefix_ends_a_sentence(text):
    for p in prompts(text, "sentence"):
        assert text.decode(p.tokens).removesuffix(OPEN)[-1] in ".!?:;\n。"


def test_a_fixed_prefix_has_about_its_length_and_a_random_one_any(text):
    fixed = [len(p.tokens) - len(text.open_ids) for p in prompts(text, "fixed", 9)]
    assert all(8 <= n <= 11 for n in fixed)
    drawn = [
        len(p.tokens) - len(text.open_ids)
        for p in prompts(text, "random", docs=[Doc(f"d{i}", STORY) for i in range(30)])
    ]
    assert len(set(drawn)) > 20
    assert min(drawn) < 6
    assert max(drawn) > 30


@pytest.mark.parametrize("where", ["sentence", "random"])
def test_the_cut_depends_on_seed_and_id_alone(text, where):
    cuts = [[p.tokens for p in prompts(text, where, docs=docs, seed=seed)] for docs, seed in (
        (DOCS, 3), (DOCS, 4), (DOCS[::-1], 3)
    )]  # fmt: skip
    assert cuts[0] != cuts[1]
    assert sorted(cuts[0]) == sorted(cuts[2])


def test_a_length_without_room_and_a_tag_in_raw_text_are_refused(text):
    with pytest.raises(UserError, match="a prefix of 40 tokens has no room"):
        prompts(text, "fixed", 45)
    with pytest.raises(UserError, match=r"x\.jsonl:1: raw text contains </think> at character 2"):
        prompts(text, "random", docs=[Doc("a", "a </think> b")])
