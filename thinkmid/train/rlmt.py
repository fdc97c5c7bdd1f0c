"""RL mid-training: from a prefix the policy thinks, then continues the text; a judge compares with the real one.

torchrun --nproc-per-node 2 -m thinkmid.train.rlmt configs/mini-rlmt.toml
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from thinkmid import config
from thinkmid.rollout.engine.protocol import check_vllm
from thinkmid.rollout.judge import rule
from thinkmid.rollout.judge.config import question_tokens
from thinkmid.rollout.verdict import Reward
from thinkmid.run.interrupt import Stopped
from thinkmid.train.config import RLMTConfig

NOISE = "note: no reward looks at continuations, yet they are trained: loss.scope = 'thought' leaves that noise out"


def main(argv: list[str]) -> int:
    cfg, dry_run = config.load(RLMTConfig, argv, prog="thinkmid rlmt", description=__doc__)

    from thinkmid.plan import memory
    from thinkmid.rollout.judge import ask
    from thinkmid.rollout.judge import reward as rewards
    from thinkmid.train import corpus, likelihood, rl
    from thinkmid.train.job import Inputs, Source, fingerprint_of, open_job
    from thinkmid.train.sampler import Sampler

    source = Source.read(cfg.model.folder)
    max_prefix = rl.longest_prompt(cfg, source.model_cfg, cfg.data.max_prefix, len(source.tokenizer.close_ids))
    if dry_run:
        return memory.dry_run_rl(cfg, source.model_cfg, max_prefix, memory.judge_phase(cfg))
    is_judged = bool(cfg.reward.judge)
    judge = ask.read_judge(cfg.judge, cfg.engine, cfg.model.folder, source.model_cfg) if is_judged else None
    if judge and cfg.judge.kind == "resident" and cfg.judge.engine == "vllm":
        check_vllm()

    ranks, interrupt = rl.start(cfg, source)
    prompts, digest, held_out = corpus.read_prompts(cfg, source.tokenizer, max_prefix, ranks, interrupt)
    longest = max([prompts.longest, *(len(p.tokens) for p in held_out)])
    rl.check_room(cfg, longest)

    frozen = {"judge's weights": Path(cfg.judge.folder)} if judge else {}
    inputs = Inputs(data=digest, held_out=fingerprint_of(held_out), num_steps=cfg.run.steps, frozen=frozen)
    job = open_job(cfg, source, inputs, ranks, interrupt)
    rl.headline(job, cfg, "RLMT", len(prompts), prompts.longest)
    if not (is_judged or cfg.reward.prefix or cfg.loss.scope == "thought"):
        job.log.say(NOISE)
    validation = rl.Validation(prompts=held_out, every=cfg.data.val_every) if held_out else None
    try:
        policy = rl.open_policy(job, cfg, longest, question_tokens(cfg.judge, cfg.sampling.max_suffix) * is_judged)
        reward: Reward = rule.Unjudged()
        if is_judged:
            reward = rewards.make_reward(cfg.judge, policy, judge, prompts, seed=cfg.run.seed, note=job.log.note)
        scores = None if cfg.reward.is_verdict else likelihood.Scores(job, cfg)
        with closing(reward):
            rl.train(job, cfg, Sampler(job, cfg, policy.engine, reward, scores), prompts, validation)
    except Stopped:
        return job.stop()
    finally:
        job.watch.rest()
    return rl.finish(job)


if __name__ == "__main__":
    config.run(main)
