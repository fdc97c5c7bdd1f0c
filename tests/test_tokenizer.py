"""thinkmid.tokenizer against plain byte searches, on tokenizers that cut the think tags in their own ways."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from thinkmid import tokenizer as text_module
from thinkmid.errors import UserError
from thinkmid.thoughts import CLOSE, OPEN, before_stop
from thinkmid.tokenizer import StopMatcher, TagMatcher, Tokenizer, train_tokenizer

TAG = CLOSE.encode()
CORPUS = [
    "Ana has 12 coins. Ben has 3 more than Ana.\n\nSo he has 15 coins!\n",
    "x</think>\ny</think>\n\nz.</think> a</think></think>\n",
    "<think>\n12 + 3 = 15\n</think>\n\n<think> Hm. </think>. So\n",
    "if a < b and b > c:\n\n    return '</th' + \"ink>\"\n",
    "Überall naïve Käfer, 東京で 3 枚 🙂.\n",
] * 20


def save(tokenizer: RawTokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"} | config))
    return folder


def with_byte_tokens(tokenizer: RawTokenizer) -> RawTokenizer:
    """The trainers know nothing of byte fallback: put <0x00> to <0xFF> into the vocabulary, as SentencePiece does."""
    spec = json.loads(tokenizer.to_str())
    model, names = spec["model"], [f"<0x{byte:02X}>" for byte in range(256)]
    if model["type"] == "BPE":
        model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(names)}
    else:
        model["vocab"] += [[name, -20.0] for name in names]
    spec["model"] |= {"byte_fallback": True}
    return RawTokenizer.from_str(json.dumps(spec))


def train(model, trainer, folder: Path, normalizer=None, pre_tokenizer=None, decoder=None, then=lambda x: x) -> Path:
    tokenizer = RawTokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(CORPUS, trainer)
    return save(then(tokenizer), folder)


def add_tags(tokenizer: RawTokenizer) -> RawTokenizer:
    tokenizer.add_tokens([AddedToken(OPEN, normalized=False), AddedToken(CLOSE, normalized=False)])
    return tokenizer


def byte_level_added(folder):
    train_tokenizer(CORPUS, 400, folder, tags="added")


def byte_level_plain(folder):
    train_tokenizer(CORPUS, 400, folder, tags="plain")


def byte_level_crossing(folder):
    """No pre-tokenisation inside a line and the one after: merges run across the tags' ends."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    words = pre_tokenizers.Split(Regex(r".{1,3}</think>.?\n*|.</|[^\n]{1,6}"), "isolated")
    steps = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    train(models.BPE(), trainer, folder, pre_tokenizer=steps, decoder=decoders.ByteLevel())


def sentencepiece_bpe(folder):
    """As in Llama 2: a space put in front and metaspaces by the normalizer, byte fallback, no pre-tokenizer."""
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<|end|>"], show_progress=False)
    tokenizer = RawTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    save(with_byte_tokens(tokenizer), folder)


def sentencepiece_unigram(folder):
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<|end|>"], unk_token="<unk>", show_progress=False
    )
    train(
        models.Unigram(),
        trainer,
        folder,
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
        then=with_byte_tokens,
    )


def word_level(folder):
    words = pre_tokenizers.Split(Regex(r" ?\w+|\n+| ?[^\w\s]"), "isolated")
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<|end|>"], show_progress=False)
    train(models.WordLevel(unk_token="<unk>"), trainer, folder, pre_tokenizer=words, then=add_tags)


KINDS = {
    make.__name__: make
    for make in (
        byte_level_added,
        byte_level_plain,
        byte_level_crossing,
        sentencepiece_bpe,
        sentencepiece_unigram,
        word_level,
    )
}
every_kind = pytest.mark.parametrize("kind", KINDS)
lossless_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word_level"])


@functools.cache
def load(kind: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        KINDS[kind](Path(folder))
        return Tokenizer.load(folder)


def flat(lists) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def near_tag(text: Tokenizer) -> list[int]:
    """Ids that share at least two bytes with the tag or are bytes of it: random streams of these do hit."""
    pairs = {TAG[i : i + 2] for i in range(len(TAG) - 1)}
    return [i for i, piece in enumerate(text.pieces) if piece in TAG or any(pair in piece for pair in pairs)]


@st.composite
def streams(draw, text: Tokenizer) -> list[int]:
    """Token ids: random ones, ones near the tag, and spellings of tags, whole or broken, cut in random places."""
    near = near_tag(text)
    parts = ["</think>", "x</think>\n", "</th</think>", "</think", "k>", "<", "</", "think>\n\n", "<</think>>", "東</"]
    spelled = st.lists(st.sampled_from(parts), max_size=4).map(lambda chosen: text.encode("".join(chosen)))
    cut = st.lists(st.sampled_from(parts), max_size=4).map(lambda chosen: flat(map(text.encode, chosen)))
    anything = st.integers(0, text.vocab_size + 2).map(lambda i: [i])
    kinds = st.one_of(st.sampled_from(near).map(lambda i: [i]), anything, spelled, cut)
    return flat(draw(st.lists(kinds, max_size=12)))


def naive_hits(text: Tokenizer, ids: list[int]) -> list[int]:
    """Complete tags that end in each token, by searching the bytes of every prefix."""
    parts = [text.pieces[i] if i < text.vocab_size else b"" for i in ids]
    counts = [b"".join(parts[:n]).count(TAG) for n in range(len(ids) + 1)]
    return [after - before for before, after in itertools.pairwise(counts)]


def walk(matcher: TagMatcher, ids: list[int], start: int = 0) -> list[int]:
    hits, state = [], np.array([start])
    for i in ids:
        state, hit = matcher.step(state, np.array([i]))
        hits.append(int(hit[0]))
    return hits


@every_kind
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_matcher_finds_the_tag_where_a_byte_search_finds_it(kind, data):
    text = load(kind)
    ids = data.draw(streams(text))
    assert walk(text.matcher, ids) == naive_hits(text, ids)


@every_kind
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_splitting_at_the_tag_agrees_with_the_decoded_text(kind, data):
    text = load(kind)
    ids = data.draw(streams(text))
    hits, split = naive_hits(text, ids), text.split_at_close(ids)
    assert split.num_tags == sum(hits)
    assert split.num_think == next((n for n, hit in enumerate(hits, start=1) if hit), None)
    assert (split.thought + CLOSE * bool(sum(hits)) + split.suffix) == text.decode(ids)
    assert CLOSE not in split.thought
    assert split.num_tags or not split.suffix


@every_kind
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_batch_of_streams_moves_like_each_stream_alone(kind, data):
    text = load(kind)
    batch = data.draw(st.lists(streams(text), min_size=1, max_size=6))
    length = max(map(len, batch))
    padded = np.array([ids + [0] * (length - len(ids)) for ids in batch], np.int32).reshape(len(batch), length)
    states, hits = np.zeros(len(batch), np.uint8), np.zeros((len(batch), length), np.uint8)
    for t in range(length):
        states, hits[:, t] = text.matcher.step(states, padded[:, t])
    assert hits.tolist() == [walk(text.matcher, ids) for ids in padded.tolist()]


def test_the_provoked_merges_do_cross_both_ends_of_the_tag():
    pieces = load("byte_level_crossing").pieces
    assert any(re.search(rb"[^<]</", piece) for piece in pieces)
    assert any(re.search(rb"k>[^>]", piece) for piece in pieces)
    assert any(TAG in piece and piece != TAG for piece in pieces)


def test_tags_spelled_one_byte_a_token_are_found():
    text = load("byte_level_crossing")
    single = {piece[0]: i for i, piece in enumerate(text.pieces) if len(piece) == 1}
    ids = [single[byte] for byte in b"a</th</think>b</think></thin</think>"]
    assert walk(text.matcher, ids) == naive_hits(text, ids)
    assert text.split_at_close(ids) == (13, "a</th", "b</think></thin</think>", 3)


@pytest.mark.parametrize("tag", [b"aabaa", b"abab", b"a", b"aa"])
@settings(max_examples=100, deadline=None)
@given(stream=st.lists(st.sampled_from([b"a", b"b", b"ab", b"aab", b"baa", b"", b"aaaa"]), max_size=30))
def test_the_matcher_finds_tags_that_overlap_themselves(tag, stream):
    pieces = [b"a", b"b", b"ab", b"aab", b"baa", b"", b"aaaa"]
    matcher = TagMatcher(pieces, tag)
    written = b"".join(stream)
    expected = sum(written.startswith(tag, i) for i in range(len(written)))
    assert sum(walk(matcher, [pieces.index(piece) for piece in stream])) == expected


def test_special_tokens_and_padded_ids_neither_advance_nor_break_a_match():
    text = load("byte_level_plain")
    single = {piece[0]: i for i, piece in enumerate(text.pieces) if len(piece) == 1}
    ids = [*(single[byte] for byte in b"</thi"), text.eos_ids[0], text.vocab_size + 7, single[ord("n")]]
    ids += [single[ord("k")], single[ord(">")], text.eos_ids[0]]
    assert walk(text.matcher, ids) == [0] * 9 + [1, 0]
    assert text.split_at_close(ids) == (10, "", "", 1)


STOPS = ["\n\nProblem:", "\nQ:", "a", "aba", "\n", "東京", ">\n"]
TAG_PARTS = ["</th", "ink>", OPEN, CLOSE, ">", "x"]
NEAR_STOPS = ["\n", "\n\nProb", "lem:", "Q", ":", "a", "b", "ba", "東", "京", *TAG_PARTS]


def first_stop(decoded: list[str], stops: list[str], is_open: bool) -> int:
    """Tokens up to the one with which a text, decoded anew for each of them, has a stop text; 0 without one."""
    cut = (before_stop(text, stops, is_open=is_open) != text for text in decoded)
    return next((n for n, has_stop in enumerate(cut) if has_stop), 0)


@every_kind
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_stop_text_is_found_in_the_token_that_completes_it_outside_thoughts(kind, data):
    text = load(kind)
    stops, is_open = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=3)), data.draw(st.booleans())
    whole, cut = (st.lists(st.sampled_from(NEAR_STOPS), max_size=9).map(join) for join in ("".join, list))
    kinds = st.one_of(whole.map(text.encode), cut.map(lambda parts: flat(map(text.encode, parts))))
    ids = flat(data.draw(st.lists(kinds, max_size=3)))
    matcher = StopMatcher(text.pieces, stops)
    hits = walk(matcher, ids, matcher.inside if is_open else 0)
    decoded = [text.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert next((n for n, hit in enumerate(hits, 1) if hit), 0) == first_stop(decoded, stops, is_open)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_stop_texts_and_tags_that_share_tokens_are_told_apart_byte_by_byte(data):
    letters = st.text("<>/thinkX\n", min_size=1, max_size=4)
    words = st.sampled_from([OPEN, CLOSE, f"X{CLOSE}X", f"{CLOSE}\nX{OPEN}X", "XX", "<t", "k>"])
    pieces = data.draw(st.lists(letters | words, min_size=1, max_size=9))
    stops = data.draw(st.lists(letters | st.sampled_from(["X", "k>X", ">\n"]), min_size=1, max_size=3))
    ids = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=12))
    is_open = data.draw(st.booleans())
    matcher = StopMatcher([piece.encode() for piece in pieces], stops)
    hits = walk(matcher, ids, matcher.inside if is_open else 0)
    decoded = ["".join(pieces[i] for i in ids[:n]) for n in range(len(ids) + 1)]
    assert next((n for n, hit in enumerate(hits, 1) if hit), 0) == first_stop(decoded, stops, is_open)


any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([OPEN, CLOSE, "<|end|>", "<unk>", " ", "  ", "\n\n", "▃", "naïve", "🙂", "e\u0301", "\0", "<0x41>"])
).map("".join)


@lossless_kinds
@settings(max_examples=150, deadline=None)
@given(written=any_text)
def test_decode_undoes_encode(kind, written):
    text = load(kind)
    if kind == "sentencepiece_unigram":  # its own vocabulary holds these names
        written = re.sub(r"<\|end\|>|<unk>|<0x..>", "_", written)
    assert text.decode(text.encode(written)) == written


@every_kind
@settings(max_examples=60, deadline=None)
@given(written=st.lists(st.text(st.characters(codec=None)), max_size=5))
def test_encoding_many_is_encoding_each_and_surrogates_become_question_marks(kind, written):
    text = load(kind)
    assert text.encode_many(written) == [text.encode(one) for one in written]
    assert text.encode("a\ud800b\udc00") == text.encode("a?b?")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["byte_level_added", "byte_level_crossing"])
def test_random_ids_decode_as_the_tokenizer_itself_decodes_them(kind, data):
    text = load(kind)
    ids = data.draw(st.lists(st.integers(0, text.vocab_size - 1)))
    assert text.decode(ids) == text.tokenizer.decode(ids, skip_special_tokens=True)


def test_sentencepiece_pieces_are_spaces_and_raw_bytes():
    text = load("sentencepiece_bpe")
    bytes_of = {text.tokenizer.id_to_token(i): piece for i, piece in enumerate(text.pieces)}
    assert (bytes_of["▁has"], bytes_of["<0xE6>"], bytes_of["<unk>"]) == (b" has", b"\xe6", b"")
    assert text.encode("has 12") == [*text.encode("has"), *text.encode(" 12")]  # no space put in front
    assert text.decode(text.encode("磁")) == "磁"
    assert len(text.encode("磁")) == 3


@every_kind
@settings(max_examples=80, deadline=None)
@given(pieces=st.lists(st.tuples(st.booleans(), st.text("ab <>/think1\n.é", max_size=12)), max_size=6))
def test_a_prefix_that_ends_at_an_opened_tag_is_a_token_prefix(kind, pieces):
    text = load(kind)
    [(ids, mask)] = text.encode_woven_many([pieces])
    assert len(ids) == len(mask)
    for n, (is_thought, _) in enumerate(pieces):
        if is_thought:
            prompt = text.encode_woven_many([pieces[:n]])[0][0] + text.open_ids
            assert ids[: len(prompt)] == prompt
    assert ids == [i for is_thought, part in pieces for i in by_hand(text, is_thought, part)]
    assert mask == [is_thought for is_thought, part in pieces for _ in by_hand(text, is_thought, part)]


def by_hand(text: Tokenizer, is_thought: bool, part: str) -> list[int]:
    return text.encode(OPEN) + text.encode(part) + text.encode(CLOSE) if is_thought else text.encode(part)


def test_weaving_many_documents_is_weaving_each():
    text = load("byte_level_plain")
    documents = [[(False, "Ana has 3."), (True, "so 3"), (False, " Ben")], [], [(True, "")], [(False, "")]]
    assert text.encode_woven_many(documents) == [text.encode_woven_many([pieces])[0] for pieces in documents]


prose = st.lists(
    st.sampled_from(["Ana has 12 coins.", " So", " ", "\n\n", "\n", "東京。", "🙂", "!!", "x" * 30, "\r\n\r\n", "."])
).map("".join)


@every_kind
@settings(max_examples=80, deadline=None)
@given(written=prose | any_text, max_tokens=st.integers(70, 90) | st.integers(12, 16))
def test_chunks_fit_and_join_to_the_text(kind, written, max_tokens):
    text = load(kind)
    parts = text.chunks(written, max_tokens)
    assert "".join(parts) == written
    assert all(part and len(text.encode(part)) <= max_tokens for part in parts)


def test_chunks_end_at_paragraphs_then_sentences_then_words_then_anywhere():
    text = load("byte_level_plain")
    sentence, word = "Ana has 12 coins.", " coins"
    two = f"{sentence} {sentence}"
    n = len(text.encode(two))
    assert text.chunks(f"{two}\n\n{two}", 2 * n) == [f"{two}\n\n", two]
    assert text.chunks(f"{two} {sentence}", n + 1) == text.chunks(f"{two} {sentence}", n) == [two, f" {sentence}"]
    assert text.chunks(word * 5 + "xxx", 5 * len(text.encode(word)) + 2) == [word * 4, word + "xxx"]
    assert text.chunks("\u0378" * 10, 6) == ["\u0378" * 3] * 3 + ["\u0378"]
    assert text.chunks("", 6) == []


def test_chunks_of_surrogates_keep_them():
    assert "".join(load("byte_level_plain").chunks("a\ud800 b" * 50, 16)) == "a\ud800 b" * 50


def test_a_character_that_cannot_fit_is_named():
    with pytest.raises(UserError, match="max_tokens 2 is too small for the one character '🦆'"):
        load("byte_level_plain").chunks("a🦆", 2)
    with pytest.raises(UserError, match="max_tokens 0"):
        load("byte_level_plain").chunks("a", 0)


def test_chunks_encode_a_huge_document_a_constant_number_of_times(monkeypatch):
    text, seen, rng = load("byte_level_added"), [], random.Random(0)
    clean = text_module.clean
    monkeypatch.setattr(text_module, "clean", lambda part: seen.append(len(part)) or clean(part))
    words = ["coins", " Ana. ", "\n\n", " " * 50, "x" * 99, "\n" * 60, " has", "! "]
    for written in ("".join(rng.choices(words, k=4000)), "a. " + "x" * 50_000, " " * 50_000, "a b. c " * 10_000):
        seen.clear()
        text.chunks(written, 64)
        assert sum(seen) < 12 * len(written)


@pytest.mark.parametrize("tags", ["added", "plain"])
def test_a_trained_tokenizer_is_the_same_in_transformers(tmp_path, tags):
    from transformers import AutoTokenizer

    train_tokenizer(CORPUS, 400, tmp_path, tags=tags)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for written in [*CORPUS[:5], "🦆 <think>a</think>b 12"]:
        assert ours.encode(written) == theirs.encode(written)
        assert theirs.decode(ours.encode(written)) == written
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (ours.vocab_size, ours.eos_ids[0], ours.bos_id)


def test_training_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        train_tokenizer(CORPUS, 400, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_trained_tokenizer_has_the_asked_size_whole_words_and_the_tags_as_asked(tmp_path):
    corpus = [*CORPUS, *map("".join, itertools.permutations("abcde"))]
    train_tokenizer(corpus, 400, tmp_path / "added", tags="added")
    train_tokenizer(corpus, 400, tmp_path / "plain", tags="plain")
    added, plain = Tokenizer.load(tmp_path / "added"), Tokenizer.load(tmp_path / "plain")
    assert added.vocab_size == plain.vocab_size == 400
    assert (added.open_ids, added.close_ids) == ([398], [399])
    assert len(plain.close_ids) > 1
    assert len(added.encode(" 12")) == 1
    assert not any(b"think" in piece for piece in added.pieces[:398])  # no merges wasted on what the tags cover
    with pytest.raises(UserError, match="vocab_size 258"):
        train_tokenizer(CORPUS, 258, tmp_path / "small")


@pytest.fixture
def folder(tmp_path) -> Path:
    train_tokenizer(CORPUS, 400, tmp_path)
    return tmp_path


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def test_a_document_cannot_end_itself(folder):
    text = Tokenizer.load(folder)
    ids = text.encode("a<|end|>b")
    assert not set(text.eos_ids) & set(ids)
    assert text.decode(ids) == "a<|end|>b"
    assert text.decode([*ids, *text.eos_ids]) == "a<|end|>b"


def test_a_stop_text_that_no_text_can_hold_is_named(folder):
    text = Tokenizer.load(folder)
    with pytest.raises(UserError, match=r"^stop text '\.<\|end\|>': <\|end\|> is a special token"):
        text.stop_matcher((".", ".<|end|>"))


def test_truncation_padding_and_put_spaces_of_the_file_are_ignored(folder):
    plain = Tokenizer.load(folder)
    tokenizer = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode(CORPUS[0]) == plain.encode(CORPUS[0])
    assert Tokenizer.load(folder).encode_many(CORPUS[:2]) == plain.encode_many(CORPUS[:2])


def test_tags_that_a_file_calls_special_are_still_text(folder):
    spec = json.loads((folder / "tokenizer.json").read_text())
    rewrite(folder / "tokenizer.json", added_tokens=[token | {"special": True} for token in spec["added_tokens"]])
    text = Tokenizer.load(folder)
    assert text.decode(text.encode("a<think>b</think>c")) == "a<think>b</think>c"
    assert len(text.open_ids) == len(text.close_ids) == 1


def test_ends_come_from_the_tokenizer_first_then_from_the_model(folder):
    end, turn, config = 0, Tokenizer.load(folder).vocab_size, folder / "config.json"
    spec = json.loads((folder / "tokenizer.json").read_text())
    extra = spec["added_tokens"][0] | {"id": turn, "content": "<|turn|>"}
    rewrite(folder / "tokenizer.json", added_tokens=[*spec["added_tokens"], extra])
    rewrite(config, eos_token_id=[turn])
    assert Tokenizer.load(folder).eos_ids == (end, turn)
    rewrite(folder / "generation_config.json", eos_token_id=[turn, end, 2])  # 2 is an ordinary piece
    assert Tokenizer.load(folder).eos_ids == (end, turn)
    rewrite(folder / "tokenizer_config.json", eos_token={"content": "<|turn|>"})
    assert Tokenizer.load(folder).eos_ids == (turn, end)
    (folder / "tokenizer_config.json").unlink()
    rewrite(folder / "generation_config.json", eos_token_id=turn)
    assert Tokenizer.load(folder).eos_ids == (turn,)


def test_bos_is_known_only_if_the_tokenizer_puts_it_in_front(folder):
    config = folder / "tokenizer_config.json"
    rewrite(config, bos_token="<|end|>")
    assert Tokenizer.load(folder).bos_id is None
    rewrite(config, add_bos_token=True)
    assert Tokenizer.load(folder).bos_id == 0
    tokenizer = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|begin|>"])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config.unlink()
    text = Tokenizer.load(folder)
    assert text.bos_id == begin
    assert text.begin_ids == ([] if begin is None else [begin])
    assert begin not in text.encode("a")
    assert text.decode([begin]) == ""
    rewrite(config, add_bos_token=False)
    assert Tokenizer.load(folder).bos_id is None


def test_holes_in_the_ids_are_counted_and_say_nothing():
    tokenizer = RawTokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    with tempfile.TemporaryDirectory() as folder:
        text = Tokenizer.load(save(add_tags(tokenizer), Path(folder), eos_token="b"))
    assert text.vocab_size == 1 + max(text.tokenizer.get_vocab().values()) > text.tokenizer.get_vocab_size()
    assert text.decode([0, 5, 7]) == "a"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", "[]", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", '{"model": 3}', "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", "3", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<eos>"}', "tokenizer_config.json: eos_token '<eos>' is not in"),
        ("tokenizer_config.json", '{"eos_token": 5}', "tokenizer_config.json: eos_token 5 must name a token"),
        ("config.json", '{"eos_token_id": "x"}', r"config.json: eos_token_id \['x'\] must be token ids"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named_in_one_line(folder, file, content, says):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_spell_the_tags_is_refused(tmp_path):
    tokenizer = RawTokenizer(models.WordLevel({"<unk>": 0, "a": 1, OPEN: 2}, unk_token="<unk>"))
    save(tokenizer, tmp_path, eos_token=None)
    with pytest.raises(UserError, match=r"tokenizer.json: cannot spell </think>; add"):
        Tokenizer.load(tmp_path)
