"""Models and data sets of the Hub by name: which commit a name means, and where that lies in the library's cache.

A model is ORG/NAME[@REVISION], with or without hf:// before it. Data are hf://datasets/ORG/NAME[@REVISION]/PATH, where
PATH is a file, a folder or holds `*`; or, in the place of a path, ?split=SPLIT or ?config=CONFIG&split=SPLIT.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from thinkmid.errors import UserError
from thinkmid.files import Row, read_json, write_json

HF = "hf://"
NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
RECORD = "hub.json"  # in a run's folder: what each name meant when the run began
# keys of configs that may hold names
MODELS = ("model.folder", "judge.folder", "writer.folder", "chunks.tokenizer")
SETS = "data.sets"
DATA = (
    SETS, "data.paths", "data.path", "data.val_paths", "data.probe_paths", "split.evals", "fresh.tokenizer_data",
)  # fmt: skip
# what is downloaded beside a model's weights, and the endings of data files; nothing in either is code
BESIDE = ("*.json", "*.jinja", "merges.txt", "tokenizer.model", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
TABLES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".csv", ".json", ".txt", ".md")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMMIT = re.compile("[0-9a-f]{40}")
NO_OWNERS = ("models", "datasets", "spaces", "buckets", "kernels")  # kinds in the Hub's addresses: folders of ours
TIMEOUT_S = 10  # for an answer of the Hub's
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Snapshot(str):
    """Path of a snapshot in the Hub's cache, or of a part of it, which keeps the name that led there."""

    asked: str  # as the user spelled it
    pinned: str  # the same at its commit
    commit: str
    part: str  # path in the repository, which may hold `*`; "" for all of it

    def __new__(cls, path: str, asked: str = "", name: str = "", commit: str = "", part: str = "") -> Snapshot:
        found = super().__new__(cls, path)
        found.asked, found.commit, found.part = asked, commit, part
        found.pinned = f"{name}@{commit}{'/' * bool(part)}{part}"
        return found


def asked(path: str) -> str:
    """A path as the user spelled it."""
    return path.asked if isinstance(path, Snapshot) else path


def pinned(path: str) -> str:
    """A path as a config names it that is to mean the same later, and on another machine."""
    return path.pinned if isinstance(path, Snapshot) else path


def local(cfg: Any, dry_run: bool = False) -> Any:
    """The config, with a Snapshot for every name of the Hub's, downloaded if the cache does not hold it.

    A name means what it meant when the run began, as its folder's record says. With dry_run no weights are downloaded,
    and no data but sets of questions. UserError: one line that names what was not found, and why.
    """
    run = getattr(cfg, "run", None)
    path = Path(getattr(run, "folder", ""), RECORD)
    known = read_json(path) if path.is_file() and not getattr(run, "fresh", False) else {}
    regrade = getattr(run, "regrade", False)
    for key in (*MODELS, SETS) if dry_run else (*MODELS, *DATA):
        names, found = _names(cfg, key), list[str]()
        weights = not (dry_run or regrade or key == "chunks.tokenizer")
        # what is graded again may do without its model
        with suppress(*((UserError,) if regrade and key in MODELS else ())):
            for name in names:
                # a path in the run's folder, which need not be there yet, is no name
                ours = path.parent.parts and Path(name).is_relative_to(path.parent)
                found += [name] if ours else _found(key, name, known, weights)
        if not any(isinstance(path, Snapshot) for path in found):
            continue
        if _is_first():
            lines = [f"{path.asked}: commit {path.commit}" for path in found if isinstance(path, Snapshot)]
            print(*(f"{'# ' * dry_run}{line}" for line in dict.fromkeys(lines)), sep="\n", flush=True)
        section, field = key.split(".")
        is_list = isinstance(getattr(getattr(cfg, section), field), tuple)
        if not is_list and len(found) > 1:
            raise UserError(f"{key}: {names[0]} is {len(found)} files; name them with *, as in {pinned(found[0])}")
        value = tuple(found) if is_list else found[0]
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{field: value})})
    return cfg


def _names(cfg: Any, key: str) -> tuple[str, ...]:
    section, field = key.split(".")
    value = getattr(getattr(cfg, section, None), field, None) or ()
    return value if isinstance(value, tuple) else (value,)


def _found(key: str, name: str, known: Row, weights: bool) -> list[str]:
    return [model(name, known, weights=weights)] if key in MODELS else data(name, known)


def record(cfg: Any) -> Row:
    """{name: {"commit", "parts"}} of all that a config has from the Hub."""
    found: Row = {}
    for path in (path for key in (*MODELS, *DATA) for path in _names(cfg, key) if isinstance(path, Snapshot)):
        parts = found.setdefault(path.asked, {"commit": path.commit, "parts": []})["parts"]
        parts += [path.part] * (path.part not in parts)
    return found


def write_record(folder: str | Path, cfg: Any) -> None:
    """Write the record into a run's folder, if there is something to record."""
    if found := record(cfg):
        write_json(Path(folder, RECORD), found)


def model(text: str, known: Row | None = None, *, weights: bool = True) -> str:
    """The folder of a model: a Snapshot if the text is the name of one and no folder, else the text itself.

    known: a record(). UserError: what is wrong with the name, the repository, the token or the network.
    """
    is_uri = text.startswith(HF)
    home = text.partition("/")[0]
    if not is_uri and (os.path.isdir(text) or not NAME.fullmatch(text) or home in NO_OWNERS):
        return text
    if not is_uri and os.path.isdir(home):
        raise UserError(f"{text}: no such folder in {home}; for the model of this name on the Hub: {HF}{text}")
    with _in_one_line(text if is_uri else f"{text}: no such folder; on the Hub"):
        repo = _Repo(text if is_uri else HF + text, "model")
        if repo.path:
            raise UserError(f"{text}: a model is a whole repository: {HF}ORG/NAME[@REVISION]")
        repo.pin((known or {}).get(text))
        there = repo.files()
        top = [file for file in there if "/" not in file]
        beside = [file for file in top if any(fnmatchcase(file, pattern) for pattern in BESIDE)]
        if "config.json" not in beside:
            raise UserError(f"{text}: no config.json; the repository holds {_few(there)}")
        folder = repo.download(beside)
        if weights:
            repo.download(_weights(text, folder, there))
    return Snapshot(str(folder), text, repo.name, repo.commit)


def _weights(text: str, folder: Path, there: Sequence[str]) -> list[str]:
    """Names of the weight files. UserError: there are none, or none that can be read without running code."""
    if SINGLE in there:
        return [SINGLE]
    if INDEX in there and isinstance(files := read_json(folder / INDEX).get("weight_map"), dict):
        named = {str(file) for file in files.values()}
        return sorted(file for file in there if file in named and file.endswith(".safetensors"))
    others = {PICKLES: "unpickling runs code", (".gguf",): "python -m thinkmid.model.gguf makes a folder of it"}
    for ends, why in others.items():
        if odd := [file for file in there if file.endswith(ends)]:
            raise UserError(f"{text}: no {SINGLE}; {odd[0]} is not read: {why}")
    raise UserError(f"{text}: no {SINGLE}; the repository holds {_few(there)}")


def data(text: str, known: Row | None = None) -> list[str]:
    """Paths of data: a Snapshot for each part of a data set of the Hub's, else the text itself. NAME= may stand before
    hf://. known, UserError: as for model()."""
    at = text.find(HF)
    if at < 0 or text[at - 1 : at] not in ("", "="):
        return [text]
    with _in_one_line(text):
        uri, _, query = text[at:].partition("?")
        repo = _Repo(uri, "dataset")
        if query and repo.path:
            raise UserError(f"{text}: a path or ?{query}, not both")
        was = repo.pin((known or {}).get(text))
        parts = was or ([repo.path] if repo.path else _split(text, repo, dict(parse_qsl(query))))
        there = [file for file in repo.files() if file.lower().endswith(TABLES)]
        chosen = {part: [file for file in there if _lies_at(file, part)] for part in parts}
        if empty := [part for part, files in chosen.items() if not files]:
            raise UserError(f"{text}: no data at {empty[0]}; the repository holds {_few(there)}")
        folder = repo.download([file for files in chosen.values() for file in files])
    return [Snapshot(f"{text[:at]}{folder}/{part}", text, text[:at] + repo.name, repo.commit, part) for part in parts]


def _lies_at(file: str, part: str) -> bool:
    return fnmatchcase(file, part) if "*" in part else file == part or file.startswith(f"{part.rstrip('/')}/")


def _split(text: str, repo: _Repo, wanted: dict[str, str]) -> list[str]:
    """Files of the split, as the data set's card or the names of its files define it."""
    if unknown := wanted.keys() - {"config", "split"}:
        raise UserError(f"{text}: unknown option {min(unknown)!r}; there are config and split")
    repo.about(repo.commit)
    builder = _library("datasets").load_dataset_builder(repo.id, wanted.get("config"), revision=repo.commit)
    splits = builder.config.data_files or {}
    split = wanted.get("split") or (next(iter(splits)) if len(splits) == 1 else "")
    if split not in splits:
        which = f"no split {split!r}" if split else "no split is named"
        raise UserError(f"{text}: {which}; there are {', '.join(map(str, splits)) or 'none'}: {repo.name}?split=NAME")
    prefix = f"{repo.name}@{repo.commit}/"
    files = [str(file) for file in splits[split]]
    if odd := [file for file in files if not file.startswith(prefix) or not file.lower().endswith(TABLES)]:
        name = odd[0].removeprefix(prefix)
        raise UserError(f"{text}: {name} is not read; the Hub's copy, if any: {repo.name}@refs/convert/parquet")
    return [file.removeprefix(prefix) for file in files]


class _Repo:
    """A repository of the Hub at one commit."""

    def __init__(self, uri: str, kind: str):
        """kind: "model" or "dataset". UserError where the uri names something else."""
        self._hub, self._errors = _library("huggingface_hub"), _library("huggingface_hub.errors")
        found = self._hub.parse_hf_uri(uri)
        if found.type != kind:
            form = {"model": f"{HF}ORG/NAME", "dataset": f"{HF}datasets/ORG/NAME"}[kind]
            raise UserError(f"{uri}: names a {found.type}; a {kind} is {form}")
        self.id, self.path, self.commit = found.id, found.path_in_repo, ""
        self.name = found.id if kind == "model" else f"{HF}datasets/{found.id}"
        self._where, self._revision = {"repo_id": found.id, "repo_type": kind}, found.revision

    def pin(self, known: Row | None) -> list[str]:
        """Settle on a commit: what is known of the name, else what its revision is now, or was when it was last asked
        for if there is no network. The known parts, or none."""
        commit = str(known.get("commit") if known else self._revision)
        if COMMIT.fullmatch(commit):
            self.commit = commit
            return [str(part) for part in known.get("parts") or () if part] if known else []
        api, where = self._hub.HfApi(), self._where | {"revision": self._revision}
        try:
            self.about(self._revision)
            self.commit = api.resolve_revision(**where).resolved
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500:  # the Hub has answered: nothing else counts
                raise
            with suppress(self._errors.RevisionResolutionError):
                self.commit = api.resolve_revision(**where, local_files_only=True).resolved
            if not self.commit:
                raise
        return []

    def about(self, revision: str | None) -> Any:
        """What the Hub says of the repository. It fails soon where there is no network; downloads, after minutes."""
        return self._hub.HfApi().repo_info(**self._where, revision=revision, timeout=TIMEOUT_S)

    def files(self) -> list[str]:
        """Paths of all files; without network, of those in the cache."""
        where = self._where | {"revision": self.commit}
        with suppress(self._errors.CachedRepoTreeNotFoundError):
            return [file.path for file in self._hub.get_cached_repo_tree(**where)]
        try:
            return [file.rfilename for file in self.about(self.commit).siblings or ()]
        except Exception:  # of the network, if the cache does not help
            with suppress(self._errors.LocalEntryNotFoundError):
                folder = Path(self._hub.snapshot_download(**where, local_files_only=True))
                return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
            raise

    def download(self, files: Sequence[str]) -> Path:
        """The snapshot's folder, which holds these files."""
        where = self._where | {"revision": self.commit}
        patterns = [glob.escape(file) for file in files]
        with suppress(self._errors.LocalEntryNotFoundError):
            folder = Path(self._hub.snapshot_download(**where, allow_patterns=patterns, local_files_only=True))
            if all((folder / file).is_file() for file in files):
                return folder
        self.about(self.commit)
        folder = Path(self._hub.snapshot_download(**where, allow_patterns=patterns))
        if lost := [file for file in files if not (folder / file).is_file()]:
            raise UserError(f"{self.name}: {lost[0]} is not in the cache, and the Hub cannot be reached")
        return folder


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """UserError for whatever goes wrong within, with the name and the reason."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # of two libraries, their HTTP client and the disk, each with its own kinds
        raise UserError(f"{name}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    errors, token = _library("huggingface_hub.errors"), "HF_TOKEN holds your token"
    if isinstance(error, (errors.RevisionResolutionError, errors.LocalEntryNotFoundError)) and error.__cause__:
        return _reason(error.__cause__)
    kinds = (
        ((errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError), "not in the cache, and HF_HUB_OFFLINE is set"),
        (errors.GatedRepoError, f"access is gated: ask for it on the repository's page; {token}"),
        (errors.RepositoryNotFoundError, f"no such repository, or a private one; {token}"),
        (errors.RevisionNotFoundError, "no such revision"),
    )
    for kind, why in kinds:
        if isinstance(error, kind):
            return why
    words = " ".join(str(error).split())
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answers {error.response.status_code}" + (f"; {token}" if "40" in words[:20] else "")
    if type(error).__module__.startswith("httpx"):
        return f"not in the cache, and the Hub cannot be reached ({words or type(error).__name__})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return words[:300] or type(error).__name__


def _library(name: str) -> Any:
    """A library of the extra [hub]; it draws its bars on a terminal alone, and once."""
    try:
        library = importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{name.partition('.')[0]} is not installed; pip install thinkmid[hub]") from None
    if "." not in name and not (_is_first() and sys.stderr.isatty()):
        importlib.import_module(f"{name}.utils").disable_progress_bars()
    return library


def _few(files: Sequence[str]) -> str:
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return f"{', '.join(files[:5])}{more}" if files else "nothing of use"


def _is_first() -> bool:
    return not int(os.environ.get("RANK", 0))
