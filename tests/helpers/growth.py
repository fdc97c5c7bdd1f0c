"""How much a program's memory grows: python growth.py sft|rlmt CONFIG ... prints a line of JSON.

before: resident bytes when all is imported and data is read, and neither model nor engine exists. peak: the most that
were resident until the last update. Saving, export and curves come after it.
"""

import atexit
import gc
import json
import sys

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401

from thinkmid import config
from thinkmid.rollout.engine import native  # noqa: F401
from thinkmid.rollout.judge import reward  # noqa: F401
from thinkmid.train import job, rl, rlmt, sft, supervised

found = {}


def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def measure(argv):
    open_job, train_step = job.open_job, rl.train_step

    def opened(*given, **options):
        gc.collect()
        found["before"] = resident("VmRSS")
        return open_job(*given, **options)

    def stepped(model, optimizer, batches, *given, **options):
        stats = train_step(model, optimizer, batches, *given, **options)
        found["peak"] = resident("VmHWM")
        found["packs"] = [sum(unit.length for unit in units) for units in batches]
        return stats

    supervised.open_job = job.open_job = opened
    supervised.train_step = rl.train_step = stepped
    atexit.register(lambda: print(json.dumps(found)))
    config.run({"sft": sft, "rlmt": rlmt}[argv[0]].main, argv[1:])


if __name__ == "__main__":
    measure(sys.argv[1:])
