"""The analytic model against times that others published, each with the share of error that is allowed.

The bare products calibrate the rate (798 TFLOP/s times 0.915); everything else is a prediction. The A100 has no
measured ceiling in the table, hence its wider tolerance.
"""

import pytest

from benchmarks.roofline import DEVICES, TARGET, Head, head, row_op

TRL = Head(tokens=8192, width=4096, vocab=151936)
QUACK = {"width": 4096, "vocab": 128256, "logit_bytes": 2}
PUBLISHED = {
    "bare products, TRL #7244": ("H100", "gemms", TRL, 42.0, 0.02),
    "naive cross-entropy, TRL #7244": ("H100", "naive", TRL, 59.0, 0.05),
    "QuACK chunked, N=16384, Liger #1356": ("H200", "one pass", Head(tokens=16384, **QUACK), 73.7, 0.03),
    "QuACK chunked, N=4096, Liger #1356": ("H200", "one pass", Head(tokens=4096, **QUACK), 16.8, 0.10),
    "Liger SM90 scaled CE, Liger #1370": (
        "H100", "fused recompute", Head(tokens=32768, width=4096, vocab=131072), 211.3, 0.05,
    ),
    "Liger FLCE 0.4.2 with 1024-row chunks, benchmark csv": (
        "A100", "one pass", Head(tokens=32768, width=4096, vocab=128256, logit_bytes=2, chunk=1024), 511.0, 0.15,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
def test_the_model_meets_published_times(case):
    device, design, shape, published_ms, tolerance = case
    assert head(design, shape, DEVICES[device]).seconds * 1e3 == pytest.approx(published_ms, rel=tolerance)


def test_naive_memory_is_what_was_published():
    """TRL #7244 reports 19.9 GiB at its peak, inputs and gradients included."""
    given = 4 * (TRL.tokens + TRL.vocab) * TRL.width  # hidden, weight and their gradients in bf16
    assert (head("naive", TRL, DEVICES["H100"]).extra_bytes + given) / 2**30 == pytest.approx(19.9, rel=0.2)


def test_at_the_target_shape_one_pass_lies_between_the_products_and_a_recompute():
    gemms, one, fused, chunked = (
        head(d, TARGET, DEVICES["H100"]).seconds for d in ("gemms", "one pass", "fused recompute", "recompute")
    )
    assert 0.147 * 0.95 < one < 0.153 * 1.05  # research: 147 to 153 ms
    assert gemms < one < fused < chunked
    assert chunked == pytest.approx(one + gemms / 3 + TARGET.logits * 4 / 3.0e12, rel=0.01)


def test_dead_rows_leave_time_in_proportion():
    h100 = DEVICES["H100"]
    whole, part = (head("one pass", TARGET.live(share), h100).seconds for share in (1.0, 0.35))
    assert part / whole == pytest.approx(0.35, abs=0.01)


def test_a_narrow_head_is_bound_by_its_traffic():
    """At D=64 the products move more bytes than they compute: the scores alone take 4 N V bytes."""
    shape = Head(tokens=32768, width=64, vocab=128256)
    cost = head("score", shape, DEVICES["H100"])
    assert cost.products_s >= 4 * shape.logits / 3.0e12
    assert cost.products_s > 2 * shape.logits * 64 / 730e12


def test_row_ops_cost_their_traffic():
    forward, backward = row_op("swiglu", 32768 * 14336, 2, DEVICES["H100"])
    assert forward == pytest.approx(3 * 32768 * 14336 * 2 / 3.0e12, rel=0.01)
    assert backward / forward == pytest.approx(5 / 3, rel=0.01)
