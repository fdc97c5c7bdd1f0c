"""Programs through a chat template: what a run is asked, what it learns, when it is refused."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, exit_code, random_model
from test_rlpt import CONFIG, QUESTIONS
from world import sft_flags

from thinkmid import sample
from thinkmid.errors import plain
from thinkmid.files import read_json, read_rows, write_json
from thinkmid.kernels.attention import SegmentAttention
from thinkmid.model import weights
from thinkmid.tokenizer import Tokenizer
from thinkmid.train import rlpt, sft

TEMPLATE = """{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
ROWS = [
    (f"Ana has {n} coins. Ben finds 1 more.", f"<think> {n} + 1 = {n + 1}.</think> So {n + 1}.") for n in range(2, 12)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with a chat template, and conversations."""
    folder = tmp_path_factory.mktemp("home")
    assert exit_code(sft, sft_flags(folder)) == 0
    (folder / "sft/export/chat_template.jinja").write_text(TEMPLATE)
    (folder / "rlpt.toml").write_text(CONFIG)
    write(folder / "questions.jsonl", QUESTIONS)
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
    write(folder / "chats.jsonl", [{"messages": talk} for talk in talks])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def learn(home, name, *more):
    data = [f"--data.paths={home}/chats.jsonl", f"--data.val_paths={home}/chats.jsonl", "--data.template=chat"]
    where = [f"--model.folder={home}/sft/export", f"--run.folder={home}/{name}", "--data.max_len=100"]
    return exit_code(sft, [*sft_flags(home), *data, *where, "--run.steps=0", "--data.epochs=1", *more])


def by_hand(text):
    """Ids of each conversation, how many of the last are the assistant's, and how many of those are its thought."""
    for question, answer in ROWS:
        thought, _, said = answer.removeprefix("<think>").partition("</think>")
        thought = [*text.open_ids, *text.encode(thought), *text.close_ids]
        end = [text.eos_ids[0]]
        words = [*text.encode(f"user:{question}"), *end, *text.encode("assistant:")]
        answer = [*thought, *text.encode(said), *end]
        yield [*words, *answer], len(answer), len(thought)


@pytest.mark.parametrize("loss", ["all", "assistant"])
def test_the_loss_is_over_the_tokens_that_are_asked_for(home, loss):
    assert learn(home, loss, f"--data.loss={loss}") == 0
    rows = read_rows(home / loss / "metrics.jsonl")
    text, model = Tokenizer.load(home / "sft/export"), weights.load_model(home / loss / "export")
    talks = list(by_hand(text))
    once = sum(num if loss == "assistant" else len(ids) - 1 for ids, num, _ in talks)
    assert once <= sum(row["tokens"] for row in rows) < once + 256
    sums = {"all": [], "thought": []}
    for ids, num, num_thought in talks:
        cu = torch.tensor([0, len(ids)], dtype=torch.int32)
        logits = model(torch.tensor(ids), torch.arange(len(ids)), SegmentAttention(cu, cu), rows=torch.arange(len(ids)))
        nll = -logits.double().log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        sums["all"] += nll[-num:].tolist() if loss == "assistant" else nll.tolist()
        sums["thought"] += nll[-num:][:num_thought].tolist()
    for name, key in (("all", "val_loss"), ("thought", "val_loss_thought")):
        assert rows[-1][key] == pytest.approx(sum(sums[name]) / len(sums[name]), rel=1e-5)


def test_another_loss_is_another_run(home, capsys):
    assert learn(home, "one", "--data.loss=assistant") == 0
    assert learn(home, "one", "--data.loss=assistant") == 0
    capsys.readouterr()
    assert learn(home, "one", "--data.loss=all") == 2
    assert "data" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["chat", "chat-think"])
def test_questions_are_asked_through_the_template_with_examples(home, template, capsys):
    write(home / "shots.jsonl", [{"question": QUESTIONS[0]["question"], "answer": "1"}])
    more = [f"--data.template={template}", "--data.system=Count.", f"--data.shots={home}/shots.jsonl"]
    where = [f"--model.folder={home}/sft/export", f"--data.path={home}/questions.jsonl", "--verify.kind=first-sentence"]
    argv = [f"{home}/rlpt.toml", *where, f"--run.folder={home}/{template}", *more, "--sampling.force_close=false"]
    assert exit_code(rlpt, argv) == 0
    assert "note: 1 of 9 questions are examples of" in capsys.readouterr().out
    asked = {q["id"]: q["question"] for q in QUESTIONS}
    samples = read_rows(home / template / "rollouts" / "step-000001.jsonl")
    for row in samples:
        shot = "" if row["prompt_id"] == "q0" else f"user:{asked['q0']}assistant:1"
        words = f"system:Count.{shot}user:{asked[row['prompt_id']]}assistant:"
        assert row["prompt"] == words + "<think>" * (template == "chat-think")
    # without a thought that its prompt opens, the whole text is the answer
    assert any(row["verdict"]["why"] == "unclosed" for row in samples) == (template == "chat-think")
    write(home / "shots.jsonl", [{"question": QUESTIONS[0]["question"], "answer": "2"}])
    assert exit_code(rlpt, argv) == 2  # the examples changed under a run that has begun


def test_a_mistake_is_one_line(home, capsys):
    for argv, line in (
        ([f"--data.paths={home}/corpus.jsonl"], '"messages" is missing'),
        (["--model.folder="], "data.template 'chat' needs model.folder"),
        (["--data.template=as-is", "--data.loss=assistant"], "need template 'chat'"),
    ):
        capsys.readouterr()
        assert learn(home, "wrong", *argv) == 2
        err = capsys.readouterr().err
        assert line in err
        assert err.count("\n") == 1
        assert not (home / "wrong").exists()


def test_a_document_that_spells_special_tokens_is_named_once(home, capsys):
    write(home / "letters.jsonl", [{"text": text} for text in ("a", "b <|end|> c", "<|end|>")])
    argv = [*sft_flags(home), f"--model.folder={home}/sft/export", f"--data.paths={home}/letters.jsonl"]
    assert exit_code(sft, [*argv, f"--run.folder={home}/letters"]) == 0
    out = capsys.readouterr().out
    assert out.count("<|end|>") == 1
    assert f"warning: {home}/letters.jsonl:2: <|end|> in a text is ordinary characters" in out


def greedy(model, text, ids, num):
    """The most probable token after the other, by whole forwards, up to the end of the text: words and their number."""
    start = len(ids)
    while len(ids) < start + num and (len(ids) == start or ids[-1] not in text.eos_ids):
        cu = torch.tensor([0, len(ids)], dtype=torch.int32)
        logits = model(torch.tensor(ids), torch.arange(len(ids)), SegmentAttention(cu, cu))
        ids = [*ids, int(logits[-1].argmax())]
    return plain(text.decode(ids[start:])).strip(), len(ids) - start


@pytest.mark.parametrize("template", ["chat", "chat-think"])
def test_a_question_on_the_command_line_is_answered_through_the_template(home, tmp_path, capsys, template):
    text = Tokenizer.load(home / "sft/export")
    # logits far apart, unlike those of the model that has learnt for two steps
    model = random_model(replace(TINY, vocab=text.vocab_size, eos_ids=text.eos_ids))
    weights.save(tmp_path, model.cfg, weights.stream(model), dtype="float32", extra_files=home / "sft/export")
    # without a thought there is one budget, the sum of both
    end, tag, room = [text.eos_ids[0]], *((text.open_ids, 5) if template == "chat-think" else ([], 7))
    for question in ("Ana", "coins", "Ben finds 1 more.", "7", "Ana has 2."):
        ids = [*text.encode(f"user:{question}"), *end, *text.encode("assistant:"), *tag]
        words, num = greedy(model, text, ids, room)
        argv = [str(tmp_path), question, f"--template={template}", "--temperature=0", "--max-think=5"]
        assert exit_code(sample, [*argv, "--max-suffix=2"]) == 0
        head = f"continuation ({num} tokens, {'suffix' if num == 7 else 'eos'})"
        head = head if template == "chat" else f"thought ({num} tokens, not closed)"
        assert words
        assert capsys.readouterr().out.startswith(f"{head}\n{words}\n")


def test_a_text_on_the_command_line_that_spells_special_tokens_is_warned_about(home, capsys):
    argv = [f"{home}/sft/export", "Ana <|end|>", "--max-think=3"]
    assert exit_code(sample, argv) == 0
    assert capsys.readouterr().out.startswith("warning: TEXT: <|end|> in a text is ordinary characters")
    assert exit_code(sample, [*argv, "--template=plain", "--system=x"]) == 2
    assert "--template, --system: system needs template" in capsys.readouterr().err


@pytest.fixture
def turns(home, tmp_path):
    """A model whose template ends a turn with a token that ends no text."""
    for path in (home / "sft/export").iterdir():
        if path.name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    num = Tokenizer.load(tmp_path).vocab_size
    token = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    spec["added_tokens"].append({"id": num, "content": "<|turn|>", "special": True, **token})
    write_json(tmp_path / "tokenizer.json", spec)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "<|turn|>"))
    model = random_model(replace(TINY, vocab=num + 1, eos_ids=Tokenizer.load(tmp_path).eos_ids, max_positions=128))
    weights.save(tmp_path / "base", model.cfg, weights.stream(model), dtype="float32", extra_files=tmp_path)
    return tmp_path / "base", num


def ends(folder):
    import transformers

    return transformers.GenerationConfig.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize("given", [None, {"eos_token_id": 0, "temperature": 0.6}, {"top_k": 5}])
def test_what_reads_the_export_ends_where_a_turn_ends(home, turns, tmp_path, given):
    base, turn = turns
    if given:
        write_json(base / "generation_config.json", given)
    [end] = Tokenizer.load(base).eos_ids
    assert learn(home, f"turns-{tmp_path.name}", f"--model.folder={base}", f"--run.folder={tmp_path}/sft") == 0
    export = tmp_path / "sft/export"
    assert ends(export) == [end, turn]
    told = read_json(export / "generation_config.json")
    assert {key: told[key] for key in given or {} if key != "eos_token_id"} == {
        key: value for key, value in (given or {}).items() if key != "eos_token_id"
    }
    assert Tokenizer.load(export).eos_ids == (end, turn)
    where = [f"--model.folder={base}", f"--data.path={home}/questions.jsonl", f"--run.folder={tmp_path}/rlpt"]
    assert exit_code(rlpt, [f"{home}/rlpt.toml", *where, "--data.template=chat", "--verify.kind=first-sentence"]) == 0
    assert ends(tmp_path / "rlpt/export") == [end, turn]


def test_an_export_that_knows_its_ends_keeps_its_files_bytes(home):
    assert learn(home, "bytes") == 0
    name = "generation_config.json"
    assert (home / "bytes/export" / name).read_bytes() == (home / "sft/export" / name).read_bytes()


def test_a_column_beside_messages_is_refused(home, capsys):
    assert learn(home, "column", "--data.column=other") == 2
    assert "column 'other' is of texts" in capsys.readouterr().err


def test_examples_may_move_under_a_run(home, tmp_path):
    write(tmp_path / "a.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    where = [f"--model.folder={home}/sft/export", f"--data.path={home}/questions.jsonl", f"--run.folder={tmp_path}/run"]
    argv = [f"{home}/rlpt.toml", *where, "--data.template=plain", "--verify.kind=first-sentence"]
    assert exit_code(rlpt, [*argv, f"--data.shots={tmp_path}/a.jsonl"]) == 0
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert exit_code(rlpt, [*argv, f"--data.shots={tmp_path}/b.jsonl"]) == 0
