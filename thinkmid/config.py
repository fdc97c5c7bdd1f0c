"""Frozen dataclasses from TOML files and dotted flags: files in order, later ones win, flags win last.

    cfg, dry_run = load(Config, argv, prog="python -m thinkmid.train.sft", description=__doc__)

A program's config is a frozen keyword-only dataclass of bool, int, float, str, Literal, tuple, `X | None` and further
such dataclasses. The comment beside a field is its help. In an `X | None` field the word "none" means None.
"""

import difflib
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO, Union, get_args, get_origin, get_type_hints

from thinkmid import __version__
from thinkmid.errors import UserError, plain
from thinkmid.files import write_whole

AnyFloat = Annotated[float, "nan and inf are allowed"]
PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "triton", "vllm", "flash-attn", "flash-attn-3", "math-verify",
)  # fmt: skip
EXPECTED = {bool: "true or false", int: "an integer", float: "a number", AnyFloat: "a number", str: "a string"}


class Loaded(NamedTuple):
    config: Any  # an instance of the class that was asked for
    dry_run: bool  # the user wants to see the config, not the run


def load(cls: type, argv: Sequence[str], *, prog: str, description: str) -> Loaded:
    """Config of class `cls` from TOML paths and flags such as `--optim.lr 3e-4`, in any order.

    `--help` prints every field and exits with 0. UserError: one line that names the file or the flag, and the key.
    """
    files, flags, switches = _split(cls, argv)
    if "help" in switches:
        _print_help(cls, prog, description)
        raise SystemExit(0)
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}  # dotted key: the file or flag that had the last word
    for path in files:
        _merge(tree, read_toml(path), sources, path)
    for flag, key, value in flags:
        for name in reversed(key.split(".")):
            value = {name: value}
        _merge(tree, value, sources, flag)
    return Loaded(_section(cls, tree, "", None, sources), "dry_run" in switches)


def to_toml(config: Any) -> str:
    """TOML that loads into an equal config. Fields that are None are left out, where leaving them out means None."""
    return "\n".join(_toml_lines(config, "", None)).lstrip("\n") + "\n"


def save_run(folder: str | Path, config: Any, env: dict) -> None:
    """Write config.toml and env.json, which say how to repeat a run. Whole or not at all."""
    write_whole(Path(folder) / "config.toml", to_toml(config))
    write_whole(Path(folder) / "env.json", json.dumps(env, indent=2) + "\n")


def environment() -> dict:
    """What a run depends on beyond its config: versions, machine, git state (None outside a repository), command."""
    from importlib.metadata import PackageNotFoundError, version

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
    """Run a program and exit. A UserError or OSError becomes one line on stderr and exit code 2; Ctrl-C is 130, and 141
    a reader of the output that went away.

    Under torchrun every rank says its own, by number: what is wrong may be wrong on one machine only.
    """
    for name in ("stdout", "stderr"):  # None where the shell closed it
        setattr(sys, name, getattr(sys, name) or _nowhere())
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # what a full disk does not take shows now
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
    except OSError:  # was said above; not again at the interpreter's exit
        sys.stdout = _nowhere()
    sys.exit(code)


def _refused(why: object) -> int:
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    sys.stderr.write(f"error{rank}: {_one_line(why)}\n")  # one write: ranks share the terminal
    return 2


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


# Layers: argv and files become one tree of plain values, and the source of every key in it.


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
    if _bare(typ) is bool and (not rest or rest[0].lower() not in ("true", "false", "none")):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{flag}: expected a value")
    return rest.pop(0)


def _parse(typ: Any, text: str) -> Any:
    """A flag's text as a TOML value of the field's type. What does not parse stays text, for _convert to refuse."""
    typ, args = _bare(typ), get_args(_bare(typ))
    if get_origin(typ) is Literal:
        return next((value for value in args if str(value) == text), text)
    if get_origin(typ) is tuple and not text.startswith("["):
        parts = [part.strip() for part in text.split(",")] if text else []
        items = _item_types(typ, len(parts))
        return list(map(_parse, items, parts)) if len(items) == len(parts) else text
    try:
        if get_origin(typ) is tuple:
            return tomllib.loads("value = " + text)["value"]
        if typ is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        return text if typ is str or is_dataclass(typ) else (float if typ == AnyFloat else typ)(text)
    except (ValueError, RecursionError):
        return text


def read_toml(path: str | Path) -> dict:
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


def _merge(tree: dict, table: dict, sources: dict[str, str], source: str, prefix: str = "") -> None:
    for name, value in table.items():
        key = prefix + name
        sources[key] = source
        if isinstance(value, dict):
            if not isinstance(tree.get(name), dict):
                tree[name] = {}
            _merge(tree[name], value, sources, source, key + ".")
        else:
            tree[name] = value


# The validator: a tree becomes dataclasses.


def _section(cls: type, table: Any, key: str, base: Any, sources: dict[str, str]) -> Any:
    """Instance of `cls` from a table. What the table does not say comes from `base`, an instance, or the defaults."""
    if not isinstance(table, dict):
        raise _wrong(key, "a table", table, sources)
    types_, values, prefix = _types(cls), {}, key + "." if key else ""
    for name in table:
        if name not in types_:
            raise _unknown(cls, prefix + name, prefix, _source(prefix + name, sources))
    for f in fields(cls):
        typ, default = types_[f.name], _default(f, base)
        if f.name in table:
            values[f.name] = _convert(typ, table[f.name], prefix + f.name, default, sources)
        elif default is not MISSING:
            values[f.name] = default
        elif is_dataclass(typ):
            values[f.name] = _section(typ, {}, prefix + f.name, None, sources)
        else:
            comment = _comments(cls).get(f.name)
            raise UserError(f"missing key '{prefix}{f.name}'" + (f": {comment}" if comment else ""))
    try:
        return cls(**values)
    except ValueError as error:  # from __post_init__
        raise UserError(_one_line(f"{key}: {error}" if key else error)) from None


def _convert(typ: Any, value: Any, key: str, default: Any, sources: dict[str, str]) -> Any:
    if type(None) in get_args(typ) and value == "none":
        return None
    typ = _bare(typ)
    if is_dataclass(typ):
        return _section(typ, value, key, default, sources)
    if get_origin(typ) is Literal:
        for allowed in get_args(typ):
            if value == allowed and type(value) is type(allowed):
                return value
        raise _wrong(key, " or ".join(map(repr, get_args(typ))), value, sources)
    if get_origin(typ) is tuple:
        items = _item_types(typ, len(value) if isinstance(value, list) else 0)
        if not isinstance(value, list) or len(items) != len(value):
            raise _wrong(key, f"a list of {len(items)}" if items else "a list", value, sources)
        return tuple(_convert(item, value[i], f"{key}[{i}]", None, sources) for i, item in enumerate(items))
    if typ in (float, AnyFloat) and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if type(value) is not (float if typ == AnyFloat else typ):
        raise _wrong(key, EXPECTED[typ], value, sources)
    if typ is int and abs(value) >= 2**63:
        raise _wrong(key, "an integer of 64 bits", value, sources)
    if typ is str and "\0" in value:
        raise _wrong(key, "a string without NUL", value, sources)
    if typ is float and not isfinite(value):
        raise _wrong(key, "a finite number", value, sources)
    return value


def _wrong(key: str, expected: str, value: Any, sources: dict[str, str]) -> UserError:
    source = _source(key, sources)
    try:
        got = repr(value)
    except ValueError:  # Python spells out no integer of more than 4300 digits
        got = "thousands of digits"
    where = source if source.startswith("-") else f"{source}: {key}"
    return UserError(_one_line(f"{where}: expected {expected}, got {got if len(got) < 80 else got[:77] + '...'}"))


def _source(key: str, sources: dict[str, str]) -> str:
    while key and key not in sources:  # an item of a list, such as parts[0].name, comes from where the list does
        key = key.rpartition("[")[0]
    return sources[key]


def _unknown(cls: type, key: str, prefix: str, source: str) -> UserError:
    known, last = _keys(cls, prefix), key.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return UserError(_one_line(f"{source}: unknown key '{key}'{hint}"))


# The schema: what a config class says about itself.


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def _bare(typ: Any) -> Any:
    """X for `X | None` and `Annotated[X, ...]`; AnyFloat stays."""
    if get_origin(typ) in (Union, types.UnionType):
        (typ,) = (arg for arg in get_args(typ) if arg is not type(None))
    return get_args(typ)[0] if get_origin(typ) is Annotated and typ != AnyFloat else typ


def _item_types(typ: Any, num: int) -> list[Any]:
    args = get_args(typ)
    return [args[0]] * num if args[-1] is Ellipsis else list(args)


def _default(f: Field, base: Any) -> Any:
    if is_dataclass(base):  # the section's own default; None or MISSING where it has none
        return getattr(base, f.name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, typ in _types(cls).items():
        keys.append(prefix + name)
        if is_dataclass(_bare(typ)):
            keys += _keys(_bare(typ), f"{prefix}{name}.")
    return keys


def _type_at(cls: type, key: str, flag: str) -> Any:
    typ = cls
    for name in key.split("."):
        section = _bare(typ)
        if not is_dataclass(section) or name not in _types(section):
            raise _unknown(cls, key, "", flag)
        typ = _types(section)[name]
    return typ


def _comments(cls: type) -> dict[str, str]:
    """{field: the comment beside it, or else the comment lines right above it}."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        above = []
        try:
            lines = inspect.getsource(base).splitlines()
        except (OSError, TypeError):  # a class without source, such as one typed at a prompt: no comments
            lines = []
        for line in lines:
            if line.lstrip().startswith("# "):
                above.append(line.lstrip()[2:])
            elif match := re.match(r"\s+(\w+):(?:.*  # (.*))?", line):
                found[match[1]] = match[2] or " ".join(above)
                above = []
            else:
                above = []
    return {name: comment for name, comment in found.items() if comment}


# Out again: TOML and help.


def _toml_lines(config: Any, key: str, base: Any) -> list[str]:
    lines, sections = [f"\n[{key}]"] if key else [], []
    for f in fields(config):
        value, default = getattr(config, f.name), _default(f, base)
        if is_dataclass(value):
            sections += _toml_lines(value, f"{key}.{f.name}" if key else f.name, default)
        elif value is not None:
            lines.append(f"{f.name} = {_toml_value(value)}")
        elif default not in (None, MISSING):
            lines.append(f'{f.name} = "none"')
    return lines + sections


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON alone leaves DEL as it is
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return "{" + ", ".join(f"{name} = {_toml_value(v)}" for name, v in pairs if v is not None) + "}"
    return repr(value)


def _print_help(cls: type, prog: str, description: str) -> None:
    import tyro  # here alone: it takes longer to import than the rest of this module together

    about = tyro.conf.arg(metavar="[FILE.toml ...]", help="later files win, flags win last", help_behavior_hint="")
    files = Annotated[str, tyro.conf.Positional, about]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    description = f"{description.strip()}\n\nWith --dry-run: show the config and stop."
    tyro.cli(_help_class(cls, None, files), args=["--help"], prog=prog, description=description, use_underscores=True)


def _help_class(cls: type, base: Any, files: Any = None) -> type:
    """A stand-in for `cls` in which every field is a string with our own words: tyro only lays it out."""
    from tyro.conf import arg

    rows, comments = [("files", files, "")] if files else [], _comments(cls)
    for f in fields(cls):
        typ, default = _types(cls)[f.name], _default(f, base)
        if is_dataclass(_bare(typ)):
            inner = _help_class(_bare(typ), default)
            rows.append((f.name, Annotated[inner, arg(help=comments.get(f.name, ""))], field(default_factory=inner)))
        else:
            words = "required" if default is MISSING else f"default: {_flag_text(default)}"
            about = arg(metavar=_metavar(typ), help=comments.get(f.name, ""), help_behavior_hint=f"({words})")
            rows.append((f.name, Annotated[str, about], ""))
    return make_dataclass(cls.__name__, rows, kw_only=True, frozen=True)


def _flag_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_flag_text, value)) or "empty"
    return "none" if value is None else value or '""' if isinstance(value, str) else _toml_value(value)


def _metavar(typ: Any) -> str:
    if typ != _bare(typ) and type(None) in get_args(typ):
        return _metavar(_bare(typ)) + "|none"
    typ = _bare(typ)
    if get_origin(typ) is Literal:
        return "|".join(map(str, get_args(typ)))
    if get_origin(typ) is tuple:
        names = [_metavar(item) for item in get_args(typ) if item is not Ellipsis]
        return ",".join(names) + (",..." if get_args(typ)[-1] is Ellipsis else "")
    return "true|false" if typ is bool else "FLOAT" if typ == AnyFloat else typ.__name__.upper()


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
