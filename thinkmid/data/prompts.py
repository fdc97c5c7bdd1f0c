"""Documents -> RLMT prompts: a prefix with the think tag opened, and the raw text that follows as reference."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from thinkmid.augment import weave
from thinkmid.data.source import Document
from thinkmid.errors import UserError
from thinkmid.text import Text
from thinkmid.types import Prompt

SENTENCE_END = re.compile(r"[.!?:;](?=\s)|\n(?=\s*\S)")


def at_thoughts(documents: Iterable[Document], text: Text, *, max_prefix: int) -> Iterator[Prompt]:
    """One prompt per thought: what stands before it, earlier thoughts included; the reference is without thoughts."""
    for doc in documents:
        pieces = _split(doc)
        for k, (is_thought, _) in enumerate(pieces):
            if is_thought:
                rest = "".join(piece for thought, piece in pieces[k:] if not thought)
                tokens, _ = text.encode_woven(pieces[:k])
                yield _prompt(f"{doc.id}#{k}", doc, tokens, rest, text, max_prefix)


def at_sentences(documents: Iterable[Document], text: Text, *, max_prefix: int, seed: int) -> Iterator[Prompt]:
    """Raw text: one prompt per chunk of at most max_prefix tokens, cut at a sentence end drawn from (seed, id)."""
    for doc in documents:
        for k, chunk in enumerate(text.chunks(doc.text, max_prefix - 1 - len(text.open_ids))):
            ends = [
                m.end() for m in SENTENCE_END.finditer(chunk) if chunk[: m.end()].strip() and chunk[m.end() :].strip()
            ]
            if ends:
                draw = hashlib.blake2b(f"{seed}/{doc.id}#{k}".encode(), digest_size=8).digest()
                cut = ends[int.from_bytes(draw, "little") % len(ends)]
                yield _prompt(f"{doc.id}#{k}", doc, text.encode(chunk[:cut]), chunk[cut:], text, max_prefix)


def _split(doc: Document):
    try:
        return weave.split(doc.text)
    except UserError as error:
        raise UserError(f"{doc.where}: {error}") from None


def _prompt(id, doc, tokens, reference, text, max_prefix) -> Prompt:
    begin = [] if text.bos_id is None else [text.bos_id]
    tokens = [*begin, *tokens, *text.open_ids]
    if len(tokens) > max_prefix:
        raise UserError(
            f"{doc.where}: prefix of {len(tokens)} tokens; the model's context leaves {max_prefix} for prefixes"
        )
    return Prompt(id=id, tokens=tokens, meta={"reference": reference, "where": doc.where})
