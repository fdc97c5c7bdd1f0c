"""rlmt with vLLM inside, sabotaged on request: run.py WHAT FLAGS... Under torchrun or alone.

The reward is a coin that every policy can win, so that every step changes the weights. After the last step the engine's
greedy tokens are compared with the native engine's; the result is printed as one line of JSON.
"""

import json
import sys

import torch
import torch.distributed as dist

from thinkmid import config
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import Sampling, requests_of
from thinkmid.rollout.engine.slices import places
from thinkmid.rollout.engine.vllm import VllmEngine
from thinkmid.rollout.judge import reward
from thinkmid.rollout.verdict import Verdict
from thinkmid.train import rl, rlmt

SPOILT = 2  # first version whose sync goes wrong


class Coin:
    """1 or 0 by the parity of a sample's ids."""

    def __call__(self, prompt, sample):
        return Verdict(int(sample.tokens.sum() % 2), "coin")

    def finish(self, step):
        return {}

    def close(self):
        pass


def skip(load):
    def load_weights(self, named, version):
        if version < SPOILT:
            return load(self, named, version)
        self._phases.enter("load_weights")
        for _ in named:  # gathering is collective
            pass
        self.version, self._phases.loaded = version, True

    return load_weights


def stale_bucket(load):
    kept = {}

    def stream(named, version):
        for name, tensor in named:
            if "layers.1." in name and version >= SPOILT:
                yield name, kept[name]
            else:
                kept[name] = tensor.clone()
                yield name, tensor

    return lambda self, named, version: load(self, stream(named, version), version)


def transposed(load):
    def stream(named, version):
        for name, tensor in named:
            yield name, tensor.T.contiguous() if name.endswith("0.self_attn.q_proj.weight") and version else tensor

    return lambda self, named, version: load(self, stream(named, version), version)


def one_element(load):
    """Of one rank's slice of a matrix that ranks share: its last column lies on the last rank."""

    def stream(named, version):
        for name, tensor in named:
            if name == "model.layers.1.self_attn.o_proj.weight" and version >= SPOILT and dist.get_rank() == 1:
                tensor = tensor.clone()
                tensor[3, -1] += 1
            yield name, tensor

    return lambda self, named, version: load(self, stream(named, version), version)


def exchanged(load):
    """Two ranks hold each other's slice."""

    def stream(named, version):
        for name, tensor in named:
            other = name == "model.layers.0.mlp.down_proj.weight" and version >= SPOILT
            yield name, tensor.roll(tensor.shape[1] // 2, 1) if other else tensor

    return lambda self, named, version: load(self, stream(named, version), version)


def stale_cache(load):
    def load_weights(self, named, version):
        self.reset_cache = lambda: None
        load(self, named, version)
        del self.reset_cache

    return load_weights


SABOTAGE = {
    "skipped": skip,
    "bucket": stale_bucket,
    "transposed": transposed,
    "cache": stale_cache,
    "element": one_element,
    "exchanged": exchanged,
}


def common(a, b):
    """Tokens that two samples begin with alike."""
    pairs = zip(a.tokens.tolist(), b.tokens.tolist(), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)))


def is_tie(a, b, n):
    """Whether two greedy samples part where both tokens are as probable: the order of sums decides."""
    return n < min(len(a.tokens), len(b.tokens)) and abs(float(a.logp[n] - b.logp[n])) < 1e-5


def compared(train):
    """rl.train, then the engine against the native one, both with the weights of the end."""

    def run(job, cfg, sampler, prompts, *given):
        train(job, cfg, sampler, prompts, *given)
        engine = sampler._engine
        native = NativeEngine(job.model.cfg, job.tokenizer, dtype=cfg.engine.dtype)
        engine.wake_weights()
        for e in (engine, native):
            sums = weight_sync.push(job.model, e, cfg.run.steps, getattr(torch, cfg.engine.dtype))
            assert weight_sync.difference(e, sums, {}) == ""
        engine.wake_cache()
        greedy = Sampling(temperature=0, max_think=20, max_suffix=8)
        some = [prompts[i] for i in places(len(prompts), job.ranks, cfg.engine.tensor_parallel)[:8]]
        names = len(list(engine.named_weights()))
        asked = requests_of(some, [[0]] * len(some))
        drawn = [{r.key: s for step in e.generate(asked, greedy) for r, s in step} for e in (engine, native)]
        pairs = [(drawn[0][r.key], drawn[1][r.key]) for r in asked]
        triples = [(a, b, common(a, b)) for a, b in pairs]
        same = sum(n == len(a.tokens) == len(b.tokens) or is_tie(a, b, n) for a, b, n in triples)
        gap = max(float(abs(a.logp[:n] - b.logp[:n]).max()) for a, b, n in triples if n)
        row = {"rank": job.ranks.rank, "same": same, "of": len(pairs), "gap": gap, "names": names}
        print(json.dumps(row), flush=True)

    return run


def main():
    what, *argv = sys.argv[1:]
    rl.train = compared(rl.train)
    if what != "judged":
        reward.make_reward = lambda *_, **__: Coin()
    if what in SABOTAGE:
        VllmEngine.load_weights = SABOTAGE[what](VllmEngine.load_weights)
    config.run(rlmt.main, argv)


if __name__ == "__main__":
    main()
