"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face folder."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from thinkmid.errors import UserError
from thinkmid.files import Row
from thinkmid.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # types of tokens: special; kept whole, but ordinary
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's word: GGUF's
ENDS = ("eos", "eot", "eom")  # tokens that end a turn; the first counts as the end of a text too
# what parts a text into words; %s: how many digits stand together
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = SPLIT % "{1,3}", SPLIT % ""
# by tokenizer.ggml.pre. "": the words of GPT-2
WORDS = {
    "gpt-2": "", "smollm": "", "llama3": LLAMA3, "llama-v3": LLAMA3, "llama-bpe": LLAMA3, "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}  # fmt: skip


def write(folder: Path, path: Path, meta: Row) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json from the metadata of the file at path.

    UserError names the key that is missing, damaged or not supported.
    """
    tokens, kind = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or len(set(tokens)) < len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.tokens is missing, or a token stands twice in it")
    ids = {key: token_id(path, meta, name) for key, name in NAMED.items()}
    special = {f"{key}_token": tokens[i] for key, i in ids.items() if i is not None}
    if kind == "gpt2":
        begin = meta.get("tokenizer.ggml.add_bos_token", WORDS.get(meta.get("tokenizer.ggml.pre", "")) == LLAMA3)
        spec = byte_level(path, meta, special.get("bos_token") if begin else None)
    elif kind == "llama":
        begin = meta.get("tokenizer.ggml.add_bos_token", True)
        spec = sentencepiece(path)
    else:
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 and llama are")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", **special, "add_bos_token": bool(begin),
        "clean_up_tokenization_spaces": False, "chat_template": meta.get("tokenizer.chat_template"),
    }  # fmt: skip
    ends = end_ids(path, meta)
    eos = list(ends) if len(ends) != 1 else ends[0]
    generation = {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["pad"]}
    for name, value in (("tokenizer", spec), ("tokenizer_config", about), ("generation_config", generation)):
        said = {key: part for key, part in value.items() if part not in (None, [])}
        (folder / f"{name}.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        Tokenizer.load(folder)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{folder}/')}") from None


def end_ids(path: Path, meta: Row) -> tuple[int, ...]:
    """Ids that end a text or a turn, the text's first."""
    ids = [token_id(path, meta, name) for name in ENDS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def token_id(path: Path, meta: Row, name: str) -> int | None:
    """The id that the metadata give a name such as "bos", None without it."""
    i, num_tokens = meta.get(key := f"tokenizer.ggml.{name}_token_id"), len(meta.get("tokenizer.ggml.tokens") or ())
    if i is not None and not (type(i) is int and 0 <= i < num_tokens):
        raise UserError(f"{path}: {key} {i!r} is none of the {num_tokens} tokens")
    return i


def byte_level(path: Path, meta: Row, begin: str | None) -> Row:
    """tokenizer.json of byte-level BPE, its words those of tokenizer.ggml.pre. begin: the token before every text.

    All control tokens are special, whatever characters they are made of.
    """
    pre, merges = meta.get("tokenizer.ggml.pre"), meta.get("tokenizer.ggml.merges")
    tokens, types = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type")
    if pre not in WORDS:
        raise UserError(f"{path}: tokenizer.ggml.pre {pre!r} is not supported; {', '.join(WORDS)} are")
    if not isinstance(merges, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise UserError(f"{path}: tokenizer.ggml.merges or token_type is missing or damaged")
    words = [{"type": "Split", "pattern": {"Regex": WORDS[pre]}, "behavior": "Isolated", "invert": False}]
    digits = [{"type": "Digits", "individual_digits": True}]
    first = words if WORDS[pre] else digits if pre == "smollm" else []
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not WORDS[pre]}
    vocab = {token: i for i, token in enumerate(tokens)}
    kept = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[token], "content": token, **kept, "special": kind == CONTROL}
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, to_bytes]},
        "post_processor": None if begin is None else begins_with(begin, vocab[begin]),
        "decoder": to_bytes,
        # a word that is a token as it stands needs no merges in Llama 3
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": WORDS[pre] == LLAMA3},
    }


def begins_with(token: str, i: int) -> Row:
    """What puts a token in front of every text."""
    named, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [named, text, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    known = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [named, text], "pair": pair, "special_tokens": known}


def sentencepiece(path: Path) -> Row:
    """tokenizer.json of a SentencePiece vocabulary, whose merges transformers recovers from its scores."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise UserError(
            f"{path}: its SentencePiece vocabulary needs transformers; pip install thinkmid[gguf]"
        ) from None
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    spec: Row = json.loads(tokenizer.backend_tokenizer.to_str())
    return spec
