"""Every Triton kernel as the compiler leaves it, for GPUs that need not be here: registers, memory, instructions.

    python -m benchmarks.compile_report --json

benchmarks.compile_cases holds calls of the launchers in thinkmid.kernels.gpu; they are run on meta tensors of real size
under a driver that compiles and does not launch. sm_90 is held to the gates of `problems`, sm_80 and sm_100 to
compiling. Exit code 1 if a gate does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import compile_cases

ARCHS = (90, 80, 100)
GATED = 90
SHARED_LIMIT = 232_448  # bytes of shared memory that a program may have on sm_90
SNAPSHOT = Path(__file__).parent / "results" / "compile_snapshot.json"
TOLERANCE = 0.1  # of an instruction count against the snapshot; differences of two instructions are let through
MIX = (
    "HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "FFMA", "FFMA2", "MUFU", "LDG.128", "LDG.64", "LDG.32", "STG.128", "STG.64",
    "STG.32", "BAR",
)  # fmt: skip


def variants(module: str) -> dict:
    """name -> (call, what sm_90 must show) for a module of kernels; one that is not shipped has its own VARIANTS."""
    return compile_cases.VARIANTS.get(module) or importlib.import_module(module).VARIANTS


class _Driver:
    """Enough of a driver for Triton's launch path to choose types, alignments and options, and to compile."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch  # compiled kernels are kept by device: one for each architecture

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def capture(arch: int):
    """A list that receives (function, arguments by name, grid, compiled kernel) of every launch, none of which runs.

    The driver stays: on a machine without a GPU there is none to go back to.
    """
    launches, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        names = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append((self, names, grid, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(_Driver(arch))
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run


def compiled(module: str, variant: str, arch: int) -> list[dict]:
    """What the kernels of one variant became on one architecture, and the gates that they do not pass."""
    call, expect = variants(module)[variant]
    try:
        with capture(arch) as launches:
            call()
    # the compiler's passes raise whatever they like; a kernel that does not compile is a finding, not the report's end
    except Exception as e:
        failure = f"does not compile: {type(e).__name__}: {str(e).strip().splitlines()[-1:]}"
        return [{"module": module, "variant": variant, "kernel": "?", "arch": arch, "problems": [failure]}]
    return [_row(module, variant, arch, expect, *launch) for launch in launches]


def _row(module, variant, arch, expect, function, args, grid, kernel) -> dict:
    name = function.__name__
    large = {n for n, x in args.items() if isinstance(x, torch.Tensor) and (x.ndim > 1 or x.numel() >= 2**31)}
    row = {"module": module, "variant": variant, "kernel": name, "arch": arch, "shared": kernel.metadata.shared}
    row |= machine_code(kernel.asm["cubin"])
    expect = expect.get(name, {}) if any(isinstance(x, dict) for x in expect.values()) else expect
    row["problems"] = problems(row, kernel.asm, large, grid, expect) if arch == GATED else []
    return row


def problems(row: dict, asm: dict, large: set[str], grid: tuple, expect: dict) -> list[str]:
    """The gates that a kernel on sm_90 does not pass."""
    found = [f"32-bit offset into {x}" for x in narrow_offsets(asm["ttir"], large)]
    mix = Counter(row["instructions"])
    if row["stack"] or row["local"] or mix["LDL"] or mix["STL"]:
        found.append(f"spills: {row['stack']} B of stack, {row['local']} B local, {mix['LDL'] + mix['STL']} accesses")
    if row["shared"] > SHARED_LIMIT:
        found.append(f"{row['shared']} bytes of shared memory, there are {SHARED_LIMIT}")
    if ".f64" in asm["ptx"]:
        found.append("fp64 arithmetic")
    if mix["HMMA"]:
        found.append("mma.sync, a quarter to a half of the speed of wgmma")
    if max(grid[1:], default=1) > 65535:
        found.append(f"grid {grid}: only its first axis may pass 65535")
    for key, code in (("load", "LDG"), ("store", "STG")):
        widths = [bits for bits in (128, 64, 32) if mix[f"{code}.{bits}"]]
        if max(widths, default=0) < expect.get(key, 0):
            found.append(f"no {code} of {expect[key]} bits, but of {widths}")
    if "regs" in expect and row["regs"] > expect["regs"]:
        found.append(f"{row['regs']} registers, expected {expect['regs']} at most")
    if expect.get("hgmma") and expect["hgmma"] not in row["hgmma"]:
        found.append(f"no wgmma {expect['hgmma']}, but {row['hgmma']}")
    if expect.get("tma") and not mix["UTMALDG"]:
        found.append("no TMA load")
    return found


def narrow_offsets(ttir: str, large: set[str]) -> list[str]:
    """Arguments among `large` to whose pointers something is added that came out of a 32-bit product.

    Products of constants and of positions inside a block are bounded by the block and let through. Names are those of
    the kernel's parameters; a pointer or an offset is followed back through loops to all that it may have been.
    """
    sources: dict[str, set[str]] = {}  # of a value: what it is made from
    makers: dict[str, str] = {}  # its operation, with its types
    added: list[tuple[str, str]] = []  # pointer, offset
    loops: list[list[str]] = []  # results of the loops and branches around the line, yields flow into them
    for line in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*", "", line)
        left, _, right = line.partition(" = ") if re.match(r"\s*%\S+ = ", line) else ("", "", line)
        results = [x.split(":")[0] for x in re.findall(r"%[\w:]+", left)]
        operands = {x.split("#")[0] for x in re.findall(r"%[\w#]+", right)}
        if right.lstrip().startswith(("scf.for", "scf.if", "scf.while")) or right.rstrip().endswith("{"):
            loops.append(results)
            for name, start in re.findall(r"(%\w+) = (%\w+)", right):
                sources.setdefault(name, set()).add(start)
                for result in results:
                    sources.setdefault(name, set()).add(result)
        elif right.strip().startswith("}") and not right.rstrip().endswith("{") and loops:
            loops.pop()
        if right.lstrip().startswith("scf.yield") and loops:
            results = loops[-1]
        for result in results:
            sources.setdefault(result, set()).update(operands)
            makers[result] = right
        if right.startswith("tt.addptr"):
            added.append(tuple(re.findall(r"%\w+", right)[:2]))

    def behind(name, seen):
        if name not in seen:
            seen.add(name)
            for source in sources.get(name, ()):
                behind(source, seen)
        return seen

    def varies(name):
        ends = [makers.get(n, "argument") for n in behind(name, set()) if not sources.get(n)]
        return any(not end.startswith(("arith.constant", "tt.make_range", "dense", "true", "false")) for end in ends)

    def is_narrow_product(name):
        maker = makers.get(name, "")
        return bool(re.match(r"arith\.(muli|shli)\b.*: (i32|tensor<[\dx]+xi32>)", maker)) and varies(name)

    found = set()
    for pointer, offset in added:
        roots = {n.removeprefix("%") for n in behind(pointer, set())} & large
        if roots and any(is_narrow_product(n) for n in behind(offset, set())):
            found |= roots
    return sorted(found)


def machine_code(cubin: bytes) -> dict:
    """Registers, stack, local memory and instruction counts, kept beside Triton's own compiled kernels."""
    kept = Path(triton.knobs.cache.dir) / "thinkmid" / f"{hashlib.sha256(cubin).hexdigest()}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {key: int(x) for key, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", text, re.MULTILINE)
    counts = Counter(_kind(code) for code in codes)
    shapes = {m[1] for code in codes if (m := re.match(r"HGMMA\.(\d+x\d+x\d+)", code))}
    made = {
        "regs": numbers["REG"], "stack": numbers["STACK"], "local": numbers["LOCAL"], "hgmma": sorted(shapes),
        "total": len(codes), "instructions": dict(sorted(counts.items())),
    }  # fmt: skip
    kept.parent.mkdir(parents=True, exist_ok=True)
    unique = kept.with_suffix(f".{os.getpid()}")
    unique.write_text(json.dumps(made))
    unique.replace(kept)
    return made


def _kind(code: str) -> str:
    """Of an instruction: its name, and the bits it moves where it reads or writes global memory."""
    name = code.split(".")[0]
    if name not in ("LDG", "STG"):
        return name
    return f"{name}.{next((bits for bits in ('128', '64', 'U16', 'U8') if f'.{bits}' in code), '32')}"


def against_snapshot(rows: list[dict], snapshot: dict) -> list[str]:
    """Counts that moved by more than the tolerance. Another compiler makes other code: then there is nothing to say."""
    if snapshot.get("triton") != triton.__version__:
        return []
    found = []
    for row in (r for r in rows if r["arch"] == GATED and "total" in r):
        key, now = _key(row), _counts(row)
        was = snapshot["kernels"].get(key)
        if was is None:
            found.append(f"{key}: not in the snapshot, write it with --update")
            continue
        moved = [k for k in was | now if abs(now.get(k, 0) - was.get(k, 0)) > max(2, TOLERANCE * was.get(k, 0))]
        found += [f"{key}: {k} {was.get(k, 0)} -> {now.get(k, 0)}" for k in moved]
    return found


def _key(row):
    return f"{row['module'].rsplit('.', 1)[-1]} / {row['variant']} / {row['kernel']}"


def _counts(row):
    return {"registers": row["regs"], "all": row["total"]} | {
        k: row["instructions"][k] for k in MIX if k in row["instructions"]
    }


def update(rows: list[dict]) -> None:
    kernels = {_key(r): _counts(r) for r in rows if r["arch"] == GATED and "total" in r}
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1, sort_keys=True) + "\n")


def table(rows: list[dict]) -> str:
    """One line for each kernel of each variant and architecture."""
    lines = [f"{'variant':<42}{'kernel':<18}arch  regs stack  shared  instr  of which"]
    for r in rows:
        if "total" in r:
            mix = " ".join(f"{k} {r['instructions'][k]}" for k in MIX if k in r["instructions"])
            numbers = f"{r['regs']:>6}{r['stack']:>6}{r['shared']:>8}{r['total']:>7}  {mix}"
        lines.append(f"{r['variant']:<42}{r['kernel']:<18}{r['arch']:>4}{numbers if 'total' in r else '  -'}")
        lines += [f"    {problem}" for problem in r["problems"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone, without the table")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--modules", nargs="+", help="modules with VARIANTS; all of thinkmid.kernels.gpu if not given")
    parser.add_argument("--archs", nargs="+", type=int, default=ARCHS, help="compute capabilities; only 90 has gates")
    parser.add_argument("--update", action="store_true", help="write the snapshot of instruction counts")
    args = parser.parse_args()
    if args.update and args.modules:
        parser.error("--update writes the snapshot of all modules; --modules chooses some")
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: there is no compiler to report on", file=sys.stderr)
        return 2
    names = args.modules or list(compile_cases.VARIANTS)
    tasks = [(m, v, arch) for m in names for v in variants(m) for arch in args.archs]
    rows = [row for rows in _each(tasks, args.jobs) for row in rows]
    if args.update:
        update(rows)
    snapshot = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() and not args.modules else {}
    moved = against_snapshot(rows, snapshot)
    if not args.json:
        print(table(rows))
        print("\n".join(moved))
    print(json.dumps({"benchmark": "compile_report", "triton": triton.__version__, "rows": rows, "moved": moved}))
    return 1 if moved or any(row["problems"] for row in rows) else 0


def _each(tasks, jobs):
    if jobs == 1:
        return [compiled(*task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compiled, *zip(*tasks, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
