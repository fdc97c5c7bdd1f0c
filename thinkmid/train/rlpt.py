"""RL post-training: questions, thoughts, answers; the reward is a rule's verdict on the answer.

torchrun --nproc-per-node 2 -m thinkmid.train.rlpt configs/mini-rlpt.toml
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from thinkmid import config
from thinkmid.data.wording import Wording
from thinkmid.run.interrupt import Stopped
from thinkmid.train.config import RLPTConfig


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLPTConfig, argv, prog="thinkmid rlpt", description=__doc__)

    from thinkmid.plan import memory
    from thinkmid.rollout.grade.grader import make_grader
    from thinkmid.rollout.grade.reward import AnswerReward
    from thinkmid.train import corpus, rl
    from thinkmid.train.job import Inputs, Source, fingerprint_of, open_job
    from thinkmid.train.sampler import Sampler

    source = Source.read(cfg.model.folder)
    wording = Wording.read(cfg.data, source.folder, source.tokenizer)
    source = replace(source, tokenizer=wording.tokenizer)
    max_prompt = rl.longest_prompt(cfg, source.model_cfg, cfg.data.max_prompt, len(source.tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, source.model_cfg, max_prompt, {})
    prompts, notes = corpus.read_questions(cfg.data, wording, max_prompt)
    longest = max(len(p.tokens) for p in prompts)
    grader = make_grader(cfg.verify)

    ranks, interrupt = rl.start(cfg, source)
    rl.check_room(cfg, longest)
    inputs = Inputs(data=fingerprint_of(prompts), num_steps=cfg.run.steps)
    job = open_job(cfg, source, inputs, ranks, interrupt)
    rl.headline(job, cfg, "RLPT", len(prompts), longest)
    for note in notes:
        job.log.say(f"note: {note}")
    try:
        engine = rl.open_policy(job, cfg, longest).engine
        thinks = source.tokenizer.opens(prompts[0].tokens)
        with closing(AnswerReward(source.tokenizer, grader, thinks=thinks, stops=cfg.drawn.stop)) as reward:
            rl.train(job, cfg, Sampler(job, cfg, engine, reward), prompts)
    except Stopped:
        return job.stop()
    finally:
        job.watch.rest()
    return rl.finish(job)


if __name__ == "__main__":
    config.run(main)
