"""rlmt in which something goes wrong on one rank: hang.py WHAT FLAGS... Under torchrun.

engine: a step of rank 1's engine never returns. dies: rank 1 is killed. prompt: rank 1's engine refuses a prompt.
verdict: a file that rank 1's judge needs cannot be read. Each in step 2, whose time is printed.
"""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.train import rlmt, rollouts


def spoilt(run, what):
    def _run(self, *args):
        if os.environ["RANK"] == "1" and self.version == 2:
            print(f"began {time.time()}", flush=True)
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "prompt":
                raise UserError("prompt 7 is too long")
            time.sleep(1000)
        yield from run(self, *args)

    return _run


def unreadable(rewarded):
    def _rewarded(group, pending, watch):
        if os.environ["RANK"] == "1" and group.samples[0].versions[0] == 2:
            raise PermissionError("judge/model.safetensors: cannot be read")
        return rewarded(group, pending, watch)

    return _rewarded


def threads_of_gloo():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads of gloo at the end: {sum('gloo' in name for name in names)}", flush=True)


if __name__ == "__main__":
    atexit.register(threads_of_gloo)  # the first to come is the last to be called
    what, *argv = sys.argv[1:]
    if what in ("engine", "dies", "prompt"):
        NativeEngine._run = spoilt(NativeEngine._run, what)
    if what == "verdict":
        rollouts.rewarded = unreadable(rollouts.rewarded)
    config.run(rlmt.main, argv)
