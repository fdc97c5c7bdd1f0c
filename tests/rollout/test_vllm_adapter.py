"""The adapter for vLLM against stand-ins, where vLLM is not installed; with the real one: tests/with_vllm."""

import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest

from thinkmid.rollout import vllm
from thinkmid.rollout.engine import EngineConfig
from thinkmid.rollout.phases import Phases

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
    assert answer() == pytest.approx(0.75)
    del engine._step
    assert engine._step() == [*early, *late]
    assert [o.new_token_ids for o in engine._step()] == [[9]]


def test_the_engine_asks_for_nothing_but_its_cache_and_steps_in_turn(monkeypatch):
    asked = {}
    fake = types.ModuleType("vllm")
    fake.__version__, fake.LLM = "0.33.0", lambda **options: asked.update(options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in (*vllm.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "0")
    vllm._build("folder", EngineConfig(kind="vllm", kv_gb=36.0), max_len=100, rows=4, cuda=True, sleeps=True)
    total_gb, trainer_gb = 80, 70
    # what vLLM's request_memory wants to be free before anything is allocated
    assert asked["gpu_memory_utilization"] * total_gb < total_gb - trainer_gb
    assert asked["kv_cache_memory_bytes"] == 36e9
    assert asked["async_scheduling"] is False
