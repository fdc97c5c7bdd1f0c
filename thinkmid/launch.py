"""torchrun whose exit code is the program's own, and no traceback of the launcher's after the program's last line.

python -m thinkmid.launch --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml

Arguments are torchrun's. A signal to the launcher reaches every rank, and is exit code 75: the same command resumes.
"""

from __future__ import annotations

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from thinkmid import config
from thinkmid.run.interrupt import EXIT


def main(argv: list[str]) -> int:
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code: int = first.exitcode
        return code if code > 0 else 128 - code  # ended by a signal: as a shell counts
    except SignalException:
        return EXIT
    return 0


if __name__ == "__main__":
    config.run(main)
