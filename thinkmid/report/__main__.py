"""Run folders -> one HTML page that opens from disk and asks for nothing, and its pictures as SVGs.

python -m thinkmid.report RUN [RUN ...] [--sweep runs/sweep/table.json] [--out report.html]
"""

import argparse
from pathlib import Path

from thinkmid.config import run
from thinkmid.errors import UserError, counted
from thinkmid.files import write_whole
from thinkmid.report import browse, page, pictures, runs, sweep
from thinkmid.report.paper import PAPER, beside_paper, five_column_means
from thinkmid.report.runs import Evaluation, Training

RUNS = "a run's folder: of training (metrics.jsonl) or evaluation (results.json), or a folder of such folders"


def main(argv: list[str]) -> None:
    args = parse(argv)
    found, skipped = runs.find(args.runs)
    if not found and not args.sweep:
        raise UserError("; ".join(skipped) or "nothing to report: give a run's folder or --sweep TABLE")
    for line in skipped:
        print(line)
    evaluated = [run for run in found if isinstance(run, Evaluation)]
    swept = sweep.read(args.sweep) if args.sweep else None
    groups, notes = browse.gather(found, args.samples, args.show_gpqa)
    folder = args.out.with_name(args.out.stem + "-svg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw_all(found, folder)
    parts = {
        "sweep": swept,
        "curves": drawn,
        "runs": [run for run in found if isinstance(run, Training)],
        "evaluations": evaluated,
        "paper": {"figures": PAPER, "ours": ours} if (ours := beside_paper(evaluated)) else None,
        "means": five_column_means(),
    }
    write(args.out, page.render(parts, groups, notes))
    print(f"{folder}: {counted(sum(len(picture.paths) for picture in drawn), 'picture')}")
    print(args.out)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="thinkmid report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help=RUNS)
    parser.add_argument("--sweep", type=Path, help="table.json of benchmarks.mini")
    out = "the page (default: %(default)s); its pictures go into NAME-svg/ beside it"
    parser.add_argument("--out", type=Path, default=Path("report.html"), help=out)
    parser.add_argument("--samples", type=int, default=60, help="groups of samples per run (default: %(default)s)")
    parser.add_argument("--show-gpqa", action="store_true", help="show texts of GPQA, whose authors ask not to")
    args = parser.parse_args(argv)
    if args.samples < 0:
        raise UserError(f"--samples: expected 0 or more, got {args.samples}")
    return args


def write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror}") from None


if __name__ == "__main__":
    run(main)
