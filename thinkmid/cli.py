"""The `thinkmid` command: the first word names a program, the rest are that program's own arguments.

thinkmid rlmt configs/mini-rlmt.toml --optim.lr 3e-4
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from thinkmid import __version__, config
from thinkmid.errors import UserError, unknown

# name: module with main(argv), and what it does. They are imported when they are called: --help needs no torch
PROGRAMS = {
    "annotate": ("thinkmid.augment.annotate", "insert thoughts into documents"),
    "sft": ("thinkmid.train.sft", "SFT mid-training: next-token loss on text with thoughts"),
    "rlmt": ("thinkmid.train.rlmt", "RL mid-training: think, continue the text, be judged against the real text"),
    "rlpt": ("thinkmid.train.rlpt", "RL post-training: questions whose answers a rule can check"),
    "eval": ("thinkmid.eval.run", "evaluate a model on question sets"),
    "thoughts": ("thinkmid.eval.thoughts", "test whether thoughts cause the answers"),
    "compare": ("thinkmid.eval.compare", "compare evaluations, paired by question"),
    "report": ("thinkmid.report.__main__", "run folders -> one HTML page"),
    "gguf": ("thinkmid.model.gguf", "a GGUF file -> a model folder"),
    "sample": ("thinkmid.sample", "print thoughts and continuations of a text"),
    "init": ("", "list the configs that come with thinkmid, or copy one"),
    "plan": ("", "resolved config, memory and time of a run; starts nothing"),
}
USAGE = "usage: thinkmid COMMAND [arguments]; thinkmid COMMAND --help"
INIT = """usage: thinkmid init [NAME [PATH]]

Without NAME: every config with its first comment line. With NAME: a copy in PATH, a file or a folder (default:
NAME.toml in this folder). An existing file is not overwritten.
"""
PLAN = """usage: thinkmid plan CONFIG.toml [CONFIG.toml ...] [--section.key value ...]

--dry-run of the program that the config is for: resolved config, batch arithmetic, memory by phase, estimated time.
WORLD_SIZE=8 thinkmid plan CONFIG.toml plans for eight ranks.
"""


def main(argv: list[str]) -> int | None:
    """Run the command that argv names. Returns its exit code; None means 0. UserError: no such command."""
    command, *rest = argv or ["--help"]
    if command in ("--help", "-h", "help"):
        print(USAGE, "", *(f"  {name:<10}{does}" for name, (_, does) in PROGRAMS.items()), sep="\n")
        return 0 if argv else 2
    if command == "--version":
        print(f"thinkmid {__version__}")
        return 0
    if command not in PROGRAMS:
        raise UserError(unknown("command", command, PROGRAMS))
    if command == "init":
        return init(rest)
    if command == "plan":
        return plan(rest)
    return run_program(command, rest)


def run_program(name: str, argv: Sequence[str]) -> int | None:
    try:
        code: int | None = importlib.import_module(PROGRAMS[name][0]).main(list(argv))
    except UserError as error:
        if re.search("unknown key|missing key", str(error)) and (other := meant(argv)) not in (None, name):
            raise UserError(f"{error}; the config is one for thinkmid {other}") from None
        raise
    return code


def meant(argv: Sequence[str]) -> str | None:
    """The program that the config files among the arguments are for; None if they could be for none."""
    with suppress(UserError):
        return program_of(keys_of(files := list(takewhile(is_no_flag, argv))), files)[0]
    return None


def configs() -> dict[str, Path]:
    """The configs that come with thinkmid, by name: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).parent
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), None)
    if folder is None:
        raise UserError(f"{package}: this installation holds no configs")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def init(argv: Sequence[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(INIT, end="")
        return 0
    if len(argv) > 2:
        raise UserError("thinkmid init: expected NAME and PATH at most; thinkmid init --help")
    found = configs()
    if not argv:
        for name, path in found.items():
            print(f"{name:<26}{first_comment(path)}")
        return 0
    name = argv[0].removesuffix(".toml")
    if name not in found:
        raise UserError(unknown("config", name, found))
    target = Path(argv[1] if len(argv) == 2 else ".")
    target = target / f"{name}.toml" if target.is_dir() or str(argv[-1]).endswith("/") else target
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(found[name].read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{target.parent}: no such folder") from None
    except FileExistsError:
        raise UserError(f"{target}: exists already and is not overwritten; name another PATH") from None
    print(target)
    return 0


def first_comment(path: Path) -> str:
    """The first sentence of a config's leading comment."""
    with open(path, encoding="utf-8") as file:
        comment = " ".join(line.removeprefix("#").strip() for line in takewhile(is_comment, file))
    return comment.partition(". ")[0].rstrip(".")


def is_comment(line: str) -> bool:
    return line.startswith("#")


def plan(argv: Sequence[str]) -> int | None:
    if {"--help", "-h"} & set(argv):
        print(PLAN, end="")
        return 0
    files = list(takewhile(is_no_flag, argv))
    if not files:
        raise UserError("thinkmid plan: expected CONFIG.toml first; thinkmid plan --help")
    name, because = program_of(keys_of(files), files)
    print(f"# thinkmid {name} --dry-run: {', '.join(files)} has {because}")
    return run_program(name, [*argv, "--dry-run"])


def keys_of(files: Sequence[str]) -> set[str]:
    """The sections of config files, and the keys of [data]."""
    keys: set[str] = set()
    for tables in map(config.read_toml, files):
        keys |= tables.keys()
        if isinstance(data := tables.get("data"), dict):
            keys |= {f"data.{key}" for key in data}
    return keys


def is_no_flag(arg: str) -> bool:
    return not arg.startswith("-")


def program_of(keys: set[str], files: Sequence[str]) -> tuple[str, str]:
    """The program that a config is for, and the section or key that says so. UserError: it could be for none."""
    signs = (
        ("annotate", ("chunks", "annotator")),
        ("eval", ("data.sets",)),
        ("rlpt", ("data.task", "data.path", "verify")),
        ("rlmt", ("data.prefix", "judge", "reward", "loss", "batch", "sampling")),
        ("sft", ("fresh", "data.paths")),
    )
    for name, only_its in signs:
        for key in only_its:
            if key in keys:
                return name, key if "." in key else f"[{key}]"
    raise UserError(f"{', '.join(files)}: no section names a program; run it as thinkmid PROGRAM CONFIG --dry-run")


def entry() -> None:
    """What the installed command calls."""
    config.run(main)
