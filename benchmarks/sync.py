"""Weight sync: trainer -> engine, against a plain copy of the same bytes.

    python -m benchmarks.sync --json
    .venv-vllm/bin/python -m benchmarks.sync --engine vllm,native --json

The trainer's model is FSDP2-sharded over the ranks (one, without torchrun), weights in fp32. `push` gathers, casts and
loads; `checked` also reads back and compares checksums, as a run does every engine.check_every steps.
"""

from __future__ import annotations

import tempfile

import torch

from benchmarks import common
from benchmarks.rollout import endless
from thinkmid.model import weights
from thinkmid.rollout.engine import weight_sync
from thinkmid.rollout.engine.native import NativeEngine
from thinkmid.rollout.engine.protocol import EngineConfig
from thinkmid.run.ranks import start_ranks
from thinkmid.train import fsdp


def main() -> int:
    parser = common.options(__doc__)
    parser.set_defaults(layers=8, width=512)
    parser.add_argument("--engine", default="native", help="of vllm, native; commas between")
    args = parser.parse_args()
    names = args.engine.split(",")
    if unknown := set(names) - {"vllm", "native"}:
        parser.error(f"--engine: {unknown.pop()!r} is none of vllm, native")
    cfg = common.shape(args.layers, args.width, vocab=8192)
    model, text, ranks = common.random_model(cfg), endless(cfg.vocab), start_ranks()
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        weights.save(f"{folder}/hf", cfg, weights.stream(model), dtype=torch.float32)
        fsdp.shard(model, ranks, compute_dtype=torch.float32)
        if "native" in names:
            engines["native"] = NativeEngine(cfg, text)
        if "vllm" in names:
            from thinkmid.rollout.engine.vllm import VllmEngine

            config = EngineConfig(kind="vllm", compile=False, kv_gb=0.2)
            engines["vllm"] = VllmEngine(f"{folder}/hf", cfg, text, config, max_len=256, rows=8)
    size = sum(t.nbytes for _, t in weights.stream(model))
    source = [t.clone() for _, t in weights.stream(model)]
    target = [torch.empty_like(t) for t in source]
    contenders = {"copy of the bytes": lambda: [a.copy_(b) for a, b in zip(target, source, strict=True)]}
    for name, engine in engines.items():
        sums = weight_sync.push(model, engine, 0, torch.float32)
        if wrong := weight_sync.difference(engine, sums, {}):
            return common.refuse(f"{name}: {wrong}")
        contenders[name] = lambda e=engine: weight_sync.push(model, e, 0, torch.float32, summed=False)
        contenders[f"{name}, checked"] = lambda e=engine: checked(model, e)
    seconds = common.interleave(contenders, args.rounds)
    lines, ratios = [f"  {size / 1e6:.0f} MB a sync"], {}
    for name in list(contenders)[1:]:
        ratios[name] = common.ratio(seconds[name], seconds["copy of the bytes"])
        r = ratios[name]
        lines.append(f"  {name}: {r['median']:.2f} times the copy ({r['low']:.2f} to {r['high']:.2f})")
    title = f"sync  L={cfg.layers} D={cfg.width} V={cfg.vocab} fp32  {ranks.world} ranks"
    if ranks.rank == 0:
        common.report(title, seconds, lines, {"bytes": size, "ratio": ratios}, only_json=args.json)
    return 0


def checked(model, engine):
    assert not weight_sync.difference(engine, weight_sync.push(model, engine, 0, torch.float32), {})


if __name__ == "__main__":
    raise SystemExit(main())
