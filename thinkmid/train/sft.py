"""SFT mid-training: next-token loss over whole sequences, text and thoughts alike, packed.

torchrun --nproc-per-node 2 -m thinkmid.train.sft configs/mini-sft.toml
"""

from __future__ import annotations

from thinkmid import config
from thinkmid.train.config import SFTConfig


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(SFTConfig, argv, prog="thinkmid sft", description=__doc__)

    from thinkmid.train import supervised

    return supervised.plan(cfg) if dry_run else supervised.run(cfg)


if __name__ == "__main__":
    config.run(main)
