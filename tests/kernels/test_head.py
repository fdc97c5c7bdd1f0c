import pytest
import torch
from conftest import assert_no_worse, assert_same

from thinkmid.kernels import head
from thinkmid.kernels.head import linear_logprob


def naive(hidden, weight, targets, temperature=1.0):
    """log_softmax of all logits; entropy with 0 log 0 = 0."""
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp[torch.arange(len(targets)), targets], torch.special.entr(logp.exp()).sum(-1)


def inputs(rows, vocab, width=7, dtype=torch.float64):
    hidden, weight = torch.randn(rows, width, dtype=torch.float64), torch.randn(vocab, width, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(vocab, (rows,))


def with_gradients(fn, hidden, weight, dlogp, dentropy):
    logp, entropy = fn(hidden, weight)
    dhidden, dweight = torch.autograd.grad((logp * dlogp).sum() + (entropy * dentropy).sum(), (hidden, weight))
    return {"logp": logp.detach(), "entropy": entropy.detach(), "dhidden": dhidden, "dweight": dweight}


@pytest.mark.parametrize("return_entropy", [False, True], ids=["logp", "entropy too"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_finite_differences(temperature, return_entropy, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    hidden, weight, targets = inputs(19, 11)  # two chunks, the second of 3 rows

    def fn(hidden, weight):
        logp, entropy = linear_logprob(hidden, weight, targets, temperature=temperature, return_entropy=return_entropy)
        return (logp, entropy) if return_entropy else logp

    assert torch.autograd.gradcheck(fn, (hidden, weight))


@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (15, 31), (16, 32), (17, 33), (101, 127)])
@pytest.mark.parametrize("chunk_rows", [16, 17, 10_000])
def test_any_chunk_gives_the_log_softmax_and_the_entropy(rows, vocab, chunk_rows, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * vocab * chunk_rows)
    hidden, weight, targets = inputs(rows, vocab)
    dlogp, dentropy = torch.randn(2, rows, dtype=torch.float64)

    def fn(hidden, weight):
        return linear_logprob(hidden, weight, targets, temperature=1.3, return_entropy=True)

    ours = with_gradients(fn, hidden, weight, dlogp, dentropy)
    assert_same(ours, with_gradients(lambda h, w: naive(h, w, targets, 1.3), hidden, weight, dlogp, dentropy))


def test_one_of_the_two_results_may_go_unused():
    hidden, weight, targets = inputs(19, 11)
    for used in (0, 1):
        grads = [
            torch.autograd.grad(result[used].square().sum(), (hidden, weight))
            for result in (linear_logprob(hidden, weight, targets, return_entropy=True), naive(hidden, weight, targets))
        ]
        assert_same(*({"dhidden": h, "dweight": w} for h, w in grads))
    assert linear_logprob(hidden, weight, targets)[1].shape == (0,)


def test_no_rows_give_zero_gradients():
    hidden, weight, targets = inputs(0, 11)
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    dhidden, dweight = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert logp.shape == entropy.shape == (0,)
    assert dhidden.shape == (0, 7)
    assert torch.equal(dweight, torch.zeros(11, 7, dtype=torch.float64))


def test_a_token_that_cannot_be_drawn_spoils_nothing():
    hidden, weight, targets = inputs(19, 11, dtype=torch.float32)
    with torch.no_grad():
        hidden[:, 0] = 100
        weight[:, 0] = 0
        weight[4] = 0
        weight[4, 0] = -3e38  # a logit of -inf in fp32
    targets[targets == 4] = 5
    assert (hidden @ weight.T)[:, 4].eq(-torch.inf).all()
    ones = torch.ones(19)
    ours = with_gradients(lambda h, w: linear_logprob(h, w, targets, return_entropy=True), hidden, weight, ones, ones)
    keep = torch.arange(11) != 4  # as if the token were not in the vocabulary
    among = torch.where(targets > 4, targets - 1, targets)
    exact = with_gradients(
        lambda h, w: naive(h, w[keep], among), hidden.double().detach().requires_grad_(),
        weight.double().detach().requires_grad_(), ones, ones,
    )  # fmt: skip
    for name, want in exact.items():
        torch.testing.assert_close(ours[name].double(), want, rtol=1e-4, atol=1e-4)
    assert ours["dweight"][4].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["flat", "peaked"])
def test_values_and_gradients_are_no_worse_than_log_softmax(dtype, scale, monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    hidden, weight, targets = inputs(211, 127, width=64, dtype=dtype)
    with torch.no_grad():
        weight *= scale / 8
    dlogp, dentropy = torch.randn(211), torch.randn(211)

    def wide(h, w):
        logits = (h @ w.T).to(torch.promote_types(dtype, torch.float32))  # what a careful user of log_softmax writes
        logp = logits.log_softmax(-1)
        return logp[torch.arange(211), targets], -(logp.exp() * logp).sum(-1)

    ours = with_gradients(
        lambda h, w: linear_logprob(h, w, targets, return_entropy=True), hidden, weight, dlogp, dentropy
    )
    plain = with_gradients(wide, hidden, weight, dlogp, dentropy)
    double = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = with_gradients(lambda h, w: naive(h, w, targets), *double, dlogp, dentropy)
    for name, want in exact.items():
        assert ours[name].dtype == (torch.float32 if name in ("logp", "entropy") else dtype)
        assert_no_worse(ours[name], want, plain[name])


def test_impossible_arguments_are_refused():
    hidden, weight, targets = inputs(5, 11)
    with pytest.raises(ValueError, match="targets"):
        linear_logprob(hidden, weight, targets[:4])
    with pytest.raises(ValueError, match="weight"):
        linear_logprob(hidden, weight[:, :6], targets)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        linear_logprob(hidden, weight, targets, temperature=0.0)
