"""What Triton makes of every kernel for GPUs that need not be here: the gates of benchmarks.compile_report, and theirs.

The compiler runs in a process of its own: in this one Triton interprets.
"""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from thinkmid.kernels import gpu

ROOT = Path(__file__).parents[2]


def report(*options):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.returncode  # before it, what the compiler has to say


@pytest.fixture(scope="module")
def tool():
    # not at the top: it brings triton, which must not come before conftest has chosen the interpreter
    from benchmarks import compile_report

    return compile_report


@pytest.fixture(scope="module")
def shipped():
    return report()


@pytest.fixture(scope="module")
def seeded():
    return report("--modules", "tests.helpers.bad_kernels", "--archs", "90")


def test_every_kernel_passes_every_gate_on_sm_90(shipped):
    found = {f"{r['variant']} / {r['kernel']} / sm_{r['arch']}": r["problems"] for r in shipped[0]["rows"]}
    assert not {name: problems for name, problems in found.items() if problems}


def test_every_kernel_compiles_for_every_architecture(shipped, tool):
    compiled = {(r["module"], r["variant"], r["arch"]) for r in shipped[0]["rows"] if "total" in r}
    variants = {pair[:2] for pair in compiled}
    assert {m.rsplit(".", 1)[1] for m, _ in variants} == {m.name for m in pkgutil.iter_modules(gpu.__path__)}
    assert {v for v in variants if any((*v, arch) not in compiled for arch in tool.ARCHS)} == set()


def test_no_instruction_count_moved_away_from_the_snapshot(shipped):
    assert shipped[0]["moved"] == []
    assert shipped[1] == 0


def seeds():
    # read, not imported: its kernels must not be wrapped by the interpreter of this process
    text = (ROOT / "tests/helpers/bad_kernels.py").read_text().partition("VARIANTS = {")[2]
    return [line.split('"')[1] for line in text.splitlines() if line.startswith('    "')]


@pytest.mark.parametrize("name", seeds())
def test_a_kernel_with_a_fault_is_found(seeded, name):
    rows = [r for r in seeded[0]["rows"] if r["variant"] == name and r["arch"] == 90]
    assert len(rows) == 1
    fault = name.split(",")[0]
    assert any(fault in problem for problem in rows[0]["problems"]) if fault else rows[0]["problems"] == []


def test_a_report_with_a_fault_fails(seeded):
    assert seeded[1] == 1


def test_a_kernel_that_grew_is_found(tool):
    snapshot = json.loads(tool.SNAPSHOT.read_text()) | {"triton": tool.triton.__version__}
    key, counts = next((k, c) for k, c in snapshot["kernels"].items() if c.get("LDG.128", 0) >= 4)
    module, variant, kernel = key.split(" / ")
    instructions = {k: n for k, n in counts.items() if k not in ("registers", "all")}
    row = {"module": module, "variant": variant, "kernel": kernel, "arch": 90, "regs": counts["registers"]}
    row |= {"total": counts["all"], "instructions": instructions}
    assert tool.against_snapshot([row], snapshot) == []
    narrow = {k: n for k, n in instructions.items() if k != "LDG.128"} | {"LDG.32": 40}
    moved = tool.against_snapshot([row | {"total": int(counts["all"] * 1.2), "instructions": narrow}], snapshot)
    assert {line.rsplit(": ", 1)[1].split()[0] for line in moved} == {"all", "LDG.128", "LDG.32"}
