"""What the head and the row ops must cost on a device: products, passes over the logits, weight-gradient traffic.

    python -m benchmarks.roofline

Seconds = sum over products of max(FLOPs / rate, bytes / bandwidth) + passes / bandwidth + launches. A product runs at
the rate that cuBLAS reaches for the head, a pass at the copy rate. Every figure printed is an estimate.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

LAUNCH_S = 4e-6  # estimate: one kernel in a stream that is kept busy
HIDDEN_SHARE = 0.5  # estimate: share of the weight gradient's accumulation that its product's epilogue hides
# bytes per logit of autograd through fp32 log_softmax on 2-byte logits: cast 6, log_softmax 8, pick and zero-filled
# gradient 6, log_softmax backward 12, cast back 6; fp32 logits need no casts
NAIVE_BYTES = {2: 38, 4: 26}
DESIGNS = ("gemms", "one pass", "recompute", "fused recompute", "naive", "score")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Ceilings in FLOP/s and bytes/s. Products of the head run at head_share of the best product."""

    name: str
    bf16: float
    fp32: float  # true fp32, no TF32
    copy: float
    head_share: float = 0.915  # bare products of TRL #7244 at 728 TFLOP/s against 798 for 8192^3
    source: str

    def rate(self, num_bytes: int) -> float:
        return self.head_share * (self.bf16 if num_bytes == 2 else self.fp32)


DEVICES = {
    "H100": Device(
        name="H100", bf16=798e12, fp32=60e12, copy=3.0e12,
        source="bf16 8192^3 and copy measured on an H100 SXM; fp32 0.9 of the data sheet",
    ),
    "H200": Device(
        name="H200", bf16=798e12, fp32=60e12, copy=4.3e12,
        source="the H100's chip; copy 0.9 of the data sheet's 4.8 TB/s",
    ),
    "A100": Device(
        name="A100", bf16=265e12, fp32=17.5e12, copy=1.75e12,
        source="0.85 of the data sheet's 312 TFLOP/s, 0.9 of 19.5, 0.86 of 2.04 TB/s",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear head over N live tokens."""

    tokens: int
    width: int
    vocab: int
    dtype_bytes: int = 2  # of hidden, weight and the gradient of the logits
    logit_bytes: int = 4  # of a chunk's scores
    chunk: int = 4096

    def live(self, share: float) -> Head:
        return replace(self, tokens=round(share * self.tokens))

    @property
    def chunks(self) -> int:
        return max(1, math.ceil(self.tokens / self.chunk))

    @property
    def logits(self) -> int:
        return self.tokens * self.vocab


@dataclass(frozen=True, kw_only=True)
class Cost:
    products_s: float
    passes_s: float = 0.0
    dweight_s: float = 0.0
    launches_s: float = 0.0
    extra_bytes: float = 0.0  # beyond inputs and the returned gradients

    @property
    def seconds(self) -> float:
        return self.products_s + self.passes_s + self.dweight_s + self.launches_s


TARGET = Head(tokens=32768, width=4096, vocab=128256)


def head(design: str, shape: Head, device: Device) -> Cost:
    """Cost of forward and backward ("score": forward alone) of a design.

    gemms: three bare products. one pass: the gradient is formed in the forward chunk loop. recompute: the backward
    forms each chunk of scores again. fused recompute: likewise, scores never leave the chip, dW in waves of 1024
    tokens. naive: autograd through the whole matrix of logits.
    """
    if design not in DESIGNS:
        raise ValueError(f"unknown design {design!r}, one of {', '.join(DESIGNS)}")
    num, vd, z, b = shape.logits, shape.vocab * shape.width, shape.logit_bytes, shape.dtype_bytes
    work = shape.chunk * shape.vocab
    score, both = _product(shape, device, z), 2 * _product(shape, device, b)
    one_sweep, two_sweeps = num * z / device.copy, num * (z + b) / device.copy  # the second sweep's read hits the cache
    if design == "gemms":
        return Cost(products_s=_product(shape, device, b) + both)
    if design == "naive":
        return Cost(
            products_s=_product(shape, device, b) + both,
            passes_s=num * NAIVE_BYTES[b] / device.copy,
            launches_s=12 * LAUNCH_S,
            extra_bytes=num * (12 if b == 2 else 8),
        )
    if design == "score":
        return Cost(products_s=score, passes_s=one_sweep, launches_s=2 * shape.chunks * LAUNCH_S, extra_bytes=work * z)
    if design == "fused recompute":
        waves = max(1, math.ceil(shape.tokens / 1024))
        return Cost(
            products_s=2 * _product(shape, device, 0) + both,
            dweight_s=_accumulate(vd, b, waves, device),
            extra_bytes=2 * 1024 * shape.vocab,
        )
    again = design == "recompute"
    return Cost(
        products_s=score + both + (score if again else 0.0),
        passes_s=two_sweeps + (one_sweep if again else 0.0),
        dweight_s=_accumulate(vd, 4, shape.chunks, device),
        launches_s=(6 if again else 4) * shape.chunks * LAUNCH_S,
        extra_bytes=work * z + (work * b if b != z else 0) + 4 * vd * (b != 4),
    )


def _product(shape, device, logit_bytes):
    """Seconds of one of the three products; scores or their gradient pass through memory, the operands once a chunk."""
    b = shape.dtype_bytes
    operands = b * shape.width * (shape.tokens + shape.vocab * shape.chunks)
    moved = operands + logit_bytes * shape.logits
    return max(2 * shape.logits * shape.width / device.rate(b), moved / device.copy)


def _accumulate(num, size, times, device):
    """Read and write of the weight's gradient for each chunk after the first."""
    return 2 * size * num * (times - 1) * (1 - HIDDEN_SHARE) / device.copy


# elements read and written per element of the named tensor, forward and backward
ROW_OPS = {
    "rms_norm": (2, 3),  # x -> y;  x, dy -> dx
    "rms_norm + residual": (4, 4),  # x, residual -> sum, y;  sum, dy, dsum -> dx
    "apply_rope": (2, 2),  # x -> y;  dy -> dx
    "swiglu": (3, 5),  # gate, up -> y;  gate, up, dy -> dgate, dup
}


def row_op(name: str, elements: int, dtype_bytes: int, device: Device) -> tuple[float, float]:
    """Seconds of forward and backward of an op that is all traffic."""
    return tuple(n * elements * dtype_bytes / device.copy + LAUNCH_S for n in ROW_OPS[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=[*DEVICES, "all"], default="all")
    parser.add_argument("--tokens", type=int, default=TARGET.tokens)
    parser.add_argument("--width", type=int, help="with --vocab: this shape alone")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--chunk", type=int, default=TARGET.chunk)
    args = parser.parse_args()
    if (args.width is None) != (args.vocab is None):
        parser.error("--width and --vocab go together")
    shapes = {
        "Llama 3 8B": (4096, 128256),
        "Llama 3.2 1B": (2048, 128256),
        "Qwen2.5 7B": (3584, 152064),
        "Qwen3 0.6B": (1024, 151936),
    }
    if args.width:
        shapes = {"given": (args.width, args.vocab)}
    for device in DEVICES.values() if args.device == "all" else [DEVICES[args.device]]:
        print(f"{device.name}: {device.bf16 / 1e12:.0f} TFLOP/s bf16, {device.copy / 1e12:.2f} TB/s ({device.source})")
        for name, (width, vocab) in shapes.items():
            print_heads(name, Head(tokens=args.tokens, width=width, vocab=vocab, chunk=args.chunk), device)
        print_row_ops(args.tokens, shapes, device)
    return 0


def print_heads(name, shape, device):
    print(
        f"  head of {name}: N={shape.tokens} D={shape.width} V={shape.vocab} C={shape.chunk}; ms, of bare products, GB"
    )
    for dtype, s in {"bf16": shape, "fp32": replace(shape, dtype_bytes=4)}.items():
        floor = head("gemms", s, device).seconds
        cases = {design: head(design, s, device) for design in DESIGNS}
        cases |= {f"one pass, live {share}": head("one pass", s.live(share), device) for share in (0.56, 0.35)}
        for label, cost in cases.items():
            print(
                f"    {dtype} {label:<22} {cost.seconds * 1e3:8.1f}  {cost.seconds / floor:5.2f}  "
                f"{cost.extra_bytes / 1e9:6.2f}"
            )


def print_row_ops(tokens, shapes, device):
    for name, (width, _) in shapes.items():
        costs = {op: row_op(op, tokens * width, 2, device) for op in ROW_OPS}
        text = ", ".join(f"{op} {f * 1e3:.2f} + {b * 1e3:.2f}" for op, (f, b) in costs.items())
        print(f"  {name}, T={tokens}, ms forward + backward per {width} columns: {text}")


if __name__ == "__main__":
    raise SystemExit(main())
