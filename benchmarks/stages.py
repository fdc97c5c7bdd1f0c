"""Every miniature stage with one thread, and whether two checkouts compute the same numbers, bit for bit.

python -m benchmarks.stages run --code /path/to/before --out /tmp/before
python -m benchmarks.stages run --out /tmp/after
python -m benchmarks.stages compare /tmp/before /tmp/after
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
STAGES = (
    ("thinkmid.mini.make", "runs/mini-data"),
    ("thinkmid.train.sft", "configs/mini-base.toml"),
    ("thinkmid.train.sft", "configs/mini-sft.toml"),
    ("thinkmid.train.rlmt", "configs/mini-rlmt.toml"),
    ("thinkmid.train.rlpt", "configs/mini-rlpt.toml"),
    ("thinkmid.eval.run", "configs/mini-eval.toml"),
    ("thinkmid.mini.annotate", "configs/mini-annotate.toml"),
)
# when and where something ran, not what it computed
VOLATILE = {"env.json", "events.jsonl", "config.toml", "curves.png", "run.log"}
FOLDERS = {"checkpoints", "watch", "store"}


def run(code: Path, out: Path, stages: list[str]) -> None:
    """Runs the stages of the thinkmid in `code` inside `out`. What an earlier call finished is not run again."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "configs").exists():
        (out / "configs").symlink_to((code / "configs").resolve())
    env = os.environ | {"PYTHONPATH": str(code.resolve()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for module, argument in STAGES:
        if stages and not any(name in argument for name in stages):
            continue
        print(f"{module} {argument}", flush=True)
        subprocess.run([sys.executable, "-m", module, argument], cwd=out, env=env, check=True)


def numbers(path: Path) -> object:
    """What a file says without times; of a file that is no JSON, its bytes."""
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [without_times(json.loads(text)) for text in texts]


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not (k.endswith("_s") or k in ("time", "wall"))}
    return [without_times(v) for v in value] if isinstance(value, list) else repr(value)


def files_of(out: Path) -> set[Path]:
    found = {p.relative_to(out) for p in (out / "runs").rglob("*") if p.is_file() and not p.name.startswith(".")}
    return {p for p in found if p.name not in VOLATILE and not FOLDERS & set(p.parts)}


def compare(before: Path, after: Path) -> list[Path]:
    """Files that differ or stand on one side alone."""
    both = sorted(files_of(before) | files_of(after))
    return [
        p
        for p in both
        if not ((before / p).exists() and (after / p).exists()) or numbers(before / p) != numbers(after / p)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--code", type=Path, default=HERE, help="checkout with csrc built")
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--only", nargs="*", default=[], help="stages by a part of their argument: rlmt eval")
    comparison = commands.add_parser("compare")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    told = parser.parse_args()
    if told.command == "run":
        run(told.code, told.out, told.only)
        return 0
    different = compare(told.before, told.after)
    total = len(files_of(told.before) | files_of(told.after))
    for path in different:
        print(f"differs: {path}")
    print(f"{total - len(different)} of {total} files equal")
    return int(bool(different) or not total)


if __name__ == "__main__":
    sys.exit(main())
