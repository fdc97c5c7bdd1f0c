"""A linear head and its loss in chunks of rows: logits never exist for more than one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from thinkmid.kernels import launch
from thinkmid.kernels.policy import Metrics, checked, plan_rows, policy_rows
from thinkmid.kernels.rows import row_grad, row_policy, row_stats
from thinkmid.kernels.streams import Policy, Rows, Scores, Stats, pick

# bytes of fp32 logits alive at a time. CUDA: 4096 rows of 128k keep the fp32 sums of dweight at a quarter of their
# product's time. CPU: a chunk stays near the last cache level
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 2 << 30}
SCORING_BYTES = CHUNK_BYTES | {"cpu": 64 << 20}  # without gradients: a tenth faster, MKL packs the weight half as often
SLAB = 1024  # vocabulary rows that the CPU works on at a time; half-precision ones it holds in fp32 meanwhile
# fp32 products that oneDNN adds up one after the other: with 256 gradients' errors against fp64 are 1.2 times MKL's,
# with 1024 up to 2.6
CHAIN = 256
CACHE_BYTES = 16 << 20  # a weight of that size gains nothing from oneDNN


class FusedLoss(NamedTuple):
    """Result of fused_linear_dr_grpo; all but loss is detached. Rows that are left out have logp and entropy 0."""

    loss: Tensor  # 0-d, differentiable
    metrics: Metrics  # of the live rows
    logp: Tensor  # (R,)
    entropy: Tensor | None  # (R,) nats; None unless asked for, or part of the loss


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk: int | str = "auto",
    wait: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of targets: logp (R,), or (logp, entropy) with return_entropy, entropy (R,) in nats.

    hidden (R, D), weight (V, D) and bias (V,), if there is one, of one dtype (fp32, bf16, fp16; fp64 for gradient
    checks); targets (R,) int64 in [0, V), or ignore_index: such rows return 0 and have no gradient. temperature: a
    number, or (R,). softcap bounds the scores: softcap * tanh(score / softcap). chunk: rows of logits alive at a time;
    "tiles", for scoring without gradients on a GPU that is short of memory: none, they stay in registers. Statistics
    and results are fp32 (fp64 for fp64), also where hidden is not. Differentiable in hidden, weight and
    bias, through the entropy too; the backward forms the logits again (8 R D V FLOP in all). wait=False: nothing waits
    for the device to look at targets, of which none may be ignored or lie outside [0, V).

    Same as log_softmax(hidden @ weight.T / temperature, -1)[arange(R), targets], without the (R, V) tensor. ValueError,
    with both values, for shapes, dtypes, devices, targets or options that do not fit.
    """
    tiles = chunk == "tiles"
    given = _Given(hidden, weight, bias, targets)
    job = _check(given, temperature, softcap, ignore_index, "auto" if tiles else chunk, wait)
    if tiles:
        logp, entropy = _from_tiles(hidden, weight, job, return_entropy)
    else:
        logp, entropy = _LinearLogprob.apply(hidden, weight, bias, job, return_entropy)  # type: ignore[no-untyped-call]
    return (logp, entropy) if return_entropy and entropy is not None else logp


def fused_linear_dr_grpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    denom: float,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk: int | str = "auto",
    old_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    is_cap: float | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    skip_zero_advantage: bool = True,
    weight_grad_into: Tensor | None = None,
    live: Tensor | None = None,
    wait: bool = True,
) -> FusedLoss:
    """linear_logprob and dr_grpo_loss in one pass over the logits: loss, metrics, logp and, if asked for, entropy.

    A row's coefficient needs only its own log-prob, so the gradients of hidden and weight are formed while a chunk of
    logits is alive: 6 R D V FLOP, against 8 for a log-prob op with a loss behind it. Inputs, options and errors as
    there; every tensor of rows (R,). Rows with mask 0, target ignore_index or, unless KL or entropy count, advantage 0
    are left out before any product (skip_zero_advantage). The gradient of the weight is summed in fp32.

    weight_grad_into: fp32 (V, D), to which the weight's gradient is added during this call, as in Megatron's main_grad;
    the loss must then be the root of backward, unscaled, and weight.grad is left alone.

    live (L,) int64, rising: the rows that are not left out, where the caller knows them; they are not looked for then.

    wait=False: nothing waits for the device, neither here nor in backward. No target may be ignored or lie outside
    [0, V), no row is left out but by live, and backward must not scale the loss: it fails on the device if it does.

    Same as dr_grpo_loss(linear_logprob(hidden, weight, targets), advantages, denom=denom).
    """
    job = _check(_Given(hidden, weight, bias, targets), temperature, softcap, ignore_index, chunk, wait)
    _expect("weight_grad_into", weight_grad_into, weight.shape, job.wide, weight.device)
    policy = checked(job.empty_rows(), Policy(
        adv=advantages, old_logp=old_logp, sampler_logp=sampler_logp, ref_logp=ref_logp, mask=_and(mask, job.valid),
        denom=denom, clip_low=clip_low, clip_high=clip_high, is_cap=is_cap, dual_clip=dual_clip, beta=beta,
        entropy_coef=entropy_coef,
    ))  # fmt: skip
    if wait and live is None and (skip_zero_advantage or policy.mask is not None):
        live = plan_rows(policy.mask, policy.adv, *((beta, entropy_coef) if skip_zero_advantage else (1, 1))).index
    task = _Task(policy, live, want_entropy=return_entropy or entropy_coef != 0, weight_grad_into=weight_grad_into)
    loss, sums, logp, entropy = _OnePass.apply(hidden, weight, bias, job, task)  # type: ignore[no-untyped-call]
    return FusedLoss(loss, Metrics(*sums.unbind()), logp, entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    denom: float | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk: int | str = "auto",
    live: Tensor | None = None,
    wait: bool = True,
) -> tuple[Tensor, Tensor]:
    """Next-token loss in one pass: (loss, logp), logp (R,) detached.

    loss = -sum(row_weights * logp) / denom. row_weights (R,), None: 1. denom None: the number of targets that are not
    ignore_index, so that the loss is F.cross_entropy(hidden @ weight.T, targets). live and wait as in
    fused_linear_dr_grpo, everything else as in linear_logprob.
    """
    job = _check(_Given(hidden, weight, bias, targets), temperature, softcap, ignore_index, chunk, wait)
    mask = _and(row_weights, job.valid)
    if denom is None:
        denom = max(1, len(targets) if job.valid is None else int(job.valid.sum()))
    # DrGRPO's first update with advantage 1: the coefficient of a row is its weight
    ones = job.empty_rows().fill_(1)
    policy = checked(ones, Policy(adv=ones, denom=denom, mask=mask))
    if wait and live is None and mask is not None:
        live = plan_rows(policy.mask, ones).index
    task = _Task(policy, live, is_cross_entropy=True)
    loss, _, logp, _ = _OnePass.apply(hidden, weight, bias, job, task)  # type: ignore[no-untyped-call]
    return loss, logp


def gather_weight(weight: Tensor) -> Tensor:
    """A DTensor's whole value (V, D): what the functions here take where FSDP2 holds the head in shards.

    Differentiable: the ranks' gradients are summed and land in the shards. Any other tensor is returned as it is.
    Same as weight.full_tensor(), whose gradient is otherwise taken to be equal on all ranks and not summed.
    """
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


class _Given(NamedTuple):
    """The tensors of a call, as they came."""

    hidden: Tensor  # (R, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (R,)


@dataclass(frozen=True)
class _Job:
    """A call after its check; hidden, weight and bias travel beside it, for autograd to see them."""

    targets: Tensor  # (R,) int64, 0 where ignored
    valid: Tensor | None  # (R,) bool; None: all are
    scores: Scores
    chunk: int  # rows
    wide: torch.dtype  # of statistics
    wait: bool
    learns: bool  # whether a gradient may be asked for

    def valid_rows(self) -> Tensor | None:
        """Their index; None: all of them."""
        return None if self.valid is None else self.valid.nonzero()[:, 0]

    def empty_rows(self) -> Tensor:
        """(R,) of the statistics' dtype."""
        return torch.empty(len(self.targets), dtype=self.wide, device=self.targets.device)


@dataclass(frozen=True)
class _Task:
    """What a pass over the logits computes beside their statistics."""

    policy: Policy
    live: Tensor | None  # (L,) index of the rows that are not left out; None: all
    want_entropy: bool = False
    weight_grad_into: Tensor | None = None  # (V, D)
    is_cross_entropy: bool = False  # advantage 1, ratio 1, nothing to log


def _from_tiles(hidden: Tensor, weight: Tensor, job: _Job, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise ValueError('chunk="tiles" is for scoring: it has no gradient, and these inputs require one')
    if launch.row_path(hidden) != "triton":
        raise ValueError(f'chunk="tiles" is a kernel for GPUs, got {hidden.dtype} on {hidden.device}')
    index = job.valid_rows()
    rows = slice(None) if index is None else index
    forward = launch.triton("logprob").linear_logprob_forward
    return _spread(forward(hidden[rows], weight, job.targets[rows], job.scores.at(rows), want_entropy), index, job)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        index = job.valid_rows()
        stats = _statistics(hidden, weight, job, index, want_entropy)
        ctx.save_for_backward(hidden, weight, bias, *stats, index)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return _spread(stats, index, job)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogp is None and dentropy is None:
            return (None,) * 5
        hidden, weight, bias, *stats, index = ctx.saved_tensors
        grads = _Grads((hidden, weight, bias), ctx.needs_input_grad, ctx.job, index)
        if index is not None:
            dlogp, dentropy = pick(dlogp, index), pick(dentropy, index)
        for at, rows in _chunks(len(hidden), ctx.job, index):
            _add_scored_rows(grads, rows, ctx.job, Stats(*stats).at(at), pick(dlogp, at), pick(dentropy, at))
        return *grads.result(), None, None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        live = task.live
        if job.learns:
            grads = _Grads((hidden, weight, bias), ctx.needs_input_grad, job, live, task.weight_grad_into)
            parts = [_add_policy_rows(grads, rows, job, task) for _, rows in _chunks(len(hidden), job, live)]
            stats = _joined(parts, job)
            # not save_for_backward: a saved gradient would be copied into weight.grad instead of becoming it
            ctx.grads = grads.result()
        else:
            stats = _statistics(hidden, weight, job, live, task.want_entropy)
        ctx.fixed, ctx.wait = task.weight_grad_into is not None, job.wait
        loss, sums = _loss(stats, task)
        logp, entropy = _spread(stats, live, job)
        ctx.mark_non_differentiable(*(x for x in (sums, logp, entropy) if x is not None))
        return loss, sums, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("backward ran twice through a fused loss, whose gradients are handed out once")
        grads, ctx.grads = ctx.grads, None
        if not ctx.wait:
            torch._assert_async(dloss == 1, "wait=False promised that backward does not scale the loss")
        elif (scale := dloss.item()) != 1:
            if ctx.fixed:
                raise RuntimeError(
                    f"weight_grad_into took the gradient of the loss itself; backward now scales it by {scale}"
                )
            grads = tuple(None if g is None else g.mul_(scale) for g in grads)
        return *grads, None, None


def _loss(stats: Stats, task: _Task) -> tuple[Tensor, Tensor]:
    """The live rows' loss, and the fields of Metrics in one tensor, empty for cross entropy."""
    policy = task.policy if task.live is None else task.policy.at(task.live)
    if not task.is_cross_entropy:
        term, _, sums = policy_rows(stats.logp, policy, stats.entropy)
        return term.sum(), sums
    logp = stats.logp if policy.mask is None else stats.logp * policy.mask
    return -logp.sum() / policy.denom, logp.new_empty(0)


def _statistics(hidden: Tensor, weight: Tensor, job: _Job, index: Tensor | None, want_entropy: bool) -> Stats:
    """Statistics of the rows in index, in order."""
    parts = []
    for _, rows in _chunks(len(hidden), job, index):
        given = job.targets[rows], job.scores.at(rows), want_entropy
        parts.append(row_stats(_scores(hidden[rows], weight, job.wide), *given))
    return _joined(parts, job)


class _Grads:
    """Gradients being summed over the chunks: of the hidden rows, the weight, the bias."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        needs: Sequence[bool],
        job: _Job,
        index: Tensor | None,
        weight_grad_into: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, bias = inputs
        self._dhidden = self._dbias = None
        if needs[0]:
            self._dhidden = torch.empty_like(self.hidden) if index is None else torch.zeros_like(self.hidden)
        self._given, self._dweight = weight_grad_into is not None, weight_grad_into
        self._first = not self._given  # the first chunk writes, nothing is filled with zeros before
        if needs[1] and not self._given:
            self._dweight = torch.empty(self.weight.shape, dtype=job.wide, device=self.weight.device)
        if needs[2] and bias is not None:
            self._dbias = bias.new_zeros(len(bias), dtype=job.wide)

    def add(self, rows: Rows, h: Tensor, dz: Tensor) -> None:
        """The products of dz (c, V), the gradient of the scores of some rows, whose hidden states are h (c, D)."""
        if self._dbias is not None:
            self._dbias += dz.sum(0, dtype=self._dbias.dtype)
        if self._dhidden is not None:
            self._dhidden[rows] = _times_weight(dz, self.weight).to(self.hidden.dtype)
        if self._dweight is not None:
            _add_product(self._dweight, dz, h, self._first)
        self._first = False

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of hidden, weight and bias; None where not needed, or where the caller holds the sum."""
        if self._first and self._dweight is not None:
            self._dweight.zero_()
        dweight = None if self._given or self._dweight is None else self._dweight.to(self.weight.dtype)
        return self._dhidden, dweight, None if self._dbias is None else self._dbias.to(self.weight.dtype)


# One chunk each, in a function of its own: its scores are freed before the next chunk's are made.


def _add_policy_rows(grads: _Grads, rows: Rows, job: _Job, task: _Task) -> Stats:
    h = grads.hidden[rows]
    z, dz = _scores_and_room(h, grads.weight, job.wide)
    policy, scores = task.policy.at(rows), job.scores.at(rows)
    stats = row_policy(z, job.targets[rows], policy, scores, task.want_entropy, out=dz)
    grads.add(rows, h, dz)
    return stats


def _add_scored_rows(
    grads: _Grads, rows: Rows, job: _Job, stats: Stats, dlogp: Tensor | None, dentropy: Tensor | None
) -> None:
    h = grads.hidden[rows]
    z, dz = _scores_and_room(h, grads.weight, job.wide)
    row_grad(z, job.targets[rows], stats, dlogp, dentropy, job.scores.at(rows), out=dz)
    grads.add(rows, h, dz)


def _scores_and_room(h: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z and where dz goes: over the scores; apart where a GPU's products read half precision."""
    z = _scores(h, weight, dtype)
    return z, torch.empty_like(z, dtype=h.dtype) if z.is_cuda and h.dtype != z.dtype else z


def _chunks(num_rows: int, job: _Job, index: Tensor | None) -> Iterator[tuple[slice, Rows]]:
    """Places among the live rows, and which rows they are (slice or index), by chunk."""
    num = num_rows if index is None else len(index)
    parts = -(-num // job.chunk)
    size = -(-num // max(1, parts))  # the last chunk is about as large as the others
    size = min(-(-size // 16) * 16, job.chunk)  # in whole tiles of the matrix products
    for start in range(0, num, max(1, size)):
        at = slice(start, min(start + size, num))
        yield at, at if index is None else index[at]


# The three products. Half precision: on a GPU with fp32 sums and results; on the CPU slab by slab in fp32, since its
# half-precision products would round the logits.


def _scores(h: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """h @ weight.T in that dtype, (c, V)."""
    if h.is_cuda:
        return h @ weight.T if h.dtype == dtype else torch.mm(h, weight.T, out_dtype=dtype)
    h = h.to(dtype)
    if weight.shape[1] <= CHAIN and _suits_onednn(weight, dtype):
        return _onednn(h.contiguous(), weight)
    out = torch.empty(len(h), len(weight), dtype=dtype, device=h.device)
    for at, slab in _slabs(weight, dtype, SLAB):
        torch.mm(h, slab.T, out=out[:, at])
    return out


def _times_weight(dz: Tensor, weight: Tensor) -> Tensor:
    """dz @ weight, (c, D)."""
    if dz.is_cuda:
        return dz @ weight
    if _suits_onednn(weight, dz.dtype):
        products = (_onednn(dz[:, at], slab.T) for at, slab in _slabs(weight, dz.dtype, CHAIN))
    else:
        products = (dz[:, at] @ slab for at, slab in _slabs(weight, dz.dtype, SLAB))
    return cast(Tensor, sum(products))


# MKL, which torch's fp32 products on the CPU run on, first copies the larger matrix: for a hundred rows a third of the
# time, a tenth where slabs of it are copied inside the cache. oneDNN copies nothing. But it adds up in one chain where
# MKL forms sums of sums, so it gets short ones; and on strided matrices it is a thousand times slower.


def _suits_onednn(weight: Tensor, dtype: torch.dtype) -> bool:
    return (
        weight.nbytes > CACHE_BYTES
        and weight.dtype == dtype == torch.float32
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
    )


def _onednn(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T"""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
    return product


def _add_product(dweight: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """dweight (V, D) += dz.T @ h; = where first."""
    if not h.is_cuda or h.dtype == dweight.dtype:
        h = h.to(dweight.dtype)
        torch.mm(dz.T, h, out=dweight) if first else dweight.addmm_(dz.T, h)
    elif first:
        torch.mm(dz.T, h, out_dtype=dweight.dtype, out=dweight)
    else:
        torch.addmm(dweight, dz.T, h, out_dtype=dweight.dtype, out=dweight)


def _slabs(weight: Tensor, dtype: torch.dtype, size: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight.shape[0], size):
        at = slice(start, start + size)
        yield at, weight[at].to(dtype)


def _spread(stats: Stats, index: Tensor | None, job: _Job) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of the rows in index among all rows, 0 elsewhere."""
    if index is None:
        return stats.logp, stats.entropy
    num = len(job.targets)
    logp, entropy = (None if x is None else x.new_zeros(num).index_copy_(0, index, x) for x in stats[:2])
    assert logp is not None
    return logp, entropy


def _joined(parts: list[Stats], job: _Job) -> Stats:
    columns = zip(*parts, strict=True) if parts else [()] * 3
    empty = torch.empty(0, dtype=job.wide, device=job.targets.device)
    logp, entropy, lse = (None if any(x is None for x in c) else torch.cat([empty, *c]) for c in columns)
    assert logp is not None
    return Stats(logp, entropy, lse)


def _and(mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
    if mask is None or valid is None:
        return valid if mask is None else mask
    return torch.where(valid, mask, torch.zeros_like(mask))


def _check(
    given: _Given, temperature: float | Tensor, softcap: float | None, ignore_index: int, chunk: int | str, wait: bool
) -> _Job:
    hidden, weight, bias, targets = given
    if hasattr(weight, "full_tensor"):
        raise ValueError("weight is a DTensor; pass gather_weight(weight), or call from the module that FSDP2 gathers")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"hidden must be (R, D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}; both must be one floating dtype")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}")
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    _expect("targets", targets, hidden.shape[:1], torch.int64, hidden.device)
    heat = _temperatures(temperature, targets, wide)
    _expect("bias", bias, weight.shape[:1], weight.dtype, weight.device)
    bias = None if bias is None else bias.detach().to(wide).contiguous()
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given[:3])
    rows = _rows_at_a_time(chunk, weight, learns)
    targets = targets.contiguous()
    targets, valid = _valid(targets, weight.shape[0], ignore_index) if wait else (targets, None)
    return _Job(targets, valid, Scores(heat, bias, softcap), rows, wide, wait, learns)


def _temperatures(temperature: float | Tensor, targets: Tensor, wide: torch.dtype) -> Tensor | None:
    """(R,), None where it is 1."""
    if isinstance(temperature, Tensor):
        _expect("temperature", temperature, targets.shape, wide, targets.device)
        return temperature.detach().contiguous()
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    if temperature == 1:
        return None
    return torch.full(targets.shape, float(temperature), dtype=wide, device=targets.device)


def _rows_at_a_time(chunk: int | str, weight: Tensor, learns: bool) -> int:
    if isinstance(chunk, int) and chunk > 0:
        return chunk
    if chunk != "auto":
        raise ValueError(f'chunk must be "auto" or a positive number of rows, got {chunk!r}')
    alive = CHUNK_BYTES if learns else SCORING_BYTES
    return max(16, alive.get(weight.device.type, 1 << 30) // (4 * weight.shape[0]))


def _valid(targets: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets with 0 where ignored, and which are not (None: all). Waits for the device once."""
    if not len(targets):
        return targets, None
    valid = targets != ignore_index
    kept = targets.where(valid, 0)
    low, high, all_valid = torch.stack((*kept.aminmax(), valid.all().long())).tolist()
    if low < 0 or high >= vocab:
        raise ValueError(
            f"targets must lie in [0, {vocab}) or be ignore_index {ignore_index}, got {low if low < 0 else high}"
        )
    return (targets, None) if all_valid else (kept, valid)


def _expect(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if x is not None and (tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device):
        want, got = (tuple(shape), dtype, device), (tuple(x.shape), x.dtype, x.device)
        raise ValueError(f"{name} must be {' '.join(map(str, want))}, got {' '.join(map(str, got))}")
