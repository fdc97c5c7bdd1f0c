"""Rollout: the native engine against transformers.generate, same weights, fp32, same threads, same process.

    python -m benchmarks.rollout --json

Both draw exactly --new tokens for each of prompts x siblings sequences at temperature 1. transformers gets what it is
made for: all sequences as one batch of equal lengths, no padding, its own KV cache, SDPA attention, no stopping rule.
It computes no log-probs; the native engine does.
"""

from __future__ import annotations

import tempfile
import warnings

import torch

from benchmarks import common
from thinkmid.model import weights
from thinkmid.rollout.engine import Sampling, collect
from thinkmid.rollout.native import NativeEngine
from thinkmid.text import Text
from thinkmid.types import Prompt

GATE_TOKENS = 24  # greedy tokens that must agree before anything is timed


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--siblings", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens drawn for each sequence")
    args = parser.parse_args()
    cfg = common.shape(args.layers, args.width)
    model = common.random_model(cfg)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, cfg.vocab, (args.prompts, args.prefix), generator=rng)  # (P, p)
    with tempfile.TemporaryDirectory() as folder:
        peer = load_peer(folder, cfg, model)
    engine = NativeEngine(cfg, endless(cfg.vocab))
    engine.load_weights(weights.stream(model), 0)

    if (differing := disagreement(engine, peer, tokens)) is not None:
        return common.refuse(f"greedy tokens of prompt {differing} differ between the engines")
    batch = tokens.repeat_interleave(args.siblings, 0)  # (P*G, p)
    seconds = common.interleave(
        {
            "native": lambda: native(engine, tokens, args.siblings, args.new, 1.0),
            "transformers.generate": lambda: generate(peer, batch, args.new, do_sample=True),
        },
        args.rounds,
    )
    num = len(batch) * args.new
    floor = args.new * common.gemms_s(cfg, len(batch), len(batch)) + common.gemms_s(cfg, tokens.numel(), 0)
    speed = {name: num / sorted(s)[len(s) // 2] for name, s in seconds.items()}
    gain = common.ratio(seconds["transformers.generate"], seconds["native"])
    lines = [f"  {name:<34} {x:8.0f} tokens/s" for name, x in {"floor (matrix products)": num / floor, **speed}.items()]
    lines.append(f"  native is {gain['median']:.2f} times as fast ({gain['low']:.2f} to {gain['high']:.2f}); target 5")
    title = (
        f"rollout  L={cfg.layers} D={cfg.width} V={cfg.vocab} fp32  {args.prompts} prompts of {args.prefix} tokens x "
        f"{args.siblings} siblings, {args.new} new each"
    )
    result = {"tokens": num, "floor_s": floor, "tokens_per_s": speed, "ratio": gain, "target": 5}
    common.report(title, seconds, lines, result, only_json=args.json)
    return 0


def endless(vocab: int) -> Text:
    """A vocabulary in which no token ends a sequence or belongs to a tag: every sequence gets its full length."""
    return Text(tokenizer=None, pieces=[b"."] * vocab, eos_ids=(), bos_id=None, open_ids=[], close_ids=[0])


def load_peer(folder, cfg, model):
    import transformers

    # its advice on flags that do not apply here would stand in the middle of the table
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    weights.save(f"{folder}/peer", cfg, weights.stream(model), dtype=torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/peer", dtype=torch.float32, attn_implementation="sdpa"
    )
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


def native(engine, tokens, num_siblings, num_new, temperature):
    """(B, new) by the native engine."""
    prompts = [Prompt(id=str(p), tokens=row) for p, row in enumerate(tokens.tolist())]
    seeds_P_G = [[p * num_siblings + g for g in range(num_siblings)] for p in range(len(prompts))]
    sampling = Sampling(temperature=temperature, max_think=num_new, max_suffix=0)
    groups = collect(engine, prompts, seeds_P_G, sampling)
    drawn = [s.tokens for group in groups for s in group.samples]
    assert all(len(x) == num_new for x in drawn), f"the native engine drew {min(map(len, drawn))}, not {num_new}"
    return torch.tensor([x.tolist() for x in drawn])


def disagreement(engine, peer, tokens) -> int | None:
    """The first prompt whose greedy tokens differ, None if all agree."""
    same = native(engine, tokens, 1, GATE_TOKENS, 0.0) == generate(peer, tokens, GATE_TOKENS, do_sample=False)
    return None if same.all() else int((~same.all(1)).nonzero()[0])


if __name__ == "__main__":
    raise SystemExit(main())
