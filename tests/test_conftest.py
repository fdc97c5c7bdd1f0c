"""The suite itself: what a paused machine does to it."""

import shutil
import subprocess
import sys
from pathlib import Path

STOPPED = """
import os, signal, subprocess
from pathlib import Path
import pytest

@pytest.mark.parametrize("stops", [True, False])
def test_it(stops):
    tries = Path(f"tries-{stops}")
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if stops and tries.read_text() == "x":
        subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    assert tries.read_text() == "xx"
"""


def test_a_test_that_failed_on_a_paused_machine_is_run_again_and_no_other(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_stopped.py").write_text(STOPPED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_stopped.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "tries-True").read_text() == "xx"
    assert (tmp_path / "tries-False").read_text() == "x"
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "while it failed: test_stopped.py::test_it[True]" in done.stdout
