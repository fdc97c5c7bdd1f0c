"""The real vLLM, in this process, on models of every family: make test-vllm."""

import gc
from dataclasses import replace
from types import FunctionType, ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from conftest import TINY, random_model

from benchmarks.common import collect
from thinkmid.errors import UserError
from thinkmid.model import weights
from thinkmid.model.transformer import RopeScaling, Yarn
from thinkmid.rollout.engine import vllm, weight_sync
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling, check_vllm, requests_of
from thinkmid.run.ranks import start_ranks
from thinkmid.tokenizer import Tokenizer, train_tokenizer
from thinkmid.types import Prompt, Written

MAX_LEN = 320
SENTENCES = ["The sum of 3 and 4 is 7.", "Mia has 12 apples.", "<think> 12 - 5 = 7 </think> So 7 remain."]
BASE = replace(TINY, head_dim=32, width=32, ffn=48, max_positions=512, rope_theta=1000.0)
SCALED = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
STRETCHED = Yarn(factor=8.0, attention_factor=1.2, original_max_positions=64)
# fused parts of unequal size, tied and untied heads, biases, RoPE scaling, vocabularies that the engine pads
FAMILIES = {
    "llama": replace(BASE, kind="llama", tied=True, rope_scaling=SCALED),
    "qwen2": replace(BASE, kind="qwen2", tied=True, width=128),
    "qwen3": replace(BASE, kind="qwen3", tied=False),
    # windows that end inside prompts; a block of the cache is 128 tokens
    "mistral": replace(BASE, kind="mistral", window=40, windowed_layers=(0, 1)),
    "smollm3": replace(BASE, kind="smollm3", tied=True, no_rope_layers=(1,)),
    "smollm3-windowed": replace(BASE, kind="smollm3", window=130, windowed_layers=(1,), no_rope_layers=(1,)),
    "olmo2": replace(BASE, kind="olmo2", attention_bias=True),
    "olmo3": replace(BASE, kind="olmo3", window=40, windowed_layers=(0,), rope_theta=5e5, rope_scaling=STRETCHED),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES, 290, folder, "plain")
    return Tokenizer.load(folder)


class World:
    """A model, the two engines that hold its weights, and prompts."""

    def __init__(self, cfg, text, folder):
        start_ranks()
        self.cfg = replace(cfg, vocab=text.vocab_size, eos_ids=text.eos_ids)
        self.model = random_model(self.cfg)
        weights.save(folder, self.cfg, weights.stream(self.model), dtype=torch.float32)
        config = EngineConfig(kind="vllm", compile=False, kv_gb=0.05)
        self.vllm = vllm.VllmEngine(folder, self.cfg, text, config, max_len=MAX_LEN, rows=16)
        self.native = NativeEngine(self.cfg, text)
        self.push(self.model, 0)
        rng = torch.Generator().manual_seed(1)
        # 128 and more: blocks of the prefix cache
        lengths = (1, 2, 31, 127, 128, 129, 257)
        drawn = [torch.randint(1, self.cfg.vocab, (n,), generator=rng).tolist() for n in lengths]
        self.prompts = [Prompt(id=f"p{i}", tokens=tokens) for i, tokens in enumerate(drawn)]

    def push(self, model, version):
        for engine in (self.vllm, self.native):
            sums = weight_sync.push(model, engine, version, torch.float32)
            assert weight_sync.difference(engine, sums, {}) == ""


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, text, tmp_path_factory):
    return World(FAMILIES[request.param], text, tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    return World(FAMILIES["qwen3"], text, tmp_path_factory.mktemp("model") / "hf")


def seeds(world, g=2):
    return [[10 * p + s for s in range(g)] for p in range(len(world.prompts))]


def samples(groups):
    return [s for g in groups for s in g.samples]


def scored(world, prompt, sample, temperature):
    """Log-probs of a sample by the model's full forward."""
    tokens = torch.tensor([*prompt.tokens, *sample.tokens.tolist()])
    with torch.no_grad():
        logp = (world.model.logits(tokens) / temperature).log_softmax(-1)
    at = torch.arange(len(prompt.tokens) - 1, len(tokens) - 1)
    return logp[at, tokens[len(prompt.tokens) :]]


GREEDY = [
    Sampling(temperature=0, max_think=30, max_suffix=5),
    Sampling(temperature=0, max_think=9, max_suffix=5, force_close=True),
    Sampling(temperature=0, max_think=30, max_suffix=5, stop=("e", "s 1")),
]


@pytest.mark.parametrize("sampling", GREEDY, ids=["open", "forced", "stop"])
def test_greedy_tokens_are_the_native_engines(world, sampling):
    ours, theirs = (collect(e, world.prompts, seeds(world), sampling) for e in (world.vllm, world.native))
    for a, b in zip(samples(ours), samples(theirs), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.finish, a.num_think, a.drawn.tolist()) == (b.finish, b.num_think, b.drawn.tolist())
        assert abs(a.logp - b.logp)[a.drawn].max() < 1e-3
    ends = [s.finish for s in samples(ours)]
    # OLMo 2 with random weights may close none of its thoughts, in which no stop text counts
    assert ("stop" in ends) == bool(sampling.stop) or world.cfg.kind == "olmo2"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_the_trainers(world, temperature):
    sampling = Sampling(temperature=temperature, max_think=30, max_suffix=5)
    for group in collect(world.vllm, world.prompts, seeds(world), sampling):
        for sample in group.samples:
            gap = scored(world, group.prompt, sample, temperature) - torch.from_numpy(sample.logp)
            assert gap.abs().max() < 1e-3
            assert gap.abs().mean() < 3e-5


def test_after_a_push_the_engine_holds_and_uses_the_trainers_bits(world):
    world.push(random_model(world.cfg, seed=3), 7)
    held = dict(world.vllm.named_weights())
    expected = dict(weights.stream(random_model(world.cfg, seed=3)))
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    # the same prompts as before: keys and values of the old weights must not be found again
    sampling = GREEDY[0]
    ours, theirs = (collect(e, world.prompts, seeds(world), sampling) for e in (world.vllm, world.native))
    assert [s.tokens.tolist() for s in samples(ours)] == [s.tokens.tolist() for s in samples(theirs)]
    assert {v for s in samples(ours) for v in s.versions.tolist()} == {7}
    world.push(world.model, 8)


def test_what_is_drawn_depends_on_the_seed_alone(one):
    sampling = Sampling(max_think=20, max_suffix=5)
    together = collect(one.vllm, one.prompts, seeds(one), sampling)
    backwards = collect(one.vllm, one.prompts[::-1], seeds(one)[::-1], sampling)[::-1]
    for a, b in zip(samples(together), samples(backwards), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
    a, b = together[-1].samples
    assert a.tokens.tolist() != b.tokens.tolist()


def drawn_from(engine, requests, sampling):
    return {request.key: sample for step in engine.generate(requests, sampling) for request, sample in step}


def test_what_comes_during_a_generation_is_drawn_as_if_it_had_been_there(one, monkeypatch):
    # one token in twelve is an end: sequences end at different times, and others take their rows
    ragged = replace(one.vllm.tokenizer, eos_ids=tuple(range(0, one.cfg.vocab, 12)))
    monkeypatch.setattr(one.vllm, "tokenizer", ragged)
    sampling = Sampling(max_think=20, max_suffix=5, max_batch=2)
    requests, found = requests_of(one.prompts, seeds(one, 1)), {}
    whole = drawn_from(one.vllm, requests, replace(sampling, max_batch=16))

    def come():
        for number, request in enumerate(requests):
            while number > len(found) + 1:  # none to ask until one has ended
                yield None
            yield request

    for step in one.vllm.generate(come(), sampling):
        found |= {request.key: sample.tokens.tolist() for request, sample in step}
    assert found == {key: sample.tokens.tolist() for key, sample in whole.items()}
    assert len({len(tokens) for tokens in found.values()}) > 3


CONTINUED = {
    "drawn": Sampling(max_think=30, max_suffix=5),
    "filtered": Sampling(temperature=0.7, top_k=20, top_p=0.9, max_think=30, max_suffix=5),
    "forced": Sampling(max_think=30, max_suffix=5, force_close=True),
    "greedy": Sampling(temperature=0, max_think=30, max_suffix=5, force_close=True),
    "stop": Sampling(max_think=30, max_suffix=5, stop=("Mia has 1", "on th", "</t", "\n")),
}


@pytest.mark.parametrize("after", [1, 12, 22, 31])
@pytest.mark.parametrize("what", CONTINUED)
def test_what_is_interrupted_and_continued_is_what_is_not_interrupted(one, what, after):
    requests, sampling = requests_of(one.prompts, seeds(one)), CONTINUED[what]
    whole, first = drawn_from(one.vllm, requests, sampling), {}
    for number, step in enumerate(one.vllm.generate(requests, sampling), 1):
        first |= {request.key: sample for request, sample in step}
        if number == after:
            break
    left = one.vllm.unfinished()
    assert {r.key for r in left} == {r.key for r in requests} - first.keys()
    assert after > 30 or len(left) > 5
    before, one.vllm.version = one.vllm.version, one.vllm.version + 1  # the same weights under another number
    rest = drawn_from(one.vllm, left, sampling)
    together = first | rest
    assert together.keys() == whole.keys()
    assert all(alike(together[key], whole[key]) for key in whole)
    for request in left:
        n, versions = len(request.written.tokens), rest[request.key].versions.tolist()
        assert n >= after
        assert versions == [before] * n + [before + 1] * (len(versions) - n)
    one.vllm.version = before


def alike(a, b):
    assert (a.tokens.tolist(), a.finish, a.num_think) == (b.tokens.tolist(), b.finish, b.num_think)
    return a.drawn.tolist() == b.drawn.tolist() and abs(a.logp - b.logp).max() < 1e-3


@pytest.mark.parametrize("what", ["tag", "budget", "forced"])
def test_a_sequence_cut_anywhere_is_continued_by_both_engines(one, what):
    """In the middle of a closing tag of several tokens, at the thought's budget, inside a forced tag."""
    close = one.vllm.tokenizer.close_ids
    prompt, n = one.prompts[2], len(close)
    sampling = Sampling(temperature=0, max_think=n + 4, max_suffix=3, force_close=what != "budget")
    (request,) = requests_of([prompt], [[0]])
    if what == "tag":  # written by the policy, as far as anyone can see
        ids = np.array([5, *close], np.int32)
        some = written(ids, np.zeros(n + 1, np.float32), np.ones(n + 1, bool))
        (whole,) = drawn_from(one.vllm, [replace(request, written=some)], sampling).values()
    else:
        (whole,) = drawn_from(one.vllm, [request], sampling).values()
    assert len(whole.tokens) == {"tag": n + 4, "budget": n + 4, "forced": n + 7}[what]
    for k in range(1, len(whole.tokens)):
        if what == "tag" and k <= n:
            continue  # the rest of the tag would be drawn
        some = written(*(getattr(whole, name)[:k] for name in ("tokens", "logp", "drawn")))
        for engine in (one.vllm, one.native):
            (sample,) = drawn_from(engine, [replace(request, written=some)], sampling).values()
            assert (sample.tokens.tolist(), sample.finish) == (whole.tokens.tolist(), whole.finish)
            assert (sample.num_think, sample.drawn.tolist()) == (whole.num_think, whole.drawn.tolist())
            assert abs(sample.logp - whole.logp)[sample.drawn].max() < 1e-3


def written(tokens, logp, drawn):
    return Written(tokens=tokens, logp=logp, drawn=drawn, versions=np.full(len(tokens), -5, np.int32))


def test_a_request_that_comes_later_beyond_the_context_is_named(one):
    long = Prompt(id="rl-17#2", tokens=[1] * (MAX_LEN - 9))
    requests = requests_of([*one.prompts[:2], long], [[0], [0], [0]])
    drawn = one.vllm.generate(requests, Sampling(max_think=20, max_suffix=5, max_batch=2))
    next(drawn)
    with pytest.raises(UserError, match=r"rl-17#2: 311 tokens and 25 new"):
        list(drawn)


def test_questions_are_answered_while_others_are_drawn(one):
    prompts = 3 * one.prompts  # more sequences than the engine has rows: they end one after the other
    questions = [p.tokens for p in prompts]
    alone = [one.native.ask(tokens, (5, 9)) for tokens in questions]
    expected = [answer.result() for answer in alone]
    answers = []
    requests = requests_of(prompts, [[p, 99 * p] for p in range(1, 22)])
    for step in one.vllm.generate(requests, Sampling(max_think=20)):
        answers += [(r.key[0], one.vllm.ask(questions[r.key[0]], (5, 9))) for r, _ in step]
    assert any(answer.p is not None for _, answer in answers)  # without anyone having waited for it
    assert all(abs(answer.result() - expected[p]) < 1e-5 for p, answer in answers)


def test_a_generation_that_is_left_leaves_nothing_running(one):
    for number, _ in enumerate(one.vllm.generate(requests_of(one.prompts, seeds(one)), Sampling(max_think=30))):
        if number == 3:
            break
    weight_sync.push(one.model, one.vllm, 9, torch.float32)  # which empties the cache, and that needs an idle engine
    assert len(samples(collect(one.vllm, one.prompts, seeds(one), Sampling(max_think=4)))) == 2 * len(one.prompts)


def test_a_prompt_beyond_the_context_is_named(one):
    long = Prompt(id="rl-17#2", tokens=[1] * (MAX_LEN - 9))
    with pytest.raises(UserError, match=r"rl-17#2: 311 tokens and 25 new"):
        collect(one.vllm, [long], [[0]], Sampling(max_think=20, max_suffix=5))


def test_an_engine_that_sleeps_or_holds_nothing_refuses(one):
    one.vllm.sleep()
    with pytest.raises(RuntimeError, match="generate while asleep"):
        one.vllm.generate([], Sampling())
    with pytest.raises(RuntimeError, match="load_weights while asleep"):
        weight_sync.push(one.model, one.vllm, 10, torch.float32)
    one.vllm.wake_weights()
    with pytest.raises(RuntimeError, match="wake_cache before load_weights"):
        one.vllm.wake_cache()
    weight_sync.push(one.model, one.vllm, 10, torch.float32)
    one.vllm.wake_cache()
    assert samples(collect(one.vllm, one.prompts, seeds(one), Sampling(max_think=2)))[0].versions.tolist() == [10, 10]


def test_the_run_keeps_its_threads_precision_and_draws(one, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    weights.save(tmp_path / "hf", one.cfg, weights.stream(one.model), dtype=torch.float32)
    config = EngineConfig(kind="vllm", compile=False, kv_gb=0.05)
    vllm.VllmEngine(tmp_path / "hf", one.cfg, one.vllm.tokenizer, config, max_len=MAX_LEN, rows=4)
    assert torch.equal(torch.rand(3), expected)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def tensors(engine):
    """Addresses of the tensors that an engine's worker leads to, not through modules, classes or functions."""
    seen, found, todo = set(), {}, [(engine._llm.llm_engine.model_executor.driver_worker.worker, "")]
    while todo:
        thing, path = todo.pop()
        if id(thing) in seen or isinstance(thing, (ModuleType, type, FunctionType)):
            continue
        seen.add(id(thing))
        path = f"{path}.{type(thing).__name__}"
        if isinstance(thing, torch.Tensor):
            if thing.numel():
                found[thing.untyped_storage().data_ptr()] = path
        elif isinstance(thing, dict):
            todo += [(value, f"{path}[{key}]") for key, value in thing.items()]
        else:
            todo += [(value, path) for value in gc.get_referents(thing)]
    return found


def test_two_engines_of_one_rope_share_no_tensor_and_each_draws_with_its_own_weights(one, tmp_path):
    """A resident judge. What they shared would be unmapped on a GPU while the policy sleeps."""
    other = random_model(one.cfg, seed=8)
    weights.save(tmp_path / "hf", one.cfg, weights.stream(one.model), dtype=torch.float32)
    config = EngineConfig(kind="vllm", compile=False, kv_gb=0.05)
    second = vllm.VllmEngine(tmp_path / "hf", one.cfg, one.vllm.tokenizer, config, max_len=MAX_LEN, rows=16)
    models = {second: other, one.vllm: one.model}
    for version, (engine, model) in enumerate(models.items()):
        weight_sync.push(model, engine, 11 + version, torch.float32)
    ours, theirs = (tensors(engine) for engine in models)
    assert sum("cos_sin_cache" in path for path in ours.values()) == 1
    assert [ours[at] for at in ours.keys() & theirs.keys()] == []
    for engine, model in models.items():
        assert weight_sync.difference(engine, weight_sync.checksums(model, engine, torch.float32), {}) == ""
        weight_sync.push(model, one.native, 11, torch.float32)
        a, b = (collect(e, one.prompts, seeds(one), GREEDY[0]) for e in (engine, one.native))
        assert [s.tokens.tolist() for s in samples(a)] == [s.tokens.tolist() for s in samples(b)]


def test_another_version_of_vllm_is_refused(monkeypatch):
    import vllm as package

    monkeypatch.setattr(package, "__version__", "0.31.5")
    with pytest.raises(UserError, match=r"vllm 0\.31\.5 is installed, the adapter is for 0\.32 to below 0\.34"):
        check_vllm()
