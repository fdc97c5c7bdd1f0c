"""The adapter for vLLM against stand-ins, where vLLM is not installed; with the real one: tests/with_vllm."""

import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, random_model
from torch import nn

from thinkmid.errors import UserError
from thinkmid.model import weights
from thinkmid.rollout.engine import vllm, weight_sync
from thinkmid.rollout.engine.phases import Phases
from thinkmid.rollout.engine.protocol import EngineConfig

YES, NO = 7, 8


def token(request, id=5):
    """What the engine's core says of one more token of a sequence, or of an answer."""
    logps = np.log([[0.2, 0.6, 0.2]])
    found = SimpleNamespace(logprob_token_ids=np.array([[NO, YES, id]]), logprobs=logps)
    return SimpleNamespace(request_id=request, new_token_ids=[id], new_logprobs=found)


class Core:
    """The engine's core with outputs step by step; it has no others."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def get_output(self):
        return SimpleNamespace(outputs=self.steps.pop(0))


def make_engine(*steps):
    engine = object.__new__(vllm.VllmEngine)
    engine.max_len, engine._phases, engine._asked, engine._inbox = 99, Phases(), {}, []
    engine._draws = vllm._Draws(SimpleNamespace())
    engine._phases.loaded = True
    engine._core, requests = Core(*steps), iter("abcdef")
    engine._add = lambda tokens, **params: next(requests)
    return engine


def test_questions_are_answered_and_what_sequences_said_meanwhile_is_kept_once_and_in_order():
    early, late = [token("1", id=3), token("2", id=4)], [token("1", id=6)]
    engine = make_engine(early, [], [token("a"), *late], [token("2", id=9)])
    answer = engine.ask([1, 2], (YES, NO))
    # what _step() hands out first is the inbox itself: waiting for an answer with it would double it, for ever
    engine._step = None
    assert answer.result() == pytest.approx(0.75)
    del engine._step
    assert engine._step() == [*early, *late]
    assert [o.new_token_ids for o in engine._step()] == [[9]]


@pytest.fixture
def package(monkeypatch):
    """A stand-in for vLLM that builds nothing; rope: what it keeps per process."""
    fake, layers = types.ModuleType("vllm"), "vllm.model_executor.layers"
    rotary = types.ModuleType(f"{layers}.rotary_embedding")
    fake.__version__, fake.LLM, fake.rotary, rotary._ROPE_DICT = "0.33.0", None, rotary, {}
    modules = {"vllm": fake, "vllm.model_executor": types.ModuleType("vllm.model_executor")}
    modules |= {layers: types.ModuleType(layers), rotary.__name__: rotary}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in (*vllm.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "0")
    return fake


def build(**config):
    config = EngineConfig(kind="vllm", **config)
    return vllm._build("folder", config, max_len=100, rows=4, cuda=True, sleeps=True)


def test_the_engine_asks_for_nothing_but_its_cache_and_steps_in_turn(package):
    asked = {}
    package.LLM = lambda **options: asked.update(options)
    build(kv_gb=36.0)
    total_gb, trainer_gb = 80, 70
    # what vLLM's request_memory wants to be free before anything is allocated
    assert asked["gpu_memory_utilization"] * total_gb < total_gb - trainer_gb
    assert asked["kv_cache_memory_bytes"] == 36e9
    assert asked["async_scheduling"] is False


def test_a_second_engine_is_given_no_rotary_table_of_the_first(package):
    """Which it would read while the first one sleeps, its memory unmapped."""
    rope = package.rotary._ROPE_DICT
    package.LLM = lambda **_: rope.setdefault("one RoPE", object())
    first = build()
    assert rope == {"one RoPE": first}
    assert build() is not first


def test_a_vllm_that_keeps_its_rotary_tables_elsewhere_is_refused(package):
    del package.rotary._ROPE_DICT
    with pytest.raises(UserError, match=r"vllm 0\.33\.0 keeps its rotary modules elsewhere.*_ROPE_DICT"):
        build()


class Memory:
    """The core of an engine over vLLM's allocator, as far as memory goes: what is freed is unmapped, asleep or not."""

    def __init__(self):
        self.mapped, self.freed, self.shutdowns = {"weights", "kv_cache"}, [], 0
        self._finalizer = SimpleNamespace(detach=lambda: self.freed.append("never"))

    def sleep(self, level):
        self.mapped.clear()

    def wake_up(self, tags):
        self.mapped.update(tags)

    def shutdown(self):
        self.shutdowns += 1
        for tag in ("weights", "kv_cache"):
            assert tag in self.mapped, f"{tag} is unmapped twice"
            self.mapped.remove(tag)
            self.freed.append(tag)


def sleeper(monkeypatch, *, sleeps=True):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.delattr(sys, "last_value", raising=False)
    engine = make_engine()
    engine._core, engine._sleeps = Memory(), sleeps
    return engine


@pytest.mark.parametrize("calls", [("sleep",), ("sleep", "wake_weights"), ("sleep", "sleep")])
def test_an_engine_that_is_closed_asleep_unmaps_nothing_again_and_wakes_nothing(monkeypatch, calls):
    engine = sleeper(monkeypatch)
    for call in calls:
        getattr(engine, call)()
    mapped = set(engine._core.mapped)
    engine.close()
    # the finaliser, which would shut down at exit, is gone
    assert (engine._core.shutdowns, engine._core.freed, engine._core.mapped) == (0, ["never"], mapped)


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_that_is_closed_awake_frees_everything_once(monkeypatch, sleeps):
    engine = sleeper(monkeypatch, sleeps=sleeps)
    engine.sleep()
    if sleeps:
        engine.wake_weights()
        engine._phases.loaded = True
        engine.wake_cache()
    engine.close()
    assert (engine._core.shutdowns, engine._core.freed) == (1, ["weights", "kv_cache"])


def held_by(rank, tp, cfg, named):
    """A module tree with a rank's parameters, laid out as vLLM's loaders do it; widths of 4 heads and 2 kv heads."""
    root, c = nn.Module(), cfg.head_dim
    rows = {"q_proj": cfg.heads // tp * c, "gate_proj": cfg.ffn // tp, "up_proj": cfg.ffn // tp}
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    pieces = {}
    for name, w in named.items():
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        if leaf in rows:
            w = w.narrow(0, rank * rows[leaf], rows[leaf])
        elif leaf in ("k_proj", "v_proj"):
            w = w.narrow(0, rank * cfg.kv_heads // tp * c, max(cfg.kv_heads // tp, 1) * c)
        elif leaf in ("o_proj", "down_proj") and kind == "weight":
            w = w.narrow(1, rank * w.shape[1] // tp, w.shape[1] // tp)
        elif leaf in ("embed_tokens", "lm_head"):
            padded = torch.full((-(-cfg.vocab // 64) * 64, w.shape[1]), 7.0)
            padded[: cfg.vocab] = w
            w = padded.narrow(0, rank * len(padded) // tp, len(padded) // tp)
        pieces.setdefault((f"{parent}.{fused.get(leaf, leaf)}".strip("."), kind), []).append(w)
    for (path, kind), ws in pieces.items():
        module = root
        for step in path.split("."):
            if not hasattr(module, step):
                module.add_module(step, nn.Module())
            module = getattr(module, step)
        module.output_partition_sizes = [len(w) for w in ws]
        module.register_parameter(kind, nn.Parameter(torch.cat(ws).clone(), requires_grad=False))
    return root


FAMILIES = {
    "llama": replace(TINY, kind="llama", ffn=20, vocab=641, attention_bias=True),
    "qwen2": replace(TINY, kind="qwen2", ffn=20, vocab=37, tied=True),  # the last of four ranks holds padding alone
    "qwen3": replace(TINY, kind="qwen3", ffn=20, vocab=640),
}


def shared_engines(cfg, model, tp):
    """One for each rank that shares an engine, with the model's weights."""
    named = {name: w.detach() for name, w in weights.stream(model)}
    for rank in range(tp):
        engine = make_engine()
        engine._cfg, engine._tp, engine._tp_rank = cfg, tp, rank
        engine._model = held_by(rank, tp, cfg, named)
        yield engine


@pytest.mark.parametrize("tp", [1, 2, 4])  # with 4, two ranks hold the same of the 2 key/value heads
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_that_shares_an_engine_reads_every_tensor_back(family, tp):
    cfg = FAMILIES[family]
    model = random_model(cfg)
    for engine in shared_engines(cfg, model, tp):
        sums = weight_sync.checksums(model, engine, torch.float32)
        assert sorted(name for name, _ in engine.named_weights()) == sorted(name for name, _ in weights.stream(model))
        assert weight_sync.difference(engine, sums, {}) == ""


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("path", "place", "name"),
    [
        ("self_attn.o_proj", (3, -1), "self_attn.o_proj.weight"),
        ("self_attn.qkv_proj", (-1, 0), "self_attn.v_proj.weight"),
        ("mlp.gate_up_proj", (0, 0), "mlp.gate_proj.weight"),
        ("mlp.down_proj", (0, 0), "mlp.down_proj.weight"),
    ],
)
def test_one_element_that_differs_on_one_rank_is_named_there_and_nowhere_else(path, place, name, rank):
    cfg = FAMILIES["qwen3"]
    model = random_model(cfg)
    for r, engine in enumerate(shared_engines(cfg, model, 4)):
        if r == rank:
            engine._model.get_submodule(f"model.layers.1.{path}").weight[place] += 1
        said = weight_sync.difference(engine, weight_sync.checksums(model, engine, torch.float32), {})
        assert said == (f"bucket model.layers.1 is damaged: model.layers.1.{name}" if r == rank else "")


def test_two_ranks_with_each_others_slice_are_both_wrong():
    cfg = FAMILIES["qwen3"]
    model = random_model(cfg)
    engines = list(shared_engines(cfg, model, 2))
    a, b = (e._model.get_submodule("model.layers.0.self_attn.o_proj") for e in engines)
    a.weight, b.weight = b.weight, a.weight
    for engine in engines:
        said = weight_sync.difference(engine, weight_sync.checksums(model, engine, torch.float32), {})
        assert said == "bucket model.layers.0 is damaged: model.layers.0.self_attn.o_proj.weight"


def test_an_engine_that_shows_no_weights_does_not_pass():
    model = random_model()
    (engine,) = shared_engines(TINY, model, 1)
    sums = weight_sync.checksums(model, engine, torch.float32)
    engine._model = nn.Module()
    assert "is held by one of trainer and engine alone" in weight_sync.difference(engine, sums, {})
