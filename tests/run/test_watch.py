"""A process that hangs, dies or fails leaves its stack."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import ctypes, os, signal, sys, time
from thinkmid.run import interrupt
from thinkmid.run.watch import Watch
interrupt.GRACE_S = 2.0
interrupt.Interrupt()
watch = Watch({folder!r}, 3, {timeout})
watch.beat("rollout", 12)
def the_culprit():
    print("ready", flush=True)
    {body}
the_culprit()
print("survived")
"""


def start(folder, body, timeout=1.0):
    code = PROGRAM.format(folder=str(folder), timeout=timeout, body=body)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child, time.monotonic()


def said(folder):
    return (folder / "watch" / "rank-3.txt").read_text()


# the second holds Python's lock: no other Python thread could end the process
STUCK = {"sleeping": "time.sleep(60)", "in C, with the lock": "ctypes.PyDLL(None).sleep(60)"}


@pytest.mark.parametrize("body", STUCK.values(), ids=STUCK)
def test_a_hang_ends_with_code_1_and_a_stack(tmp_path, body):
    child, began = start(tmp_path, body)
    assert child.wait(timeout=30) == 1
    assert 0.5 < time.monotonic() - began < 6
    assert said(tmp_path).startswith("rank 3: rollout, step 12, since ")
    assert "in the_culprit" in said(tmp_path)


def test_beats_keep_it_alive_and_rest_ends_the_watch(tmp_path):
    body = "for _ in range(40): time.sleep(0.1); watch.beat()\n    watch.rest(); time.sleep(3.5)"
    child, _ = start(tmp_path, body, timeout=3.0)
    assert (child.wait(timeout=30), child.stdout.read()) == (0, "survived\n")


def test_without_a_timeout_it_waits(tmp_path):
    child, _ = start(tmp_path, "time.sleep(1.5)", timeout=0)
    assert child.wait(timeout=30) == 0


def test_an_error_is_in_the_file_and_on_stderr(tmp_path):
    child, _ = start(tmp_path, "raise RuntimeError('disk on fire')")
    assert child.wait(timeout=30) == 1
    for text in (said(tmp_path), child.stderr.read()):
        assert "disk on fire" in text
        assert "in the_culprit" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGABRT])
def test_a_signal_leaves_the_stack(tmp_path, number):
    child, _ = start(tmp_path, "time.sleep(20)", timeout=25)
    child.send_signal(number)
    if number == signal.SIGTERM:  # a request to stop: noted by Interrupt, the phase goes on until it is polled
        deadline = time.monotonic() + 20
        while "in the_culprit" not in said(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.poll() is None
        child.kill()
    child.wait(timeout=30)
    assert "in the_culprit" in said(tmp_path)


def test_a_signal_soon_after_another_is_the_same_request_and_a_late_one_ends_the_process(tmp_path):
    # the clock is set by hand: a machine may stand still for longer than GRACE_S
    body = """
    for interrupt.time.monotonic, number in (
        (lambda: 100.0, signal.SIGTERM), (lambda: 100.5, signal.SIGTERM), (lambda: 102.0, signal.SIGINT)
    ):
        os.kill(os.getpid(), number)
    print("alive", flush=True)
    interrupt.time.monotonic = lambda: 102.1
    os.kill(os.getpid(), signal.SIGTERM)
    """
    child, _ = start(tmp_path, body, timeout=0)
    assert child.wait(timeout=120) == -signal.SIGTERM
    said = "stopping: SIGTERM; progress is saved first, a further signal after 2 s ends the run at once\n"
    assert (child.stdout.read(), child.stderr.read()) == ("alive\n", said)
