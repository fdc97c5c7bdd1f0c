"""A program on a terminal of its own."""

import os
import pty
import subprocess
import sys


def on_terminal(program, code=0):
    """What a Python program, given as text, shows on a terminal of 160 columns. It ends with this exit code."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "NO_COLOR": "1"}
    child = subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux reports the closed terminal so
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    assert child.wait() == code
    return shown.decode()
