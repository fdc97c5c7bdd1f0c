"""The Hugging Face Hub, as the place where an export goes."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from thinkmid.errors import UserError

LIBRARY = "huggingface_hub"
# those of an older export that was cut into other files must not stay beside the new ones
WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_push(repository: str) -> None:
    """UserError where a push is bound to fail, before a run begins that would end with it."""
    if not repository:
        return
    if find_spec(LIBRARY) is None:
        raise UserError(f"export.push {repository}: needs {LIBRARY}: pip install 'thinkmid[hub]'")
    if import_module(LIBRARY).get_token() is None:
        raise UserError(f"export.push {repository}: no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Puts a folder's files into a repository, which is made where there is none, by one commit; returns its address.

    Other files that are there stay, but for weights. UserError: it could not be done, in one line.
    """
    library = import_module(LIBRARY)
    if not sys.stderr.isatty():
        import_module(f"{LIBRARY}.utils").disable_progress_bars()
    hub = library.HfApi()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    changes = [library.CommitOperationAdd(name, path) for name, path in files.items()]
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        stale = [name for name in hub.list_repo_files(repository) if name.endswith(WEIGHTS) and name not in files]
        changes += map(library.CommitOperationDelete, stale)
        # one commit for all: upload_folder makes several, and an interrupted one would leave two models mixed
        done = hub.create_commit(repository, changes, commit_message="Export by thinkmid")
    except Exception as error:  # of the library, of its HTTP client, of the system; the export is whole whatever it is
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error
    return str(done.commit_url)
