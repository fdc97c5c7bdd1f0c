"""One HTML file that asks for nothing: style, script, pictures and samples are in it, a policy forbids others."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from thinkmid.report.runs import number
from thinkmid.report.text import visible

HERE = Path(__file__).parent


def render(parts: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """The whole file.

    parts: what the templates of sweep, curves, runs, evaluations and paper show; a part that is false is left out.
    groups, notes: of browse.gather.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"figure": figure, "number": number, "mean": fmean, "sha256": sha256}
    # our own, not escaped: nothing of a run is in them
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    template = environment.get_template("page.html")
    return template.render(parts=parts, groups=groups, notes=notes, style=style, script=script)


def finalize(value: Any) -> Any:
    """Applied to every expression before it is escaped: text of any origin without hidden characters."""
    return value if isinstance(value, Markup) else visible(value)


def figure(value: float | None, form: str = "{:.4f}") -> str:
    return "–" if value is None else form.format(value)


def sha256(text: str) -> str:
    """As a content policy states it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
