"""A GGUF file of llama.cpp into a Hugging Face folder: weights, config, tokenizer, chat template.

thinkmid gguf SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2 --dtype bfloat16
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from thinkmid import config
from thinkmid.errors import UserError


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UserError(f"{args.folder}: exists already and is not empty")
    try:
        from thinkmid.model import gguf_file, gguf_tokenizer, weights
    except ModuleNotFoundError as error:
        raise UserError(f"{args.file}: needs {error.name}; pip install thinkmid[gguf]") from None
    file = gguf_file.read(args.file)
    cfg = gguf_file.with_stretch(file, gguf_file.model_config(file))
    tensors = gguf_file.tensors(file, cfg)
    with TemporaryDirectory() as tokenizer:
        gguf_tokenizer.write(Path(tokenizer), file.path, file.meta)
        weights.save(args.folder, cfg, tensors, dtype=args.dtype, extra_files=tokenizer)
    print(f"{args.folder}: {cfg.kind}, {cfg.num_parameters / 1e6:.1f} M parameters, {args.dtype}")


def parse(argv: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="thinkmid gguf", description=__doc__, formatter_class=form)
    parser.add_argument("file", metavar="FILE", type=Path, help="GGUF file of a Llama, Qwen2 or Qwen3 model")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the model goes: new or empty")
    dtypes = "dtype of the weights in the folder (default: %(default)s)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help=dtypes)
    return parser.parse_args(argv)


if __name__ == "__main__":
    config.run(main)
