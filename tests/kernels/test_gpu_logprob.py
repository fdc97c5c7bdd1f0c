"""The fused Triton forward of the head, interpreted where there is no GPU, against the formula in fp64."""

import math

import pytest
import torch

from tests.conftest import assert_no_worse
from thinkmid.kernels.gpu import logprob
from thinkmid.kernels.streams import Scores

# numpy's, under the interpreter, where a GPU says nothing
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = {"temperature": None, "bias": None, "softcap": None}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    # several blocks of rows, several parts of the vocabulary and several tiles in each, at the interpreter's pace
    monkeypatch.setattr(logprob, "_tile", lambda x: (16, 32, 32, 4, 2))
    monkeypatch.setattr(logprob, "_num_multiprocessors", lambda x: 1)


def case(N=20, D=64, V=300, dtype=torch.float32):
    hidden, weight = torch.randn(N, D, device=DEVICE), torch.randn(V, D, device=DEVICE) * 0.5
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[: min(2, N)] = torch.tensor([V - 1, 0], device=DEVICE)[:N]
    return hidden.to(dtype), weight.to(dtype), targets


def formula(hidden, weight, targets, scores, dtype):
    temperature, bias, softcap = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in scores.values())
    x = hidden.to(dtype) @ weight.to(dtype).T
    x = x if bias is None else x + bias
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    s = x if temperature is None else x / temperature[:, None]
    logp = s.log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp[torch.arange(len(targets), device=DEVICE), targets], entropy, s.logsumexp(-1)


def check(hidden, weight, targets, **scores):
    scores = PLAIN | scores
    exact, naive = (formula(hidden, weight, targets, scores, t) for t in (torch.float64, torch.float32))
    got = logprob.linear_logprob_forward(hidden, weight, targets, Scores(**scores), True)
    for ours, want, honest in zip(got, exact, naive, strict=True):
        floor = torch.finfo(torch.float32).eps * (1 + want.abs().max())
        assert_no_worse(ours, want, want + torch.maximum((honest - want).abs().max(), floor))
    assert (got[0] <= 0).all()
    alone = logprob.linear_logprob_forward(hidden, weight, targets, Scores(**scores), False)
    assert torch.equal(alone[0], got[0])
    assert alone[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_log_prob_entropy_and_log_sum_exp_are_those_of_the_formula(dtype):
    check(*case(dtype=dtype))


@pytest.mark.parametrize(("N", "V"), [(1, 1), (15, 31), (16, 32), (17, 33), (3, 257)])
def test_rows_and_columns_beyond_the_last_tile_count_for_nothing(N, V):
    check(*case(N, 32, V))


def test_a_vocabulary_of_low_scores_is_not_drowned_by_the_padding():
    # columns beyond V come as 0, which would be far above all real scores
    hidden, weight, targets = case(4, 32, 33)
    hidden, weight = hidden.abs(), -weight.abs() - 3
    check(hidden, weight, targets)


@pytest.mark.parametrize("D", [1, 7, 40, 65])
def test_any_width_is_covered(D):
    check(*case(5, D, 70))


def test_temperature_bias_and_softcap():
    hidden, weight, targets = case()
    temperature, bias = torch.linspace(0.3, 2.5, 20, device=DEVICE), torch.randn(300, device=DEVICE)
    check(hidden, weight, targets, temperature=temperature)
    check(hidden, weight, targets, bias=bias)
    check(hidden, weight, targets, softcap=4.0)
    closed = torch.where((torch.rand(300, device=DEVICE) < 0.5) & (bias != bias[targets[0]]), -math.inf, bias)
    closed[64:128] = -math.inf
    closed[targets] = 0.5
    check(hidden, weight, targets, temperature=temperature, bias=closed, softcap=None)
    check(hidden, weight, targets, temperature=temperature, bias=bias, softcap=4.0)


def test_large_scores_keep_their_log_prob():
    hidden, weight, targets = case()
    check(hidden * 100, weight * 20, targets)


def test_the_parts_of_the_vocabulary_do_not_show(monkeypatch):
    args = case(20, 32, 300)
    for num in (1, 2, 100):
        monkeypatch.setattr(logprob, "_num_multiprocessors", lambda x, num=num: num)
        check(*args)


def test_views_and_unaligned_rows_are_read_right():
    hidden, weight, targets = case(6, 33, 70)
    wide = torch.randn(6, 40, device=DEVICE)
    wide[:, 3:36] = hidden
    check(wide[:, 3:36], weight, targets)
    check(hidden.T.contiguous().T, weight, targets)


def test_nan_stays_in_its_row():
    hidden, weight, targets = case(5, 32, 70)
    hidden[3] = math.nan
    got = logprob.linear_logprob_forward(hidden, weight, targets, Scores(**PLAIN), True)
    assert all(x.isnan().tolist() == [False, False, False, True, False] for x in got)


def test_no_rows_are_no_work():
    got = logprob.linear_logprob_forward(*case(0), Scores(**PLAIN), True)
    assert [len(x) for x in got] == [0, 0, 0]
