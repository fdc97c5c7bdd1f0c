"""Killed at any moment, the same command goes on as if nothing had happened, bit for bit.

`python tests/train/test_resume.py 30` kills 30 times instead of the suite's few, and prints a table.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from world import rlmt_flags, sft_flags

from thinkmid.train.interrupt import EXIT

STEPS = 6
CLOCK = ("_s", "seconds")


def launch(argv, ranks=2):
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*(module if ranks > 1 else [sys.executable, "-m"]), "thinkmid.train.rlmt", *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=env, start_new_session=True, **quiet)


def kill(process, number=signal.SIGKILL):
    if process.poll() is None:
        os.killpg(process.pid, number)
    return process.wait()


def prepare(home: Path) -> float:
    """The start model and the uninterrupted run; seconds that it took."""
    subprocess.run([sys.executable, "-m", "thinkmid.train.sft", *sft_flags(home)], check=True, capture_output=True)
    began = time.monotonic()
    assert launch(rlmt_flags(home, "whole", STEPS)).wait() == 0
    return time.monotonic() - began


def outcome(run: Path) -> dict:
    """Everything a run leaves that is not a clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in rows],
        "weights": (run / "export/model.safetensors").read_bytes(),
        "rollouts": {path.name: path.read_bytes() for path in sorted((run / "rollouts").iterdir())},
    }


def killed_and_resumed(home: Path, name: str, after_s: float) -> int:
    """Kills a run after so many seconds, runs the command again; steps that the metrics held at the kill."""
    process = launch(rlmt_flags(home, name, STEPS))
    time.sleep(after_s)
    kill(process)
    metrics = home / name / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    assert launch(rlmt_flags(home, name, STEPS)).wait() == 0
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    folder.joinpath("seconds").write_text(str(prepare(folder)))
    return folder


@pytest.mark.parametrize("share", [0.75, 0.92])
def test_a_killed_run_resumes_bitwise(home, share):
    killed_and_resumed(home, f"killed-{share}", share * float((home / "seconds").read_text()))
    assert outcome(home / f"killed-{share}") == outcome(home / "whole")


def test_sigterm_saves_and_another_world_size_goes_on(home):
    # long enough to be stopped in the middle
    process = launch([*rlmt_flags(home, "stopped", STEPS), "--run.steps", "1000", "--run.save_every", "0"], ranks=1)
    metrics = home / "stopped/metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size < 600):
        time.sleep(0.05)
    assert kill(process, signal.SIGTERM) == EXIT
    steps = len(metrics.read_text().splitlines())
    (saved,) = (home / "stopped/checkpoints").iterdir()
    assert saved.name == f"step-{steps:06d}"
    more = ["--run.steps", str(steps + 2), "--run.save_every", "0"]
    assert launch([*rlmt_flags(home, "stopped", STEPS), *more]).wait() == 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 3))
    # ranks change the order of sums, not what is drawn from the same weights
    same = [{k: v for k, v in row.items() if k in ("reward", "thinking_tokens")} for row in rows]
    whole = [json.loads(line) for line in (home / "whole/metrics.jsonl").read_text().splitlines()]
    assert same[: len(whole)] == [{k: row[k] for k in ("reward", "thinking_tokens")} for row in whole][: len(same)]


def drill(kills: int):
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        seconds = prepare(home)
        whole = outcome(home / "whole")
        print(f"uninterrupted: {STEPS} steps in {seconds:.1f} s, start-up included")
        for k in range(kills):
            after_s = draw.uniform(0.3, 1.0) * seconds
            done = killed_and_resumed(home, f"kill-{k}", after_s)
            same = outcome(home / f"kill-{k}") == whole
            print(f"kill {k + 1:2d} after {after_s:5.1f} s, {done} steps done: {'bitwise' if same else 'DIFFERS'}")


if __name__ == "__main__":
    drill(int(sys.argv[1]))
