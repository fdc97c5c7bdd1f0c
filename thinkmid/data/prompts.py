"""Documents -> RLMT prompts: a prefix with the think tag opened, and the raw text that follows as reference."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from thinkmid import sentences, thoughts
from thinkmid.data.source import Document
from thinkmid.data.store import Store
from thinkmid.errors import UserError
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt


def at_thoughts(documents: Iterable[Document], tokenizer: Tokenizer, *, max_prefix: int) -> Iterator[Prompt]:
    """One prompt per thought that text follows: what stands before it, earlier thoughts included.

    The reference is the text after it without thoughts. UserError names a document whose prefix is too long.
    """
    documents = list(documents)
    pieces_of = [split(doc) for doc in documents]
    for doc, pieces, runs in zip(documents, pieces_of, tokenizer.encode_pieces(pieces_of), strict=True):
        for k, (is_thought, _) in enumerate(pieces):
            rest = "".join(piece for thought, piece in pieces[k:] if not thought) if is_thought else ""
            if not rest.strip():
                continue
            prompt = _prompt(doc, k, chain.from_iterable(runs[:k]), rest, tokenizer)
            if (num := len(prompt.tokens)) > max_prefix:
                room = f"the model's context leaves {max_prefix} for prefixes"
                raise UserError(f"{doc.where}: prefix of {num} tokens; {room}")
            yield prompt


def in_raw_text(
    documents: Iterable[Document], tokenizer: Tokenizer, *, where: str, max_prefix: int, length: int, seed: int
) -> Iterator[Prompt]:
    """Raw text: one prompt per chunk, cut at a place decided by (seed, id); the rest of the chunk is the reference.

    "sentence": chunks of at most max_prefix tokens, cut at the end of a sentence or clause. "fixed": chunks of at most
    twice `length` tokens, cut after about `length` (a cut is between characters, and the tokens around it change).
    "random": chunks as of "sentence", cut after 1 to all but one of their tokens.
    """
    room = max_prefix - len(tokenizer.begin_ids) - len(tokenizer.open_ids)
    if room < max(1, length):
        raise UserError(f"a prefix of {max_prefix} tokens has no room for text beside the opened tag")
    for doc in documents:
        if tag := thoughts.TAG.search(doc.text):
            raise UserError(f"{doc.where}: raw text contains {tag[0]} at character {tag.start()}")
        for k, chunk in enumerate(tokenizer.chunks(doc.text, 2 * length if where == "fixed" else room)):
            cut = _cut(chunk, where, tokenizer, length, f"{seed}/{doc.id}#{k}")
            tokens = tokenizer.encode(chunk[:cut])
            # a cut inside a run of spaces may cost more tokens than the run had
            if 0 < len(tokens) <= room and chunk[cut:].strip():
                yield _prompt(doc, k, tokens, chunk[cut:], tokenizer)


def _prompt(doc: Document, number: int, tokens: Iterable[int], reference: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt after these tokens of a document, the tag opened."""
    ids = [*tokenizer.begin_ids, *tokens, *tokenizer.open_ids]
    return Prompt(id=f"{doc.id}#{number}", tokens=ids, meta={"reference": reference, "where": doc.where})


def _cut(chunk: str, where: str, tokenizer: Tokenizer, length: int, key: str) -> int:
    """A place with text on both sides, decided by the key; 0 if there is none."""
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    draw = int.from_bytes(digest, "little")
    if where == "sentence":
        first, last = len(chunk) - len(chunk.lstrip()), len(chunk.rstrip())
        ends = [end for end in sentences.ends(chunk, clauses=True) if first < end < last]
        return ends[draw % len(ends)] if ends else 0
    ends = tokenizer.token_ends(chunk)
    after = length if where == "fixed" else 1 + draw % max(1, len(ends) - 1)
    return ends[after - 1] if after < len(ends) else 0


def split(doc: Document) -> list[tuple[bool, str]]:
    """(is thought, text) pieces of an annotated document. UserError names its file and line for a stray tag."""
    try:
        return thoughts.split(doc.text)
    except UserError as error:
        raise UserError(f"{doc.where}: {error}") from None


class StoredPrompts(Sequence[Prompt]):
    """Prompts read from a store of records(...) when they are needed."""

    def __init__(self, store: Store):
        self._store, self._ends = store, np.cumsum(store.numbers[:, 0])
        self.longest = int(store.numbers[:, 1].max())  # tokens of the longest

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Prompt:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = int(np.searchsorted(self._ends, i, side="right"))
        data = self._store[at]
        num_bytes = 4 * int(self._store.numbers[at, 1])
        fields = json.loads(bytes(data[num_bytes:]).decode("utf-8", "surrogatepass"))
        id, num_tokens, num_chars = fields["prompts"][i - int(self._ends[at])]
        reference = fields["reference"][len(fields["reference"]) - num_chars :]
        tokens = np.frombuffer(data[:num_bytes], np.int32)[:num_tokens].tolist()
        return Prompt(id=id, tokens=tokens, meta={"reference": reference, "where": fields["where"]})


def records(prompts: Iterable[Prompt]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """What a store keeps of prompts, and with each record the number of its prompts and the tokens of the longest.

    Consecutive prompts of a document, each of which extends the one before, share one record, so that storage is linear
    in the text.
    """
    row: list[Prompt] = []
    for prompt in prompts:
        if row and not _extends(row[-1], prompt):
            yield _record(row)
            row = []
        row.append(prompt)
    if row:
        yield _record(row)


def _extends(a: Prompt, b: Prompt) -> bool:
    """Whether b begins with a, in the same text."""
    same = a.meta["where"] == b.meta["where"] and a.tokens == b.tokens[: len(a.tokens)]
    return same and a.meta["reference"].endswith(b.meta["reference"])


def _record(row: list[Prompt]) -> tuple[bytes, tuple[int, int]]:
    each = [(p.id, len(p.tokens), len(p.meta["reference"])) for p in row]
    fields = {"prompts": each, "reference": row[0].meta["reference"], "where": row[0].meta["where"]}
    tokens = np.array(row[-1].tokens, np.int32).tobytes()
    data = tokens + json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return data, (len(row), len(tokens) // 4)
