"""The GPU session, rehearsed on the CPU: every section at toy sizes, and what becomes of one that fails or hangs."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import predict, session
from benchmarks.measure.sizes import H100, TOY, Family
from benchmarks.roofline import DEVICES

ROOT = Path(__file__).parents[2]
# rows that only a GPU has, or that need packages which may be missing
ONLY_THERE = (
    r"peak memory of tensors|memory beyond inputs|memory taken by the context|clock|power|torch-varlen|flash-attn|"
    r"Liger|host waits|device busy|padded batches"
)
OBSERVED = r"tests: (passed|skipped)|largest |operations of a step|error over sdpa's"  # no figure is expected of these


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("session")
    flags = ["--device", "cpu", "--toy", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.session", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, json.loads((out / "session.json").read_text()), out


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(rehearsal):
    done, found, out = rehearsal
    status = {name: (s["status"], s.get("why")) for name, s in found["sections"].items()}
    assert status == dict.fromkeys(session.SECTIONS, ("ok", None)), done.stderr
    assert done.returncode == 0
    rows = [row for s in found["sections"].values() for row in s["rows"]]
    assert all(row["value"] is not None for row in rows if not re.search(ONLY_THERE, row["what"]))
    assert (out / "trace.json.gz").stat().st_size > 1000
    assert found["environment"]["torch"] == torch.__version__
    table = (out / "session.md").read_text()
    assert all(f"## {name} (ok" in table for name in session.SECTIONS)


@pytest.mark.slow
def test_what_is_measured_is_predicted_and_the_other_way_round(rehearsal):
    _, found, _ = rehearsal
    guesses = predict.table(TOY, DEVICES["H100"])
    for name, section in found["sections"].items():
        measured, predicted = {row["what"] for row in section["rows"]}, guesses[name].keys()
        assert not {what for what in measured - predicted if not re.search(OBSERVED, what)}
        assert not {what for what in predicted - measured if not re.search(ONLY_THERE, what)}
        for row in section["rows"]:
            if guess := guesses[name].get(row["what"]):
                assert guess.unit == row["unit"]
                assert guess.unit or guess.value == row["value"]  # a count is known before it is measured


def test_the_committed_predictions_are_what_the_code_says():
    told = json.loads((ROOT / "benchmarks" / "results" / "gpu-predicted.json").read_text())
    now = predict.table(H100, DEVICES["H100"])
    assert told.keys() == now.keys()
    for section, rows in now.items():
        assert told[section].keys() == rows.keys()
        for what, guess in rows.items():
            assert told[section][what]["value"] == pytest.approx(guess.value, rel=1e-6), (section, what)


def test_no_prediction_beats_its_floor():
    for gpu in ("H100", "H200"):
        for section, rows in predict.table(H100, DEVICES[gpu]).items():
            for what, guess in rows.items():
                if guess.floor and guess.unit == "s":
                    assert guess.value >= 0.999 * guess.floor, (gpu, section, what)
                if guess.floor and guess.unit in ("FLOP/s", "B/s"):
                    assert guess.value <= guess.floor, (gpu, section, what)


def test_a_familys_counts_are_those_of_its_pack():
    from benchmarks.measure.training import groups_of, units_of
    from thinkmid.data.pack import duplicated, make_pack

    family = Family(prefix=5, siblings=3, reply=4, groups=2)
    units = units_of(groups_of(family, vocab=50))
    copies = [part for unit in units for part in duplicated(unit)]
    # an odd number of siblings: none has advantage 0
    for shared, given in ((True, units), (False, copies)):
        pack = make_pack(given)
        assert family.tokens(shared) == len(pack.tokens)
        assert family.rows == len(pack.rows)


def test_time_on_the_device_is_counted_once():
    """Events as torch's profiler lists them: host ops, the kernels that they launch, spans that somebody named."""
    from benchmarks.measure.profile import on_device

    def event(name, us, device="CUDA", span=False):
        kind = getattr(torch.autograd.DeviceType, device)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=span, self_device_time_total=us)

    events = [event("aten::mm", 300, "CPU"), event("gemm", 200), event("gemm", 100), event("copy", 50)]
    events += [event("FSDP::post_backward", 350, span=True)]
    rows = {row.what: row.value for row in on_device(events, plain=0.001)}
    assert rows["kernels and copies of a step"] == 3
    assert rows["device busy, share of the unprofiled step"] == pytest.approx(0.35)
    assert [rows["share of gemm"], rows["share of copy"]] == pytest.approx([300 / 350, 50 / 350])


def test_outcomes_of_tests_are_read_as_far_as_pytest_came():
    from benchmarks.measure.suite import outcomes

    alone = [
        "tests/gpu/test_a.py::test_x[one pass-2] PASSED [ 10%]",
        "tests/gpu/test_a.py::test_y SKIPPED (needs 16 GB) [ 20%]",
        "tests/gpu/test_a.py::test_late",
    ]
    spread = [
        "[gw1] [ 10%] FAILED tests/gpu/test_b.py::test_z[torch.float32] ",
        "[gw0] [ 20%] PASSED tests/gpu/test_b.py::test_w",
    ]
    assert outcomes("\n".join(alone)) == {
        "tests/gpu/test_a.py::test_x[one pass-2]": "passed", "tests/gpu/test_a.py::test_y": "skipped",
    }  # fmt: skip
    assert sorted(outcomes("\n".join(spread)).values()) == ["failed", "passed"]


# the parent, with workers that misbehave

WELL = "say(event='begin', section=name); say(event='row', row={'what': name}); say(event='end', section=name, why='')"
SCRIPT = """
import json, os, sys, time
def say(**event): print(json.dumps(event), flush=True)
say(event="environment", found={"sizes": "fake"})
for name in sys.argv[sys.argv.index("--only") + 1].split(","):
    if name in BAD:
        say(event="begin", section=name)
        say(event="row", row={"what": "half a result"})
        exec(BAD[name])
    else:
        WELL
"""
BAD = {
    "raises": "say(event='end', section=name, why='ValueError: no'); sys.exit(1)",
    "overruns": "time.sleep(60)",
    "crashes": "os.abort()",
}


@pytest.fixture
def sections(monkeypatch, tmp_path):
    """Six sections of which three misbehave, each in its own way; a worker that runs them."""
    names = ("first", "raises", "second", "overruns", "crashes", "last")
    known = {name: session.Section(module="none", half="first", budget_s=3.0) for name in names}
    monkeypatch.setattr(session, "SECTIONS", known)
    worker = tmp_path / "worker.py"
    worker.write_text(f"BAD = {BAD!r}\n" + SCRIPT.replace("WELL", WELL))
    monkeypatch.setattr(session, "WORKER", [sys.executable, str(worker)])
    return list(names)


def test_a_section_that_fails_overruns_or_crashes_costs_itself_alone(sections, tmp_path):
    record = session.Record(tmp_path / "session.json")
    session.run(sections, record, [], time.monotonic() + 60)
    found = json.loads((tmp_path / "session.json").read_text())["sections"]
    assert {name: s["status"] for name, s in found.items()} == {
        "first": "ok", "raises": "failed", "second": "ok", "overruns": "overran", "crashes": "crashed", "last": "ok",
    }  # fmt: skip
    assert found["raises"]["why"] == "ValueError: no"
    assert found["overruns"]["rows"] == found["crashes"]["rows"] == [{"what": "half a result"}]


def test_what_there_is_no_time_for_is_skipped_and_said(sections, tmp_path):
    record = session.Record(tmp_path / "session.json")
    session.run(["overruns", "first", "last"], record, [], time.monotonic() + 3.5)
    found = json.loads((tmp_path / "session.json").read_text())["sections"]
    assert [found[name]["status"] for name in ("overruns", "first", "last")] == ["overran", "skipped", "skipped"]


def test_a_second_call_adds_to_the_first(sections, tmp_path):
    for name in ("first", "last"):
        session.run([name], session.Record(tmp_path / "session.json"), [], time.monotonic() + 60)
    found = json.loads((tmp_path / "session.json").read_text())
    assert list(found["sections"]) == ["first", "last"]
    assert found["sizes"] == "fake"


def test_figures_of_two_machines_or_sizes_do_not_mix(tmp_path):
    def found(gpu, sizes):
        return {"environment": {"gpu": gpu}, "sizes": sizes}

    record = session.Record(tmp_path / "session.json")
    record.on(found("NVIDIA H100", "H100"))
    record.begin("head")
    record.on(found("NVIDIA H100", "H100"))
    for other in (found("", "toy"), found("NVIDIA H200", "H100")):
        with pytest.raises(ValueError, match="holds figures of NVIDIA H100 H100, not of"):
            record.on(other)


def test_a_section_that_raises_is_named_by_the_worker(monkeypatch, tmp_path, capsys):
    import io

    from benchmarks.measure import ceilings, head

    def broken(sizes, device, folder):
        yield from ()
        raise ZeroDivisionError("nothing there")

    monkeypatch.setattr(ceilings, "run", broken)
    monkeypatch.setattr(head, "run", lambda *_: pytest.fail("the worker went on with a context that raised"))
    pipe = io.StringIO()
    assert session.work(["ceilings", "head"], "cpu", True, tmp_path, pipe) == 1
    events = [json.loads(line) for line in pipe.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["environment", "begin", "end"]
    assert events[-1]["why"] == "ZeroDivisionError: nothing there"
    assert "nothing there" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["session"])
    assert session.main() == 2
    assert "needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["session", "--only", "blocks"])
    with pytest.raises(SystemExit) as end:
        session.main()
    assert end.value.code == 2
    assert "unknown section 'blocks'" in capsys.readouterr().err
