"""A linear head and its loss in chunks of rows: logits never exist for more than one chunk."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from thinkmid.kernels import launch
from thinkmid.kernels.policy import Metrics, Policy, make_policy, plan_rows, policy_rows
from thinkmid.kernels.rows import Scores, Stats, row_grad, row_policy, row_stats

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
    """What fused_linear_dr_grpo returns; all but loss is detached. Rows that are not live have logp and entropy 0."""

    loss: Tensor  # 0-d, differentiable
    metrics: Metrics  # of the live rows
    logp: Tensor  # (R,)
    entropy: Tensor | None  # (R,) nats; None unless asked for, or part of the loss


def linear_logprob(
    hidden,
    weight,
    targets,
    *,
    temperature=1.0,
    bias=None,
    softcap=None,
    ignore_index=-100,
    return_entropy=False,
    chunk="auto",
    wait=True,
):
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
    job = _check(hidden, weight, targets, temperature, bias, softcap, ignore_index, "auto" if tiles else chunk, wait)
    if tiles:
        return _from_tiles(hidden, weight, bias, job, return_entropy)
    logp, entropy = _LinearLogprob.apply(hidden, weight, bias, job, return_entropy)
    return (logp, entropy) if return_entropy else logp


def fused_linear_dr_grpo(
    hidden,
    weight,
    targets,
    advantages,
    *,
    denom,
    temperature=1.0,
    bias=None,
    softcap=None,
    ignore_index=-100,
    chunk="auto",
    old_logp=None,
    sampler_logp=None,
    is_cap=None,
    ref_logp=None,
    beta=0.0,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    entropy_coef=0.0,
    mask=None,
    return_entropy=False,
    skip_zero_advantage=True,
    weight_grad_into=None,
    live=None,
    wait=True,
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
    """
    job = _check(hidden, weight, targets, temperature, bias, softcap, ignore_index, chunk, wait)
    if weight_grad_into is not None:
        _expect("weight_grad_into", weight_grad_into, weight.shape, job.wide, weight.device)
    policy = make_policy(
        torch.empty(len(targets), dtype=job.wide, device=hidden.device),
        advantages,
        denom=denom,
        old_logp=old_logp,
        sampler_logp=sampler_logp,
        is_cap=is_cap,
        ref_logp=ref_logp,
        beta=beta,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        mask=_and(mask, job.valid),
    )
    index = live
    if wait and live is None and (skip_zero_advantage or policy.mask is not None):
        index = plan_rows(policy.mask, policy.adv, *((beta, entropy_coef) if skip_zero_advantage else (1, 1))).index
    asked = return_entropy or entropy_coef != 0
    loss, sums, logp, entropy = _OnePass.apply(
        hidden, weight, bias, job, policy, index, asked, weight_grad_into, _policy_loss, torch.is_grad_enabled(), wait
    )
    return FusedLoss(loss, Metrics(*sums.unbind()), logp, entropy)


def linear_cross_entropy(
    hidden,
    weight,
    targets,
    *,
    row_weights=None,
    denom=None,
    temperature=1.0,
    bias=None,
    softcap=None,
    ignore_index=-100,
    chunk="auto",
    live=None,
    wait=True,
):
    """Next-token loss in one pass: (loss, logp), logp (R,) detached.

    loss = -sum(row_weights * logp) / denom. row_weights (R,), None: 1. denom None: the number of targets that are not
    ignore_index, so that the loss is F.cross_entropy(hidden @ weight.T, targets). live and wait as in
    fused_linear_dr_grpo, everything else as in linear_logprob.
    """
    job = _check(hidden, weight, targets, temperature, bias, softcap, ignore_index, chunk, wait)
    mask = _and(row_weights, job.valid)
    if denom is None:
        denom = max(1, len(targets) if job.valid is None else int(job.valid.sum()))
    # DrGRPO's first update with advantage 1: the coefficient of a row is its weight
    ones = torch.ones(len(targets), dtype=job.wide, device=hidden.device)
    policy = make_policy(ones, ones, denom=denom, mask=mask)
    index = plan_rows(policy.mask, ones).index if wait and live is None and mask is not None else live
    loss, _, logp, _ = _OnePass.apply(
        hidden, weight, bias, job, policy, index, False, None, _cross_entropy, torch.is_grad_enabled(), wait
    )
    return loss, logp


def gather_weight(weight):
    """A DTensor's whole value, gathered once: what the functions here take where FSDP2 holds the head in shards.

    Differentiable: the ranks' gradients are summed and land in the shards. Any other tensor is returned as it is.
    """
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def _from_tiles(hidden, weight, bias, job, want_entropy):
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        raise ValueError('chunk="tiles" is for scoring: it has no gradient, and these inputs require one')
    if launch.row_path(hidden) != "triton":
        raise ValueError(f'chunk="tiles" is a kernel for GPUs, got {hidden.dtype} on {hidden.device}')
    from thinkmid.kernels.gpu.logprob import linear_logprob_forward

    index = job.valid_rows()
    rows = slice(None) if index is None else index
    options = {**job.scores.at(rows)._asdict(), "want_entropy": want_entropy}
    logp, entropy, _ = linear_logprob_forward(hidden[rows], weight, job.targets[rows], **options)
    logp, entropy = _spread(logp, index, job), _spread(entropy, index, job)
    return (logp, entropy) if want_entropy else logp


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, job, want_entropy):
        index = job.valid_rows()
        stats = _forward_only(hidden, weight, job, index, want_entropy)
        ctx.save_for_backward(hidden, weight, bias, *stats, index)
        ctx.job = job
        ctx.set_materialize_grads(False)
        logp, entropy, _ = stats
        return _spread(logp, index, job), _spread(entropy, index, job)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        if dlogp is None and dentropy is None:
            return (None,) * 5
        hidden, weight, bias, *stats, index = ctx.saved_tensors
        job, stats = ctx.job, Stats(*stats)
        dlogp, dentropy = (None if d is None else d if index is None else d[index] for d in (dlogp, dentropy))
        grads = _Grads(hidden, weight, bias, ctx.needs_input_grad, index, job)
        for at, rows in _chunks(hidden, job, index):
            part = Stats(*(None if x is None else x[at] for x in stats))
            given = [None if d is None else d[at] for d in (dlogp, dentropy)]
            kernel = partial(row_grad, targets=job.targets[rows], stats=part, dlogp=given[0], dentropy=given[1])
            grads.add_chunk(hidden[rows], weight, rows, partial(kernel, scores=job.scores.at(rows)))
        return *grads.result(), None, None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, job, policy, index, want_entropy, weight_grad_into, loss_of, want_grads, wait
    ):
        # under no_grad the inputs still say that they require gradients
        if want_grads and any(ctx.needs_input_grad):
            grads = _Grads(hidden, weight, bias, ctx.needs_input_grad, index, job, weight_grad_into)
            stats = _with_grads(hidden, weight, job, policy, index, want_entropy, grads)
            # not save_for_backward: a saved gradient would be copied into weight.grad instead of becoming it
            ctx.grads = grads.result()
        else:
            stats = _forward_only(hidden, weight, job, index, want_entropy)
        ctx.fixed, ctx.wait = weight_grad_into is not None, wait
        live = policy if index is None else policy.at(index)
        loss, sums = loss_of(stats, live)
        logp, entropy = _spread(stats.logp, index, job), _spread(stats.entropy, index, job)
        ctx.mark_non_differentiable(*(x for x in (sums, logp, entropy) if x is not None))
        return loss, sums, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
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
        return *grads, *(None,) * 8


def _forward_only(hidden, weight, job, index, want_entropy) -> Stats:
    """Of the live rows, in order."""
    parts = []
    for _, rows in _chunks(hidden, job, index):
        given = job.targets[rows], job.scores.at(rows), want_entropy
        parts.append(row_stats(_scores(hidden[rows], weight, job.wide), *given))
    return _joined(parts, job, hidden.device)


def _with_grads(hidden, weight, job, policy, index, want_entropy, grads) -> Stats:
    """The same, and the gradients of the policy's loss on the way."""
    parts = []
    for _, rows in _chunks(hidden, job, index):
        kernel = partial(row_policy, targets=job.targets[rows], policy=policy.at(rows), want_entropy=want_entropy)
        parts.append(grads.add_chunk(hidden[rows], weight, rows, partial(kernel, scores=job.scores.at(rows))))
    return _joined(parts, job, hidden.device)


def _policy_loss(stats, policy: Policy):
    term, _, sums = policy_rows(stats.logp, policy, stats.entropy)
    return term.sum(), sums


def _cross_entropy(stats, policy: Policy):
    logp = stats.logp if policy.mask is None else stats.logp * policy.mask
    return -logp.sum() / policy.denom, logp.new_empty(0)


class _Job(NamedTuple):
    """What was checked."""

    targets: Tensor  # (R,) int64, 0 where ignored
    valid: Tensor | None  # (R,) bool; None: all are
    scores: Scores
    chunk: int
    wide: torch.dtype  # of statistics

    def valid_rows(self) -> Tensor | None:
        """Their index; None: all of them."""
        return None if self.valid is None else self.valid.nonzero()[:, 0]


class _Grads:
    """Gradients being summed over the chunks: of the hidden rows, the weight, the bias."""

    def __init__(self, hidden, weight, bias, needs, index, job, weight_grad_into=None):
        self._dhidden = None
        if needs[0]:
            self._dhidden = torch.empty_like(hidden) if index is None else torch.zeros_like(hidden)
        self._given, self._dweight = weight_grad_into is not None, weight_grad_into
        self._first = not self._given  # the first chunk writes, nothing is filled with zeros before
        if needs[1] and not self._given:
            self._dweight = torch.empty(weight.shape, dtype=job.wide, device=weight.device)
        self._dbias = weight.new_zeros(weight.shape[0], dtype=job.wide) if bias is not None and needs[2] else None
        self._wide, self._dtypes = job.wide, (hidden.dtype, weight.dtype)

    def add_chunk(self, h, weight, rows, row_kernel):
        """row_kernel(z, out=dz) on the scores of some rows, and the products of dz; what the kernel returns."""
        z = _scores(h, weight, self._wide)
        # over the scores; apart where a GPU's products read half precision
        dz = torch.empty_like(z, dtype=h.dtype) if z.is_cuda and h.dtype != z.dtype else z
        result = row_kernel(z, out=dz)
        if self._dbias is not None:
            self._dbias += dz.sum(0, dtype=self._dbias.dtype)
        if self._dhidden is not None:
            self._dhidden[rows] = _times_weight(dz, weight).to(self._dtypes[0])
        if self._dweight is not None:
            _add_product(self._dweight, dz, h, self._first)
        self._first = False
        return result

    def result(self):
        if self._first and self._dweight is not None:
            self._dweight.zero_()
        dweight = None if self._given or self._dweight is None else self._dweight.to(self._dtypes[1])
        return self._dhidden, dweight, None if self._dbias is None else self._dbias.to(self._dtypes[1])


def _chunks(hidden, job, index):
    """Places among the live rows, and which rows they are (slice or index), by chunk."""
    num = len(hidden) if index is None else len(index)
    parts = -(-num // job.chunk)
    size = -(-num // max(1, parts))  # the last chunk is about as large as the others
    size = min(-(-size // 16) * 16, job.chunk)  # in whole tiles of the matrix products
    for start in range(0, num, max(1, size)):
        at = slice(start, min(start + size, num))
        yield at, at if index is None else index[at]


# The three products. Half precision: on a GPU with fp32 sums and results; on the CPU slab by slab in fp32, since its
# half-precision products would round the logits.


def _scores(h, weight, dtype):
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


def _times_weight(dz, weight):
    """dz @ weight, (c, D)."""
    if dz.is_cuda:
        return dz @ weight
    if _suits_onednn(weight, dz.dtype):
        return sum(_onednn(dz[:, at], slab.T) for at, slab in _slabs(weight, dz.dtype, CHAIN))
    return sum(dz[:, at] @ slab for at, slab in _slabs(weight, dz.dtype, SLAB))


# MKL, which torch's fp32 products on the CPU run on, first copies the larger matrix: for a hundred rows a third of the
# time, a tenth where slabs of it are copied inside the cache. oneDNN copies nothing. But it adds up in one chain where
# MKL forms sums of sums, so it gets short ones; and on strided matrices it is a thousand times slower.


def _suits_onednn(weight, dtype):
    large = weight.nbytes > CACHE_BYTES
    return (
        large
        and weight.dtype == dtype == torch.float32
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
    )


def _onednn(x, y):
    """x @ y.T"""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def _add_product(dweight, dz, h, first):
    """dweight (V, D) += dz.T @ h; = where first."""
    if h.is_cuda and h.dtype != dweight.dtype:
        kind = {"out_dtype": dweight.dtype, "out": dweight}
        torch.mm(dz.T, h, **kind) if first else torch.addmm(dweight, dz.T, h, **kind)
    else:
        h = h.to(dweight.dtype)
        torch.mm(dz.T, h, out=dweight) if first else dweight.addmm_(dz.T, h)


def _slabs(weight, dtype, size):
    for start in range(0, weight.shape[0], size):
        at = slice(start, start + size)
        yield at, weight[at].to(dtype)


def _spread(live, index, job):
    """The live rows' values among all rows, 0 elsewhere."""
    return live if index is None or live is None else live.new_zeros(len(job.targets)).index_copy_(0, index, live)


def _joined(parts: list[Stats], job, device) -> Stats:
    columns = zip(*parts, strict=True) if parts else [()] * 3
    empty = torch.empty(0, dtype=job.wide, device=device)
    return Stats(*(None if any(x is None for x in c) else torch.cat([empty, *c]) for c in columns))


def _and(mask, valid):
    if mask is None or valid is None:
        return valid if mask is None else mask
    return torch.where(valid, mask, torch.zeros_like(mask))


def _check(hidden, weight, targets, temperature, bias, softcap, ignore_index, chunk, wait) -> _Job:
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
    if isinstance(temperature, Tensor):
        _expect("temperature", temperature, hidden.shape[:1], wide, hidden.device)
        temperature = temperature.detach().contiguous()
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive, got {temperature}")
    else:
        whole = {"dtype": wide, "device": hidden.device}
        temperature = None if temperature == 1 else torch.full(targets.shape, float(temperature), **whole)
    if bias is not None:
        _expect("bias", bias, weight.shape[:1], weight.dtype, weight.device)
        bias = bias.detach().to(wide).contiguous()
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if chunk == "auto":
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        alive = CHUNK_BYTES if learns else SCORING_BYTES
        chunk = max(16, alive.get(hidden.device.type, 1 << 30) // (4 * weight.shape[0]))
    elif not (isinstance(chunk, int) and chunk > 0):
        raise ValueError(f'chunk must be "auto" or a positive number of rows, got {chunk!r}')
    targets = targets.contiguous()
    targets, valid = _valid(targets, weight.shape[0], ignore_index) if wait else (targets, None)
    return _Job(targets, valid, Scores(temperature, bias, softcap), chunk, wide)


def _valid(targets, vocab, ignore_index):
    """Targets with 0 where ignored, and which are not (None: all). Waits for the device once."""
    if not len(targets):
        return targets, None
    low, high = torch.stack(targets.aminmax()).tolist()
    if low >= 0 and high < vocab:
        # an ignore_index inside the vocabulary is possible, if odd
        valid = None if not low <= ignore_index <= high else targets != ignore_index
        return targets, valid
    valid = targets != ignore_index
    kept = targets.where(valid, 0)
    low, high = torch.stack(kept.aminmax()).tolist()
    if low < 0 or high >= vocab:
        raise ValueError(
            f"targets must lie in [0, {vocab}) or be ignore_index {ignore_index}, got {low if low < 0 else high}"
        )
    return kept, valid


def _expect(name, x, shape, dtype, device):
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        want, got = (tuple(shape), dtype, device), (tuple(x.shape), x.dtype, x.device)
        raise ValueError(f"{name} must be {' '.join(map(str, want))}, got {' '.join(map(str, got))}")
