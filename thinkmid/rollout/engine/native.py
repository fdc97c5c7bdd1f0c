"""The embedded engine: KV cache, continuous batching with refill, each prefix prefilled and stored once per group."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from thinkmid.kernels.attention import SegmentAttention
from thinkmid.model import weights
from thinkmid.model.transformer import ModelConfig
from thinkmid.rollout.engine.kv_cache import Cache, Prefixes, attention
from thinkmid.rollout.engine.phases import Phases
from thinkmid.rollout.engine.protocol import Answer, Sampling
from thinkmid.rollout.engine.sequences import Rows
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Sample

PREFILL_TOKENS = 8192  # prefix tokens in one forward


class NativeEngine:
    """Decodes with the trainer's own Transformer, so that its log-probs are the trainer's. CPU or one GPU."""

    def __init__(self, cfg: ModelConfig, tokenizer: Tokenizer, *, dtype="float32", device="cpu"):
        self.tokenizer = tokenizer
        self.version = -1  # no weights yet
        self._model = weights.build(cfg, dtype=dtype, device=device).requires_grad_(False)
        self._params = dict(weights.stream(self._model))
        self._device = torch.device(device)
        self._phases = Phases()
        self._asked: list[tuple[list[int], tuple[int, int], Answer]] = []

    # its weights stay where they are between steps, the cache lives for one call: there is nothing to give back
    def sleep(self):
        self._phases.enter("sleep")

    def wake_weights(self):
        self._phases.enter("wake_weights")

    def wake_cache(self):
        self._phases.enter("wake_cache")

    def reset_cache(self):
        """Nothing: a prefix is kept for one call."""

    def load_weights(self, named, version):
        self._phases.enter("load_weights")
        missing = set(self._params)
        for name, tensor in named:
            self._params[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(f"sync brought no {sorted(missing)[0]} and {len(missing) - 1} more")
        self.version, self._phases.loaded = version, True

    def named_weights(self):
        return iter(self._params.items())

    def part(self, name, whole):
        return whole

    def generate(self, prompts: list[Prompt], seeds_P_G, sampling: Sampling, stop=lambda: False):
        self._phases.enter("generate")
        return self._run(prompts, seeds_P_G, sampling, stop)

    # a decorator, not a with-block: between two samples the consumer must not find itself in inference mode
    @torch.inference_mode()
    def _run(self, prompts, seeds_P_G, sampling, stop) -> Iterator[tuple[int, int, Sample]]:
        waiting = deque((p, g, s) for p, seeds in enumerate(seeds_P_G) for g, s in enumerate(seeds))
        if not waiting:
            return
        max_rows = min(sampling.max_batch, len(waiting))
        longest = max(len(p.tokens) for p in prompts) - 1
        # one more prefix than rows: the next sequence may be a sibling of one that has just ended
        like = next(iter(self._params.values()))
        prefixes = Prefixes(self._model.cfg, min(len(prompts), max_rows + 1), longest, like)
        cache = Cache(self._model.cfg, max_rows, sampling.max_new + len(self.tokenizer.close_ids), like)
        rows = Rows(max_rows, sampling, self.tokenizer)
        queued = len(prompts)
        while (waiting or rows.num) and not stop():
            # a refill costs a prefill: wait until an eighth of the batch is free
            if waiting and max_rows - rows.num >= min(len(waiting), 1 + max_rows // 8):
                taken = [waiting.popleft() for _ in range(min(len(waiting), max_rows - rows.num))]
                self._admit(taken, prompts, rows, prefixes)
                families = prefixes.families(rows.owner)
            logits = self._decode(cache, rows, families)
            logp, token = draw(logits, uniforms(rows.seed, rows.count), sampling)
            forced = rows.forced()
            if (forced >= 0).any():
                tag = torch.from_numpy(forced).to(token.device)
                token = torch.where(tag >= 0, tag, token)
            chosen = logp.gather(1, token[:, None])[:, 0]
            finished = rows.append(np.arange(rows.num), token.cpu().numpy(), chosen.cpu().numpy(), forced < 0)
            for row in np.flatnonzero(finished != ""):
                p, g = rows.owner[row]
                yield p, g, rows.sample(row, finished[row], self.version)
            if (finished != "").any():
                cache.move(rows.keep(np.flatnonzero(finished == "")))
                # sequences wait in the order of their prompts: only the first one's prompt may hold a prefix already
                prefixes.keep({p for p, _ in rows.owner} | {p for p, _, _ in list(waiting)[:1]})
                families = prefixes.families(rows.owner)
            # those that the consumer has appended
            waiting.extend((p, g, s) for p in range(queued, len(prompts)) for g, s in enumerate(seeds_P_G[p]))
            queued = len(prompts)

    def ask(self, tokens, choices):
        self._phases.enter("ask")
        self._asked.append((tokens, choices, answer := Answer(self)))
        return answer

    @torch.inference_mode()
    def drain(self):
        while self._asked:
            room, batch = PREFILL_TOKENS, []
            while self._asked and (not batch or len(self._asked[0][0]) <= room):
                batch.append(self._asked.pop(0))
                room -= len(batch[-1][0])
            logits = self._last_logits([tokens for tokens, _, _ in batch])
            yes, no = logits.gather(1, torch.tensor([choices for _, choices, _ in batch], device=self._device)).T
            for (_, _, answer), p in zip(batch, (yes - no).sigmoid().tolist(), strict=True):
                answer.p = p

    def _last_logits(self, sequences):
        """Logits (S, V) fp32 after the last token of each of S sequences."""
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        cu = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        tokens = torch.tensor([t for tokens in sequences for t in tokens], device=self._device)
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(self._device)
        rows = (lengths.cumsum(0) - 1).to(self._device)
        return self._model(tokens, positions, SegmentAttention(cu, cu), rows=rows).float()

    def _admit(self, taken, prompts, rows, prefixes):
        """Give each sequence a row, and each new prompt a slot that holds its prefix."""
        fresh = {}
        for p, g, seed in taken:
            rows.add(p, g, seed, prompts[p].tokens)
            if p not in prefixes.slot:
                fresh[p] = prompts[p].tokens[:-1]
                prefixes.add(p, len(fresh[p]))
        for batch in _batches([(p, tokens) for p, tokens in fresh.items() if tokens], PREFILL_TOKENS):
            self._prefill(batch, prefixes)

    def _prefill(self, batch, prefixes):
        """Keys and values of all but the last prompt token; that one is the first input of decoding."""
        lengths = torch.tensor([len(tokens) for _, tokens in batch])
        cu = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        tokens = torch.tensor([t for _, tokens in batch for t in tokens], device=self._device)
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(self._device)
        cache, last = prefixes.cache, self._model.cfg.layers - 1
        segments, spans = SegmentAttention(cu, cu), list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))

        def attend(layer, q, k, v):
            for (p, _), (lo, hi) in zip(batch, spans, strict=True):
                cache.k[layer][prefixes.slot[p], :, :, : hi - lo] = k[lo:hi].permute(1, 2, 0)  # (K, C, p-1)
                cache.v[layer][prefixes.slot[p], :, : hi - lo] = v[lo:hi].transpose(0, 1)  # (K, p-1, C)
            if layer == last:
                return q  # nobody reads what comes after the last keys and values
            return segments(layer, q, k, v)

        no_rows = torch.empty(0, dtype=torch.long, device=self._device)
        self._model(tokens, positions, attend, rows=no_rows, head=lambda hidden, weight: hidden)

    def _decode(self, cache, rows, families):
        """Logits (B, V) fp32 after each row's newest token, whose key and value enter the cache."""
        tokens, positions = (torch.from_numpy(x).to(self._device) for x in (rows.newest, rows.position))
        return self._model(tokens, positions, attention(cache, families, rows.count)).float()


def uniforms(seed, count):
    """(B,) float64 in [0, 1): a hash of the sequence's seed and the number of the draw (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = seed + (count.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits, uniforms, sampling: Sampling):
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


def _batches(items, limit):
    """Runs of (row, tokens) with at most limit tokens each, at least one item."""
    batch, size = [], 0
    for item in items:
        if batch and size + len(item[1]) > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item[1])
    if batch:
        yield batch
