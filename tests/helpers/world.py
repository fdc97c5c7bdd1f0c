"""A world small enough for tests: a corpus, a tokenizer and a model of a few thousand numbers, as files."""

import json
from pathlib import Path

TEXTS = [
    f"{a} has {n} coins. {b} finds {k} more.<think> {n} + {k} = {n + k}.</think> So there are {n + k} coins."
    for a, b in (("Ana", "Ben"), ("Cleo", "Dan"))
    for n in range(2, 8)
    for k in (1, 2)
]


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def sft_flags(folder: Path) -> list[str]:
    """A fresh start of two steps: its export is what the RL tests begin from."""
    config = folder / "sft.toml"
    config.write_text(
        f"""
[run]
folder = "{folder}/sft"
steps = 2
[fresh]
vocab = 300
width = 16
heads = 2
kv_heads = 1
head_dim = 8
ffn = 24
max_positions = 128
[data]
paths = ["{write_corpus(folder)}"]
batch_tokens = 256
pack_tokens = 256
max_len = 64
[optim]
lr = 1e-2
"""
    )
    return [str(config)]


def rlmt_flags(folder: Path, run: str, steps: int = 6) -> list[str]:
    config = folder / "rlmt.toml"
    config.write_text(
        f"""
[run]
steps = {steps}
save_every = 2
[model]
folder = "{folder}/sft/export"
[data]
paths = ["{folder}/corpus.jsonl"]
[sampling]
max_think = 6
max_suffix = 4
force_close = true
[batch]
prompts = 5
siblings = 4
pack_tokens = 256
[loss]
denom = 10
[optim]
lr = 1e-2
"""
    )
    return [str(config), "--run.folder", str(folder / run)]
