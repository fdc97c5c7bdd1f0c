"""thinkmid.data.conversations: rows of messages become sequences, and what carries loss is known token by token."""

import json

import numpy as np
import pytest
from test_chat import TALKS, make, messages

from thinkmid.data.chat import Chat
from thinkmid.data.conversations import Conversations
from thinkmid.data.sequences import read_sequences, with_loss
from thinkmid.errors import UserError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_sequences_are_those_of_transformers_and_a_system_text_comes_first(tmp_path):
    text, theirs = make(tmp_path, "marked")
    talks = [messages(talk) for talk in TALKS[1:]]
    own = [{"role": "system", "content": "Own."}, *talks[0]]
    extra = [message | {"tool_calls": None} for message in talks[0]]
    paths = write(tmp_path / "a.jsonl", *({"messages": talk} for talk in (*talks, own, extra)))
    chats = Conversations(chat=Chat(tmp_path, text), system="Be brief.", loss="assistant")
    found = read_sequences(paths, text, 4096, chats)
    system = [{"role": "system", "content": "Be brief."}]
    for (tokens, _), talk in zip(found, [*(system + talk for talk in talks), own, system + talks[0]], strict=True):
        wanted = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        ids, has_loss = with_loss(tokens)
        assert ids.tolist() == wanted["input_ids"]
        assert has_loss.astype(int).tolist() == wanted["assistant_masks"]
    everything = read_sequences(paths, text, 4096, Conversations(chat=chats.chat, system="Be brief."))
    for (masked, _), (whole, _) in zip(found, everything, strict=True):
        assert np.array_equal(with_loss(masked)[0], whole)
        assert (whole >= 0).all()


def test_parquet_rows_are_read_alike(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text, _ = make(tmp_path, "qwen")
    chats, rows = Conversations(chat=Chat(tmp_path, text)), [{"messages": messages(talk)} for talk in TALKS]
    rows[0]["messages"][0]["name"] = "Ana"  # null in all others
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_sequences([str(tmp_path / "a.parquet")], text, 4096, chats)
    wanted = read_sequences(write(tmp_path / "a.jsonl", *rows), text, 4096, chats)
    assert [tokens.tolist() for tokens, _ in found] == [tokens.tolist() for tokens, _ in wanted]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"text": "a"}, '"messages" is missing, expected a list with messages; the row has text'),
        ({"messages": []}, '"messages" is a list, expected a list with messages'),
        ({"messages": "a"}, '"messages" is a string, expected a list with messages'),
        ({"messages": ["a"]}, "message 1 is a string, not an object with role and content"),
        ({"messages": [{"role": "user"}]}, 'message 1: "content" is missing, expected text'),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 'message 1: "content" is a list'),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, '"tool_calls" is a list, expected text'),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'; there are system, user, assistant"),
        ({"messages": [{"role": "system", "content": "a"}]}, "its chat template fails: only user and assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of an assistant"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path, row, line):
    text, _ = make(tmp_path, "mistral")
    good = {"messages": messages(TALKS[1])}
    paths = write(tmp_path / "a.jsonl", good, row)
    with pytest.raises(UserError) as error:
        read_sequences(paths, text, 4096, Conversations(chat=Chat(tmp_path, text), loss="assistant"))
    assert str(error.value).startswith(f"{paths[0]}:2: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
