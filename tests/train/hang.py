"""rlmt in which something stops for ever on one rank: hang.py WHAT FLAGS... Under torchrun.

engine: a step of rank 1's engine never returns. dies: rank 1 is killed. Each in step 2, whose time is printed.
"""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from thinkmid import config
from thinkmid.rollout.native import NativeEngine
from thinkmid.train import rlmt


def spoilt(run, what):
    def _run(self, *args):
        if os.environ["RANK"] == "1" and self.version == 2:
            print(f"began {time.time()}", flush=True)
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        yield from run(self, *args)

    return _run


def threads_of_gloo():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads of gloo at the end: {sum('gloo' in name for name in names)}", flush=True)


if __name__ == "__main__":
    atexit.register(threads_of_gloo)  # the first to come is the last to be called
    what, *argv = sys.argv[1:]
    if what in ("engine", "dies"):
        NativeEngine._run = spoilt(NativeEngine._run, what)
    config.run(rlmt.main, argv)
