"""The linear head: DrGRPO loss with gradients, half of the rows dead, scoring, cross-entropy; against its products.

    python -m benchmarks.head [--json [PATH]]

The floor is the bare matrix products of the same shape in the same rounds: three for a loss, one for scoring.
Contenders take turns. Each is first run once for its error against fp64 and its memory beyond inputs and returned
gradients; one whose results are wrong is not timed, and if it is ours the run is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common, rivals
from benchmarks.rivals import Case, dr_grpo, naive_logprob
from thinkmid.kernels import dr_grpo_loss, fused_linear_dr_grpo, linear_cross_entropy, linear_logprob

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# share of the largest gradient by which a contender may differ from fp64
WRONG = {torch.float32: 1e-4, torch.bfloat16: 0.05}
REPLY = 128  # tokens that share an advantage
ONE_PASS, RECOMPUTE, HALF = "ours, one pass", "ours, log-prob then loss", "ours, half of the rows dead"
SCORE, CE = "ours, linear_logprob", "ours, linear_cross_entropy"
NAIVE = "naive autograd"


@dataclass(kw_only=True)
class Row:
    """One line of the table. Ratios are to the bare products of the same round, but for the one of the minima.

    The minima are what a busy machine disturbs least.
    """

    contest: str
    name: str
    seconds: float
    ratio_to_gemm: float
    ratio_low: float
    ratio_high: float
    ratio_of_minima: float
    peak_extra_bytes: int
    max_grad_error: float | None = None  # share of the largest gradient of hidden or weight
    max_logp_error: float | None = None  # share of the largest log-prob


@dataclass(kw_only=True)
class Contest:
    """Contenders for one task: each returns tensors that are compared with exact."""

    name: str
    floor: Callable[[], object]
    contenders: dict[str, Callable[[], list[Tensor]]]
    exact: list[list[Tensor]]  # of each contender, in order
    given: int  # bytes of the gradients that each returns


# contenders


def one_pass(case: Case) -> Tensor:
    return fused_linear_dr_grpo(
        case.hidden, case.weight, case.targets, case.advantages, denom=case.denom, old_logp=case.old_logp
    ).loss


def log_prob_then_loss(case: Case) -> Tensor:
    logp = linear_logprob(case.hidden, case.weight, case.targets)
    return dr_grpo_loss(logp, case.advantages, denom=case.denom, old_logp=case.old_logp)[0]


def cross_entropy(case: Case) -> Tensor:
    return linear_cross_entropy(case.hidden, case.weight, case.targets, denom=case.denom)[0]


# inputs and truth


def make_case(num: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> Case:
    """Log-probs of an unsure model; ratios inside and outside the clip range, none where rounding could decide."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, width, generator=rng)
    weight = torch.randn(vocab, width, generator=rng) * 2 * width**-0.5
    advantages = torch.randn(-(-num // REPLY), generator=rng).repeat_interleave(REPLY)[:num]
    away = torch.where(torch.rand(num, generator=rng) < 0.8, 0.05, 0.5) * torch.randn(num, generator=rng).sign()
    targets = torch.randint(vocab, (num,), generator=rng)
    streams = [x.to(device) for x in (targets, advantages, torch.zeros(num))]
    case = Case(
        hidden=hidden.to(device, dtype), weight=weight.to(device, dtype), targets=streams[0], advantages=streams[1],
        old_logp=streams[2], denom=float(num),
    )  # fmt: skip
    with torch.no_grad():
        return replace(case, old_logp=(rivals.logsumexp_logprob(case) + away.to(device))).to(dtype)


def half_dead(case: Case) -> Case:
    """Every second reply has advantage 0, as in a group of equal rewards."""
    live = torch.arange(len(case.targets), device=case.targets.device) // REPLY % 2 == 0
    return replace(case, advantages=case.advantages * live)


def truth(loss: Callable[[Case], Tensor], case: Case) -> list[Tensor]:
    """Loss and both gradients in fp64, 256 rows at a time."""
    case = case.to(torch.float64)
    total = torch.zeros((), dtype=torch.float64, device=case.hidden.device)
    for index in torch.arange(len(case.targets), device=total.device).split(256):
        part = loss(case.rows(index))
        part.backward()
        total += part.detach()
    return [total, case.hidden.grad, case.weight.grad]


def naive_loss(case: Case) -> Tensor:
    return dr_grpo(naive_logprob(case), case)


def naive_ce(case: Case) -> Tensor:
    return -naive_logprob(case).sum() / case.denom


def with_gradients(loss: Callable[[Case], Tensor], case: Case) -> Callable[[], list[Tensor]]:
    def run():
        value = loss(case)
        return [value.detach(), *torch.autograd.grad(value, (case.hidden, case.weight))]

    return run


# floors


def products(case: Case, *, backward: bool) -> Callable[[], None]:
    """Bare products, as one writes them."""
    h, w = case.hidden.detach(), case.weight.detach()

    def run():
        z = h @ w.T
        if backward:
            return z @ w, z.T @ h
        return z

    return run


# contests


def contests(case: Case, *, compiled: bool = True) -> list[Contest]:
    device = case.hidden.device.type
    given = case.hidden.nbytes + case.weight.nbytes
    dead = half_dead(case)
    live = dead.advantages.nonzero()[:, 0]
    policy = {ONE_PASS: (one_pass, case), RECOMPUTE: (log_prob_then_loss, case)}
    policy |= {name: (fn, case) for name, fn in rivals.losses(device).items()}
    policy |= {HALF: (one_pass, dead), "naive, half of the rows dead": (naive_loss, dead)}
    policy |= {"naive, dead rows dropped by hand": (lambda c: naive_loss(c.rows(live)), dead)}
    exact = {id(c): truth(naive_loss, c) for c in (case, dead)}
    sft = {CE: cross_entropy, **rivals.cross_entropies(device, compiled=compiled)}
    scoring = {SCORE: torch.no_grad()(lambda c: linear_logprob(c.hidden, c.weight, c.targets)), **rivals.scores()}
    double = case.to(torch.float64)
    with torch.no_grad():
        logp = torch.cat([naive_logprob(double.rows(i)) for i in torch.arange(len(case.targets)).split(256)])
    return [
        Contest(
            name="DrGRPO loss and gradients", floor=products(case, backward=True), given=given,
            contenders={name: with_gradients(fn, c) for name, (fn, c) in policy.items()},
            exact=[exact[id(c)] for _, c in policy.values()],
        ),
        Contest(
            name="scoring without a gradient", floor=products(case, backward=False), given=0,
            contenders={name: lambda fn=fn: [fn(case)] for name, fn in scoring.items()},
            exact=[[logp]] * len(scoring),
        ),
        Contest(
            name="cross-entropy and gradients", floor=products(case, backward=True), given=given,
            contenders={name: with_gradients(fn, case) for name, fn in sft.items()},
            exact=[truth(naive_ce, case)] * len(sft),
        ),
    ]  # fmt: skip


def hold(contest: Contest, rounds: int, dtype: torch.dtype) -> tuple[list[Row], dict[str, str]]:
    """Rows of the table, and who was left out and why."""
    checked, refused, naive_error = {}, {}, None
    for (name, run), exact in zip(contest.contenders.items(), contest.exact, strict=True):
        got, peak = with_peak(run, exact[0].device)
        error = max(error_of(a, b) for a, b in zip(got, exact, strict=True))
        naive_error = error if name.startswith("naive") and naive_error is None else naive_error
        if error > WRONG[dtype] or error != error:
            refused[name] = f"error {error:.1e} of the largest value"
        else:
            checked[name] = error, peak - contest.given
    for name in (ONE_PASS, RECOMPUTE, HALF, SCORE, CE):
        if name in checked and checked[name][0] > 2 * naive_error:
            refused[name] = f"error {checked[name][0]:.1e}, naive {naive_error:.1e}"
    runs = {name: waiting(contest.contenders[name], contest.exact[0][0].device) for name in checked}
    seconds = common.interleave({"products": waiting(contest.floor, contest.exact[0][0].device), **runs}, rounds)
    rows = [_row(contest, "bare products", seconds["products"], seconds["products"], 0, None)]
    rows += [_row(contest, n, seconds[n], seconds["products"], peak, error) for n, (error, peak) in checked.items()]
    return rows, refused


def _row(contest, name, seconds, floor, peak, error):
    ratio = common.ratio(seconds, floor)
    kind = "max_logp_error" if contest.name.startswith("scoring") else "max_grad_error"
    return Row(
        contest=contest.name, name=name, seconds=statistics.median(seconds), ratio_to_gemm=ratio["median"],
        ratio_low=ratio["low"], ratio_high=ratio["high"], ratio_of_minima=min(seconds) / min(floor),
        peak_extra_bytes=peak, **{kind: error},
    )  # fmt: skip


def error_of(got, exact):
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def waiting(run, device):
    """On a GPU, seconds end when the work has."""
    if device.type != "cuda":
        return run

    def wait():
        run()
        torch.cuda.synchronize(device)

    return wait


def with_peak(run: Callable[[], list[Tensor]], device: torch.device) -> tuple[list[Tensor], int]:
    """What it returns, and the most bytes of torch's allocator that were alive above the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = run()
        torch.cuda.synchronize(device)
        return out, torch.cuda.max_memory_allocated(device) - before
    run()  # compiled contenders compile; what stays allocated is not theirs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        out = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return out, peak


# report


def targets(rows: list[Row]) -> list[dict]:
    """What we set out to reach, beside what was reached."""
    at = {(r.contest.split()[0], r.name): r for r in rows}
    fastest = {contest: math.inf for contest, _ in at}
    for (contest, name), r in at.items():
        if not name.startswith(("ours", "bare")) and "dead" not in name:
            fastest[contest] = min(fastest[contest], r.ratio_to_gemm)
    asked = []

    def ask(what, contest, name, limit, value=lambda r: r.ratio_to_gemm, beside=None):
        if (contest, name) in at and (contest, beside or name) in at:
            got = value(at[contest, name])
            asked.append({"target": what, "at_most": limit, "measured": got, "met": got <= limit})

    ask("one pass / three products", "DrGRPO", ONE_PASS, 1.08)
    ask("one pass / fastest rival", "DrGRPO", ONE_PASS, 1.0, lambda r: r.ratio_to_gemm / fastest["DrGRPO"])
    ask("half of the rows dead / all alive", "DrGRPO", HALF, 0.56,
        lambda r: r.ratio_to_gemm / at["DrGRPO", ONE_PASS].ratio_to_gemm, beside=ONE_PASS)  # fmt: skip
    ask("one pass, memory / naive's", "DrGRPO", ONE_PASS, 0.05,
        lambda r: r.peak_extra_bytes / at["DrGRPO", NAIVE].peak_extra_bytes, beside=NAIVE)  # fmt: skip
    ask("scoring / fastest rival", "scoring", SCORE, 1.0, lambda r: r.ratio_to_gemm / fastest["scoring"])
    ask("cross-entropy / three products", "cross-entropy", CE, 1.08)
    ask("cross-entropy / fastest rival", "cross-entropy", CE, 1.0, lambda r: r.ratio_to_gemm / fastest["cross-entropy"])
    return asked


def show(title, rows, refused, asked):
    print(f"{title}\n{common.machine()}")
    for contest in dict.fromkeys(r.contest for r in rows):
        print(f"  {contest:<36}  seconds   of products (low to high)  of minima   extra MB   error")
        for r in (r for r in rows if r.contest == contest):
            error = r.max_grad_error if r.max_grad_error is not None else r.max_logp_error
            text = "" if error is None else f"{error:.1e}"
            print(
                f"    {r.name:<34} {r.seconds:8.3f}   {r.ratio_to_gemm:8.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})"
                f"   {r.ratio_of_minima:6.2f}   {r.peak_extra_bytes / 1e6:10.1f}   {text}"
            )
    for name, why in refused.items():
        print(f"  not timed, results are wrong: {name}: {why}")
    for t in asked:
        print(
            f"  {t['target']:<36} {t['measured']:6.3f}   target {t['at_most']:.2f}   {'met' if t['met'] else 'MISSED'}"
        )
    if rivals.missing():
        print(f"  not installed: {', '.join(rivals.missing())}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="N, tokens with loss")
    parser.add_argument("--width", type=int, default=1024, help="D")
    parser.add_argument("--vocab", type=int, default=32000, help="V")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, after one that does not count")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile (a minute)")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="PATH", help="no table; with PATH: the table, JSON to PATH"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="torch")
    dtype = DTYPES[args.dtype]
    case = make_case(args.rows, args.width, args.vocab, dtype, args.device)
    rows, refused = [], {}
    for contest in contests(case, compiled=not args.no_compile):
        more, wrong = hold(contest, args.rounds, dtype)
        rows, refused = rows + more, refused | wrong
    title = f"head  N={args.rows} D={args.width} V={args.vocab} {args.dtype} {args.device}"
    asked = targets(rows)
    result = {
        "benchmark": title, "machine": common.machine(), "rows": [asdict(r) for r in rows], "targets": asked,
        "refused": refused, "not_installed": rivals.missing(),
    }  # fmt: skip
    if args.json != "-":
        show(title, rows, refused, asked)
    if args.json not in (None, "-"):
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
    if ours := {name: why for name, why in refused.items() if name.startswith("ours")}:
        return common.refuse(str(ours))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
