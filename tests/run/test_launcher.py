"""The launcher: the program's own exit code, its last line last, a signal passed on."""

import os
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = [sys.executable, "-m", "thinkmid.launch", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("last", "code"), [("sys.exit(2)", 2), ("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 137), ("", 0)]
)
def test_the_exit_code_is_the_programs_own_and_no_traceback_follows(tmp_path, last, code):
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys\nsys.stderr.write('error: a line\\n')\nsys.stderr.flush()\n{last}\n")
    done = subprocess.run([*LAUNCH, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == code
    assert "error: a line" in done.stderr  # of both, unless the launcher ends the other one first
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 10


def test_a_signal_reaches_every_rank_and_the_launcher_waits_for_them(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(1)\n"
        "    pathlib.Path(f'saved-{os.environ[\"RANK\"]}').touch()\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(f'began-{os.environ[\"RANK\"]}').touch()\n"
        "time.sleep(300)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    child = subprocess.Popen([*LAUNCH, str(program)], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=env)
    while child.poll() is None and len(list(tmp_path.glob("began-*"))) < 2:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 75
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert "Traceback" not in err
