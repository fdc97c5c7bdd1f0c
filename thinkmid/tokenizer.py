"""The one place where text becomes tokens and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from thinkmid import files, sentences
from thinkmid.errors import UserError
from thinkmid.thoughts import CLOSE, OPEN

END = "<|end|>"
BATCH = 4096  # texts a call into the tokenizer: its encodings are some ten times the size of the ids that we keep
PARAGRAPH = re.compile(r"\n\s*\n")
WORD = re.compile(r"\S(?=\s)")  # a space goes with the word that follows it, as in every byte-level vocabulary


def clean(text: str) -> str:
    """Text that UTF-8 can hold: lone surrogates become "?"."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in an optional file, {} without the file."""
    return files.read_json(path) if path.is_file() else {}


def token_name(path: Path, config: dict[str, Any], key: str) -> str | None:
    """The token that a tokenizer_config.json names under key, in either of its two spellings."""
    entry = config.get(key)
    name = entry.get("content") if isinstance(entry, dict) else entry
    if name is not None and not isinstance(name, str):
        raise UserError(f"{path}: {key} {entry!r} must name a token")
    return name


def end_ids(folder: Path, named: int | None, special: set[int]) -> tuple[int, ...]:
    """Ids that end a text: the named one, then those listed in generation_config.json, or else in config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        listed: Any = read_json(path).get("eos_token_id")
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(i) is int and 0 <= i < 2**31 for i in listed):
            raise UserError(f"{path}: eos_token_id {listed} must be token ids")
        if listed:
            break
    if named is None:
        return tuple(dict.fromkeys(listed))
    # library defaults (eos_token_id 2) often name an ordinary piece that the tokenizer knows nothing of
    return tuple(dict.fromkeys([named, *(i for i in listed if i in special)]))


def begin_id(tokenizer: tokenizers.Tokenizer, add: bool | None, named: int | None) -> int | None:
    """The id that the tokenizer puts in front of a text; its config decides over its template."""
    probe = tokenizer.encode("a")
    first = probe.ids[0] if any(probe.special_tokens_mask[:1]) else None
    if add is None:
        return first
    return (first if named is None else named) if add else None


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies: itself where it shows, else from U+0100."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def flat_steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    if step is None:
        return []
    inner = [steps for key in ("normalizers", "pretokenizers", "decoders") for steps in step.get(key, [])]
    return [step, *chain.from_iterable(map(flat_steps, inner))]


def token_bytes(tokenizer: tokenizers.Tokenizer, spec: dict[str, Any]) -> list[bytes]:
    """What each id adds to a text: by the byte-level alphabet, by metaspaces and <0xNN>, or as it stands."""
    steps = [step for key in ("decoder", "pre_tokenizer", "normalizer") for step in flat_steps(spec.get(key))]
    kinds = {step["type"] for step in steps}
    alphabet = byte_alphabet() if "ByteLevel" in kinds else {}
    fallback = "ByteFallback" in kinds or spec["model"].get("byte_fallback")
    added = tokenizer.get_added_tokens_decoder()
    spaces = {step["replacement"] for step in steps if step["type"] == "Metaspace"}
    spaces |= {"▁" for step in flat_steps(spec.get("decoder")) if step.get("pattern") == {"String": "▁"}}
    pieces = {}
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            pieces[i] = token.encode()
        elif alphabet.keys() >= set(token):
            pieces[i] = bytes(alphabet[letter] for letter in token)
        elif fallback and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            pieces[i] = bytes.fromhex(byte[1])
        else:
            pieces[i] = "".join(" " if letter in spaces else letter for letter in token).encode()
    return [pieces.get(i, b"") for i in range(max(pieces, default=-1) + 1)]


def without_prefix(step: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front of a text."""
    match step:
        case {"type": "Sequence", **rest}:
            return step | {key: list(map(without_prefix, cast("list[Any]", steps))) for key, steps in rest.items()}
        case {"type": "Prepend"}:
            return {"type": "Sequence", "normalizers": []}
        case {"type": "Metaspace"}:
            return step | {"add_prefix_space": False, "prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": _}:
            return step | {"add_prefix_space": False}
    return step


def exact(spec: dict[str, Any], names: set[str | None]) -> dict[str, Any]:
    """A tokenizer.json that loses nothing, see Tokenizer. The named tokens are special, and the think tags are not."""
    added = [
        token | {"special": token["content"] not in (OPEN, CLOSE) and (token["special"] or token["content"] in names)}
        for token in spec.get("added_tokens", [])
    ]
    steps = {key: without_prefix(spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
    return spec | steps | {"added_tokens": added, "truncation": None, "padding": None}


def longest(patterns: Iterable[str]) -> re.Pattern[str]:
    """One of these, in a group; of two that begin alike the longer one. Without any it matches nothing."""
    return re.compile(f"({'|'.join(sorted(patterns, key=len, reverse=True)) or '(?!)'})")


def last_break(text: str, start: int, limit: int) -> int:
    """The best place at or before limit, and after start, to end a chunk."""
    # one character past the limit, for the patterns that look ahead
    paragraphs = (match.end() for match in PARAGRAPH.finditer(text, (start + limit) // 2, limit + 1))
    words = (match.end() for match in WORD.finditer(text, start, limit + 1))
    for ends in (paragraphs, sentences.ends(text, start, limit), words):
        if fitting := [end for end in ends if end <= limit]:
            return fitting[-1]
    return limit


def byte_automaton(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Next state, and the number of the text that is complete (from 1; 0: none), by state and byte; (m, 256) uint16.

    The m states are the texts' proper beginnings, shortest first: the longest of them with which what was read ends,
    after a complete text too. Of texts that are complete at once, the first of the list counts.
    """
    states = sorted(sorted({text[:k] for text in texts for k in range(len(text))}), key=len)
    follow = np.zeros((len(states), 256), np.uint16)
    found = np.zeros_like(follow)
    for state, begun in enumerate(states):
        for byte in set(b"".join(texts)):
            read = begun + bytes([byte])
            found[state, byte] = next((n for n, text in enumerate(texts, 1) if read.endswith(text)), 0)
            follow[state, byte] = next(k for k in range(len(states) - 1, -1, -1) if read.endswith(states[k]))
    return follow, found


class TagMatcher:
    """Finds a tag in streams of token ids, whatever the tokenizer: its bytes may be spread over several tokens or
    share one with others ("x</", "think", ">\\n"). The Knuth-Morris-Pratt automaton of the tag, lifted to tokens.

    A stream's state is the number of tag bytes matched so far, 0 at its start. With m the tag's length:
    next_state  (m, V+1) uint16; hits  (m, V+1) uint16, the complete tags that end inside the token.
    The last column stands for every id past the vocabulary, as in padded embeddings: no bytes, no change.
    """

    def __init__(self, pieces: Sequence[bytes], tag: bytes):
        self._lift(pieces, *byte_automaton([tag]))

    def _lift(self, pieces: Sequence[bytes], follow: np.ndarray, found: np.ndarray) -> None:
        """From bytes to tokens: follow and found (m, 256) uint16, what each byte adds to the hits."""
        flat = np.frombuffer(b"".join(pieces), np.uint8)
        num_bytes = np.fromiter(map(len, [*pieces, b""]), np.int64)  # (V+1,)
        start = np.cumsum(num_bytes) - num_bytes
        self.next_state = np.repeat(np.arange(len(follow), dtype=np.uint16)[:, None], len(num_bytes), axis=1)
        self.hits = np.zeros_like(self.next_state)
        live = np.arange(len(num_bytes))
        for column in range(int(num_bytes.max())):
            live = live[num_bytes[live] > column]
            state, byte = self.next_state[:, live], flat[start[live] + column]
            self.hits[:, live] += found[state, byte]
            self.next_state[:, live] = follow[state, byte]

    def step(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One token for each of B streams: states, tokens (B,) integers -> next states, hits (B,) uint16."""
        column = np.minimum(tokens, self.next_state.shape[1] - 1)
        return self.next_state[states, column], self.hits[states, column]


class StopMatcher(TagMatcher):
    """Finds stop texts outside thoughts, as thoughts.before_stop() does, in streams of token ids.

    A stream's state is 0 at its start, `inside` where its prompt has opened a thought. No stop text holds a tag.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Sequence[str]):
        outside, found = byte_automaton([OPEN.encode(), *(stop.encode() for stop in stops)])
        inside, closed = byte_automaton([CLOSE.encode()])
        self.inside = len(outside)
        # an opening tag leads to the first state inside, a closing one back to the first outside
        rows = np.where(found == 1, self.inside, outside), np.where(closed, 0, inside + self.inside)
        hits = np.concatenate([found > 1, np.zeros_like(closed)])
        self._lift(pieces, np.concatenate(rows).astype(np.uint16), hits.astype(np.uint16))


class Split(NamedTuple):
    """What a policy wrote, taken apart at its first closing tag."""

    num_think: int | None  # tokens up to and including the one in which the first tag completes; None: no tag
    thought: str  # before the tag; everything if there is none
    suffix: str  # from right after the tag, even if the tag ends inside a token
    num_tags: int  # complete closing tags in all


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Tokenizer:
    """A tokenizer that loses nothing: pieces of a text are encoded on their own, joined, and read back exactly.

    To that end the file's tokenizer is changed in three ways: no truncation or padding, no space put in front of a
    text, and the names of special tokens inside a text are ordinary characters (a document cannot end itself).
    Two losses stay: what the normalizer does (NFC in Qwen), and names that a Unigram or word vocabulary holds itself.
    """

    tokenizer: tokenizers.Tokenizer
    pieces: list[bytes]  # of each id, as they stand in a text; b"" for special tokens
    eos_ids: tuple[int, ...]  # the tokenizer's own first
    bos_id: int | None  # None unless the tokenizer itself puts it in front
    open_ids: list[int]
    close_ids: list[int]

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """From a Hugging Face model folder. UserError: tokenizer.json is missing, broken or cannot spell the tags."""
        folder = Path(folder)
        path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        config = read_json(config_path)
        names = {key: token_name(config_path, config, f"{key}_token") for key in ("eos", "bos", "pad")}
        try:
            spec = exact(json.loads(path.read_bytes()), set(names.values()))
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the tokenizers library raises nothing narrower; the message goes to the user
            raise UserError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error
        tokenizer.encode_special_tokens = True
        ids = {key: None if name is None else tokenizer.token_to_id(name) for key, name in names.items()}
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        if names["eos"] is not None and ids["eos"] is None:
            raise UserError(f"{config_path}: eos_token {names['eos']!r} is not in the vocabulary")
        eos_ids = end_ids(folder, ids["eos"], special)
        silent = special.union(eos_ids, (i for i in ids.values() if i is not None))
        text = Tokenizer(
            tokenizer=tokenizer,
            pieces=[b"" if i in silent else piece for i, piece in enumerate(token_bytes(tokenizer, spec))],
            eos_ids=eos_ids,
            bos_id=begin_id(tokenizer, config.get("add_bos_token"), ids["bos"]),
            open_ids=tokenizer.encode(OPEN, add_special_tokens=False).ids,
            close_ids=tokenizer.encode(CLOSE, add_special_tokens=False).ids,
        )
        for tag, tag_ids in ((OPEN, text.open_ids), (CLOSE, text.close_ids)):
            if text.decode(tag_ids) != tag:
                raise UserError(f"{path}: cannot spell {tag}; add {OPEN} and {CLOSE} to its added_tokens")
        return text

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return len(self.pieces)

    @property
    def begin_ids(self) -> list[int]:
        """What stands in front of every text that the model reads: the begin token, or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    @cached_property
    def digest(self) -> str:
        """Hash of all that decides the ids of a text."""
        decides = (self.tokenizer.to_str(), self.bos_id, self.eos_ids, self.open_ids, self.close_ids)
        return hashlib.blake2b(repr(decides).encode(), digest_size=16).hexdigest()

    @cached_property
    def special(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}

    @cached_property
    def names(self) -> re.Pattern[str]:
        """The name of a special token."""
        return longest([re.escape(name) for name in self.special])

    @cached_property
    def matcher(self) -> TagMatcher:
        """Finds closing tags."""
        return TagMatcher(self.pieces, CLOSE.encode())

    @cached_property
    def open_matcher(self) -> TagMatcher:
        """Finds opening tags."""
        return TagMatcher(self.pieces, OPEN.encode())

    @lru_cache(maxsize=4)  # noqa: B019  a process has few tokenizers, and they live as long as it
    def stop_matcher(self, stops: tuple[str, ...]) -> StopMatcher:
        """Finds these stop texts. UserError for one with the name of a special token: it has no text to be found."""
        if found := [(stop, name) for stop in stops if (name := self.spelled(stop))]:
            raise UserError(
                "stop text {!r}: {} is a special token, in no text; template 'chat' ends there".format(*found[0])
            )
        return StopMatcher(self.pieces, stops)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. Lone surrogates become "?"."""
        return self.tokenizer.encode(clean(text), add_special_tokens=False).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """encode(text), and the characters from start to end of each token."""
        encoding = self.tokenizer.encode(clean(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """[encode(text) for text in texts], on all cores."""
        texts, ids = [clean(text) for text in texts], []
        for i in range(0, len(texts), BATCH):
            batch = self.tokenizer.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)
            ids += [encoding.ids for encoding in batch]
        return ids

    def encode_woven_many(self, documents: Sequence[Sequence[tuple[bool, str]]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of the (is thought, text) pieces of each document, and which of the ids are thought, tags included.

        Each text, tag and thought is encoded on its own, so the ids of everything up to an opened tag do not
        depend on what follows: an RLMT prompt is a token-prefix of its SFT sequence.
        """
        woven = []
        for pieces, runs in zip(documents, self.encode_pieces(documents), strict=True):
            mask = [thought for (thought, _), ids in zip(pieces, runs, strict=True) for _ in ids]
            woven.append((list(chain.from_iterable(runs)), mask))
        return woven

    def encode_pieces(self, documents: Sequence[Sequence[tuple[bool, str]]]) -> list[list[list[int]]]:
        """For each document the ids of every piece, which encode_woven_many joins: those of a thought with its tags."""
        encoded = iter(self.encode_many(text for pieces in documents for _, text in pieces))
        return [
            [[*self.open_ids, *next(encoded), *self.close_ids] if thought else next(encoded) for thought, _ in pieces]
            for pieces in documents
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; special tokens and ids past the vocabulary are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes(ids)).decode("utf-8", errors="replace")

    def opens(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends in a thought that has just been opened: white space at most follows the tag."""
        return self.decode(ids[-len(self.open_ids) - 8 :]).rstrip().endswith(OPEN)

    def spelled(self, text: str) -> str | None:
        """A special token whose name stands in a text, where it is ordinary characters."""
        found = self.names.search(text)
        return found[0] if found else None

    def split_at_close(self, ids: Sequence[int] | np.ndarray) -> Split:
        """Thought and suffix of generated ids, cut at the first closing tag."""
        parts, tag = self._bytes(ids), CLOSE.encode()
        written = b"".join(parts)
        thought, _, suffix = (part.decode("utf-8", errors="replace") for part in written.partition(tag))
        if not (num_tags := written.count(tag)):
            return Split(None, thought, suffix, num_tags)
        ends = np.cumsum([len(part) for part in parts])
        num_think = int(np.searchsorted(ends, written.find(tag) + len(tag))) + 1
        return Split(num_think, thought, suffix, num_tags)

    def chunks(self, text: str, max_tokens: int) -> list[str]:
        """Contiguous parts of at most max_tokens tokens each, every one encoded on its own; together the text exactly.

        Cut after a paragraph if that leaves a chunk at least half full, else after a sentence, else before
        whitespace, else anywhere. Linear time. UserError if one character alone has more tokens than that.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens {max_tokens} must be at least 1")
        parts, start, width = [], 0, 8 * max_tokens
        while start < len(text):
            end = self._chunk_end(text, start, width, max_tokens)
            parts.append(text[start:end])
            start, width = end, max(2 * (end - start), max_tokens)
        return parts

    def _chunk_end(self, text: str, start: int, width: int, max_tokens: int) -> int:
        ends = self.token_ends(text[start : start + width])
        while len(ends) <= max_tokens:
            if start + width >= len(text):
                return len(text)
            width *= 2
            ends = self.token_ends(text[start : start + width])
        room = max(ends[max_tokens - 1], 1)  # characters
        while True:
            end = last_break(text, start, start + room)
            # a cut changes the tokens around it, and the new tail may be longer than the old one
            excess = len(self.encode(text[start:end])) - max_tokens
            if excess <= 0:
                return end
            if end == start + 1:
                raise UserError(f"max_tokens {max_tokens} is too small for the one character {text[start]!r}")
            room = max(end - start - max(1, (end - start) * excess // max_tokens), 1)

    def token_ends(self, text: str) -> list[int]:
        """Characters up to the end of each token of encode(text)."""
        return [end for _, end in self.encode_spans(text)[1]]

    def _bytes(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        return [self.pieces[i] if 0 <= i < len(self.pieces) else b"" for i in ids]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path, tags: Literal["added", "plain"] = "added"
) -> None:
    """Byte-level BPE with GPT-2's words (" 12" is one), written to folder as tokenizer.json and tokenizer_config.json.

    Id 0 ends a text; "added" gives each think tag an id of its own at the end of the vocabulary, "plain" leaves them
    to the merges. A corpus with fewer merges gives a smaller vocabulary. Same texts in the same order, same bytes.
    """
    tag_tokens = [AddedToken(tag, special=False, normalized=False) for tag in (OPEN, CLOSE)] if tags == "added" else []
    smallest = 256 + 1 + len(tag_tokens)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} must be at least {smallest}: the bytes, {END} and the tags")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tag_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    clean_texts: Iterable[str] = map(clean, texts)
    if tag_tokens:  # no merges for what the added tokens cover
        clean_texts = chain.from_iterable(re.split(f"{OPEN}|{CLOSE}", text) for text in clean_texts)
    tokenizer.train_from_iterator(clean_texts, trainer)
    tokenizer.add_tokens(tag_tokens)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
