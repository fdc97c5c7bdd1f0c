"""Rows of messages -> token sequences, through the model's own chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from thinkmid.data.chat import Chat, Message
from thinkmid.data.source import Document, json_kind, read_rows
from thinkmid.errors import UserError

ROLES = ("system", "user", "assistant")
Loss = Literal["all", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """How conversations are read and encoded."""

    chat: Chat
    system: str = ""  # first message of conversations without one of the system
    loss: Loss = "all"  # which tokens carry loss: all but the first, or what the assistant wrote

    @property
    def decides(self) -> dict[str, Any]:
        """All that decides the tokens, beside tokenizer and files."""
        return {"chat": self.chat.source, "system": self.system, "loss": self.loss}

    def read(self, paths: Sequence[str]) -> Iterator[Document]:
        """Conversations of the given files and folders. UserError names the file and row that is none."""
        where = ""
        for where, row in read_rows(paths, only=("id", "messages")):
            messages = messages_of(where, row)
            if self.system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.system}, *messages]
            text = "\n\n".join(message["content"] for message in messages)
            yield Document(id=str(row.get("id") or where), text=text, where=where, messages=messages)
        if not where:
            raise UserError(f"{', '.join(map(str, paths))}: no row with messages")

    def encode(self, documents: Sequence[Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens int32, is thought) of each. A token without loss stands as its complement, -1 - id."""
        for doc in documents:
            try:
                found = (self.chat.answers if self.loss == "assistant" else self.chat.conversation)(doc.messages)
            except UserError as error:
                raise UserError(f"{doc.where}: {error}") from None
            tokens = np.array(found.ids, np.int32)
            if self.loss == "assistant":
                if not any(found.generated):
                    raise UserError(f"{doc.where}: no message of an assistant; data.loss 'assistant' needs one")
                tokens = np.where(found.generated, tokens, ~tokens)
            yield tokens, np.array(found.thought, bool)


def messages_of(where: str, row: dict[str, Any]) -> list[Message]:
    """The messages of a row, each a text of one of ROLES; further fields of theirs are texts too."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        kind = json_kind(messages) if "messages" in row else "missing"
        raise UserError(f'{where}: "messages" is {kind}, expected a list with messages; the row has {", ".join(row)}')
    return [message_of(f"{where}: message {n}", message) for n, message in enumerate(messages, start=1)]


def message_of(where: str, message: Any) -> Message:
    """A message of a row, null fields left out."""
    if not isinstance(message, dict):
        raise UserError(f"{where} is {json_kind(message)}, not an object with role and content")
    fields = {key: value for key, value in message.items() if value is not None}
    if odd := [key for key in ("role", "content", *fields) if not isinstance(fields.get(key), str)]:
        kind = json_kind(fields[odd[0]]) if odd[0] in fields else "missing"
        raise UserError(f'{where}: "{odd[0]}" is {kind}, expected text; other content is not supported')
    if fields["role"] not in ROLES:
        raise UserError(f"{where}: role '{fields['role']}'; there are {', '.join(ROLES)}")
    return fields
