"""The embedded engine: KV cache, continuous batching with refill, each prefix prefilled and stored once per group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from thinkmid.kernels.attention import SegmentAttention
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.kv_cache import Attention, Cache, Families, Prefixes
from thinkmid.rollout.engine.phases import Phases
from thinkmid.rollout.engine.protocol import Answer, Finished, Sampling
from thinkmid.rollout.engine.sequences import Rows, Texts, mixed
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Request

PREFILL_TOKENS = 8192  # prefix tokens in one forward


class NativeEngine:
    """Decodes with the trainer's own Transformer, so that its log-probs are the trainer's. CPU or one GPU.

    Tokens that a request brings are decoded again, one a step, with the bits of a sequence that was never interrupted.
    """

    def __init__(
        self, cfg: ModelConfig, tokenizer: Tokenizer, dtype: weights.Dtype = "float32", device: weights.Device = "cpu"
    ):
        self.tokenizer = tokenizer
        self.version = -1  # no weights yet
        self._model = weights.build(cfg, dtype=dtype, device=device).requires_grad_(False)
        self._params = dict(weights.stream(self._model))
        self._device = torch.device(device)
        self._phases = Phases()
        self._rows: Rows | None = None  # of the last generation
        self._asked: list[tuple[list[int], tuple[int, int], Answer]] = []

    # its weights stay where they are between steps, the cache lives for one call: there is nothing to give back
    def sleep(self) -> None:
        self._phases.enter("sleep")

    def wake_weights(self) -> None:
        self._phases.enter("wake_weights")

    def wake_cache(self) -> None:
        self._phases.enter("wake_cache")

    def reset_cache(self) -> None:
        """Nothing: a prefix is kept for one call."""

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._phases.enter("load_weights")
        missing = set(self._params)
        for name, tensor in named:
            self._params[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(f"sync brought no {sorted(missing)[0]} and {len(missing) - 1} more")
        self.version, self._phases.loaded = version, True

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._params.items())

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def generate(self, requests: Iterable[Request | None], sampling: Sampling) -> Iterator[Finished]:
        self._phases.enter("generate")
        self._rows = Rows(requests, sampling, self.tokenizer)
        return self._run(self._rows, sampling)

    def unfinished(self) -> list[Request]:
        return self._rows.unfinished() if self._rows else []

    # no inference mode here: the caller's code runs between two steps, and where requests are pulled
    def _run(self, rows: Rows, sampling: Sampling) -> Iterator[Finished]:
        cfg, like = self._model.cfg, next(iter(self._params.values()))
        prefixes, cache = Prefixes(cfg, like), Cache(cfg, 0, rows.max_new, like)
        families = None
        while True:
            free = sampling.max_batch - rows.num
            waiting = rows.pull(free + 1)
            # a refill costs a prefill: wait until an eighth of the batch is free, or there is room for all that wait
            if waiting and (free > rows.most // 8 or free >= waiting):
                self._admit(rows, free, prefixes, cache)
                families = None
            if not rows.num:
                return
            families = families or prefixes.families(id(r.prompt) for r in rows.requests)
            finished = self._step(rows, cache, families, sampling)
            ended = np.flatnonzero(finished != "")
            out = [(rows.requests[row], rows.sample(row, finished[row])) for row in ended]
            if out:
                self._drop(rows, ended, prefixes, cache)
                families = None
            yield out

    @torch.inference_mode()
    def _step(self, rows: Rows, cache: Cache, families: Families, sampling: Sampling) -> Texts:
        """One token for each row. Returns (B,) why each ended, "" where it continues."""
        everyone = np.arange(rows.num)
        logits = self._decode(cache, rows, families)
        logp, token = draw(logits, uniforms(rows.column("seed"), rows.column("count")), sampling)
        forced = rows.forced(everyone)
        if (forced >= 0).any():
            tag = torch.from_numpy(forced).to(token.device)
            token = torch.where(tag >= 0, tag, token)
        chosen = logp.gather(1, token[:, None])[:, 0]
        return rows.append(everyone, token.cpu().numpy(), chosen.cpu().numpy(), forced < 0, self.version)

    @torch.inference_mode()
    def _admit(self, rows: Rows, num: int, prefixes: Prefixes, cache: Cache) -> None:
        """Give each of num requests a row, and each new prompt a slot that holds its prefix."""
        prompts = {id(request.prompt): request.prompt for request in (rows.requests[i] for i in rows.admit(num))}
        fresh = {p: prompt.tokens[:-1] for p, prompt in prompts.items() if p not in prefixes.slot}
        prefixes.add({p: len(tokens) for p, tokens in fresh.items()})
        cache.reserve(rows.num)
        for batch in _batches([(p, tokens) for p, tokens in fresh.items() if tokens], PREFILL_TOKENS):
            self._prefill(batch, prefixes)

    @torch.inference_mode()
    def _drop(self, rows: Rows, ended: NDArray[np.int64], prefixes: Prefixes, cache: Cache) -> None:
        """Rows that ended, and prefixes that none reads any more."""
        cache.move(rows.keep(np.setdiff1d(np.arange(rows.num), ended)))
        # siblings come one after the other: only the first that waits may be one of those that ran
        following = [rows.waiting[0]] if rows.waiting else []
        prefixes.keep({id(request.prompt) for request in [*rows.requests, *following]})

    def ask(self, tokens: list[int], choices: tuple[int, int]) -> Answer:
        self._phases.enter("ask")
        self._asked.append((tokens, choices, answer := Answer(self.drain)))
        return answer

    @torch.inference_mode()
    def drain(self) -> None:
        while self._asked:
            num = len(next(_batches([(i, asked[0]) for i, asked in enumerate(self._asked)], PREFILL_TOKENS)))
            batch, self._asked = self._asked[:num], self._asked[num:]
            logits = self._last_logits([tokens for tokens, _, _ in batch])
            yes, no = logits.gather(1, torch.tensor([choices for _, choices, _ in batch], device=self._device)).T
            for (_, _, answer), p in zip(batch, (yes - no).sigmoid().tolist(), strict=True):
                answer.p = p

    def _last_logits(self, sequences: list[list[int]]) -> Tensor:
        """Logits (S, V) fp32 after the last token of each of S sequences."""
        tokens, positions, cu = self._packed(sequences)
        rows = cu[1:].long().to(self._device) - 1
        logits: Tensor = self._model(tokens, positions, SegmentAttention(cu, cu), rows=rows)
        return logits.float()

    def _prefill(self, batch: list[tuple[int, list[int]]], prefixes: Prefixes) -> None:
        """Keys and values of all but the last prompt token; that one is the first input of decoding."""
        tokens, positions, cu = self._packed([tokens for _, tokens in batch])
        store = _Store(prefixes, [prefixes.slot[p] for p, _ in batch], cu, self._model.cfg.layers)
        no_rows = torch.empty(0, dtype=torch.long, device=self._device)
        self._model(tokens, positions, store, rows=no_rows)

    def _packed(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """tokens, positions (T,) int64 and, on the host, cu (S+1,) int32 of S sequences one after the other."""
        lengths = [len(tokens) for tokens in sequences]
        cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        tokens = torch.tensor([t for tokens in sequences for t in tokens], device=self._device)
        return tokens, torch.cat([torch.arange(n) for n in lengths]).to(self._device), cu

    def _decode(self, cache: Cache, rows: Rows, families: Families) -> Tensor:
        """Logits (B, V) fp32 after each row's newest token, whose key and value enter the cache."""
        tokens, positions = (torch.from_numpy(x).to(self._device) for x in map(rows.column, ("newest", "position")))
        logits: Tensor = self._model(tokens, positions, Attention(cache, families, rows.column("count")))
        return logits.float()


class _Store:
    """attend(layer, q, k, v) of prefixes: keys and values enter their slots (K, C, n) and (K, n, C)."""

    def __init__(self, prefixes: Prefixes, slots: list[int], cu: Tensor, num_layers: int):
        self._cache, self._last, self._attend = prefixes.cache, num_layers - 1, SegmentAttention(cu, cu)
        self._spans = list(zip(slots, cu[:-1].tolist(), cu[1:].tolist(), strict=True))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
        for slot, low, high in self._spans:
            self._cache.k[layer][slot, :, :, : high - low] = k[low:high].permute(1, 2, 0)
            self._cache.v[layer][slot, :, : high - low] = v[low:high].transpose(0, 1)
        # nothing reads what comes after the last keys and values
        return q if layer == self._last else self._attend(layer, q, k, v, window)


def uniforms(seed: NDArray[np.uint64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B,) in [0, 1): of the sequence's seed and the number of the draw alone."""
    return (mixed(seed, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniforms: NDArray[np.float64], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform. Returns log-probs (B, V) at the temperature, unfiltered, and tokens (B,).

    The draw depends on the row's logits and its uniform alone, so not on what else is in the batch.
    """
    logp = (logits / sampling.temperature if sampling.temperature else logits).log_softmax(-1)
    if not sampling.temperature:
        return logp, logp.argmax(-1)
    p = logp.exp()
    if 0 < sampling.top_k < p.shape[1]:
        p = p.masked_fill(p < p.topk(sampling.top_k).values[:, -1:], 0.0)
    if sampling.top_p < 1:
        ordered, order = p.sort(descending=True)
        # a token stays while the mass before it is below top_p of what is left
        gone = ordered.cumsum(-1) - ordered >= sampling.top_p * ordered.sum(-1, keepdim=True)
        p = p.masked_fill(torch.zeros_like(gone).scatter(1, order, gone), 0.0)
    cdf = p.cumsum(-1, dtype=torch.float64)  # in fp32 the sum would lose the rarest tokens of a large vocabulary
    at = torch.from_numpy(uniforms).to(cdf.device)[:, None] * cdf[:, -1:]
    # right=True: the first token whose cdf exceeds the draw, so one of probability 0 is never taken
    return logp, torch.searchsorted(cdf, at, right=True)[:, 0].clamp(max=p.shape[1] - 1)


def _batches(items: list[tuple[int, list[int]]], limit: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Runs of (number, tokens) with at most limit tokens each, at least one item."""
    batch: list[tuple[int, list[int]]] = []
    size = 0
    for item in items:
        if batch and size + len(item[1]) > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item[1])
    if batch:
        yield batch
