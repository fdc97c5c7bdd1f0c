"""How large the session's cases are: one H100, and a rehearsal of a few seconds on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import shapes
from thinkmid.model.transformer import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """Groups of one layout: a prefix of P tokens, G siblings of R tokens each."""

    prefix: int
    siblings: int
    reply: int
    groups: int = 1

    @property
    def label(self) -> str:
        return f"P={self.prefix} G={self.siblings} R={self.reply}"

    def tokens(self, shared: bool = True) -> int:
        """Trunk tokens; the last token of a reply predicts nothing and is left out."""
        copies = 1 if shared else self.siblings
        return self.groups * (copies * self.prefix + self.siblings * (self.reply - 1))

    @property
    def rows(self) -> int:
        """Tokens that carry loss."""
        return self.groups * self.siblings * self.reply

    def pairs(self, shared: bool = True) -> float:
        """Query-key pairs of causal attention."""
        p, n = self.prefix, self.reply - 1
        return self.groups * ((1 if shared else self.siblings) * p * p / 2 + self.siblings * (n * p + n * n / 2))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Every number that a section needs."""

    square: int  # side of the ceilings' matrix product
    copy_bytes: int
    upload_bytes: int
    attention: tuple[Family, ...]
    heads: tuple[int, int, int]  # H, K, C of the attention cases
    wide: ModelConfig  # its width in whole training steps; layers are those of depths
    depths: tuple[int, int]
    pack: Family  # one pack of about 8,192 tokens for the wide model
    pack_tokens: int
    small: ModelConfig
    rl: Family
    rl_pack_tokens: int
    micro_batch: int  # sequences of the padded baseline in one forward
    head: tuple[int, int, int]  # N, D, V
    live: float  # share of the head's rows with an advantage
    rollout: Family  # reply: new tokens of each sample
    rollout_steps: int
    mini_steps: tuple[int, int, int]  # of the miniature's base, SFT and RLMT
    repeats: int
    compile_backend: str
    tests_s: float  # seconds that tests/gpu may take
    test_workers: int = 1  # processes that share them


H100 = Sizes(
    square=8192, copy_bytes=4 << 30, upload_bytes=256 << 20,
    attention=(Family(prefix=512, siblings=30, reply=255), Family(prefix=1024, siblings=16, reply=200)),
    heads=(32, 8, 128),
    wide=shapes.LLAMA3_8B, depths=(4, 8), pack=Family(prefix=1024, siblings=8, reply=896), pack_tokens=8192,
    small=shapes.LLAMA32_1B, rl=Family(prefix=512, siblings=32, reply=255, groups=4), rl_pack_tokens=17_408,
    micro_batch=16, head=(32_768, 4096, 128_256), live=0.56,
    rollout=Family(prefix=512, siblings=32, reply=128, groups=8), rollout_steps=3, mini_steps=(20, 40, 6),
    repeats=5, compile_backend="inductor", tests_s=75, test_workers=4,
)  # fmt: skip
TOY = Sizes(
    square=128, copy_bytes=1 << 20, upload_bytes=1 << 20,
    attention=(Family(prefix=24, siblings=3, reply=9), Family(prefix=17, siblings=2, reply=5)),
    heads=(4, 2, 16),
    wide=shapes.TOY_WIDE, depths=(1, 2), pack=Family(prefix=24, siblings=3, reply=17), pack_tokens=80,
    small=shapes.TOY_SMALL, rl=Family(prefix=16, siblings=4, reply=9, groups=4), rl_pack_tokens=64,
    micro_batch=4, head=(256, 32, 512), live=0.56,
    rollout=Family(prefix=12, siblings=4, reply=8, groups=2), rollout_steps=2, mini_steps=(2, 2, 1),
    repeats=2, compile_backend="eager", tests_s=250,
)  # fmt: skip
