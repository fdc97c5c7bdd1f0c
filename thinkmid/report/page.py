"""One HTML file that asks for nothing: style, script, pictures and samples are in it, a policy forbids others."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkmid.report.pictures import Picture
from thinkmid.report.text import escape, json_block

HERE = Path(__file__).parent


def page(sections: Sequence[tuple[str, str, str]], groups: list[dict[str, Any]], notes: Sequence[str]) -> str:
    """sections: (id, title, HTML) in reading order; groups, notes: of browse.gather. The whole file."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<a href="#{id}">{title}</a>' for id, title, _ in sections)
    parts = "".join(f'<section id="{id}"><h2>{title}</h2>{body}</section>\n' for id, title, body in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>thinkmid report</title>
<style>{style}</style>
</head>
<body>
<header><h1>thinkmid report</h1><nav>{links}<a href="#browser">Samples</a></nav></header>
<main>
{parts}{browser(groups, notes)}
</main>
<script type="application/json" id="samples">{json_block(groups)}</script>
<script>{script}</script>
</body>
</html>
"""


def policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def pictures(drawn: Sequence[Picture]) -> str:
    return "".join(map(picture, drawn))


def picture(p: Picture) -> str:
    title, caption = escape(p.title), escape(p.caption)
    image = ""
    if p.path:
        data = base64.b64encode(p.path.read_bytes()).decode()
        image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    whole = f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return f"<details><summary>{title}</summary>{whole}</details>" if p.folded else f"<h3>{title}</h3>{whole}"


def browser(groups: Sequence[Any], notes: Sequence[str]) -> str:
    """What the script fills; the controls stay hidden without it."""
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    controls = CONTROLS if groups else "<p>No samples to show.</p>"
    return f"""<section id="browser"><h2>Samples</h2>
<p>Text in a framed box was written by a model or comes from data; everything outside the boxes is the report's own.
Characters that hide or reorder others are written out, as ⟨U+202E⟩.</p>
<details><summary>Which part of the samples is here</summary><ul class="notes">{lines}</ul></details>
<noscript><p>The samples need this page's own script, which is off; tables and pictures need none.</p></noscript>
{controls}</section>"""


CONTROLS = """<div id="controls" hidden>
<label>run <select id="by-run"></select></label>
<label>step or set <select id="by-where"></select></label>
<label>reward <select id="by-reward"><option value="">any</option><option value="1">1</option>
<option value="0">0</option><option value="between">other</option><option value="none">none</option></select></label>
<label>finish <select id="by-finish"></select></label>
<label>text <input id="by-text" type="search" autocomplete="off" spellcheck="false"></label>
<label><input id="diff" type="checkbox" checked> word diff</label>
<output id="count"></output>
</div>
<div id="groups"></div>
<button id="more" type="button" hidden>more</button>
"""
