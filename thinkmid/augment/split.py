"""Which documents are for SFT, for RL, held out or left out: decided by hash, checked by n-grams, written down.

split/documents.jsonl   {"id", "sha256", "split"} of every document in source order; "dropped" says why it is left out
split/manifest.json     counts, settings, source files, sha256 of documents.jsonl; written last
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thinkmid.data.source import Document, data_files, left_out, read_documents, read_rows
from thinkmid.errors import UserError, at_least
from thinkmid.files import Row, is_count, locked, write_whole

SPLITS = ("heldout", "rl", "sft", "control")  # of two near-duplicates that are apart, the one named earlier stays
ANNOTATED = SPLITS[:3]
SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts in which each character counts as a word
WORD = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
LISTED = 3  # names that stand for each reason why documents are left out
Hashes = NDArray[np.uint64]
Pools = dict[str, dict[int, Hashes]]  # {evaluation file: {words of an n-gram: sorted hashes}}
PRIME = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of the documents, and what is left out of them."""

    sft: float = 0.495
    rl: float = 0.495
    heldout: float = 0.01
    control: float = 0.0  # never annotated: fills the raw control up to the tokens of the annotated SFT half
    seed: int = 0
    ngram: int = 13  # words of the n-grams that are compared; case and punctuation do not count
    near: float = 0.5  # a document is left out if this share of its n-grams stands in another split; 0: no check
    sample: int = 1  # keep one n-gram in so many for that check: 8 bytes each; raise it for billions of words
    evals: tuple[str, ...] = ()  # evaluation sets: a document that shares an n-gram with one is left out
    eval_fields: tuple[str, ...] = ("question", "problem", "text")  # of their rows, those that are there
    eval_words: int = 8  # an evaluation text shorter than ngram is looked for whole; with fewer words than this, not

    def __post_init__(self) -> None:
        shares = (self.sft, self.rl, self.heldout, self.control)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"sft, rl, heldout and control must be 0 or more and sum to 1, got {shares}")
        at_least(self, seed=0, ngram=1, sample=1, eval_words=1)
        if not 0 <= self.near <= 1:
            raise ValueError(f"near must lie in [0, 1], got {self.near}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The decision, as far as the annotator needs it."""

    dropped: frozenset[str]  # keys of documents that are left out
    left_out: dict[str, Row]  # {reason: {"count": of documents, "first": names of the first ones}}
    documents: int  # read, the ones left out included


def ensure(folder: Path, paths: tuple[str, ...], cfg: SplitConfig, column: str = "text") -> Split:
    """The split in folder; made if it is not there, while other processes wait.

    UserError: it was made with other settings or from other files.
    """
    # [file, bytes] of every file that is read
    read = [[str(file), file.stat().st_size] for path in (*paths, *cfg.evals) for file in data_files(Path(path))]
    wanted = {"settings": json.loads(json.dumps(asdict(cfg))), "sources": read}
    with locked(folder / "split" / ".lock"):
        manifest = read_manifest(folder / "split")
        if manifest is None:
            manifest = make(folder / "split", read_documents(paths, column), cfg, wanted)
    if manifest | wanted != manifest:
        raise UserError(f"{folder}/split was made with other settings or from other files; name another run.folder")
    with (folder / "split" / "documents.jsonl").open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if "dropped" in row]
    ids: dict[str, list[str]] = {}
    for row in rows:
        ids.setdefault(row["dropped"], []).append(row["id"])
    return Split(
        # a copy has the key of a document before it, which may stay
        dropped=frozenset(row["sha256"] for row in rows if row["dropped"] != "copy"),
        left_out={reason: {"count": len(of_it), "first": of_it[:LISTED]} for reason, of_it in ids.items()},
        documents=manifest["documents"],
    )


def read_manifest(folder: Path) -> Row | None:
    """The manifest, if it is there and the list is what it says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        listed = (folder / "documents.jsonl").read_bytes()
    except (OSError, ValueError, RecursionError):
        return None
    good = isinstance(manifest, dict) and is_count(manifest.get("documents"))
    return manifest if good and sha256(listed).hexdigest() == manifest.get("sha256") else None


def make(folder: Path, documents: Iterable[Document], cfg: SplitConfig, wanted: Row) -> Row:
    pools, about = evaluation(cfg)
    rows, kept = first_pass(documents, cfg, pools)
    near_duplicates(rows, kept, cfg)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    dropped = Counter(row["dropped"] for row in rows if "dropped" in row)
    for name, counts in about.items():
        counts["documents"] = dropped.get(f"evaluation: {name}", 0)
    manifest = wanted | {
        "documents": len(rows),
        "splits": {name: sum(row["split"] == name and "dropped" not in row for row in rows) for name in SPLITS},
        "dropped": dict(sorted(dropped.items())),
        "evaluation": about,
        "sha256": sha256(lines.encode()).hexdigest(),
    }
    write_whole(folder / "documents.jsonl", lines)
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


def first_pass(documents: Iterable[Document], cfg: SplitConfig, pools: Pools) -> tuple[list[Row], dict[int, Hashes]]:
    """A row for each document, and the sampled n-grams of those that are still in, by row number."""
    rows: list[Row] = []
    kept: dict[int, Hashes] = {}
    seen: dict[bytes, str] = {}
    for doc in documents:
        row = {"id": doc.id, "sha256": key(doc.text), "split": assign(doc.text, cfg)}
        fold, words = folded(doc.text), split_words(doc.text)
        if fold in seen:
            row["dropped"] = "copy" if seen[fold] == row["sha256"] else "same words"
        elif found := overlap(words, pools):
            row["dropped"] = f"evaluation: {found}"
        elif cfg.near:
            hashes = grams(words, cfg.ngram)
            kept[len(rows)] = np.unique(hashes[hashes % np.uint64(cfg.sample) == 0])
        seen.setdefault(fold, row["sha256"])
        rows.append(row)
    return rows, kept


def near_duplicates(rows: list[Row], kept: dict[int, Hashes], cfg: SplitConfig) -> None:
    """Mark those whose n-grams stand, to the share cfg.near, in the documents of the splits named earlier in SPLITS."""
    pool = np.empty(0, np.uint64)
    for name in SPLITS:
        mine = [i for i in kept if rows[i]["split"] == name]
        for i in mine:
            if len(kept[i]) and among(kept[i], pool).mean() >= cfg.near:
                rows[i]["dropped"] = "near-duplicate"
        pool = np.unique(np.concatenate([pool, *(kept[i] for i in mine if "dropped" not in rows[i])]))


def evaluation(cfg: SplitConfig) -> tuple[Pools, dict[str, dict[str, int]]]:
    """{file: {words of an n-gram: sorted hashes}}, and for the manifest how many texts each file has.

    UserError names a row without any of cfg.eval_fields.
    """
    pools: Pools = {}
    about: dict[str, dict[str, int]] = {}
    for path in cfg.evals:
        if not data_files(Path(path)):
            raise UserError("; ".join([f"{path}: no file to read (split.evals)", *left_out([path])]))
    for file in (file for path in cfg.evals for file in data_files(Path(path))):
        found: dict[int, list[Hashes]] = {}
        about[str(file)] = counts = {"texts": 0, "too_short": 0}
        for where, row in read_rows([file]):
            texts = [row[name] for name in cfg.eval_fields if isinstance(row.get(name), str)]
            if not texts:
                raise UserError(f"{where}: none of {', '.join(cfg.eval_fields)} is a string here (split.eval_fields)")
            for words in map(split_words, texts):
                n = min(cfg.ngram, len(words))
                short = n < min(cfg.eval_words, cfg.ngram)
                counts["texts"] += 1
                counts["too_short"] += short
                if not short:
                    found.setdefault(n, []).append(grams(words, n))
        pools[str(file)] = {n: np.unique(np.concatenate(hashes)) for n, hashes in found.items()}
    return pools, about


def overlap(words: list[str], pools: Pools) -> str | None:
    """The first evaluation file that shares an n-gram with these words."""
    ids = word_ids(words)
    mine = {n: windows(ids, n) for n in {n for pool in pools.values() for n in pool} if n <= len(words)}
    for name, pool in pools.items():
        if any(among(mine[n], hashes).any() for n, hashes in pool.items() if n in mine):
            return name
    return None


def key(text: str) -> str:
    """What a document is called wherever it must be the same text exactly."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def folded(text: str) -> bytes:
    """Equal for texts that differ in case, white space and punctuation only."""
    words = " ".join(split_words(text)) or text
    return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def assign(text: str, cfg: SplitConfig) -> str:
    """The split of a text: depends on its words and the seed, on nothing else."""
    hashed = blake2b(folded(text), digest_size=8, key=str(cfg.seed).encode()[:64]).digest()
    draw = int.from_bytes(hashed, "little") / 2**64
    ends = (("sft", cfg.sft), ("rl", cfg.sft + cfg.rl), ("control", cfg.sft + cfg.rl + cfg.control))
    return next((name for name, end in ends if draw < end), "heldout")


def split_words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def grams(words: list[str], n: int) -> Hashes:
    """Hashes of all runs of n words, (max(1, W-n+1),) uint64; a shorter text is one run."""
    return windows(word_ids(words), min(n, len(words))) if words else np.empty(0, np.uint64)


def windows(ids: Hashes, n: int) -> Hashes:
    """Hashes of all runs of n >= 1 word ids, mixed so that their low bits may be sampled."""
    out = np.full(len(ids) - n + 1, n, np.uint64)
    for i in range(n):
        out = (out ^ ids[i : i + len(out)]) * PRIME
        out ^= out >> np.uint64(29)
    return out


def word_ids(words: list[str]) -> Hashes:
    return np.fromiter(map(word_id, words), np.uint64, len(words))


@lru_cache(1 << 20)
def word_id(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def among(hashes: Hashes, pool: Hashes) -> NDArray[np.bool_]:
    """Which of the hashes stand in the sorted pool."""
    if not len(pool):
        return np.zeros(len(hashes), bool)
    found: NDArray[np.bool_] = pool[np.minimum(np.searchsorted(pool, hashes), len(pool) - 1)] == hashes
    return found
