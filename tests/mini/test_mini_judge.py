import json
import re

import pytest
import torch

from thinkmid import config
from thinkmid.data.pack import make_pack
from thinkmid.mini import judge, world
from thinkmid.mini.annotator import annotate
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig, init_weights
from thinkmid.rollout.judge.rule import match
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.train.loss import text_loss

SHAPE = {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "rope_theta": 1000.0, "norm_eps": 1e-6, "tied": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small world and an untrained model that knows its words."""
    root = tmp_path_factory.mktemp("judge")
    texts = [row["text"] for row in world.documents(3, 400)]
    (root / "world").mkdir()
    for name, part in zip(judge.FILES, (texts[:200], texts[200:]), strict=True):
        lines = [json.dumps({"id": str(i), "text": annotate(text)}) + "\n" for i, text in enumerate(part)]
        (root / "world" / name).write_text("".join(lines))
    train_tokenizer([row["text"] for row in world.general(3, 1000)], 640, root / "words")
    shape = ModelConfig(kind="qwen3", vocab=640, width=16, ffn=24, max_positions=256, eos_ids=(0,), **SHAPE)
    model = weights.build(shape)
    init_weights(model, 0)
    weights.save(root / "base", shape, weights.stream(model), dtype="float32", extra_files=root / "words")
    return root


@pytest.fixture(scope="module")
def text(folders):
    return Tokenizer.load(folders / "base")


@pytest.fixture(scope="module")
def references(folders, text):
    return judge.read_references(folders / "world", text)


@pytest.fixture(scope="module")
def drawn(references, text):
    return judge.pairs(references, text, 4000, 0)


def numbers(sentence):
    return re.findall(r"\d+", re.split(r"[.!?]\s", sentence.strip())[0])


def test_references_follow_a_thought_and_are_cut_as_in_rlmt(folders, references, text):
    rows = [json.loads(line) for name in judge.FILES for line in (folders / "world" / name).read_text().splitlines()]
    after = [rest for row in rows for rest in row["text"].split("</think>")[1:]]
    assert {text.decode(text.encode(re.sub("<think>.*", "", rest))[:10]) for rest in after} >= {
        reference for reference in references if len(text.encode(reference)) < 10
    }
    assert len(references) == len(set(references)) > 100
    assert all(len(numbers(reference)) == 1 and len(text.encode(reference)) <= 10 for reference in references)


def test_labels_are_those_of_the_rule(drawn):
    assert [pair.label for pair in drawn] == [match(pair.candidate, pair.reference).value for pair in drawn]
    clean = [pair for pair in drawn if pair.kind.split(",")[0] in ("as it is", "reworded", "another")]
    assert len(clean) > 2000
    assert all(pair.label == (numbers(pair.candidate) == numbers(pair.reference)) for pair in clean)


def test_classes_are_balanced_and_words_do_not_tell_them(drawn):
    def share(pairs):
        return sum(pair.label for pair in pairs) / len(pairs)

    assert 0.42 < share(drawn) < 0.58
    for words in ("as it is", "reworded", "another"):
        assert 0.4 < share([pair for pair in drawn if pair.kind.startswith(words)]) < 0.65


def test_negatives_are_hard(drawn):
    def skeleton(sentence):
        return re.sub(r"s?\b", "", re.sub(r"\d+", "#", sentence))

    no = [pair for pair in drawn if not pair.label]
    twins = [pair for pair in no if skeleton(pair.candidate) == skeleton(pair.reference)]
    gaps = [abs(int(numbers(pair.candidate)[0]) - int(numbers(pair.reference)[0])) for pair in twins]
    assert len(twins) > 0.15 * len(no)
    assert gaps.count(1) > 0.05 * len(no)
    assert {1, 2, 3, 4, 10} <= set(gaps)


def test_positives_may_differ_in_every_word(drawn):
    yes = [pair for pair in drawn if pair.label]
    apart = [p for p in yes if not (set(re.findall(r"[a-z]+", p.candidate)) & set(re.findall(r"[a-z]+", p.reference)))]
    assert apart
    assert sum(pair.candidate != pair.reference for pair in yes) > 0.5 * len(yes)


def test_pairs_are_the_same_for_a_seed(references, text, drawn):
    assert judge.pairs(references, text, 4000, 0) == drawn
    assert judge.pairs(references, text, 4000, 1) != drawn


def test_a_hint_asks_for_both_numbers_in_the_place_of_the_answer(text):
    asker = judge.Asker(text, 0)
    pair = judge.Pair(kind="", candidate=" Ana has 7 pens. On Monday 9", reference=" So Ana has 12 pens.", label=0)
    pack = make_pack([asker.unit(pair, 0.5, hint=0.25)])
    assert text.decode(pack.tokens.tolist()).endswith("same?")
    assert pack.rows.tolist() == [len(pack.tokens) - 1] * 3
    assert [text.decode([token]) for token in pack.targets.tolist()] == [" n", " 12", " 7"]
    assert pack.ce_w.tolist() == [0.5, 0.125, 0.125]


def test_a_few_steps_lower_the_loss_of_the_answer(folders, references, text, drawn):
    asker, model = judge.Asker(text, 0), weights.load_model(folders / "base")
    fixed = make_pack([judge.Asker(text, 1).unit(pair, 1 / 64) for pair in judge.pairs(references, text, 64, "fixed")])

    def loss():
        with torch.no_grad():
            return text_loss(model, fixed)[0].item()

    before = loss()
    judge.train(model.train(), asker, drawn[: 60 * 32], 60)
    assert loss() < 0.5 * before


def test_accuracy_is_told_by_class_words_and_number():
    kinds = ["as it is, the same", "as it is, off by one", "another, the same", "another, any"]
    asked = [judge.Pair(kind=k, candidate="", reference="", label=y) for k, y in zip(kinds, (1, 0, 1, 0), strict=True)]
    assert judge.accuracy(asked, [0.9, 0.2, 0.4, 0.7]) == {
        "yes": (0.5, 2), "no": (0.5, 2), "as it is": (1.0, 2), "another": (0.0, 2),
        "the same": (0.5, 2), "off by one": (1.0, 1), "any": (0.0, 1),
    }  # fmt: skip


def test_the_program_writes_a_folder_that_loads_the_same_for_a_seed(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "NUM_HELD_OUT", 40)
    for name in ("one", "two"):
        flags = {"base": folders / "base", "data": folders / "world", "out": tmp_path / name, "steps": 2}
        judge.main([f"--{key}={value}" for key, value in flags.items()])
    one, two, base = (weights.load_model(folder) for folder in (tmp_path / "one", tmp_path / "two", folders / "base"))
    assert one.cfg == base.cfg
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.embed_tokens.weight, base.embed_tokens.weight)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (folders / "base" / file).read_bytes()
    assert "step 2/2" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["base", "data"])
def test_a_missing_folder_ends_with_one_line_and_code_2(folders, tmp_path, missing, capsys):
    flags = {"base": folders / "base", "data": folders / "world", "out": tmp_path / "out"} | {missing: tmp_path / "no"}
    with pytest.raises(SystemExit) as end:
        config.run(judge.main, [f"--{key}={value}" for key, value in flags.items()])
    assert end.value.code == 2
    assert re.fullmatch(rf"error: {tmp_path / 'no'}.*: no such file.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["README.md", "docs", "README.md/judge"])
def test_a_place_that_cannot_be_written_is_named_before_training(folders, out, capsys):
    with pytest.raises(SystemExit) as end:
        config.run(judge.main, [f"--base={folders / 'base'}", f"--data={folders / 'world'}", f"--out={out}"])
    assert end.value.code == 2
    assert re.fullmatch(r"error: \S*(README.md|docs): .*\n", capsys.readouterr().err)


def test_the_model_to_start_from_is_never_replaced(folders):
    with pytest.raises(judge.UserError, match="is the model to start from"):
        judge.main([f"--base={folders / 'base'}", f"--data={folders / 'world'}", f"--out={folders / 'base'}"])
