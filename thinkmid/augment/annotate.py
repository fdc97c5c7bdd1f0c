"""Annotation: documents are split, cut into chunks, and an annotator puts thoughts between their sentences.

python -m thinkmid.augment.annotate CONFIG.toml
python -m thinkmid.augment.annotate CONFIG.toml --shard 3/8       one of eight jobs; under torchrun each rank is one

The folder then holds sft-, rl- and heldout-think/ and -raw/, and sft-control/, for data.paths of SFT and RLMT, and
report.json and manifest.json. The same command resumes a killed or interrupted run, with another number of jobs too.
"""

from __future__ import annotations

from thinkmid import config
from thinkmid.augment import job
from thinkmid.augment.config import AnnotateConfig
from thinkmid.errors import UserError
from thinkmid.run.interrupt import Interrupt


def main(argv: list[str]) -> int:
    prog = "python -m thinkmid.augment.annotate"
    cfg, dry_run = config.load(AnnotateConfig, argv, prog=prog, description=__doc__ or "")
    if dry_run:
        return plan(cfg)
    interrupt = Interrupt()
    return job.run(cfg, make_annotator(cfg, interrupt), interrupt)


def make_annotator(cfg: AnnotateConfig, interrupt: Interrupt) -> job.Annotator:
    if cfg.annotator.kind == "openai":
        from thinkmid.augment.endpoint import EndpointAnnotator

        return EndpointAnnotator(cfg.annotator, cfg.endpoint, interrupt)
    if cfg.annotator.kind == "engine":
        from thinkmid.augment.engine import EngineAnnotator

        return EngineAnnotator(cfg, interrupt)
    raise UserError("annotator.kind 'rules' is for the miniature world: python -m thinkmid.mini.annotate")


def plan(cfg: AnnotateConfig) -> int:
    """The configuration, and what an engine in process needs."""
    if cfg.annotator.kind != "engine":
        print(config.to_toml(cfg), end="")
        return 0
    from thinkmid.augment.engine import longest
    from thinkmid.model.hf_config import read_config
    from thinkmid.plan import memory

    model_cfg = read_config(cfg.writer.folder)
    longest_prompt = longest(cfg, model_cfg.max_positions) - cfg.writer.max_tokens
    return memory.dry_run_engine(cfg, model_cfg, cfg.writer.sampling, longest_prompt)


if __name__ == "__main__":
    config.run(main)
