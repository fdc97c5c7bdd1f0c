"""A thought and a continuation of a text, drawn from a model's folder by the native engine.

thinkmid sample runs/mini-rlmt/export "The box contains 26 cards. At seven Eva takes out 4."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from thinkmid import config, hub
from thinkmid.data import templates
from thinkmid.data.wording import Wording, WordingConfig
from thinkmid.errors import UserError, plain
from thinkmid.eval.config import EvalSampling
from thinkmid.rollout.engine.protocol import Sampling, seed
from thinkmid.thoughts import before_stop
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Request, Sample


def main(argv: list[str]) -> int:
    args = parse(argv)
    folder = Path(hub.model(args.model))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a Hugging Face model folder")

    import torch

    from thinkmid.model import hf_config, weights
    from thinkmid.rollout.engine.native import NativeEngine

    model_cfg = hf_config.read_config(folder)
    wording = Wording.read(wording_of(args), folder, Tokenizer.load(folder))
    tokenizer, prompt = wording.tokenizer, Prompt(id="sample", tokens=wording.around(args.text))
    if warning := wording.warning("TEXT", args.text):
        print(warning)
    sampling = sampling_of(args)
    longest = len(prompt.tokens) + sampling.max_new
    if longest > model_cfg.max_positions:
        sizes = f"{len(prompt.tokens)} prompt tokens and {sampling.max_new} new ones"
        raise UserError(f"{sizes} exceed the model's context of {model_cfg.max_positions}; lower --max-think")
    engine = NativeEngine(model_cfg, tokenizer, device="cuda" if torch.cuda.is_available() else "cpu")
    engine.load_weights(weights.stream_folder(folder, "float32"), 0)
    requests = [Request(prompt=prompt, seed=seed(args.seed, 0, prompt.id, i), key=(i,)) for i in range(args.n)]
    drawn = {request.key[0]: sample for step in engine.generate(requests, sampling) for request, sample in step}
    for i in range(args.n):
        if args.n > 1:
            print(f"--- {i + 1} of {args.n}")
        show(drawn[i], tokenizer, opened=tokenizer.opens(prompt.tokens), stops=sampling.stop)
    return 0


def wording_of(args: argparse.Namespace) -> WordingConfig:
    """UserError names the flag that is out of range."""
    try:
        return WordingConfig(template=args.template, system=args.system)
    except ValueError as error:
        raise UserError(f"--template, --system: {error}") from None


def sampling_of(args: argparse.Namespace) -> Sampling:
    """UserError names the flag that is out of range."""
    try:
        stop = templates.stops(args.template, True, tuple(args.stop))
        budgets = {"max_think": args.max_think, "max_suffix": args.max_suffix}
        return EvalSampling(temperature=args.temperature, top_p=1.0, stop=stop, max_batch=args.n, **budgets)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def show(sample: Sample, tokenizer: Tokenizer, *, opened: bool = True, stops: Sequence[str] = ()) -> None:
    """Print a sample: thought and continuation up to a stop text, each under a line with its number of tokens.

    opened: its prompt opens the thought; otherwise what has no closing tag is a continuation.
    """
    split = tokenizer.split_at_close(sample.tokens)
    if not opened and not split.num_tags:
        print(f"continuation ({len(sample.tokens)} tokens, {sample.finish})")
        print(plain(before_stop(split.thought, stops)).strip())
        return
    closed = split.num_tags > 0
    print(f"thought ({sample.num_think} tokens{'' if closed else ', not closed'})")
    print(plain(split.thought).strip())
    print(f"continuation ({len(sample.tokens) - sample.num_think} tokens, {sample.finish})")
    if closed:
        print(plain(before_stop(split.suffix, stops)).strip())


def parse(argv: list[str]) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="thinkmid sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, or ORG/NAME[@REVISION] on the Hub")
    parser.add_argument("text", metavar="TEXT", help="the text before the thought")
    words = "around the text: chat or chat-think is the model's own chat template (default: %(default)s, the bare text)"
    parser.add_argument("--template", default="as-is-think", help=words)
    parser.add_argument(
        "--system", default="", help="system message, for --template chat (default: the template's own)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--max-think", type=int, default=256, help="tokens of the thought (default: %(default)s)")
    parser.add_argument("--max-suffix", type=int, default=64, help="tokens after the thought (default: %(default)s)")
    stop_help = "text that ends the continuation; may be repeated"
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help=stop_help)
    parser.add_argument("--seed", type=int, default=0, help="same seed, same samples (default: %(default)s)")
    parser.add_argument("--n", type=int, default=1, help="number of samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise UserError(f"--n: expected at least 1, got {args.n}")
    return args


if __name__ == "__main__":
    config.run(main)
