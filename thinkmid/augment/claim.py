"""Whose run a folder holds: the settings and models that its output depends on, compared before anything is added."""

import json
from pathlib import Path
from typing import Any

from thinkmid import config
from thinkmid.augment.config import AnnotateConfig
from thinkmid.errors import UserError
from thinkmid.files import locked, read_json, write_whole
from thinkmid.run import identity
from thinkmid.tokenizer import Tokenizer

# by kind of annotator, the sections that the output depends on beside data, chunks, annotator and split
SECTIONS = {"rules": (), "openai": ("endpoint",), "engine": ("writer", "engine")}
# settings in there that it does not depend on; of folders of models the content counts
FREE = {
    "endpoint": ("url", "key_env", "workers", "timeout_s", "retries", "price_prompt", "price_written"),
    "writer": ("folder", "max_batch"),
    "engine": ("kv_gb", "sleep", "compile", "tensor_parallel", "check_every", "check_samples", "max_gap"),
    "chunks": ("tokenizer",),
    "annotator": ("retries",),
}
CUT = 2  # version of the rule that cuts documents into chunks: a run's journals name chunks by their number alone


def claim(cfg: AnnotateConfig, tokenizer: Tokenizer, model: dict[str, str]) -> None:
    """Make the folder this run's, or check that it is.

    model: hashes of the annotator's, by part, where it runs in this process. UserError: the folder is another
    program's; the first setting in which it is another run's; which part of the annotator's model or of the tokenizer
    of chunks has another content.
    """
    folder = Path(cfg.run.folder)
    path, saved = folder / "made-of.json", folder / "config.toml"
    if saved.exists() and not path.exists():
        raise UserError(f"{folder}: holds the run of another program; name another run.folder")
    ours = made_of(cfg, tokenizer, model)
    with locked(folder / ".lock"):
        if path.exists():
            check_same(cfg, ours, read_json(path))
        else:
            write_whole(path, json.dumps(ours, indent=1) + "\n")
        if not saved.exists():
            config.save_run(folder, cfg, config.environment())


def made_of(cfg: AnnotateConfig, tokenizer: Tokenizer, model: dict[str, str]) -> dict[str, Any]:
    """All that the output depends on, as JSON reads it back."""
    ours: dict[str, Any] = {"run.parts": cfg.run.parts, "chunks.cut": CUT, "writer.model": dict(model)}
    ours["chunks.tokenizer"] = {"tokenizer": tokenizer.digest}
    for section in ("data", "chunks", "annotator", "split", *SECTIONS[cfg.annotator.kind]):
        settings = vars(getattr(cfg, section)).items()
        ours |= {f"{section}.{key}": value for key, value in settings if key not in FREE.get(section, ())}
    found: dict[str, Any] = json.loads(json.dumps(ours))
    return found


def check_same(cfg: AnnotateConfig, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """UserError names the first difference."""
    key = min((key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)), default=None)
    if key is None:
        return
    was, now = theirs.get(key), ours.get(key)
    begun = f"was begun with {key} = {was}, now {now}"
    if key == "chunks.cut":
        begun = "was begun by a version that cut documents into other chunks"
    if home := {"chunks.tokenizer": cfg.chunks.tokenizer, "writer.model": cfg.writer.folder}.get(key):
        begun = "was begun by a version that did not know models by their content"
        if was:
            begun = f"was begun with another model or tokenizer (changed: {identity.changed(was, now or {}, home)})"
    raise UserError(f"{cfg.run.folder}: {begun}; name another run.folder")
