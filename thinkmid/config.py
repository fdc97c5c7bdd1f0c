"""Frozen dataclasses from TOML files and dotted flags: files in order, later ones win, flags win last.

    cfg, dry_run = load(Config, argv, prog="python -m thinkmid.train.sft", description=__doc__)

A program's config is a frozen keyword-only dataclass of sections, which are such dataclasses; a field is a bool, int,
float, str, Literal of strings or tuple[X, ...] of one of these. The comment beside a field is its help.
"""

from __future__ import annotations

import difflib
import inspect
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar, get_args, get_origin, get_type_hints

from thinkmid import __version__, hub
from thinkmid.errors import UserError, plain
from thinkmid.files import Row, write_json, write_whole

PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "triton", "vllm", "flash-attn", "flash-attn-3", "math-verify",
)  # fmt: skip
EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
Config = TypeVar("Config")


def load(cls: type[Config], argv: Sequence[str], *, prog: str, description: str | None) -> tuple[Config, bool]:
    """Config of class `cls` from TOML paths and flags such as `--optim.lr 3e-4`, in any order; whether to --dry-run.

    Names of the Hub's models and data sets become the folders that hold them: hub.local().

    `--help` prints every field and exits with 0. UserError: one line that names the file or the flag, and the key.
    """
    files, flags, switches = _split(cls, argv)
    if "help" in switches:
        _print_help(cls, prog, description or "")
        raise SystemExit(0)
    reader = _Reader()
    for path in files:
        reader.merge(reader.tree, read_toml(path), path)
    for flag, key, value in flags:
        for name in reversed(key.split(".")):
            value = {name: value}
        reader.merge(reader.tree, value, flag)
    config: Config = hub.local(reader.section(cls, reader.tree, "", None), "dry_run" in switches)
    return config, "dry_run" in switches


def to_toml(config: Any) -> str:
    """TOML that loads into an equal config. What came from the Hub stands there by its name, at its commit."""
    return "\n".join(_toml_lines(config, "")).lstrip("\n") + "\n"


def save_run(folder: str | Path, config: Any, env: Row) -> None:
    """Write config.toml and env.json, and hub.json where names of the Hub's are in use: what a run needs to be
    repeated."""
    hub.write_record(folder, config)
    write_whole(Path(folder) / "config.toml", to_toml(config))
    write_json(Path(folder) / "env.json", env)


def environment() -> Row:
    """What a run depends on beyond its config: versions, machine, git state (None outside a repository), command."""
    versions = {"python": platform.python_version(), "thinkmid": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # an extra that is not installed
            versions[name] = version(name)
    git = ["git", "-C", str(Path(__file__).parent)]
    revision, changes = _output(*git, "rev-parse", "HEAD"), _output(*git, "status", "--porcelain")
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "gpus": gpus.splitlines() if gpus else [],
        "git_revision": revision,
        "git_dirty": None if changes is None else changes != "",
        "argv": sys.orig_argv,
    }


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a program and exit. A UserError or OSError becomes one line on stderr and exit code 2; Ctrl-C is exit code
    130, a broken pipe 141.

    Under torchrun every rank prints its own line, with its number: what is wrong may be wrong on one machine only.
    """
    for name in ("stdout", "stderr"):  # None where the shell closed it
        setattr(sys, name, getattr(sys, name) or _nowhere())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a full disk is noticed now
    except UserError as error:
        code = _refused(error)
    except BrokenPipeError:
        code = 141
    except OSError as error:
        code = _refused(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except KeyboardInterrupt:
        code = 130
    try:
        sys.stdout.flush()
    except OSError:  # reported above; not again at the interpreter's exit
        sys.stdout = _nowhere()
    sys.exit(code)


def _refused(why: object) -> int:
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    sys.stderr.write(f"error{rank}: {_one_line(why)}\n")  # one write: ranks share the terminal
    return 2


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


# What the command line holds: paths, flags, switches.


def _split(cls: type, argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str, Any]], set[str]]:
    """(TOML paths, (flag, key, value) of every flag, which of help and dry_run were given)."""
    rest, files, flags, switches = list(argv), [], [], set()
    while rest:
        arg = rest.pop(0)
        flag, has_value, text = arg.partition("=")
        key = flag[2:].replace("-", "_") if flag.startswith("--") else flag
        if arg in ("--help", "-h", "--dry-run", "--dry_run"):
            switches.add("dry_run" if "dry" in arg else "help")
        elif not arg.startswith("-"):
            files.append(arg)
        else:
            typ = _type_at(cls, key, flag)
            flags.append((flag, key, _parse(typ, text if has_value else _take(typ, rest, flag))))
    return files, flags, switches


def _take(typ: Any, rest: list[str], flag: str) -> str:
    if typ is bool and (not rest or rest[0].lower() not in ("true", "false")):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{flag}: expected a value")
    return rest.pop(0)


def _parse(typ: Any, text: str) -> Any:
    """A flag's text as a TOML value of the field's type. What does not parse stays text, for _Reader to refuse."""
    try:
        if get_origin(typ) is tuple:
            if text.startswith("["):
                return tomllib.loads("value = " + text)["value"]
            return [_parse(get_args(typ)[0], part.strip()) for part in text.split(",")] if text else []
        if typ is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return typ(text) if typ in (int, float) else text
    except (ValueError, RecursionError):
        return text


def read_toml(path: str | Path) -> Row:
    """The tables of a file. UserError: one line that names it, and its line where it is no TOML."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows begins a text with a byte order mark
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        found = re.search(r"\(at line (\d+)", str(error))
        line = found[1] if found else max(1, len(text.splitlines()))  # "(at end of document)"
        raise UserError(f"{path}:{line}: malformed TOML: {_one_line(error)}") from None


# The validator: a tree of plain values becomes dataclasses.


class _Reader:
    """The tree that files and flags make together, and its way into dataclasses."""

    def __init__(self) -> None:
        self.tree: Row = {}
        self.sources: dict[str, str] = {}  # dotted key: the file or flag that had the last word

    def merge(self, tree: Row, table: Row, source: str, prefix: str = "") -> None:
        for name, value in table.items():
            key = prefix + name
            self.sources[key] = source
            if isinstance(value, dict):
                if not isinstance(tree.get(name), dict):
                    tree[name] = {}
                self.merge(tree[name], value, source, key + ".")
            else:
                tree[name] = value

    def section(self, cls: Any, table: Any, key: str, base: Any) -> Any:
        """Instance of `cls` from a table. What the table lacks comes from `base`, an instance, or the defaults."""
        if not isinstance(table, dict):
            raise self.wrong(key, "a table", table)
        types, values, prefix = _types(cls), {}, key + "." if key else ""
        for name in table:
            if name not in types:
                raise _unknown(cls, prefix + name, prefix, self.sources[prefix + name])
        for f in fields(cls):
            typ, default = types[f.name], _default(f, base)
            if f.name in table:
                values[f.name] = self.convert(typ, table[f.name], prefix + f.name, default)
            elif default is not MISSING:
                values[f.name] = default
            elif is_dataclass(typ):
                values[f.name] = self.section(typ, {}, prefix + f.name, None)
            else:
                comment = _comments(cls).get(f.name)
                raise UserError(f"missing key '{prefix}{f.name}'" + (f": {comment}" if comment else ""))
        try:
            return cls(**values)
        except ValueError as error:  # from __post_init__
            raise UserError(_one_line(f"{key}: {error}" if key else error)) from None

    def convert(self, typ: Any, value: Any, key: str, default: Any = None) -> Any:
        """The value as a field of this type holds it."""
        if is_dataclass(typ):
            return self.section(typ, value, key, default)
        if get_origin(typ) is Literal:
            if value not in get_args(typ):
                raise self.wrong(key, " or ".join(map(repr, get_args(typ))), value)
            return value
        if get_origin(typ) is tuple:
            if not isinstance(value, list):
                raise self.wrong(key, "a list", value)
            return tuple(self.convert(get_args(typ)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        if typ is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not typ:
            raise self.wrong(key, EXPECTED[typ], value)
        if typ is int and abs(value) >= 2**63:
            raise self.wrong(key, "an integer of 64 bits", value)
        if typ is str and "\0" in value:
            raise self.wrong(key, "a string without NUL", value)
        if typ is float and not isfinite(value):
            raise self.wrong(key, "a finite number", value)
        return value

    def wrong(self, key: str, expected: str, value: Any) -> UserError:
        source = self.sources[key.partition("[")[0]]  # an item of a list comes from where the list does
        try:
            got = repr(value)
        except ValueError:  # Python spells out no integer of more than 4300 digits
            got = "thousands of digits"
        where = source if source.startswith("-") else f"{source}: {key}"
        return UserError(_one_line(f"{where}: expected {expected}, got {got if len(got) < 80 else got[:77] + '...'}"))


def _unknown(cls: type, key: str, prefix: str, source: str) -> UserError:
    known, last = _keys(cls, prefix), key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return UserError(_one_line(f"{source}: unknown key '{key}'{hint}"))


# The schema: what a config class says about itself.


def _types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _default(f: Field[Any], base: Any) -> Any:
    if is_dataclass(base):  # the section's own default; MISSING where it has none
        return getattr(base, f.name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, typ in _types(cls).items():
        keys += [prefix + name, *(_keys(typ, f"{prefix}{name}.") if is_dataclass(typ) else ())]
    return keys


def _type_at(cls: type, key: str, flag: str) -> Any:
    typ: Any = cls
    for name in key.split("."):
        if not is_dataclass(typ) or name not in _types(typ):
            raise _unknown(cls, key, "", flag)
        typ = _types(typ)[name]
    return typ


def _comments(cls: type) -> dict[str, str]:
    """{field: the comment beside it, or else the comment lines right above it}."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        above: list[str] = []
        try:
            lines = inspect.getsource(base).splitlines()
        except (OSError, TypeError):  # a class without source, such as one typed at a prompt: no comments
            lines = []
        for line in lines:
            if line.lstrip().startswith("# "):
                above.append(line.lstrip()[2:])
                continue
            if match := re.match(r"\s+(\w+):(?:.*  # (.*))?", line):
                found[match[1]] = match[2] or " ".join(above)
            above = []
    return {name: comment for name, comment in found.items() if comment}


# Out again: TOML and help.


def _toml_lines(config: Any, key: str) -> list[str]:
    lines, sections = [f"\n[{key}]"] if key else [], []
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            sections += _toml_lines(value, f"{key}.{f.name}" if key else f.name)
        else:
            lines.append(f"{f.name} = {_toml_value(value)}")
    return lines + sections


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        # JSON alone leaves DEL as it is
        return json.dumps(hub.pinned(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)


def _print_help(cls: Any, prog: str, description: str) -> None:
    import tyro  # here alone: it takes longer to import than the rest of this module together

    about = tyro.conf.arg(metavar="[FILE.toml ...]", help="later files win, flags win last", help_behavior_hint="")
    files = Annotated[str, tyro.conf.Positional, about]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    description = f"{description.strip()}\n\nWith --dry-run: show the config and stop."
    tyro.cli(_help_class(cls, None, files), args=["--help"], prog=prog, description=description, use_underscores=True)


def _help_class(cls: Any, base: Any, files: Any = None) -> type:
    """A stand-in for `cls` in which every field is a string with our own words: tyro only lays it out."""
    from tyro.conf import arg

    rows: list[Any] = [("files", files, "")] if files else []
    types, comments = _types(cls), _comments(cls)
    for f in fields(cls):
        typ, default = types[f.name], _default(f, base)
        if is_dataclass(typ):
            inner = _help_class(typ, default)
            rows.append((f.name, Annotated[inner, arg(help=comments.get(f.name, ""))], field(default_factory=inner)))
        else:
            words = "required" if default is MISSING else f"default: {_flag_text(default)}"
            about = arg(metavar=_metavar(typ), help=comments.get(f.name, ""), help_behavior_hint=f"({words})")
            rows.append((f.name, Annotated[str, about], ""))
    return make_dataclass(cls.__name__, rows, kw_only=True, frozen=True)


def _flag_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_flag_text, value)) or "empty"
    return value or '""' if isinstance(value, str) else _toml_value(value)


def _metavar(typ: Any) -> str:
    if get_origin(typ) is Literal:
        return "|".join(get_args(typ))
    if get_origin(typ) is tuple:
        return _metavar(get_args(typ)[0]) + ",..."
    return "true|false" if typ is bool else str(typ.__name__).upper()


def _one_line(text: object) -> str:
    return " ".join(plain(str(text)).split("\n"))


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # not installed here, or not answering
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor()
