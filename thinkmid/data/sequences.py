"""Documents -> token sequences for next-token loss: in memory, or as many as a disk holds."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from thinkmid.data.conversations import Conversations
from thinkmid.data.prompts import split
from thinkmid.data.source import Document, read_documents
from thinkmid.data.store import Store, blocks
from thinkmid.errors import UserError
from thinkmid.tokenizer import Tokenizer

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]


def tokens_of(
    documents: Sequence[Document], tokenizer: Tokenizer, chats: Conversations | None = None
) -> Iterator[tuple[Tokens, Mask]]:
    """(tokens int32, is thought) of every document, begin and end tokens added; of conversations see encode() there."""
    if chats:
        yield from chats.encode(documents)
        return
    begin, end = tokenizer.begin_ids, list(tokenizer.eos_ids[:1])
    for tokens, thought in tokenizer.encode_woven_many([split(doc) for doc in documents]):
        mask = [*[False] * len(begin), *thought, *[False] * len(end)]
        yield np.array([*begin, *tokens, *end], np.int32), np.array(mask, bool)


def num_pieces(num_tokens: NDArray[np.int64], max_len: int) -> NDArray[np.int64]:
    """Pieces of at most max_len tokens. They overlap by one, so that every token but the first is predicted once."""
    return np.maximum(num_tokens + max_len - 3, 0) // (max_len - 1)


def with_loss(tokens: Tokens) -> tuple[Tokens, Mask]:
    """Ids of a sequence, and which of them carry loss: those that do not stand as their complement."""
    has_loss = tokens >= 0
    return np.where(has_loss, tokens, ~tokens), has_loss


def read_sequences(
    paths: Sequence[str], tokenizer: Tokenizer, max_len: int, chats: Conversations | None = None, column: str = "text"
) -> list[tuple[Tokens, Mask]]:
    """(tokens, is thought) of every document, cut into pieces of at most max_len as Sequences cuts them."""
    out = []
    documents = blocks(chats.read(paths) if chats else read_documents(paths, column))
    for tokens, thought in chain.from_iterable(tokens_of(block, tokenizer, chats) for block in documents):
        for at in range(0, len(tokens) - 1, max_len - 1):
            out.append((tokens[at : at + max_len], thought[at : at + max_len]))
    if not out:
        raise UserError(f"{', '.join(paths)}: no document of two tokens or more")
    return out


def records(
    documents: Sequence[Document], tokenizer: Tokenizer, chats: Conversations | None = None
) -> Iterator[tuple[bytes, tuple[()]]]:
    """What a store keeps of each document that has a target: its tokens."""
    return ((tokens.tobytes(), ()) for tokens, _ in tokens_of(documents, tokenizer, chats) if len(tokens) > 1)


class Sequences:
    """The tokens of read_sequences, read from a store of records(...) when they are needed."""

    def __init__(self, store: Store, max_len: int):
        num_tokens = store.sizes // 4
        pieces = num_pieces(num_tokens, max_len)
        self.num_documents = len(num_tokens)
        self._store, self._max_len, self._ends = store, max_len, np.cumsum(pieces)
        self.lengths = np.full(len(self), max_len, np.int64)  # (N,) tokens of each
        last = (num_tokens - (pieces - 1) * (max_len - 1))[pieces > 0]
        self.lengths[self._ends[pieces > 0] - 1] = last

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> Tokens:
        if not 0 <= i < len(self):
            raise IndexError(i)
        doc = int(np.searchsorted(self._ends, i, side="right"))
        tokens = np.frombuffer(self._store[doc], np.int32)
        nth = i - (int(self._ends[doc - 1]) if doc else 0)
        return tokens[nth * (self._max_len - 1) :][: self._max_len]
