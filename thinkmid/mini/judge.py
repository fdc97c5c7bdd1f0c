"""Train a judge for the miniature world, `python -m thinkmid.mini.judge --out runs/mini-judge/export`.

It starts from the base model of the miniature and learns to answer the template "short" as rollout/judge/rule.py does,
in its next token.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

from thinkmid import config
from thinkmid.errors import UserError
from thinkmid.mini.pairs import draw_pairs, read_references
from thinkmid.tokenizer import Tokenizer

PROGRAM = "thinkmid.mini.judge"
BATCH = 32  # pairs of one step, of 50 to 90 tokens each
HELD_OUT = 0.1  # share of the references that are not trained on
NUM_HELD_OUT = 2000  # pairs


def main(argv: list[str]) -> None:
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", formatter_class=show_defaults)
    parser.add_argument("--base", type=Path, default=Path("runs/mini-base/export"), help="model to start from")
    parser.add_argument("--data", type=Path, default=Path("runs/mini-data"), help="folder of the miniature world")
    parser.add_argument("--out", type=Path, default=Path("runs/mini-judge/export"), help="folder to write")
    parser.add_argument("--steps", type=int, default=900, help=f"of {BATCH} pairs each")
    parser.add_argument("--seed", type=int, default=0, help="everything is drawn from it")
    args = parser.parse_args(argv)

    from thinkmid.mini import judge_training as training
    from thinkmid.model import weights

    if args.steps < 1:
        raise UserError(f"--steps: expected 1 or more, got {args.steps}")
    if os.path.realpath(args.out) == os.path.realpath(args.base):
        raise UserError(f"--out {args.out} is the model to start from")
    weights.replaceable(args.out).parent.mkdir(parents=True, exist_ok=True)  # now, not after training
    tokenizer = Tokenizer.load(args.base)
    references = read_references(args.data, tokenizer)
    random.Random(f"held out {args.seed}").shuffle(references)
    num_held_out = max(1, int(HELD_OUT * len(references)))
    pairs = draw_pairs(references[num_held_out:], tokenizer, args.steps * BATCH, args.seed)
    held_out = draw_pairs(references[:num_held_out], tokenizer, NUM_HELD_OUT, f"held out {args.seed}")
    share = sum(pair.label for pair in pairs) / len(pairs)
    print(f"{len(references)} references, {num_held_out} held out; {len(pairs)} pairs, {share:.0%} of them yes")
    model, encoder = weights.load_model(args.base).train(), training.Encoder(tokenizer, args.seed)
    training.train(model, encoder, pairs, args.steps)
    p_yes = training.answers(model, encoder, held_out)
    for name, (right, n) in training.accuracy(held_out, p_yes).items():
        print(f"held out  {name:15s} {right:6.1%} of {n}")
    weights.save(args.out, model.cfg, weights.stream(model), dtype="float32", extra_files=args.base)
    print(f"{args.out} holds the judge")


if __name__ == "__main__":
    config.run(main)
