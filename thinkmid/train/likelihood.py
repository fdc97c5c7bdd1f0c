"""Rewards without a judge: how likely thoughts make the text that really follows, added to the judge's verdicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from thinkmid.data.pack import Reply, Unit, make_pack
from thinkmid.model import weights
from thinkmid.tokenizer import Tokenizer
from thinkmid.train.config import RLMTConfig
from thinkmid.train.job import Job
from thinkmid.train.loss import logprobs
from thinkmid.train.packing import Packing
from thinkmid.train.references import Reference, begins_true, references
from thinkmid.types import Group, Sample

Terms = dict[str, np.ndarray]  # name of a reward -> (samples of all groups,) fp64, NaN: none
COLUMNS = {"judge": "verdict", "prefix": "prefix_match"}  # what the metrics call them


class Scores:
    """Rewards of groups as weighted sums. Every rank brings the same groups and learns the same rewards."""

    def __init__(self, job: Job, cfg: RLMTConfig):
        self._cfg, self._tokenizer, self._ranks = cfg.reward, job.tokenizer, job.ranks
        self._models = {"policy": job.model, "frozen": job.frozen, "ema": job.ema}  # whose weights may score
        self._max_suffix, self._pack_tokens = cfg.sampling.max_suffix, cfg.batch.pack_tokens

    def __call__(self, groups: list[Group]) -> tuple[list[Group], dict[str, float]]:
        """Groups with the judge's verdicts as rewards -> groups with the sums, and the terms' means. Collective."""
        terms, row = self._terms(groups)
        # a weight of 0 times no verdict would be no reward
        weight_of = {name: getattr(self._cfg, name) for name in terms}
        total = sum(weight_of[name] * values for name, values in terms.items() if weight_of[name])
        shown = [", ".join(f"{name} {values[i]:.4g}" for name, values in terms.items()) for i in range(len(total))]
        out, at = [], 0
        for g in groups:
            mine = slice(at, at := at + len(g.samples))
            whys = [f"{why}; {more}" if why else more for why, more in zip(g.whys, shown[mine], strict=True)]
            out.append(replace(g, rewards=total[mine].tolist(), whys=whys))
        return out, row

    def _terms(self, groups: list[Group]) -> tuple[Terms, dict[str, float]]:
        """By the names of their weights, and what of them is logged."""
        cfg, suffixes = self._cfg, references([g.prompt for g in groups], self._tokenizer, self._max_suffix)
        terms: Terms = {}
        if cfg.judge:
            terms["judge"] = np.array([r for g in groups for r in g.rewards], np.float64)
        if cfg.prefix:
            pairs = [(s, [*t.lead, *t.targets]) for g, t in zip(groups, suffixes, strict=True) for s in g.samples]
            begins = [begins_true(s, suffix, self._tokenizer, cfg.prefix_tokens) for s, suffix in pairs]
            terms["prefix"] = np.array(begins, np.float64)
        row = {COLUMNS[name]: _mean(values) for name, values in terms.items()}
        if cfg.likelihood or cfg.gain:
            layout = Layout(groups, suffixes, self._tokenizer)
            likely = self._likely(layout)
            terms |= likely
            row |= {name: _mean(values[layout.is_scored]) for name, values in likely.items()}
        return terms, row

    def _likely(self, layout: Layout) -> Terms:
        cfg = self._cfg
        together = cfg.scorer == cfg.baseline
        values = self._mean_logp(cfg.scorer, layout.units(thoughts=True, bare=bool(cfg.gain) and together), layout.num)
        terms = {"likelihood": layout.of_samples(values, cfg.unclosed)}
        if cfg.gain:
            if not together:
                bare = self._mean_logp(cfg.baseline, layout.units(thoughts=False, bare=True), layout.num)
                values = np.where(np.isnan(values), bare, values)
            terms["gain"] = terms["likelihood"] - layout.of_prompts(values)
        return terms

    @torch.no_grad()
    def _mean_logp(self, name: str, units: list[Unit], num: int) -> np.ndarray:
        """(num,) fp64: mean log-prob of the tokens with next-token weight, by their reply's number, the weight less 1;
        NaN where there are none or it is not finite. At temperature 1: the text was not drawn at ours."""
        model, ranks = self._models[name], self._ranks
        assert model is not None, f"no {name} weights"
        numbers, logps = [np.zeros(0, np.int64)], [np.zeros(0)]
        for batch in Packing(self._pack_tokens, model.cfg, ranks).mine(units):
            pack = make_pack(batch, ranks.device)
            logps.append(logprobs(model, pack).double().cpu().numpy())
            numbers.append(pack.ce_w.long().cpu().numpy() - 1)
        weights.reshard(model)  # a copy's head would stay gathered through the training phase
        number, logp = np.concatenate(numbers), np.concatenate(logps)
        # a reply lies on one rank whole, so adding up ranks rounds nothing
        mine = np.stack([np.bincount(number, logp, num), np.bincount(number, minlength=num)])
        everyone = [np.frombuffer(part).reshape(2, num) for part in ranks.gather_bytes(mine.tobytes())]
        sums, counts = np.sum(everyone, axis=0)
        mean = np.divide(sums, counts, out=np.full(num, np.nan), where=counts > 0)
        return np.where(np.isfinite(mean), mean, np.nan)


class Layout:
    """A step's thoughts and bare prompts, numbered, as units to score: a group's equal thoughts are scored once, so
    that they get the same reward to the last bit."""

    def __init__(self, groups: list[Group], suffixes: list[Reference], tokenizer: Tokenizer):
        self._suffixes = suffixes
        self.num = 0  # numbers given: one for each distinct thought and one for each bare prompt
        self._numbers_P: list[dict[bytes, int]] = []  # by the thought's tokens; b"": the bare prompt
        self._slots_P_G: list[list[int]] = []  # -1: never closed
        for group in groups:
            numbers: dict[bytes, int] = {}
            thoughts = [closed(s, tokenizer) for s in group.samples]
            slots = [numbers.setdefault(t, self.num + len(numbers)) if t else -1 for t in thoughts]
            numbers[b""] = self.num + len(numbers)
            self.num += len(numbers)
            self._numbers_P.append(numbers)
            self._slots_P_G.append(slots)

    def units(self, *, thoughts: bool, bare: bool) -> list[Unit]:
        """Units to score: each prompt's distinct thoughts, its reference without a thought, or both in one unit."""
        out: list[Unit] = []
        for reference, numbers in zip(self._suffixes, self._numbers_P, strict=True):
            replies = [_reply(thought, reference, n) for thought, n in numbers.items() if thought and thoughts]
            unit = reference.unit(replies) if replies and len(reference.targets) else None
            if bare:
                out += reference.beside(unit, Reply.text(reference.targets, numbers[b""] + 1))
            elif unit:
                out.append(unit)
        return out

    def of_samples(self, values: np.ndarray, below: float) -> np.ndarray:
        """(samples,) of values (num,). A thought that never closed lies `below` under the worst of its siblings' that
        did; where none did, or the suffix has no token to predict, all are 0. A score that failed is NaN."""
        out = []
        for reference, slots in zip(self._suffixes, self._slots_P_G, strict=True):
            is_open = np.array(slots) < 0
            if is_open.all() or not len(reference.targets):
                out.append(np.zeros(len(slots)))
                continue
            mine = values[slots]
            out.append(np.where(is_open, np.fmin.reduce(mine[~is_open]) - below, mine))
        return np.concatenate(out)

    def of_prompts(self, values: np.ndarray) -> np.ndarray:
        """(samples,) of values (num,): what each sample's prompt has without a thought, 0 where of_samples is 0."""
        out = []
        for reference, numbers, slots in zip(self._suffixes, self._numbers_P, self._slots_P_G, strict=True):
            out.append(np.full(len(slots), values[numbers[b""]] if len(reference.targets) and max(slots) >= 0 else 0.0))
        return np.concatenate(out)

    @property
    def is_scored(self) -> np.ndarray:
        """(samples,) bool: closed, and with a suffix to predict."""
        pairs = zip(self._suffixes, self._slots_P_G, strict=True)
        return np.array([slot >= 0 and len(reference.targets) > 0 for reference, slots in pairs for slot in slots])


def closed(sample: Sample, tokenizer: Tokenizer) -> bytes:
    """The tokens of a thought as int64, its first closing tag included; none without one. What the last of them holds
    beyond the tag stays: tokens as drawn."""
    return sample.tokens[: tokenizer.split_at_close(sample.tokens).num_think or 0].astype(np.int64).tobytes()


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _reply(thought: bytes, reference: Reference, number: int) -> Reply:
    tokens = np.concatenate([np.frombuffer(thought, np.int64), reference.lead, reference.targets])
    is_scored = np.arange(len(tokens)) >= len(tokens) - len(reference.targets)
    return Reply.text(tokens, is_scored * np.float32(number + 1))
