"""Rollout: our engines against transformers.generate, same weights, fp32, same threads, same process.

    python -m benchmarks.rollout --json
    .venv-vllm/bin/python -m benchmarks.rollout --engine vllm,native,transformers --json

All draw exactly --new tokens for each of prompts x siblings sequences at temperature 1. transformers gets what it is
made for: all sequences as one batch of equal lengths, no padding, its own KV cache, SDPA attention, no stopping rule.
It computes no log-probs; our engines do. vLLM gets its cache of prefixes, emptied before each round as after a sync,
and its compiled model. `bare vllm` is LLM.generate() on the same engine and requests: what our step loop adds.
"""

from __future__ import annotations

import tempfile
import warnings

import torch

from benchmarks import common
from thinkmid.model import weights
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import EngineConfig, Sampling
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt

GATE_TOKENS = 24  # greedy tokens that must agree before anything is timed


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--engine", default="native,transformers", help="of vllm, native, transformers; commas between")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--siblings", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens drawn for each sequence")
    args = parser.parse_args()
    names = args.engine.split(",")
    if unknown := set(names) - {"vllm", "native", "transformers"}:
        parser.error(f"--engine: {unknown.pop()!r} is none of vllm, native, transformers")
    cfg = common.shape(args.layers, args.width)
    model = common.random_model(cfg)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, cfg.vocab, (args.prompts, args.prefix), generator=rng)  # (P, p)
    batch = tokens.repeat_interleave(args.siblings, 0)  # (P*G, p)
    with tempfile.TemporaryDirectory() as folder:
        weights.save(f"{folder}/peer", cfg, weights.stream(model), dtype=torch.float32)
        greedy, contenders = {}, {}
        if "native" in names:
            ours = NativeEngine(cfg, endless(cfg.vocab))
            ours.load_weights(weights.stream(model), 0)
            greedy["native"] = lambda: draw(ours, tokens, 1, GATE_TOKENS, 0.0)
            contenders["native"] = lambda: draw(ours, tokens, args.siblings, args.new, 1.0)
        if "vllm" in names:
            engine = load_vllm(f"{folder}/peer", cfg, model, args.prefix + args.new, len(batch))
            greedy["vllm"] = lambda: draw(engine, tokens, 1, GATE_TOKENS, 0.0)
            contenders["vllm"] = lambda: draw(engine, tokens, args.siblings, args.new, 1.0)
            contenders["bare vllm"] = lambda: bare(engine, tokens, args.siblings, args.new)
        if "transformers" in names:
            peer = load_peer(f"{folder}/peer")
            greedy["transformers"] = lambda: generate(peer, tokens, GATE_TOKENS, do_sample=False)
            contenders["transformers.generate"] = lambda: generate(peer, batch, args.new, do_sample=True)
        if (differing := disagreement(greedy)) is not None:
            return common.refuse(differing)
        seconds = common.interleave(contenders, args.rounds)
    num = len(batch) * args.new
    floor = args.new * common.gemms_s(cfg, len(batch), len(batch)) + common.gemms_s(cfg, tokens.numel(), 0)
    speed = {name: num / sorted(s)[len(s) // 2] for name, s in seconds.items()}
    lines = [f"  {name:<34} {x:8.0f} tokens/s" for name, x in {"floor (matrix products)": num / floor, **speed}.items()]
    result = {"tokens": num, "floor_s": floor, "tokens_per_s": speed}
    pairs = [("native", "transformers.generate", 5), ("vllm", "transformers.generate", None), ("vllm", "native", None)]
    for fast, slow, target in [*pairs, ("vllm", "bare vllm", None)]:
        if {fast, slow} <= seconds.keys():
            gain = common.ratio(seconds[slow], seconds[fast])
            goal = f"; target {target}" if target else ""
            spread = f"({gain['low']:.2f} to {gain['high']:.2f})"
            lines.append(f"  {fast} is {gain['median']:.2f} times as fast as {slow} {spread}{goal}")
            result[f"{fast} / {slow}"] = gain
    title = (
        f"rollout  L={cfg.layers} D={cfg.width} V={cfg.vocab} fp32  {args.prompts} prompts of {args.prefix} tokens x "
        f"{args.siblings} siblings, {args.new} new each"
    )
    common.report(title, seconds, lines, result, only_json=args.json)
    return 0


def load_vllm(folder, cfg, model, max_len, rows):
    from thinkmid.rollout.engine.vllm import VllmEngine
    from thinkmid.run.ranks import start_ranks

    start_ranks()  # vLLM joins the trainer's process group
    config = EngineConfig(kind="vllm", kv_gb=2.0)
    engine = VllmEngine(folder, cfg, endless(cfg.vocab), config, max_len=max_len, rows=rows)
    engine.load_weights(weights.stream(model), 0)
    return engine


def bare(engine, tokens, num_siblings, num_new):
    """The same requests through vLLM's own front."""
    from vllm import SamplingParams

    engine.reset_cache()
    prompts = [{"prompt_token_ids": row} for row in tokens.tolist() for _ in range(num_siblings)]
    common_options = {"temperature": 1.0, "max_tokens": num_new, "logprobs": 0, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**common_options, seed=i) for i in range(len(prompts))]
    outputs = engine._llm.generate(prompts, params, use_tqdm=False)
    assert all(len(o.outputs[0].token_ids) == num_new for o in outputs)


def endless(vocab: int) -> Tokenizer:
    """A vocabulary in which no token ends a sequence or belongs to a tag: every sequence gets its full length."""
    return Tokenizer(tokenizer=None, pieces=[b"."] * vocab, eos_ids=(), bos_id=None, open_ids=[], close_ids=[0])


def load_peer(folder):
    import transformers

    # its advice on flags that do not apply here would stand in the middle of the table
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.eval()


@torch.inference_mode()
def generate(peer, batch, num_new, *, do_sample):
    """(B, new) by transformers."""
    draws = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    out = peer.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=num_new,
        do_sample=do_sample,
        use_cache=True,
        **draws,
    )
    assert out.shape[1] == batch.shape[1] + num_new, f"transformers drew {out.shape[1] - batch.shape[1]}, not {num_new}"
    return out[:, batch.shape[1] :]


def draw(engine, tokens, num_siblings, num_new, temperature):
    """(B, new) by one of our engines."""
    engine.reset_cache()
    prompts = [Prompt(id=str(p), tokens=row) for p, row in enumerate(tokens.tolist())]
    seeds_P_G = [[p * num_siblings + g for g in range(num_siblings)] for p in range(len(prompts))]
    sampling = Sampling(temperature=temperature, max_think=num_new, max_suffix=0)
    groups = common.collect(engine, prompts, seeds_P_G, sampling)
    drawn = [s.tokens for group in groups for s in group.samples]
    assert all(len(x) == num_new for x in drawn), f"the engine drew {min(map(len, drawn))}, not {num_new}"
    return torch.tensor([x.tolist() for x in drawn])


def disagreement(greedy) -> str | None:
    """Which two differ in greedy tokens, and where; None if all agree."""
    drawn = {name: run() for name, run in greedy.items()}
    first, *others = drawn
    for other in others:
        differing = (drawn[first] != drawn[other]).any(1).nonzero()
        if len(differing):
            return f"greedy tokens of prompt {int(differing[0])} differ between {first} and {other}"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
