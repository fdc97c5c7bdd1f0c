import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def drill(tmp_path_factory):
    """What drill.py found; in a process of its own, whose forks inherit no threads of torch's."""
    folder = tmp_path_factory.mktemp("drill")
    program = Path(__file__).parents[1] / "helpers" / "drill.py"
    done = subprocess.run([sys.executable, program, "--folder", folder], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + (folder / "out.txt").read_text()
    return json.loads((folder / "results.json").read_text())


def test_a_run_killed_three_times_leaves_what_one_left_alone_leaves(drill):
    killed = drill["killed"]
    assert (killed["codes"], killed["differences"]) == ([0], [])
    # otherwise nothing was learnt, and equal weights mean nothing
    assert len(set(killed["rewards"])) > 2
    assert len(killed["kills"]) == 3
    assert all(-9 in kill["codes"] for kill in killed["kills"])


def test_sigterm_to_one_rank_saves_on_all_exits_with_75_and_loses_nothing(drill):
    stopped = drill["stopped"]
    assert stopped["stopped"] == [75]
    assert stopped["saved"] == [f"step-{stopped['steps']:06d}"]
    assert (stopped["codes"], stopped["differences"]) == ([0], [])


@pytest.mark.parametrize("program", ["rlmt", "sft"])
def test_a_signal_to_one_rank_in_mid_step_drops_the_step_on_all_and_a_second_one_is_the_same_request(drill, program):
    stopped = drill[program]
    assert stopped["stopped"] == [75]
    assert (stopped["steps"], stopped["saved"]) == (2, ["step-000002"])
    assert (stopped["codes"], stopped["differences"]) == ([0], [])


@pytest.mark.parametrize("program", ["rlmt", "sft"])
def test_a_weight_of_one_rank_that_is_not_finite_ends_all_and_is_never_saved(drill, program):
    spoilt = drill[f"spoilt {program}"]
    assert (spoilt["spoilt"], spoilt["saved"]) == ([2], ["step-000002"])
    said = "step 3: weights or Adam's moments are not finite after this update"
    assert sorted(line.partition(" (optim.lr")[0] for line in spoilt["said"]) == [
        f"error (rank {rank}): {said}" for rank in (0, 1)
    ]
    assert (spoilt["codes"], spoilt["differences"]) == ([0], [])


def test_a_run_of_two_ranks_goes_on_with_one(drill):
    fewer = drill["fewer"]
    assert fewer["codes"] == [0]
    assert fewer["steps"] == list(range(1, 9))
    assert fewer["same_before"]
    assert fewer["same_prompts_after"]


def test_what_one_rank_finds_wrong_every_rank_says_and_none_waits(drill):
    damaged = drill["damaged"]
    assert (damaged["codes"], damaged["wrote"]) == ([2], ["store"])
    line = "flipped/model.safetensors: does not match its sha256 in thinkmid.json"
    assert [said.partition(";")[0] for said in damaged["said"]] == [f"error (rank {r}): {line}" for r in (0, 1)]


def test_adapters_of_two_ranks_resume_bitwise_and_a_checkpoint_holds_nothing_of_the_base(drill):
    run = drill["adapters"]
    assert -9 in run["killed"]
    assert "step-000002" in run["left"]
    assert (run["codes"], run["differences"]) == ([0], [])
    names = [f"layers.{i}.{path}_proj.{factor}" for i in (0, 1) for path in PATHS for factor in ("lora_a", "lora_b")]
    assert run["saved"] == sorted(f"{kind}.{n}" for n in names for kind in ("model", "exp_avg", "exp_avg_sq", "step"))


PATHS = [*(f"self_attn.{x}" for x in "qkvo"), *(f"mlp.{x}" for x in ("gate", "up", "down"))]


def test_the_base_of_adapters_may_move_and_not_change(drill):
    run = drill["adapters"]
    assert (run["moved"], run["other"]) == ([0], [2])
    said = "base/export: not the weights that this run began with; --run.fresh starts over"
    assert sorted(run["said"]) == [f"error (rank {rank}): {said}" for rank in (0, 1)]
