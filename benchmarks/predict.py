"""What the GPU session should measure, worked out before: rooflines, the memory plan, and assumed shares of them.

    python -m benchmarks.predict [--gpu H100] [--json]

Every figure is an estimate. The table is committed (benchmarks/results/gpu-predicted.json) before a GPU is touched, so
that the error of each prediction is a result. Value: what we expect. Floor: the least time, or the highest rate, of any
version (products at the best product's rate, bytes at the copy's), where one is known.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace

from benchmarks import roofline
from benchmarks.measure.sizes import H100, Family, Sizes
from benchmarks.roofline import DEVICES, Device
from benchmarks.shapes import needed_flops
from thinkmid.data.pack import duplicated
from thinkmid.model.transformer import ModelConfig
from thinkmid.plan import memory
from thinkmid.plan.footprint import outside
from thinkmid.plan.time import block_parameters, cache_bytes
from thinkmid.train.config import ModelSection

# assumed; shares are of the best bf16 product. A card at its power limit does not hold that product's clock
PRODUCTS = 0.80  # the trunk's products, a step long
FORWARD, BACKWARD = 0.42, 0.33  # FlashAttention 2 on long sequences
FA3 = 1.55  # FlashAttention 3 over 2
FIXED_ORDER = 0.9  # of the backward's rate, dq summed in a fixed order
TILE = 128  # queries of an attention kernel's block: short segments fill it in part
GROUPED = False  # torch 2.11, without flash-attn, saves keys and values once for each query head
EAGER_ROWS = 3.0  # traffic of norms, RoPE and SwiGLU as transformers writes them, over ours
HOST_OP_S = 7e-6  # the host's time for an operation of a Python loop: decoding and the miniature are bound by it
DECODE_OPS = 45  # operations of a layer of the embedded engine, a step
UNIT_S = 4e-4  # the host's time for one FSDP unit in a small training step, forward and backward


@dataclass(frozen=True, kw_only=True)
class Guess:
    value: float
    unit: str
    floor: float | None = None


Table = dict[str, dict[str, Guess]]  # section -> what -> guess


def table(sizes: Sizes, gpu: Device) -> Table:
    """A guess for every row of the session on a GPU that a formula can give."""
    return {
        "ceilings": ceilings(gpu),
        "tests": {f"tests: {outcome}": Guess(value=0, unit="") for outcome in ("failed", "error")},
        "attention": attention(sizes, gpu),
        "block": block(sizes, gpu),
        "variants": variants(sizes, gpu),
        "rl": rl(sizes, gpu),
        "head": head(sizes, gpu),
        "profile": profile(sizes, gpu),
        "rollout": rollout(sizes, gpu),
        "mini": mini(),
    }


def ceilings(gpu: Device) -> dict[str, Guess]:
    return {
        "memory taken by the context": Guess(value=0.6e9, unit="B"),
        "product bf16": Guess(value=gpu.bf16, unit="FLOP/s", floor=989e12),
        "SM clock under load": Guess(value=1.6e9, unit="Hz", floor=1.98e9),
        "memory clock under load": Guess(value=2.6e9, unit="Hz"),
        "power draw under load": Guess(value=680, unit="W", floor=700),
        "copy": Guess(value=gpu.copy, unit="B/s", floor=3.35e12 if gpu.name == "H100" else 4.8e12),
        "host to device, pageable": Guess(value=8e9, unit="B/s"),
        "host to device, pinned": Guess(value=50e9, unit="B/s", floor=64e9),
    }


# attention


def tiled_pairs(family: Family, shared: bool) -> float:
    """Pairs of query and key that the kernels work on: whole tiles, causal by tile."""

    def segment(queries: int, before: int) -> float:
        ends = [min(start + TILE, queries) for start in range(0, queries, TILE)]
        return sum(TILE * TILE * math.ceil((before + end) / TILE) for end in ends)

    new = family.reply - 1
    if shared:
        return family.groups * (segment(family.prefix, 0) + family.siblings * segment(new, family.prefix))
    return family.groups * family.siblings * segment(family.prefix + new, 0)


def attention_s(cfg_heads: tuple[int, int, int], family: Family, shared: bool, gpu: Device, *, path="flash") -> tuple:
    """(forward, forward and backward) seconds of one layer."""
    heads, kv_heads, size = cfg_heads
    pairs, rate = tiled_pairs(family, shared), gpu.bf16 * (FA3 if path == "flash-attn-3" else 1)
    order = 1 if path.endswith("any order") else FIXED_ORDER
    forward = 4 * heads * size * pairs / (FORWARD * rate)
    backward = 10 * heads * size * pairs / (BACKWARD * order * rate)
    if shared:  # keys and values are gathered for each reply, once more in the backward, and their gradients summed
        gathered = family.groups * family.siblings * (family.prefix + family.reply) * kv_heads * size * 2 * 2
        forward += 2 * gathered / gpu.copy
        backward += 6 * gathered / gpu.copy
    return forward, forward + backward


def attention(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    found, (heads, _, size) = {}, sizes.heads
    for family in sizes.attention:
        for layout, shared in (("shared keys", True), ("keys of each reply", False)):
            least = 4 * heads * size * family.pairs(shared) / gpu.bf16
            for path in ("flash-attn-3", "flash-attn", "torch-varlen", "torch-varlen, any order"):
                forward, both = attention_s(sizes.heads, family, shared, gpu, path=path)
                name = f"{family.label} {layout}, {path}"
                found[f"{name}: forward"] = Guess(value=forward, unit="s", floor=least)
                found[f"{name}: forward and backward"] = Guess(value=both, unit="s", floor=3.5 * least)
            # scores of padded batches pass through memory: some eight times forward, twenty with the backward
            queries = family.siblings * family.reply if shared else family.siblings * (family.prefix + family.reply)
            scores = heads * queries * (family.prefix + family.reply) * 2
            name = f"{family.label} {layout}, sdpa"
            found[f"{name}: forward"] = Guess(value=8 * scores / gpu.copy, unit="s", floor=least)
            found[f"{name}: forward and backward"] = Guess(value=20 * scores / gpu.copy, unit="s", floor=3.5 * least)
        for path in ("flash-attn-3", "flash-attn", "torch-varlen", "torch-varlen, any order"):
            found[f"{family.label} {path}: error over sdpa's"] = Guess(value=1.0, unit="1")
    return found


# training steps


def head_sizes(cfg: ModelConfig) -> tuple[int, int, int]:
    return cfg.heads, cfg.kv_heads, cfg.head_dim


def trunk_s(cfg: ModelConfig, family: Family, shared: bool, gpu: Device, *, row_traffic=1.0) -> tuple[float, float]:
    """(expected, floor) seconds of the blocks' forward and backward."""
    tokens = family.tokens(shared)
    products = 6 * block_parameters(cfg) * tokens
    _, attended = attention_s(head_sizes(cfg), family, shared, gpu)
    # elements that norms, RoPE and SwiGLU read and write, forward and backward, and the sum behind the MLP
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    ops = roofline.ROW_OPS
    elements = (
        sum(ops["rms_norm"]) * cfg.width + sum(ops["rms_norm + residual"]) * cfg.width + 3 * cfg.width
        + sum(ops["apply_rope"]) * (q + kv) + sum(ops["swiglu"]) * cfg.ffn
    )  # fmt: skip
    rows = row_traffic * cfg.layers * tokens * elements * 2 / gpu.copy
    expected = products / (PRODUCTS * gpu.bf16) + cfg.layers * attended + rows
    return expected, (products + cfg.layers * 14 * q * family.pairs(shared)) / gpu.bf16


def adamw_s(cfg: ModelConfig, gpu: Device) -> float:
    """Weight, gradient and both moments are read, all but the gradient written, in fp32."""
    return 28 * cfg.num_parameters / gpu.copy


def fsdp_s(cfg: ModelConfig, packs: int, gpu: Device) -> float:
    """Alone: weights to bf16 and into place in forward and backward, gradients to fp32 and added up."""
    return packs * (2 * (6 + 4) + (6 + 12)) * cfg.num_parameters / gpu.copy


def head_cost(cfg: ModelConfig, rows: int, gpu: Device, design: str = "one pass") -> roofline.Cost:
    return roofline.head(design, roofline.Head(tokens=rows, width=cfg.width, vocab=cfg.vocab), gpu)


def step_s(cfg: ModelConfig, family: Family, gpu: Device, *, shared=True, packs=1) -> tuple[float, float]:
    """(expected, floor) seconds of a whole training step in one process."""
    trunk, least = trunk_s(cfg, family, shared, gpu)
    top, products = head_cost(cfg, family.rows, gpu), 6 * cfg.vocab * cfg.width * family.rows / gpu.bf16
    # the gradient's norm reads every gradient once
    update = adamw_s(cfg, gpu) + 4 * cfg.num_parameters / gpu.copy
    return trunk + top.seconds + fsdp_s(cfg, packs, gpu) + update, least + products + adamw_s(cfg, gpu)


def num_packs(cfg: ModelConfig, family: Family, room: int, shared: bool = True) -> int:
    from benchmarks.measure.training import groups_of, packs_of, units_of

    units = units_of(groups_of(family, vocab=cfg.vocab))
    return len(packs_of(units if shared else [part for unit in units for part in duplicated(unit)], cfg, room))


def peak(cfg: ModelConfig, pack_tokens: int) -> float:
    """The plan's tensors: what no allocator of torch's counts is left out. torch 2.11's attention repeats keys."""
    owners = memory.training_phase(cfg, ModelSection(dtype="bfloat16"), pack_tokens, 1, grouped=GROUPED)
    return sum(owners.values()) - sum(outside("cuda", 1).values())


def block(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    from benchmarks.measure.training import groups_of, units_of

    found, seconds = {}, {}
    for layers in sizes.depths:
        cfg, name = replace(sizes.wide, layers=layers), f"{layers} layers"
        seconds[layers], least = step_s(cfg, sizes.pack, gpu)
        found[f"{name}: step"] = Guess(value=seconds[layers], unit="s", floor=least)
        flops = needed_flops(cfg, units_of(groups_of(sizes.pack, vocab=cfg.vocab)))
        found[f"{name}: FLOPs needed a second"] = Guess(value=flops / seconds[layers], unit="FLOP/s", floor=gpu.bf16)
        found[f"{name}: tokens a second"] = Guess(value=sizes.pack.tokens() / seconds[layers], unit="1/s")
        found[f"{name}: peak memory of tensors"] = Guess(value=peak(cfg, sizes.pack.tokens()), unit="B")
        found[f"{name}: AdamW alone"] = Guess(value=adamw_s(cfg, gpu), unit="s", floor=adamw_s(cfg, gpu))
    few, many = sizes.depths
    slope = (seconds[many] - seconds[few]) / (many - few)
    found["a layer more: step"] = Guess(value=slope, unit="s")
    whole, least = step_s(sizes.wide, sizes.pack, gpu)
    spared = adamw_s(sizes.wide, gpu) * 7 / 8
    name = f"{sizes.wide.layers} layers on 8 ranks, a pack"
    found[name] = Guess(value=whole - spared, unit="s", floor=least - spared)
    return found


def variants(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    cfg, found = replace(sizes.wide, layers=sizes.depths[0]), {}
    for times in (1, 2):
        family = replace(sizes.pack, groups=times)
        seconds, least = step_s(cfg, family, gpu)
        q, kv, tokens = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, family.tokens()
        # two norms, RoPE and SwiGLU once more in the forward direction
        again = cfg.layers * tokens * 2 * (6 * cfg.width + 2 * (q + kv) + 3 * cfg.ffn) / gpu.copy
        spared = cfg.layers * tokens * 2 * (cfg.width + cfg.ffn)
        cases = {
            "eager": (seconds, peak(cfg, tokens)),
            "cheap ops recomputed": (seconds + again, peak(cfg, tokens) - spared),
            "compiled blocks": (0.97 * seconds, peak(cfg, tokens)),
        }
        for name, (s, size) in cases.items():
            what = f"{name}, {times} x {sizes.pack.tokens()} tokens"
            found[f"{what}: step"] = Guess(value=s, unit="s", floor=least)
            found[f"{what}: peak memory of tensors"] = Guess(value=size, unit="B")
    return found


def rl(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    from benchmarks.measure.rl import DEAD, PADDED, SHARED, UNSHARED

    cfg, family, room = sizes.small, sizes.rl, sizes.rl_pack_tokens
    few = replace(family, groups=max(1, family.groups // 4))
    seconds, floors = {}, {}
    for name, given, shared in ((SHARED, family, True), (UNSHARED, family, False), (DEAD, few, True)):
        packs = num_packs(cfg, given, room, shared)
        seconds[name], floors[name] = step_s(cfg, given, gpu, shared=shared, packs=packs)
    trunk, _ = trunk_s(cfg, family, False, gpu, row_traffic=EAGER_ROWS)
    batches = math.ceil(family.groups * family.siblings / sizes.micro_batch)
    top = head_cost(cfg, family.rows, gpu, "naive").seconds
    seconds[PADDED] = trunk + top + fsdp_s(cfg, batches, gpu) + adamw_s(cfg, gpu)
    floors[PADDED] = floors[UNSHARED]
    found = {f"{name}: step": Guess(value=s, unit="s", floor=floors[name]) for name, s in seconds.items()}
    for name in (UNSHARED, PADDED):
        found[f"{name} over {SHARED}: gradient norm"] = Guess(value=1.0, unit="1")
    for name in (UNSHARED, DEAD, PADDED):
        found[f"{name} over {SHARED}"] = Guess(value=seconds[name] / seconds[SHARED], unit="1")
    return found


def head(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    from benchmarks.measure.head import FLOOR, LIGER, LIVE, NAIVE, OURS

    num, width, vocab = sizes.head
    whole = roofline.Head(tokens=num, width=width, vocab=vocab)
    quarter = roofline.Head(tokens=num // 4, width=width, vocab=vocab)
    least = roofline.head("gemms", whole, gpu).seconds
    found = {FLOOR: Guess(value=least, unit="s", floor=6 * num * width * vocab / gpu.bf16)}
    cases = {
        OURS: ("one pass", whole), LIVE: ("one pass", whole.live(sizes.live)),
        f"{OURS}, a quarter of the rows": ("one pass", quarter), f"{NAIVE}, a quarter of the rows": ("naive", quarter),
        NAIVE: ("naive", whole), LIGER[0]: ("naive", whole), LIGER[1]: ("fused recompute", whole),
    }  # fmt: skip
    for name, (design, shape) in cases.items():
        cost = roofline.head(design, shape, gpu)
        floor = roofline.head("gemms", shape, gpu).seconds
        found[f"{name}: loss and gradients"] = Guess(value=cost.seconds, unit="s", floor=floor)
        found[f"{name}: memory beyond inputs and gradients"] = Guess(value=cost.extra_bytes, unit="B")
    return found


def profile(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    packs = num_packs(sizes.small, sizes.rl, sizes.rl_pack_tokens)
    seconds, least = step_s(sizes.small, sizes.rl, gpu, packs=packs)
    return {
        "host waits of a step": Guess(value=1, unit=""),
        "host waits of a step of one pack less": Guess(value=1, unit=""),
        "packs of the step": Guess(value=packs, unit=""),
        "a step, unprofiled": Guess(value=seconds, unit="s", floor=least),
        "device busy, share of the unprofiled step": Guess(value=0.97, unit="1", floor=1.0),
    }


# rollouts


def decode_s(cfg: ModelConfig, family: Family, gpu: Device) -> tuple[float, float]:
    """(expected, floor) seconds of one step of decoding, half-way."""
    rows = family.groups * family.siblings
    stored = family.groups * family.prefix + rows * family.reply / 2
    read = 2 * cfg.num_parameters + stored * cache_bytes(cfg, "bfloat16")
    drawn = 60 * rows * cfg.vocab  # logits in fp32, log-probs, probabilities, sums in fp64: some sixty bytes a score
    host = cfg.layers * DECODE_OPS * HOST_OP_S
    return max(host, read / gpu.copy) + drawn / gpu.copy, read / gpu.copy


def rollout(sizes: Sizes, gpu: Device) -> dict[str, Guess]:
    cfg, family = sizes.small, sizes.rollout
    step, floor = decode_s(cfg, family, gpu)
    prefill = 2 * block_parameters(cfg) * family.groups * family.prefix / (PRODUCTS * gpu.bf16)
    generation = family.reply * step + prefill
    packs = num_packs(cfg, family, sizes.rl_pack_tokens)
    training, least = step_s(cfg, family, gpu, packs=packs)
    copy = 4 * cfg.num_parameters / gpu.copy
    tensors = 9 * cfg.layers + 2
    return {
        # fp32 read and bf16 written, then copied; some ten operations a tensor on the host
        "sync": Guess(value=max(10 * cfg.num_parameters / gpu.copy, tensors * 10 * HOST_OP_S), unit="s", floor=copy),
        "generation": Guess(value=generation, unit="s", floor=family.reply * floor),
        "training": Guess(value=training, unit="s", floor=least),
        "tokens generated a second": Guess(
            value=family.groups * family.siblings * family.reply / generation, unit="1/s"
        ),
        "a step of decoding": Guess(value=generation / family.reply, unit="s", floor=floor),
        "mean |trainer - engine|": Guess(value=0.01, unit="nats"),
        "a copy of the engine's weights": Guess(value=copy, unit="s", floor=copy),
    }  # fmt: skip


def mini() -> dict[str, Guess]:
    """Two layers of width 128: the host's work is all there is. RLMT decodes 74 tokens and trains on two packs."""
    step = 5 * UNIT_S + 2 * 150 * HOST_OP_S
    return {
        "base: step": Guess(value=step, unit="s"),
        "SFT: step": Guess(value=step, unit="s"),
        "RLMT: step": Guess(value=74 * (2 * DECODE_OPS + 40) * HOST_OP_S + 2 * step, unit="s"),
    }


# the tables


def report(found: dict) -> str:
    """What a session found as Markdown: measured, predicted, floor, ratio. found: the contents of session.json."""
    about = found.get("environment", {})
    gpu = next((d for name, d in DEVICES.items() if name in about.get("gpu", "")), None)
    guesses = table(H100, gpu) if gpu and found.get("sizes") == "H100" else {}
    lines = [
        f"# GPU session: {about.get('gpu') or about.get('machine', '')}, torch {about.get('torch', '')}, "
        f"triton {about.get('triton', '')}",
        "",
        "Predicted: `python -m benchmarks.predict`, made before. Floor: the least time or the highest rate there is.",
    ]
    for name, section in found["sections"].items():
        why = f": {section['why']}" if section.get("why") else ""
        lines += ["", f"## {name} ({section['status']}, {section.get('seconds', 0):.0f} s{why})", ""]
        if section["rows"]:
            lines += [
                "| what | measured | predicted | measured / predicted | floor | note |",
                "|---|---|---|---|---|---|",
            ]
        for row in section["rows"]:
            guess = guesses.get(name, {}).get(row["what"])
            value, unit = row["value"], row["unit"]
            cells = [row["what"], size(value, unit)]
            ratio = f"{value / guess.value:.2f}" if guess and guess.value and value is not None else ""
            cells += [size(guess.value, unit) if guess else "", ratio]
            cells += [size(guess.floor, unit) if guess and guess.floor else "", row["note"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


SCALES = {"s": 1e3, "B": 1e-9, "FLOP/s": 1e-12, "B/s": 1e-9, "Hz": 1e-6}
NAMES = {"s": "ms", "B": "GB", "FLOP/s": "TFLOP/s", "B/s": "GB/s", "Hz": "MHz", "1": "", "1/s": "a second"}


def size(value: float | None, unit: str) -> str:
    """A figure for people: seconds in ms, bytes in GB."""
    if value is None:
        return "-"
    scaled = value * SCALES.get(unit, 1)
    text = f"{scaled:,.0f}" if unit in ("", "1/s", "Hz", "W") or abs(scaled) >= 1000 else f"{scaled:.3g}"
    return f"{text} {NAMES.get(unit, unit)}".strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=["H100", "H200"], default="H100")
    parser.add_argument("--json", action="store_true", help="the table that is committed")
    args = parser.parse_args()
    guesses = table(H100, DEVICES[args.gpu])
    if args.json:
        print(json.dumps({s: {what: asdict(g) for what, g in rows.items()} for s, rows in guesses.items()}, indent=1))
        return 0
    for section, rows in guesses.items():
        print(section)
        for what, guess in rows.items():
            floor = f"   floor {size(guess.floor, guess.unit)}" if guess.floor else ""
            print(f"  {what:<72} {size(guess.value, guess.unit):>16}{floor}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
