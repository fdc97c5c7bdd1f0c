import itertools

import pytest

from thinkmid.rollout.engine.phases import CALLS, Phases

CYCLE = ("wake_weights", "load_weights", "wake_cache", "generate", "ask", "load_weights", "ask", "sleep")


def run(calls):
    phases = Phases()
    for call in calls:
        phases.enter(call)
        if call == "load_weights":
            phases.loaded = True
    return phases


def test_the_cycle_of_a_step_goes_round():
    run(["sleep", *CYCLE * 3])


def test_an_engine_that_was_just_built_needs_weights_and_nothing_else():
    run(["load_weights", "generate"])
    with pytest.raises(RuntimeError, match="generate before load_weights"):
        run(["generate"])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", [(), ("sleep",), ("sleep", "wake_weights"), ("load_weights",)])
def test_a_call_is_taken_or_refused_by_what_came_before(before, call):
    """By hand: all may sleep; asleep takes wake_weights; awake without a cache takes weights; ready takes the rest."""
    allowed = {"sleep"} | {
        (): {"load_weights"},
        ("sleep",): {"wake_weights"},
        ("sleep", "wake_weights"): {"load_weights"},
        ("load_weights",): {"load_weights", "generate", "ask"},
    }[before]
    if call in allowed:
        run([*before, call])
    else:
        with pytest.raises(RuntimeError, match=f"engine: {call}"):
            run([*before, call])


def test_nothing_is_drawn_without_a_whole_load_since_the_engine_woke():
    """Every sequence of up to five calls."""
    for calls in itertools.product(CALLS, repeat=5):
        phases, fresh = Phases(), False
        for call in calls:
            try:
                phases.enter(call)
            except RuntimeError:
                continue
            if call == "load_weights":
                phases.loaded = fresh = True
            elif call == "sleep":
                fresh = False
            elif call in ("generate", "ask"):
                assert fresh, calls


def test_a_load_that_broke_off_is_none():
    phases = Phases()
    phases.enter("load_weights")  # and nobody says that it is whole
    with pytest.raises(RuntimeError, match="no weights yet"):
        phases.enter("generate")
