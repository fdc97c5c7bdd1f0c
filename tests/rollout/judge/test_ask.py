from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, flip_bit, random_model
from safetensors.torch import load_file, save_file

from thinkmid.errors import UserError
from thinkmid.model import weight_files, weights
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling
from thinkmid.rollout.judge import ask as ask_module
from thinkmid.rollout.judge.ask import JUDGE, EngineAsk, JudgeModel, Policy, Swap, choices, make_ask
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.model import JudgeError
from thinkmid.tokenizer import Tokenizer

QUESTION = [3, 1, 4, 1, 5, 9, 2, 6]


class Words:
    """A tokenizer of three texts."""

    bos_id = None

    def __init__(self, yes, no):
        self.ids = {" yes": yes, " no": no, "question": QUESTION}

    def encode(self, text):
        return self.ids[text]


def make_engine(seed=0):
    text = Tokenizer(tokenizer=None, pieces=[b"."] * TINY.vocab, eos_ids=(0,), bos_id=None, open_ids=[1], close_ids=[2])
    engine = NativeEngine(TINY, text)
    engine.load_weights(weights.stream(random_model(seed=seed)), 4)
    return engine


def p_yes(seed, tokens, yes, no):
    """By the full forward of the model with this seed."""
    with torch.no_grad():
        p = random_model(seed=seed).logits(torch.tensor(tokens))[-1].softmax(-1)
    return (p[yes] / (p[yes] + p[no])).item()


@pytest.mark.parametrize(("yes", "no", "shared"), [([7], [8], []), ([7, 8], [7, 9, 1], [7]), ([7, 8, 9], [5], [])])
def test_the_answer_is_the_models_choice_between_the_first_tokens_that_differ(yes, no, shared):
    assert choices(Words(yes, no)) == (shared, (yes[len(shared)], no[len(shared)]))
    ask = EngineAsk(make_engine(), Words(yes, no), 20)
    answers = [ask("question") for _ in range(3)]
    expected = p_yes(0, [*QUESTION, *shared], yes[len(shared)], no[len(shared)])
    assert [answer.result() for answer in answers] == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize(("yes", "no"), [([7], [7]), ([7], [7, 8])])
def test_a_tokenizer_without_two_answers_is_refused(yes, no):
    with pytest.raises(UserError, match="cannot tell ' yes' from ' no'"):
        choices(Words(yes, no))


def test_a_question_that_is_too_long_fails_and_is_not_asked():
    answer = EngineAsk(make_engine(), Words([7], [8]), len(QUESTION))("question")
    with pytest.raises(JudgeError, match="8 tokens exceeds the engine's 8"):
        answer.result()


def test_swapped_weights_answer_all_questions_after_one_load():
    engine, loads = make_engine(seed=0), []
    judge = SimpleNamespace(stream=lambda: loads.append(0) or weights.stream(random_model(seed=1)))
    ask = EngineAsk(Swap(engine, judge), Words([7], [8]), 20)
    answers = [ask("question") for _ in range(3)]
    assert (engine.version, loads) == (4, [])  # sampling goes on with the policy's weights
    assert [answer.result() for answer in answers] == pytest.approx([p_yes(1, QUESTION, 7, 8)] * 3, rel=1e-5)
    assert (engine.version, loads) == (JUDGE, [0])
    assert ask("question").result() == pytest.approx(p_yes(1, QUESTION, 7, 8), rel=1e-5)  # a retry
    engine.load_weights(weights.stream(random_model(seed=0)), 5)  # the next step's sync
    assert ask("question").result() == pytest.approx(p_yes(1, QUESTION, 7, 8), rel=1e-5)
    assert loads == [0, 0]


def policy_in(engine, **options):
    cfg = EngineConfig(**options)
    return Policy(engine=engine, engine_cfg=cfg, tokenizer=None, sampling=Sampling(), max_len=20, device="cpu")


def test_a_resident_judge_has_a_cache_of_its_own_size(monkeypatch, tmp_path):
    built = {}

    def build(config, folder, shape, text, **options):
        built.update(vars(config), folder=folder, **options)
        return make_engine()

    weights.save(tmp_path, TINY, weights.stream(random_model()), dtype=torch.float32)
    monkeypatch.setattr(ask_module, "make_engine", build)
    policy = policy_in(None, kind="vllm", kv_gb=36.0, dtype="bfloat16")
    judge = JudgeConfig(kind="resident", engine="vllm", folder=str(tmp_path), kv_gb=2.5)
    make_ask(judge, policy, JudgeModel(TINY, Words([7], [8])), print)
    assert (built["kv_gb"], built["kind"], built["dtype"]) == (2.5, "vllm", "bfloat16")
    assert built["sleep"] is False
    assert 0 < JudgeConfig().kv_gb < 8


def judge_in(folder, kind):
    """A judge of the seed-1 model in a folder: (ask, the policy's engine)."""
    engine, judge = make_engine(seed=0), JudgeConfig(kind=kind, folder=str(folder))
    return make_ask(judge, policy_in(engine), JudgeModel(TINY, Words([7], [8])), print), engine


@pytest.fixture
def judges(tmp_path):
    weights.save(tmp_path / "judge", TINY, weights.stream(random_model(seed=1)), dtype=torch.float32)
    return tmp_path / "judge"


@pytest.mark.parametrize("kind", ["swap", "resident"])
def test_a_damaged_judge_judges_nothing(judges, kind):
    ask, _ = judge_in(judges, kind)
    assert ask("question").result() == pytest.approx(p_yes(1, QUESTION, 7, 8), rel=1e-5)
    flip_bit(judges / "model.safetensors")
    with pytest.raises(UserError, match=r"judge/model\.safetensors: does not match its sha256"):
        judge_in(judges, kind)[0]("question").result()
    tensors = load_file(judges / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, judges / "model.safetensors")
    (judges / "thinkmid.json").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: model\.norm\.weight holds values that are not finite"):
        judge_in(judges, kind)[0]("question").result()


def test_a_judge_that_is_swapped_in_again_is_the_one_that_was_verified(judges, monkeypatch):
    ask, engine = judge_in(judges, "swap")
    monkeypatch.setattr(weight_files, "digest", lambda path: pytest.fail("hashed again"))
    for version in (5, 6):
        assert ask("question").result() == pytest.approx(p_yes(1, QUESTION, 7, 8), rel=1e-5)
        engine.load_weights(weights.stream(random_model(seed=0)), version)
    monkeypatch.undo()
    weights.save(judges, TINY, weights.stream(random_model(seed=2)), dtype=torch.float32)  # whole, but another
    with pytest.raises(UserError, match=r"judge/model\.safetensors: changed since"):
        ask("question").result()


def test_a_cache_of_no_size_is_refused():
    with pytest.raises(ValueError, match=r"kv_gb must be positive, got 0\.0"):
        JudgeConfig(kv_gb=0.0)
