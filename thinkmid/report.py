"""Draw runs: curves.png into each run's folder, and several runs over one another into overlay.png.

python -m thinkmid.report RUN [RUN ...] [--out overlay.png]
"""

import argparse
from pathlib import Path

from thinkmid.config import run
from thinkmid.curves import draw


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m thinkmid.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, with its metrics.jsonl")
    parser.add_argument("--out", default="overlay.png", help="picture of several runs (default: %(default)s)")
    args = parser.parse_args(argv)
    for folder in args.runs:
        print(draw(folder, Path(folder) / "curves.png"))
    if len(args.runs) > 1:
        print(draw(args.runs, args.out))


if __name__ == "__main__":
    run(main)
