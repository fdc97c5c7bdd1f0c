"""Is one model better than another? Evaluations paired by question, by set and over all sets.

python -m thinkmid.eval.compare RUN_A RUN_B [RUN_C ...]

The runs are folders of thinkmid.eval.run with the same questions; differences are RUN_A minus each of the others.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from thinkmid import config
from thinkmid.data.questions import NAME
from thinkmid.errors import UserError
from thinkmid.eval.summary import Graded, as_row, compare_sets, in_words
from thinkmid.files import Row, check_row, is_count, is_text, read_json, read_rows, write_json

# should be the same in both
ALIKE = ("template", "system", "shots", "samples", "temperature", "top_p", "max_new", "max_direct", "stop")
FIELDS = {f.name for f in fields(Graded)}
KINDS = {"question": is_text, "sample": is_count, "num_think": is_count}


class Run(NamedTuple):
    """What an evaluation left in its folder."""

    folder: Path
    results: Row  # results.json
    sets: dict[str, list[Graded]]


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="thinkmid compare", description=__doc__, formatter_class=form)
    parser.add_argument("a", metavar="RUN_A", type=Path)
    parser.add_argument("others", metavar="RUN_B", type=Path, nargs="+")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the numbers to this file too")
    args = parser.parse_args(argv)
    a = read(args.a)
    differences = [against(a, read(folder)) for folder in args.others]
    for row in differences:
        show(a.folder, row)
    if args.json:
        about = {"a": str(a.folder), "others": differences}
        write_json(args.json, about)
    return 0


def read(folder: Path) -> Run:
    """UserError names the file that is missing or is not what an evaluation writes."""
    path = folder / "results.json"
    results = read_json(path)
    sets: Any = results.get("sets")
    tables = isinstance(sets, dict) and isinstance(results.get("questions", {}), dict)
    # the names of sets are names of files
    if not tables or not all(map(NAME.fullmatch, sets)):
        raise UserError(f"{path}: not the results of an evaluation")
    return Run(folder, results, {name: graded(folder / "graded" / f"{name}.jsonl") for name in sets})


def graded(path: Path) -> list[Graded]:
    """The samples of a set. UserError names the row that is none."""
    rows = []
    for number, row in enumerate(read_rows(path), start=1):
        if row.keys() != FIELDS or row["score"] not in (None, 0, 1):
            raise UserError(f"{path}:{number}: not a graded sample")
        check_row(f"{path}:{number}", row, KINDS)
        rows.append(Graded(**row))
    return rows


def against(a: Run, b: Run) -> Row:
    """Run a minus run b. UserError: their questions differ."""
    if odd := a.sets.keys() ^ b.sets.keys():
        has, lacks = (a, b) if min(odd) in a.sets else (b, a)
        raise UserError(f"{lacks.folder}: has no set '{min(odd)}', {has.folder} has")
    hashes = [run.results.get("questions", {}) for run in (a, b)]
    for name in a.sets:
        if all(name in h for h in hashes) and hashes[0][name] != hashes[1][name]:
            raise UserError(f"{b.folder}: set '{name}' has other questions or answers than in {a.folder}")
    try:
        by_set, over_sets = compare_sets(a.sets, b.sets)
    except ValueError as error:
        raise UserError(f"{b.folder} against {a.folder}: {error}") from None
    return {
        "b": str(b.folder),
        "warnings": warnings(a, b, all(hashes)),
        "mean": as_row(over_sets),
        "sets": {name: as_row(pair) for name, pair in by_set.items()},
    }


def warnings(a: Run, b: Run, hashed: bool) -> list[str]:
    pairs = [(name, a.results.get(name), b.results.get(name)) for name in ALIKE]
    lines = [f"{name} is {x} in {a.folder}, {y} in {b.folder}" for name, x, y in pairs if x != y]
    return lines + ([] if hashed else ["a run has no hash of its questions: their ids alone were compared"])


def show(a: Path, found: Row) -> None:
    for line in found["warnings"]:
        print(f"warning: {line}")
    print(f"{a} minus {found['b']}")
    print(f"{'set':<20} {'difference':>10}  {'95 % interval':<16}  {'':8} {'better':>6} {'worse':>6}")
    for name, d in [*found["sets"].items(), ("mean of the sets", found["mean"])]:
        print(f"{name:<20} {in_words(d)} {d['better']:6} {d['worse']:6}")


if __name__ == "__main__":
    config.run(main)
