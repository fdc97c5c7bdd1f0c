"""Judge prompts by id, from templates.toml, with both texts made harmless between fences."""

from __future__ import annotations

import hashlib
import re
import tomllib
import unicodedata
from pathlib import Path

ANSWERS = (" yes", " no")  # the next token after a prompt

PARTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
TEMPLATES: dict[str, str] = {
    name: PARTS["rules"] + instruction + PARTS["fences"] + PARTS["questions"][name]
    for name, instruction in PARTS["instructions"].items()
} | {"short": PARTS["short"]}

BREAKS = re.compile(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
INVISIBLE = {"Cc", "Cf", "Cs", "Co"}  # controls, direction overrides and zero widths, surrogates, private use
RUN = re.compile(r"([-=#~*_`<>|＝－＃＜＞｜])\1{2,}")
TAG = re.compile(r"([<＜])(?=[/|｜\w])|(\[)(?=/?[A-Z_]{2,}\])|(?<=[|｜])(?=[>＞])")


def nonce(seed: int, reference: str, vote: int) -> str:
    """8 hex characters that the policy cannot know: a hash of the run's seed, the reference and the vote.

    Siblings share it, as they share their reference.
    """
    text = f"{vote}/{reference}".encode("utf-8", errors="surrogatepass")
    return hashlib.blake2b(text, key=str(seed).encode(), digest_size=4).hexdigest()


def render(template_id: str, candidate: str, reference: str, nonce: str) -> str:
    """The whole prompt of one of TEMPLATES."""
    template = TEMPLATES[template_id]
    candidate, reference = neutral(candidate, nonce), neutral(reference, nonce)
    if "\n{candidate}\n" not in template:  # what shares its line with others must not leave it
        candidate, reference = " ".join(candidate.split()), " ".join(reference.split())
    return template.format(candidate=candidate, reference=reference, nonce=nonce)


def neutral(text: str, nonce: str) -> str:
    """The text, changed so that it cannot end its fence, open another, or spell a special token. Its words stay."""
    text = BREAKS.sub("\n", text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in INVISIBLE)
    text = TAG.sub(r"\g<0> ", RUN.sub(r"\1\1", text))
    # between the halves of the nonce wherever it stands, overlapping or not, after all that could draw it together
    return re.sub(f"(?i)(?<={nonce[:4]})(?={nonce[4:]})", " ", text)
