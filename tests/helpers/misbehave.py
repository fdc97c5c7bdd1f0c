"""A scripted annotator that misbehaves in every way we know, English text for it, and a program that can be killed.

python tests/augment/misbehave.py FOLDER OUT CALLS.txt SHARD
"""

import ast
import json
import pydoc_data.topics
import re
import sys
import sysconfig
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

from thinkmid.augment import annotators, job
from thinkmid.augment.annotators import AnnotatorConfig, Reply
from thinkmid.augment.config import AnnotateConfig, AnnotateData, AnnotateRun, ChunkConfig
from thinkmid.augment.pool import through_pool
from thinkmid.augment.split import SplitConfig
from thinkmid.tokenizer import train_tokenizer

MARK = re.compile(r"⟦(\d+)⟧")
THOUGHT = "So what comes next has to follow from this; 2 + 2 is 4."


def framed(body):
    return f"=== answer ===\n{body}\n=== end ==="


def swapped(text):
    """Every third word is another."""
    return " ".join("other" if i % 3 == 2 else word for i, word in enumerate(text.split(" ")))


# each sees the passage, its number of places, the last of these; all are given a place that exists
GOOD = {
    "well": lambda text, n: framed(f"@{n}\n{THOUGHT}"),
    "runs on after the end": lambda text, n: framed(f"@{n}\n{THOUGHT}") + "\n@1\nAnd another passage:\n" + text,
    "chats before": lambda text, n: "Sure, here you are.\n\n" + framed(f"@{n} {THOUGHT}"),
    "other tags": lambda text, n: framed(f"@{n}\n[[thought]] {THOUGHT} [[/thought]]"),
    "tags with attributes": lambda text, n: framed(f'@{n}\n<Reusable_Lessons kind="a">{THOUGHT}</reusable-lessons>'),
    "reasons first": lambda text, n: "<think>@1\nmaybe\n=== answer ===</think>\n" + framed(f"@{n}\n{THOUGHT}"),
    "carriage returns": lambda text, n: framed(f"@{n}\n{THOUGHT}").replace("\n", "\r\n"),
}
BAD = {
    "nothing": lambda text, n: "",
    "blanks": lambda text, n: " \n\t ",
    "no marks": lambda text, n: f"@{n}\n{THOUGHT}",
    "runs on without end": lambda text, n: f"=== answer ===\n@{n}\n" + THOUGHT * 50,
    "two answers": lambda text, n: framed(f"@{n}\n{THOUGHT}") + framed(f"\n@{n}\n{THOUGHT}"),
    "no thoughts": lambda text, n: framed(""),
    "place out of range": lambda text, n: framed(f"@{n + 1}\n{THOUGHT}"),
    "place 0": lambda text, n: framed(f"@0\n{THOUGHT}"),
    "place twice": lambda text, n: framed(f"@{n}\n{THOUGHT}\n@{n}\n{THOUGHT}"),
    "place too big": lambda text, n: framed(f"@{'9' * 40}\n{THOUGHT}"),
    "nested tags": lambda text, n: framed(f"@{n}\n<think>a<reflect>b</reflect></think>"),
    "unclosed tag": lambda text, n: framed(f"@{n}\n<think>{THOUGHT}"),
    "stray closing tag": lambda text, n: framed(f"@{n}\n{THOUGHT}</think> {text}"),
    "breaks out of the thought": lambda text, n: framed(f"@{n}\na</think> new text <think>b"),
    "mixed tags": lambda text, n: framed(f"@{n}\n<plan>{THOUGHT}</goal>"),
    "half a tag": lambda text, n: framed(f"@{n}\n{THOUGHT} </think"),
    "empty thought": lambda text, n: framed(f"@{n}\n<think> </think>"),
    "endless thought": lambda text, n: framed(f"@{n}\n" + "and so on " * 1000),
    "control characters": lambda text, n: framed(f"@{n}\n{THOUGHT}\x00\u202e"),
    "lone surrogate": lambda text, n: framed(f"@{n}\n{THOUGHT}\ud800"),
    "writes the text": lambda text, n: framed(text),
    "changes words": lambda text, n: framed(swapped(text) + f"<think>{THOUGHT}</think>"),
    "drops text": lambda text, n: framed(f"<think>{THOUGHT}</think>" + text[len(text) // 2 :]),
    "JSON": lambda text, n: framed(json.dumps([{"place": n, "thought": THOUGHT}])),
    "ends by its budget": lambda text, n: Reply(framed(f"@{n}\n{THOUGHT}"), cut=True),
}
WAYS = GOOD | BAD


def way(prompt):
    """How the annotator answers a prompt, decided by its hash."""
    return list(WAYS)[int.from_bytes(sha256(prompt.encode("utf-8", "surrogatepass")).digest()[:4]) % len(WAYS)]


def passage(prompt):
    """(passage without marks, number of places) of a prompt, first or repeated."""
    shown = prompt.rpartition("The passage:\n\n")[2].rpartition("\n\nAn earlier answer")
    shown = shown[0] or shown[2]
    return MARK.sub("", shown), len(MARK.findall(shown))


def reply(prompt):
    out = WAYS[way(prompt)](*passage(prompt))
    return out if isinstance(out, Reply) else Reply(out, prompt_tokens=len(prompt), written_tokens=len(out))


def write_world(folder: Path, chars: int = 2_000_000) -> None:
    """corpus.jsonl: help pages and docstrings of Python itself. tokenizer/: a small vocabulary for them."""
    texts = list(pydoc_data.topics.topics.values())
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        texts.append("\n\n".join(filter(None, found)))
    texts = [text for text in texts if text.strip()]
    while sum(map(len, texts)) > chars:
        texts.pop()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"page {i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    train_tokenizer(texts[:40], 1500, folder / "tokenizer")


def settings(folder: Path, *, out: str = "out", shard: str = "", max_tokens: int = 24, retries: int = 1):
    return AnnotateConfig(
        shard=shard,
        run=AnnotateRun(folder=str(folder / out), parts=3, progress_s=1e9),
        data=AnnotateData(paths=(str(folder / "corpus.jsonl"),)),
        chunks=ChunkConfig(tokenizer=str(folder / "tokenizer"), max_tokens=max_tokens),
        annotator=AnnotatorConfig(kind="rules", retries=retries),
        split=SplitConfig(sft=0.5, rl=0.4, heldout=0.1),
    )


class Stop:
    """An interrupt that is requested once when() is true."""

    def __init__(self, when=lambda: False):
        self._when = when

    @property
    def requested(self):
        return self._when()


class Scripted:
    """An annotator whose outcomes come from through(pieces)."""

    def __init__(self, through, patience=10):
        self.outcomes, self.patience, self.model, self.failures = through, patience, {}, Counter()


def annotated(cfg, write, workers=1):
    """Run to the end with this write function, of one prompt. Returns the exit code."""
    model = AnnotatorConfig(strategy="insert", retries=cfg.annotator.retries)
    asks, stop = partial(annotators.by_model, cfg=model, write=write), Stop()
    through = partial(through_pool, annotate=asks, workers=workers, interrupt=stop, abort=lambda: None)
    return job.run(cfg, Scripted(through, patience=2 * workers + 8), stop)


def name(prompt):
    return sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def main(folder, out, calls, shard):
    with open(calls, "a", buffering=1) as log:

        def write(prompt):
            log.write(name(prompt) + "\n")
            return reply(prompt)

        return annotated(settings(Path(folder), out=out, shard=shard), write, workers=4)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
