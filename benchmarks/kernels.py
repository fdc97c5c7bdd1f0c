"""The model's ops, the policy's loss, the row kernel and attention: against eager torch and a copy of the same bytes.

    python -m benchmarks.kernels [--json [PATH]]

Each op is timed alone (forward) and with its backward, in turn with the plain formula and with a copy that reads and
writes as many bytes as the op must. Results are compared with the formula in fp64 first; a wrong op is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.head import DTYPES, WRONG, waiting
from benchmarks.roofline import ROW_OPS
from thinkmid import kernels
from thinkmid.kernels import head, ref
from thinkmid.kernels.rows import row_policy, row_stats
from thinkmid.kernels.streams import Policy, Scores

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Op:
    """One function and the plain formula for it, on the same inputs."""

    name: str
    ours: Callable
    plain: Callable
    inputs: tuple[Tensor, ...]  # those of floating point get gradients where learn says so
    learn: tuple[bool, ...]
    bytes_forward: int
    bytes_backward: int


@dataclass(frozen=True, kw_only=True)
class Row:
    op: str
    direction: str
    seconds: float
    plain_seconds: float
    copy_seconds: float | None
    times_plain: float  # how many times as fast as the formula
    times_plain_low: float
    times_plain_high: float
    share_of_copy: float | None  # 1: as fast as copying the bytes
    bytes_s: float | None


def model_ops(args, dtype, device) -> list[Op]:
    tokens, width = args.tokens, args.width
    heads, size = max(1, width // args.head_size), args.head_size

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    x, res, w = randn(tokens, width), randn(tokens, width), randn(width)
    q, gate, up = randn(tokens, heads, size), randn(tokens, 3 * width), randn(tokens, 3 * width)
    angle = torch.rand(tokens, size // 2, device=device) * 6
    cos, sin = angle.cos(), angle.sin()

    def op(name, ours, plain, inputs, learn):
        forward, backward = (n * inputs[0].nbytes for n in ROW_OPS[name])
        return Op(name=name, ours=ours, plain=plain, inputs=inputs, learn=learn,
                  bytes_forward=forward, bytes_backward=backward)  # fmt: skip

    return [
        op("rms_norm", lambda x, w: kernels.rms_norm(x, w, EPS), lambda x, w: ref.rms_norm(x, w, EPS),
           (x, w), (True, True)),
        op("rms_norm + residual", lambda x, w, r: kernels.rms_norm(x, w, EPS, r),
           lambda x, w, r: ref.rms_norm(x, w, EPS, r), (x, w, res), (True, True, True)),
        op("apply_rope", kernels.apply_rope, ref.apply_rope, (q, cos, sin), (True, False, False)),
        op("swiglu", kernels.swiglu, ref.swiglu, (gate, up), (True, True)),
    ]  # fmt: skip


def policy_op(args, device) -> Op:
    """Clipping, importance weight and KL at once."""
    logp, old, sampler, against = (-2 + 0.3 * torch.randn(args.policy_rows, device=device) for _ in range(4))
    adv = torch.randn(args.policy_rows, device=device)

    def ours(logp, adv, old, sampler, against):
        return kernels.dr_grpo_loss(
            logp, adv, denom=100.0, old_logp=old, sampler_logp=sampler, is_cap=1.5, ref_logp=against, beta=0.1
        )[0]

    def plain(logp, adv, old, sampler, against):
        ratio = (logp - old).exp()
        term = torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * (old - sampler).exp().clamp(max=1.5)
        return (0.1 * ((against - logp).exp() - (against - logp) - 1) - term).sum() / 100

    num = logp.nbytes
    return Op(
        name="dr_grpo_loss", ours=ours, plain=plain, inputs=(logp, adv, old, sampler, against),
        learn=(True, False, False, False, False), bytes_forward=7 * num, bytes_backward=2 * num,
    )  # fmt: skip


def attention_op(args, dtype, device) -> Op:
    """Siblings that share a prefix: one segment for it, one for each of them, keys gathered."""
    prefix, reply, siblings = args.prefix, args.reply, args.siblings
    tokens, heads, size = prefix + siblings * reply, max(2, args.width // args.head_size), args.head_size
    q = torch.randn(tokens, heads, size, device=device).to(dtype)
    k, v = (torch.randn(tokens, heads // 2, size, device=device).to(dtype) for _ in range(2))
    starts = [prefix + g * reply for g in range(siblings)]
    cu_q = torch.tensor([0, prefix, *(s + reply for s in starts)], dtype=torch.int32)
    cu_k = torch.tensor([0, prefix, *(prefix + (g + 1) * (prefix + reply) for g in range(siblings))], dtype=torch.int32)
    spans = [torch.cat([torch.arange(prefix), torch.arange(s, s + reply)]) for s in starts]
    rows = torch.cat([torch.arange(prefix), *spans]).to(device)
    cu_q_there, cu_k_there = cu_q.to(device), cu_k.to(device)

    def ours(q, k, v):
        return kernels.varlen_attention(q, k, v, cu_q_there, cu_k_there, rows)

    def plain(q, k, v):
        outs, k, v = [], k[rows], v[rows]
        for q0, q1, k0, k1 in zip(*(c.tolist() for c in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril(k1 - k0 - q1 + q0)
            q_s, k_s, v_s = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
            outs.append(F.scaled_dot_product_attention(q_s, k_s, v_s, seen, enable_gqa=True).transpose(0, 1))
        return torch.cat(outs)

    return Op(name=f"varlen_attention {prefix}+{siblings}x{reply}", ours=ours, plain=plain, inputs=(q, k, v),
              learn=(True, True, True), bytes_forward=0, bytes_backward=0)  # fmt: skip


def run_of(fn, op: Op, inputs, *, backward: bool):
    """Forward without a gradient, or both directions; returns results and gradients."""
    if not backward:
        return torch.no_grad()(lambda: _tuple(fn(*inputs)))
    leaves = [x.detach().requires_grad_() if learn else x for x, learn in zip(inputs, op.learn, strict=True)]
    wanted = [x for x, learn in zip(leaves, op.learn, strict=True) if learn]
    outs = _tuple(torch.no_grad()(fn)(*leaves))
    given = [torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o).to(o.dtype) for o in outs]
    given = [torch.ones_like(o) if o.ndim == 0 else g for o, g in zip(outs, given, strict=True)]

    def run():
        outs = _tuple(fn(*leaves))
        return [*(o.detach() for o in outs), *torch.autograd.grad(outs, wanted, given)]

    return run


def _tuple(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def copy_of(num_bytes: int, device) -> Callable[[], object]:
    """Reads and writes that many bytes in all."""
    source = torch.ones(max(1, num_bytes // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def wrong(got, exact, dtype) -> float | None:
    """The error, where it is too large."""
    worst = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, exact, strict=True))
    return None if worst <= WRONG[dtype] else worst


def hold(op: Op, rounds: int) -> tuple[list[Row], dict[str, str]]:
    device, dtype = op.inputs[0].device, op.inputs[0].dtype
    double = tuple(x.double() if x.is_floating_point() else x for x in op.inputs)
    exact = run_of(op.plain, op, double, backward=True)()
    for who, fn in (("ours", op.ours), ("plain", op.plain)):
        error = wrong(run_of(fn, op, op.inputs, backward=True)(), exact, dtype)
        if error is not None:
            return [], {f"{op.name}, {who}": f"error {error:.1e} of the largest value"}
    rows = []
    for direction, backward in (("forward", False), ("forward and backward", True)):
        ours, plain = (run_of(fn, op, op.inputs, backward=backward) for fn in (op.ours, op.plain))
        rows.append(
            race(op.name, direction, ours, plain, op.bytes_forward + backward * op.bytes_backward, device, rounds)
        )
    return rows, {}


def race(name, direction, ours, plain, num_bytes, device, rounds) -> Row:
    contenders = {"ours": ours, "plain": plain} | ({"copy": copy_of(num_bytes, device)} if num_bytes else {})
    seconds = common.interleave({n: waiting(run, device) for n, run in contenders.items()}, rounds)
    gain = common.ratio(seconds["plain"], seconds["ours"])
    median = {n: statistics.median(s) for n, s in seconds.items()}
    return Row(
        op=name, direction=direction, seconds=median["ours"], plain_seconds=median["plain"],
        copy_seconds=median.get("copy"), times_plain=gain["median"], times_plain_low=gain["low"],
        times_plain_high=gain["high"], bytes_s=num_bytes / median["ours"] if num_bytes else None,
        share_of_copy=common.ratio(seconds["copy"], seconds["ours"])["median"] if num_bytes else None,
    )  # fmt: skip


def row_kernel(args, device, rounds) -> tuple[list[Row], dict[str, str]]:
    """A chunk of scores as the head makes it: statistics alone, and statistics with the gradient in place."""
    chunk = max(16, head.CHUNK_BYTES[device.type] // (4 * args.vocab))
    z = 3 * torch.randn(chunk, args.vocab, device=device)
    targets = torch.randint(args.vocab, (chunk,), device=device)
    adv = torch.randn(chunk, device=device)
    policy = Policy(adv=adv, denom=float(chunk))

    def plain_policy(z):
        lse = z.logsumexp(-1)
        logp = z.gather(1, targets[:, None])[:, 0] - lse
        g = (-adv / chunk).to(z.dtype)  # the first update: ratio 1
        z.sub_(lse[:, None]).exp_().mul_(-g[:, None])
        z.scatter_add_(1, targets[:, None], g[:, None])
        return logp, z

    def plain_stats(z):
        return z.gather(1, targets[:, None])[:, 0] - z.logsumexp(-1)

    def ours_policy(z):
        return row_policy(z, targets, policy, Scores(), False, z).logp, z

    def ours_stats(z):
        return row_stats(z, targets, Scores(), False).logp

    exact = [*plain_policy(z.double()), plain_stats(z.double())]
    for who, fns in {"ours": (ours_policy, ours_stats), "plain": (plain_policy, plain_stats)}.items():
        error = wrong([*fns[0](z.clone()), fns[1](z.clone())], exact, torch.float32)
        if error is not None:
            return [], {f"row kernel, {who}": f"error {error:.1e} of the largest value"}
    # in place: after the first round the scores are gradients, which cost the same
    mine, theirs = z.clone(), z.clone()
    name = f"row kernel {chunk}x{args.vocab}"
    return [
        race(name, "statistics", lambda: ours_stats(z), lambda: plain_stats(z), z.nbytes, device, rounds),
        race(name, "statistics and gradient", lambda: ours_policy(mine), lambda: plain_policy(theirs),
             2 * z.nbytes, device, rounds),
    ], {}  # fmt: skip


def show(title, rows, refused):
    print(f"{title}\n{common.machine()}")
    print(f"  {'':<52}  ours ms   eager ms    copy ms   times eager (low to high)   of copy     GB/s")
    for r in rows:
        copy = f"{r.copy_seconds * 1e3:8.3f}" if r.copy_seconds else "       -"
        rate = f"{r.share_of_copy:7.2f}  {r.bytes_s / 1e9:7.1f}" if r.bytes_s else ""
        print(
            f"  {r.op:<28} {r.direction:<24} {r.seconds * 1e3:8.3f}   {r.plain_seconds * 1e3:8.3f}   {copy}"
            f"   {r.times_plain:7.2f} ({r.times_plain_low:.2f} to {r.times_plain_high:.2f})      {rate}"
        )
    for name, why in refused.items():
        print(f"  not timed, results are wrong: {name}: {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1024, help="of the model; swiglu has three times as many columns")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--policy-rows", type=int, default=1 << 16)
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--siblings", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the ops; policy and row kernel are fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each, after one that does not count")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="PATH", help="no table; with PATH: the table, JSON to PATH"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="torch")
    rows, refused = measure(args)
    title = f"kernels  T={args.tokens} D={args.width} V={args.vocab} {args.dtype} {args.device}"
    result = {"benchmark": title, "machine": common.machine(), "rows": [asdict(r) for r in rows], "refused": refused}
    if args.json != "-":
        show(title, rows, refused)
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
    return common.refuse(str(refused)) if refused else 0


def measure(args) -> tuple[list[Row], dict[str, str]]:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    rows, refused = row_kernel(args, device, args.rounds)
    for op in (*model_ops(args, dtype, device), policy_op(args, device), attention_op(args, dtype, device)):
        more, bad = hold(op, args.rounds)
        rows, refused = rows + more, refused | bad
    return rows, refused


if __name__ == "__main__":
    raise SystemExit(main())
