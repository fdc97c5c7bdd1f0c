"""Annotation: documents are split, cut into chunks, and an annotator puts thoughts between their sentences.

python -m thinkmid.augment.annotate CONFIG.toml
python -m thinkmid.augment.annotate CONFIG.toml --shard 3/8       one of eight jobs; under torchrun each rank is one

The folder then holds sft-, rl- and heldout-think/ and -raw/, and sft-control/, for data.paths of SFT and RLMT, and
report.json and manifest.json. The same command resumes a killed or interrupted run, with another number of jobs too.
"""

from thinkmid import config
from thinkmid.augment.config import AnnotateConfig
from thinkmid.errors import UserError
from thinkmid.run.interrupt import Interrupt


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(AnnotateConfig, argv, prog="thinkmid annotate", description=__doc__)
    if dry_run and cfg.annotator.kind != "engine":
        print(config.to_toml(cfg), end="")
        return 0

    # they import torch, which --help does without
    from thinkmid.augment import engine, job

    if dry_run:
        return engine.plan(cfg)
    interrupt = Interrupt()
    if cfg.annotator.kind == "openai":
        from thinkmid.augment.endpoint import EndpointAnnotator

        return job.run(cfg, EndpointAnnotator(cfg.annotator, cfg.endpoint, interrupt), interrupt)
    if cfg.annotator.kind == "engine":
        return job.run(cfg, engine.EngineAnnotator(cfg, interrupt), interrupt)
    raise UserError("annotator.kind 'rules' is for the miniature world: python -m thinkmid.mini.annotate")


if __name__ == "__main__":
    config.run(main)
