"""All that only a GPU can measure about the kernels, in one command: one table a section, one JSON.

    python -m benchmarks.gpu [--json PATH] [--sections ceilings,products,rows,ops,head,score,filter,sanitizer,same]

Needs torch 2.11 to 2.14 and triton 3.6 or later. Rivals that are not installed are left out. A section that fails is
recorded with its error and the next one runs; the exit code is then 1. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import head, kernels, rivals, roofline
from benchmarks.rivals import Case
from thinkmid.kernels import fused_linear_dr_grpo, linear_logprob
from thinkmid.kernels.rows import row_policy, row_stats
from thinkmid.kernels.streams import Policy, Scores

# tests whose shapes are ragged, for compute-sanitizer: quick, and every kernel is in them
RAGGED = ["-m", "pytest", "-q", "-x", "tests/gpu", "-k", "ragged"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The target shape; tests put smaller numbers in."""

    square: int = 8192
    copy_bytes: int = 4 << 30
    width: int = 4096
    vocab: int = 128256
    chunks: tuple[int, ...] = (4096, 8192)
    row_chunks: tuple[int, ...] = (512, 2048, 4096)
    tokens: tuple[int, ...] = (4096, 16384, 32768)
    gate_tokens: int = 1024
    live: tuple[float, ...] = (1.0, 0.56, 0.35)
    ops_tokens: int = 32768
    repeats: int = 10


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of single runs after two that do not count, by events on the stream."""
    for _ in range(2):
        run()
    if device.type != "cuda":
        return min(_wall(run) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def _wall(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# sections: each takes sizes, device and what went before, and returns rows


def ceilings(sizes: Sizes, device, before) -> list[dict]:
    """The best product and the best copy: what everything else is measured against."""
    n = sizes.square
    rows = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        s = seconds(lambda a=a, b=b: a @ b, device, sizes.repeats)
        rows.append({"what": f"{n}^3 product, {name}", "seconds": s, "flop_s": 2 * n**3 / s})
    source = torch.ones(sizes.copy_bytes // 8, device=device)
    target = torch.empty_like(source)
    s = seconds(lambda: target.copy_(source), device, sizes.repeats)
    rows.append({"what": "copy", "seconds": s, "bytes_s": 2 * source.nbytes / s})
    return rows


def measured_device(before) -> roofline.Device:
    """The roofline of this run; the head's own products are slower than a square one, by how much the table says."""
    found = {r["what"].split(", ")[-1]: r for r in before["ceilings"]}
    return roofline.Device(
        name="this GPU", bf16=found["bf16"]["flop_s"], fp32=found["fp32"]["flop_s"], copy=found["copy"]["bytes_s"],
        source="measured in this run",
    )  # fmt: skip


def products(sizes: Sizes, device, before) -> list[dict]:
    """The head's three products with fp32 results, and dz as a strided view of the scores' own memory."""
    out = []
    for chunk in sizes.chunks:
        for name, run in product_runs(chunk, sizes.width, sizes.vocab, device).items():
            s = seconds(run, device, sizes.repeats)
            flops = 2 * chunk * sizes.width * sizes.vocab
            out.append({"what": f"C={chunk} {name}", "seconds": s, "flop_s": flops / s})
    return out


def product_runs(chunk, width, vocab, device) -> dict[str, Callable[[], Tensor]]:
    h = torch.randn(chunk, width, device=device, dtype=torch.bfloat16)
    w = torch.randn(vocab, width, device=device, dtype=torch.bfloat16)
    z, scores = (torch.empty(chunk, vocab, device=device) for _ in range(2))
    dz = torch.randn(chunk, vocab, device=device, dtype=torch.bfloat16)
    # the bf16 gradient over the first half of each fp32 row: row stride 2 V
    view = z.view(torch.bfloat16)[:, :vocab]
    view.copy_(dz)
    dw, dw16 = torch.zeros(vocab, width, device=device), torch.empty_like(w)
    wide = {"out_dtype": torch.float32}
    return {
        "scores, bf16": lambda: torch.mm(h, w.T),
        "scores, fp32 result": lambda: torch.mm(h, w.T, out=scores, **wide),
        "dhidden": lambda: dz @ w,
        "dhidden, strided dz": lambda: view @ w,
        "dweight, bf16": lambda: torch.mm(dz.T, h, out=dw16),
        "dweight, fp32 written": lambda: torch.mm(dz.T, h, out=dw, **wide),
        "dweight, fp32 added": lambda: torch.addmm(dw, dz.T, h, out=dw, **wide),
        "dweight, fp32 added, strided dz": lambda: torch.addmm(dw, view.T, h, out=dw, **wide),
    }


def rows(sizes: Sizes, device, before) -> list[dict]:
    """The row kernel: one sweep for statistics, two with the gradient, over the scores or apart; rows in flight."""
    out = []
    for chunk in sizes.row_chunks:
        z = 3 * torch.randn(chunk, sizes.vocab, device=device)
        targets = torch.randint(sizes.vocab, (chunk,), device=device)
        adv = torch.randn(chunk, device=device)
        policy = Policy(adv=adv, denom=float(chunk))
        apart = torch.empty_like(z, dtype=torch.bfloat16)
        scratch = z.clone()
        entropy = replace(policy, entropy_coef=0.01)
        cases = {
            "statistics": (lambda z=z, y=targets: row_stats(z, y, Scores(), False), 4),
            "statistics, entropy": (lambda z=z, y=targets: row_stats(z, y, Scores(), True), 4),
            "gradient, bf16 apart": (
                lambda z=z, y=targets, p=policy, o=apart: row_policy(z, y, p, Scores(), False, o), 6,
            ),
            "gradient, bf16 apart, entropy": (
                lambda z=z, y=targets, p=entropy, o=apart: row_policy(z, y, p, Scores(), True, o), 6,
            ),
            "gradient, fp32 in place": (
                lambda z=scratch, y=targets, p=policy: row_policy(z, y, p, Scores(), False, z), 8,
            ),
        }  # fmt: skip
        for name, (run, num_bytes) in cases.items():
            s = seconds(run, device, sizes.repeats)
            out.append({"what": f"C={chunk} {name}", "seconds": s, "bytes_s": num_bytes * z.numel() / s})
    return out


def ops(sizes: Sizes, device, before) -> list[dict]:
    """The model's ops in bf16 at the target width, with the benchmark that the CPU uses."""
    args = argparse.Namespace(
        tokens=sizes.ops_tokens, width=sizes.width, head_size=128, vocab=sizes.vocab, policy_rows=1 << 20,
        prefix=1024, reply=256, siblings=16, dtype="bf16", device=device.type, rounds=sizes.repeats,
    )  # fmt: skip
    found, refused = kernels.measure(args)
    bad = [{"what": name, "error": why} for name, why in refused.items()]
    return [{"what": f"{r.op}, {r.direction}", **asdict(r)} for r in found] + bad


def heads(sizes: Sizes, device, before) -> list[dict]:
    """Loss and gradients at each number of tokens and live share, against rivals and this GPU's roofline."""
    model = measured_device(before)
    wrong = gate(sizes, device)
    out = [{"what": f"gate: {name}", "error": why} for name, why in wrong.items()]
    for num in sizes.tokens:
        case = head.make_case(num, sizes.width, sizes.vocab, torch.bfloat16, device.type)
        shape = roofline.Head(tokens=num, width=sizes.width, vocab=sizes.vocab)
        floor = floor_s(case, device, sizes.repeats)
        out.append(_head_row(f"N={num} bare products", floor, 0, shape, "gemms", model))
        fns = {"ours, one pass": head.one_pass, "ours, log-prob then loss": head.log_prob_then_loss}
        designs = {"ours, one pass": "one pass", "ours, log-prob then loss": "recompute", "naive autograd": "naive"}
        for name, fn in (fns | rivals.losses(device.type)).items():
            if name not in wrong:
                design = designs.get(name)
                out.append(_timed(f"N={num} {name}", fn, case, floor, shape, design, model, sizes.repeats))
        for share in sizes.live[1:]:
            part, live = dead_rows(case, share), shape.live(share)
            what = f"N={num} ours, one pass, live {share}"
            out.append(_timed(what, head.one_pass, part, floor, live, "one pass", model, sizes.repeats))
    return out


def floor_s(case: Case, device, repeats: int) -> float:
    """The three bare products, of 4096 tokens and scaled up: all scores at once would not fit beside the inputs."""
    part = case.rows(slice(0, 4096))
    return seconds(head.products(part, backward=True), device, repeats) * len(case.targets) / len(part.targets)


def gate(sizes: Sizes, device) -> dict[str, str]:
    """Who is wrong on a few rows, against fp64."""
    case = head.make_case(sizes.gate_tokens, sizes.width, sizes.vocab, torch.bfloat16, device.type)
    exact = head.truth(head.naive_loss, case)
    wrong = {}
    fns = {"ours, one pass": head.one_pass, "ours, log-prob then loss": head.log_prob_then_loss}
    for name, fn in (fns | rivals.losses(device.type)).items():
        try:
            got = head.with_gradients(fn, case)()
            error = max(head.error_of(a, b) for a, b in zip(got, exact, strict=True))
        except Exception as problem:  # a rival that cannot run here is a finding, not the end of ours
            wrong[name] = _line(problem)
            continue
        if not error <= head.WRONG[torch.bfloat16]:
            wrong[name] = f"error {error:.1e} of the largest value"
    return wrong


def dead_rows(case: Case, share: float) -> Case:
    """All but a share of the replies have advantage 0, spread evenly."""
    reply = torch.arange(len(case.targets), device=case.targets.device) // head.REPLY
    live = ((reply + 1) * share).floor() > (reply * share).floor()
    return replace(case, advantages=case.advantages * live)


def _timed(what, fn, case, floor, shape, design, model, repeats) -> dict:
    try:
        run = head.with_gradients(fn, case)
        _, peak = head.with_peak(run, case.hidden.device)
        s = seconds(run, case.hidden.device, repeats)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"what": what, "error": "out of memory"}
    except Exception as problem:  # a rival's own failure
        return {"what": what, "error": _line(problem)}
    return _head_row(what, s, peak - case.hidden.nbytes - case.weight.nbytes, shape, design, model, floor)


def _head_row(what, s, peak, shape, design, model, floor=None):
    row = {"what": what, "seconds": s, "ratio_to_gemm": s / (floor or s), "peak_extra_bytes": peak}
    row["min_flop_s"] = 6 * shape.logits * shape.width / s
    if design:
        cost = roofline.head(design, shape, model)
        row |= {"roofline_s": cost.seconds, "of_roofline": cost.seconds / s, "roofline_bytes": cost.extra_bytes}
    return row


def score(sizes: Sizes, device, before) -> list[dict]:
    """Log-probs without a gradient: chunks and row kernel, the fused forward kernel, rivals."""
    out = []
    for num in sizes.tokens:
        case = head.make_case(num, sizes.width, sizes.vocab, torch.bfloat16, device.type)
        fns = {"ours, linear_logprob": lambda c: linear_logprob(c.hidden, c.weight, c.targets)}
        if importlib.util.find_spec("thinkmid.kernels.gpu.logprob") and device.type == "cuda":
            fns["ours, fused forward"] = _fused_forward
        for name, fn in (fns | rivals.scores()).items():
            try:
                run = torch.no_grad()(lambda fn=fn, case=case: [fn(case)])
                _, peak = head.with_peak(run, device)
                s = seconds(run, device, sizes.repeats)
            except Exception as problem:
                out.append({"what": f"N={num} {name}", "error": _line(problem)})
                continue
            flops = 2 * num * sizes.width * sizes.vocab
            out.append({"what": f"N={num} {name}", "seconds": s, "flop_s": flops / s, "peak_extra_bytes": peak})
    return out


def _fused_forward(case: Case) -> Tensor:
    from thinkmid.kernels.gpu.logprob import linear_logprob_forward

    return linear_logprob_forward(case.hidden.detach(), case.weight.detach(), case.targets, Scores(), False).logp


def filter_share(sizes: Sizes, device, before) -> list[dict]:
    """Share of dz's blocks that a certified filter would keep, by block size and tolerance.

    A block may go if, in each of its rows, its probability is at most tol (1 - p_target) block / V: then what is left
    out of a row's gradient is at most tol / 2 of it. Random states say little; --states gives a real policy's.
    """
    if before.get("states"):
        from safetensors.torch import load_file

        given = {k: v.to(device) for k, v in load_file(before["states"]).items()}
        hidden, weight, targets = (given[k] for k in ("hidden", "weight", "targets"))
    else:
        case = head.make_case(sizes.gate_tokens, sizes.width, sizes.vocab, torch.bfloat16, device.type)
        hidden, weight, targets = case.hidden.detach(), 4 * case.weight.detach(), case.targets
    p = (hidden @ weight.T).float().softmax(-1)  # (N, V)
    at = targets[:, None]
    budget = 1 - p.gather(1, at)
    out = []
    for block in (64, 128, 256):
        rows_, columns = p.shape[0] // block * block, p.shape[1] // block * block
        mass = p[:rows_, :columns].unflatten(1, (-1, block)).sum(-1)  # (N, V / block)
        for tol in (1e-3, 1e-2, 1e-1):
            keep = mass > tol * budget[:rows_] * block / p.shape[1]
            keep |= torch.arange(keep.shape[1], device=device) == at[:rows_] // block
            share = keep.unflatten(0, (-1, block)).any(1).float().mean().item()
            out.append({"what": f"blocks of {block}, tolerance {tol}", "kept": share})
    return out


def sanitizer(sizes: Sizes, device, before) -> list[dict]:
    """Out-of-bounds and races on ragged shapes, by NVIDIA's tool where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"what": "compute-sanitizer", "skipped": "not installed"}]
    out = []
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, *RAGGED]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        row = {"what": f"compute-sanitizer {kind}", "exit": done.returncode}
        out.append(row if done.returncode == 0 else row | {"error": (done.stdout + done.stderr)[-2000:]})
    return out


def same(sizes: Sizes, device, before) -> list[dict]:
    """Two runs give the same bits: loss, metrics, log-probs, gradients; with clipping, KL and entropy on."""
    case = head.make_case(sizes.gate_tokens + 37, sizes.width, sizes.vocab, torch.bfloat16, device.type)

    def run():
        done = fused_linear_dr_grpo(
            case.hidden, case.weight, case.targets, case.advantages, denom=case.denom, old_logp=case.old_logp,
            sampler_logp=case.old_logp, is_cap=2.0, ref_logp=case.old_logp, beta=0.1, entropy_coef=0.01,
            temperature=0.9,
        )  # fmt: skip
        grads = torch.autograd.grad(done.loss, (case.hidden, case.weight))
        return [done.loss, *done.metrics, done.logp, done.entropy, *grads]

    first, second = run(), run()
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [{"what": "two runs are equal bit for bit", "equal": equal} | ({} if equal else {"error": "they differ"})]


SECTIONS = {
    "ceilings": ceilings, "products": products, "rows": rows, "ops": ops, "head": heads, "score": score,
    "filter": filter_share, "sanitizer": sanitizer, "same": same,
}  # fmt: skip


def run_sections(names, sizes: Sizes, device, states=None) -> dict:
    before = {"states": states}
    for name in names:
        began = time.perf_counter()
        try:
            before[name] = SECTIONS[name](sizes, device, before)
        except Exception as problem:  # the sections after it are worth having
            before[name] = [{"what": name, "error": _line(problem)}]
        show(name, before[name], time.perf_counter() - began)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return before


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


UNITS = {
    "seconds": (1e3, "ms"), "roofline_s": (1e3, "ms by the model"), "flop_s": (1e-12, "TFLOP/s"),
    "min_flop_s": (1e-12, "TFLOP/s of 6NDV"), "bytes_s": (1e-9, "GB/s"), "peak_extra_bytes": (1e-9, "GB extra"),
    "ratio_to_gemm": (1, "of products"), "of_roofline": (1, "of roofline"), "times_plain": (1, "times eager"),
    "share_of_copy": (1, "of copy"), "kept": (1, "kept"),
}  # fmt: skip


def show(name, found, took):
    print(f"{name}  ({took:.0f} s)")
    for row in found:
        cells = [f"{row[k] * scale:9.3f} {unit}" for k, (scale, unit) in UNITS.items() if row.get(k) is not None]
        cells += [f"{k}: {row[k]}" for k in ("equal", "exit", "skipped", "error") if k in row]
        print(f"  {row['what']:<52} {'  '.join(cells)}")


def environment(device) -> dict:
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    found |= {"gpu": torch.cuda.get_device_name(device), "rivals_missing": rivals.missing()}
    return found | {"capability": list(torch.cuda.get_device_capability(device))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="where the JSON goes; else it is the last line printed")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated; head needs ceilings")
    parser.add_argument("--tokens", type=int, nargs="+", help="N of head and score instead of 4096, 16384 and 32768")
    parser.add_argument("--repeats", type=int, default=Sizes.repeats)
    parser.add_argument("--states", metavar="PATH", help="safetensors with hidden, weight and targets of a real policy")
    args = parser.parse_args()
    names = args.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown section {sorted(unknown)[0]!r}, one of {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a GPU that torch can use; there is none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    sizes = Sizes(repeats=args.repeats, tokens=tuple(args.tokens or Sizes.tokens))
    result = {"benchmark": "gpu", **environment(device)}
    print(json.dumps(result))
    result["sections"] = run_sections(names, sizes, device, args.states)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))
    ours = [r for name in names for r in result["sections"][name] if "error" in r and not _is_rival(r["what"])]
    return 1 if ours else 0


def _is_rival(what: str) -> bool:
    return any(name in what for name in (*rivals.losses("cuda"), *rivals.scores()))


if __name__ == "__main__":
    raise SystemExit(main())
