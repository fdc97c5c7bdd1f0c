"""Nothing waits for ever: within the timeout every rank has left its stack and ended, and the same command goes on."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from world import rlmt_flags, sft_flags

from thinkmid.files import read_rows

PROGRAM = Path(__file__).parents[1] / "helpers" / "hang.py"
TIMEOUT_S = 8
STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "thinkmid.train.sft", *sft_flags(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


def run(home, what, *flags):
    """(exit code, stdout, stderr, wall clock at the end) of hang.py on two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*rlmt_flags(home, what.split("-")[0], STEPS), f"--run.timeout_s={TIMEOUT_S}", *flags]
    command = [sys.executable, *launcher, str(PROGRAM), what, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr, time.time()


def stack(home, what, rank):
    return (home / what / "watch" / f"rank-{rank}.txt").read_text()


def goes_on(home, what, *flags):
    code, out, err, _ = run(home, f"{what}-again", *flags, "--run.timeout_s=120")
    assert code == 0, err[-2000:]
    # they would now and then abort a rank that has finished
    assert out.count("threads of gloo at the end: 0") == 2, out[-2000:]
    assert [row["step"] for row in read_rows(home / what / "metrics.jsonl")] == list(range(1, STEPS + 1))


def test_an_engine_step_that_never_returns(home):
    code, out, _, end = run(home, "engine")
    assert code == 1  # of the launcher; each rank ended with 1
    assert end - float(re.search(r"began ([\d.]+)", out)[1]) < TIMEOUT_S + 5
    assert stack(home, "engine", 1).startswith("rank 1: rollout, step 2, since ")
    assert "in _run" in stack(home, "engine", 1)
    assert "in gather_bytes" in stack(home, "engine", 0) or "in any" in stack(home, "engine", 0)
    goes_on(home, "engine")


def test_a_rank_that_dies(home):
    code, out, _, end = run(home, "dies")
    assert code == 1
    assert end - float(re.search(r"began ([\d.]+)", out)[1]) < TIMEOUT_S + 5
    assert "line" in stack(home, "dies", 0)
    goes_on(home, "dies")


@pytest.mark.parametrize(
    ("what", "line"), [("prompt", "prompt 7 is too long"), ("verdict", "judge/model.safetensors: cannot be read")]
)
def test_what_one_rank_finds_wrong_in_mid_step_every_rank_says_and_the_step_alone_is_lost(home, what, line):
    code, _, err, _ = run(home, what, "--run.save_every=0", "--run.timeout_s=60")
    assert code == 1
    assert {f"error (rank {rank}): {line}" for rank in (0, 1)} <= set(err.splitlines())
    assert [path.name for path in (home / what / "checkpoints").iterdir()] == ["step-000002"]
    goes_on(home, what, "--run.save_every=0")


def test_a_judge_that_never_answers(home):
    """Its verdicts fail after their own timeout; too many of them stop the run, which keeps what it has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, args=(server, []), daemon=True).start()
        port = server.getsockname()[1]
        judge = ["--judge.kind=remote", "--judge.model=m", "--judge.retries=0", "--judge.canary_every=0"]
        silent = ["--judge.timeout_s=0.5", f"--judge.url=http://127.0.0.1:{port}/v1"]
        code, _, err, _ = run(home, "judge", *judge, *silent)
    assert code == 1
    line = r"error \(rank 0\): \d+ of 20 samples have no verdict, most of them for: judge failed: (timeout|not asked)"
    assert re.search(line, err)
    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # patient: what answers here shares its cores with the ranks
        patient = ["--judge.timeout_s=60", f"--judge.url=http://127.0.0.1:{server.server_port}/v1"]
        goes_on(home, "judge", *judge, *patient)
        server.shutdown()


def listen(server, kept):
    """Takes every connection and says nothing."""
    with contextlib.suppress(OSError):  # closed in the end
        while True:
            kept.append(server.accept())


class Yes(BaseHTTPRequestHandler):
    """An endpoint that says yes."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
