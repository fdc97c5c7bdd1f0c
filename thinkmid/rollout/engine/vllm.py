"""vLLM in the trainer's own process: its scheduler and kernels, our step loop, weights replaced in place."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thinkmid.errors import UserError
from thinkmid.model.transformer import ModelConfig
from thinkmid.model.weights import EMBEDDING, HEAD
from thinkmid.rollout.engine import slices
from thinkmid.rollout.engine.phases import Phases
from thinkmid.rollout.engine.protocol import Answer, EngineConfig, Finished, Sampling, check_vllm
from thinkmid.rollout.engine.sequences import Rows, mixed
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Request

# nothing sent or fetched, no line per request
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's too
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


class VllmEngine:
    """One vLLM engine per rank, or per tensor_parallel ranks, inside the trainer's process group.

    Collective: every rank builds it at the same point, after the process group exists. It starts with noise for
    weights: the first sync fills it, the checkpoint is not read twice. Ranks that share an engine must ask and generate
    the same.
    """

    def __init__(
        self, folder: str | Path, cfg: ModelConfig, tokenizer: Tokenizer, config: EngineConfig, max_len: int, rows: int
    ):
        """folder: Hugging Face folder whose config.json describes the model. rows: sequences decoded at a time."""
        self.tokenizer, self.version, self.max_len = tokenizer, -1, max_len
        self._cfg, self._tp, self._phases = cfg, config.tensor_parallel, Phases()
        cuda = torch.cuda.is_available()
        self._sleeps = config.sleep and cuda
        self._llm = _build(folder, config, max_len=max_len, rows=rows, cuda=cuda, sleeps=self._sleeps)
        self._core = self._llm.llm_engine.engine_core
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        self._model, self._draws = worker.get_model(), _Draws(worker.model_runner)
        from vllm.distributed import get_tensor_model_parallel_rank

        self._tp_rank = get_tensor_model_parallel_rank()
        self._asked: dict[str, tuple[tuple[int, int], Answer]] = {}
        self._inbox: list[Any] = []  # outputs of sequences, seen while questions were answered
        self._rows: Rows | None = None  # of the last generation
        self._num = 0  # requests so far: their ids
        atexit.register(self.close)

    def close(self) -> None:
        """At an orderly exit, before the process group goes; after an error its groups are left to the system."""
        # the first engine that goes takes the groups along
        orderly = getattr(sys, "last_value", None) is None and torch.distributed.is_initialized()
        # a shutdown frees the tensors, and on CUDA vLLM's allocator unmaps what it frees: of a sleeping engine that
        # would be the second time. Waking first would need the memory that the trainer has
        mapped = not self._sleeps or self._phases.state == "ready"
        if orderly and mapped:
            self._core.shutdown()
        else:
            self._core._finalizer.detach()

    # memory

    def sleep(self) -> None:
        self._phases.enter("sleep")
        if self._sleeps:
            gc.collect()  # while it sleeps, a collector must find none of its tensors (vllm#36651)
            self._core.sleep(2)

    def wake_weights(self) -> None:
        self._phases.enter("wake_weights")
        if self._sleeps:
            torch.cuda.empty_cache()  # the trainer's cached blocks are invisible to the engine's allocator
            self._core.wake_up(["weights"])

    def wake_cache(self) -> None:
        self._phases.enter("wake_cache")
        if self._sleeps:
            self._core.wake_up(["kv_cache"])

    # weights

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._phases.enter("load_weights")
        twice = self._with_tied_head(named) if self._cfg.tied else named
        with _quiet():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(twice)})
        self.reset_cache()  # keys and values of old weights would stay in use
        self.version, self._phases.loaded = version, True

    def _with_tied_head(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Both names: with the embedding alone the head would keep its old copy."""
        for name, tensor in named:
            yield name, tensor
            if name == EMBEDDING:
                yield HEAD, tensor

    def reset_cache(self) -> None:
        assert self._core.reset_prefix_cache(), "the prefix cache is in use: a sequence is running"

    def part(self, name: str, whole: Tensor) -> Tensor:
        return slices.part(self._cfg, name, whole, self._tp_rank, self._tp)

    @torch.inference_mode()
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Read back, fused matrices taken apart, padding cut off."""
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        vocab = len(slices.vocab_rows(self._cfg.vocab, self._tp_rank, self._tp))
        for path, module in self._model.named_modules():
            for kind, p in module.named_parameters(recurse=False):
                name = f"{path}.{kind}"
                if name == HEAD and self._cfg.tied:
                    continue
                held = _read(module) if kind == "weight" and p.numel() == 0 else p
                parent, _, leaf = path.rpartition(".")
                if leaf in parts:
                    for part, rows in zip(parts[leaf], held.split(module.output_partition_sizes), strict=True):
                        yield f"{parent}.{part}.{kind}", rows
                else:
                    yield name, held[:vocab] if name in (HEAD, EMBEDDING) else held

    # sequences

    def generate(self, requests: Iterable[Request | None], sampling: Sampling) -> Iterator[Finished]:
        self._phases.enter("generate")
        self._rows = Rows(requests, sampling, self.tokenizer)
        return self._run(self._rows, sampling)

    def unfinished(self) -> list[Request]:
        return self._rows.unfinished() if self._rows else []

    def _run(self, rows: Rows, sampling: Sampling) -> Iterator[Finished]:
        running: dict[str, int] = {}  # id in vLLM -> row
        try:
            while True:
                out = self._admit(rows, running, sampling)
                if running:
                    out += self._advance(rows, running, sampling)
                elif not out:
                    return
                if out:
                    moved = dict(rows.keep(np.array(sorted(running.values()), np.int64)))
                    running = {id: moved.get(row, row) for id, row in running.items()}
                yield out
        finally:
            self._core.abort_requests(list(running))

    def _admit(self, rows: Rows, running: dict[str, int], sampling: Sampling) -> Finished:
        """Start requests where rows are free. Returns those that already end with the tokens they brought."""
        free = sampling.max_batch - rows.num
        rows.pull(free)
        for prompt in (request.prompt for request in rows.waiting):
            if len(prompt.tokens) + sampling.max_new > self.max_len:
                raise UserError(
                    f"prompt {prompt.id}: {len(prompt.tokens)} tokens and {sampling.max_new} new ones exceed the "
                    f"engine's {self.max_len} (engine.max_len)"
                )
        out = []
        for row, why in zip(at := rows.admit(free), rows.replay(at), strict=True):
            if why := why or self._start(rows, row, running, sampling):
                out.append((rows.requests[row], rows.sample(row, why)))
        return out

    def _advance(self, rows: Rows, running: dict[str, int], sampling: Sampling) -> Finished:
        """One step of the engine; the samples that end with it."""
        outputs = [(o, running[o.request_id]) for o in self._step() if o.request_id in running and o.new_token_ids]
        if not outputs:
            return []
        at = np.array([row for _, row in outputs])
        token = np.array([o.new_token_ids[0] for o, _ in outputs])
        logp = np.array([o.new_logprobs.logprobs[0, 0] for o, _ in outputs], np.float32)
        finished = rows.append(at, token, logp, True, self.version)
        # what has ended, or has a closing tag to come that vLLM must not draw
        stopped = (finished != "") | (rows.forced(at) >= 0)
        self._core.abort_requests(
            [o.request_id for (o, _), s in zip(outputs, stopped, strict=True) if s and not o.finished]
        )
        out = []
        for (o, row), why, is_stopped in zip(outputs, finished, stopped, strict=True):
            if is_stopped:
                del running[o.request_id]
                if why := why or self._start(rows, row, running, sampling):
                    out.append((rows.requests[row], rows.sample(row, why)))
            elif o.finished:
                prompt = rows.requests[row].prompt
                raise RuntimeError(f"prompt {prompt.id}: vLLM ended a sequence by itself: {o.finish_reason}")
        return out

    def _start(self, rows: Rows, row: int, running: dict[str, int], sampling: Sampling) -> str:
        """Hand the row's sequence to vLLM, with the closing tag whose place has come. Returns why it ended, or ""."""
        at = np.array([row])
        while (tag := rows.forced(at))[0] >= 0:  # its tokens carry no gradient, so no log-prob either
            (why,) = rows.append(at, tag, 0.0, False, self.version)
            if why:
                return str(why)
        tokens = rows.tokens(row)
        id = self._add(
            tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            **self._draws.params(int(rows.column("seed")[row]), len(tokens)),
            max_tokens=sampling.max_new - int(rows.column("count")[row]),
            stop_token_ids=list(self.tokenizer.eos_ids),
            logprobs=0,
        )
        running[id] = row
        return ""

    # questions

    def ask(self, tokens: list[int], choices: tuple[int, int]) -> Answer:
        self._phases.enter("ask")
        if len(tokens) + 1 > self.max_len:
            raise UserError(f"a question of {len(tokens)} tokens exceeds the engine's {self.max_len} (engine.max_len)")
        id = self._add(
            tokens,
            temperature=0.0,
            max_tokens=1,
            allowed_token_ids=list(choices),
            logprobs=len(choices),
            logprob_token_ids=list(choices),
        )
        self._asked[id] = choices, (answer := Answer(self.drain))
        return answer

    def drain(self) -> None:
        while self._asked:
            self._inbox += self._step_engine()

    # the engine's loop

    def _add(self, tokens: list[int], **params: Any) -> str:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self._num += 1
        request = EngineCoreRequest(
            request_id=str(self._num),
            prompt_token_ids=tokens,
            mm_features=None,
            sampling_params=SamplingParams(**params, ignore_eos=True, detokenize=False),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._core.add_request(request)
        return str(self._num)

    def _step(self) -> list[Any]:
        """Outputs of sequences: those that came while questions were answered, else those of the next step."""
        waiting, self._inbox = self._inbox, []
        return waiting or self._step_engine()

    def _step_engine(self) -> list[Any]:
        """Outputs of sequences, one token each; answers go to those who asked."""
        outputs = []
        self._draws.number()
        for output in self._core.get_output().outputs:
            if question := self._asked.pop(output.request_id, None):
                choices, answer = question
                answer.p = _probability(choices, output)
            else:
                assert len(output.new_token_ids) <= 1, "speculative decoding is not supported"
                outputs.append(output)
        return outputs


class _Draws:
    """Makes every draw depend on the sequence's seed and the token's position alone, as the native engine's do.

    vLLM's second model runner draws so by itself. The first one has a generator for each sequence, seeded at its start,
    which a sequence that was interrupted would begin anew: it is seeded for each token.
    """

    def __init__(self, runner: Any):
        self._requests: dict[str, Any] | None = getattr(runner, "requests", None)  # of the first runner

    def params(self, seed: int, position: int) -> dict[str, Any]:
        """Fields of a sequence's SamplingParams. position: of the first token to draw."""
        first = seed if self._requests is None else int(mixed(np.array([seed], np.uint64), np.array([position]))[0])
        return {"seed": first % 2**63, "extra_args": {"seed": seed}}

    def number(self) -> None:
        """Before each step."""
        states = [s for s in (self._requests or {}).values() if s.generator is not None]
        seeds = np.array([s.sampling_params.extra_args["seed"] for s in states], np.uint64)
        for state, seed in zip(states, mixed(seeds, np.array([s.num_tokens for s in states], np.int64)), strict=True):
            state.generator.manual_seed(int(seed) % 2**63)


def _probability(choices: tuple[int, int], output: Any) -> float:
    """Probability of the first choice, when nothing but the two may come."""
    ids, logps = output.new_logprobs.logprob_token_ids[0], output.new_logprobs.logprobs[0]
    found = dict(zip(ids.tolist(), logps.tolist(), strict=True))
    a, b = (found[choice] for choice in choices)
    return float(1 / (1 + np.exp(b - a)))


def _build(folder: str | Path, config: EngineConfig, *, max_len: int, rows: int, cuda: bool, sleeps: bool) -> Any:
    """vllm.LLM, with what it changes in this process put back."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which we step
    check_vllm()
    import vllm

    try:
        with _unchanged(), _quiet():
            _forget_rope(vllm.__version__)
            return vllm.LLM(
                model=str(folder),
                tensor_parallel_size=config.tensor_parallel,
                max_num_seqs=rows,
                **_options(config, max_len, cuda, sleeps),
            )
    except (ValueError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"vLLM cannot start with {folder}: {lines[0] if lines else type(error).__name__}") from error


def _options(config: EngineConfig, max_len: int, cuda: bool, sleeps: bool) -> dict[str, Any]:
    """Arguments of vllm.LLM: how it is fed, what memory it takes beside a trainer, and what it computes."""
    options = {
        "max_model_len": max_len,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": int(config.kv_gb * 1e9),
        # unused where the cache has a size, but this share of the GPU must be free at the start: the default,
        # 0.92, would refuse every GPU that holds a trainer
        "gpu_memory_utilization": 0.01,
        "enable_sleep_mode": sleeps,
        "distributed_executor_backend": "external_launcher",
        # the default on a GPU: the next step starts before we have seen the last one's tokens, and one is under
        # way at a sync or a sleep. vLLM's CPU platform, on which this is tested, has none
        "async_scheduling": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": config.dtype,
        # logits in fp32, as the trainer's head forms them
        "hf_overrides": {"head_dtype": "float32"} if config.dtype != "float32" else {},
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": not config.compile,
        "seed": 0,
    }
    # with seeded requests the CPU build cannot take a prompt in pieces: its generators have no offset
    pieces = {} if cuda else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_len)}
    return options | pieces


@contextmanager
def _unchanged() -> Iterator[None]:
    """The process's threads, precision and random states, and no variables of a launcher where there is none."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # a group of one process has no launcher to set them; our children must not read them
    alone = {name: value for name, value in ALONE.items() if name not in os.environ}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name in alone:
            del os.environ[name]
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    gc.unfreeze()


def _forget_rope(version: str) -> None:
    """Gives the next engine rotary tables of its own. UserError if this vLLM does not keep them where we look.

    vLLM keeps rotary modules per process: the next engine of the same RoPE would read tables that lie in the first
    one's memory, unmapped while it sleeps. Of vLLM's other caches, each engine replaces the scratch buffers, and the
    sampler's tables lie outside the memory that sleeps.
    """
    try:
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    except ImportError as error:
        raise UserError(f"vllm {version} keeps its rotary modules elsewhere than the adapter looks: {error}") from error
    _ROPE_DICT.clear()


def _read(linear: Any) -> Tensor:
    """A rank's (out, in) weight of a linear whose matrix was packed away: what it makes of the identity."""
    dtype = linear.weight.dtype
    eye = torch.eye(linear.input_size_per_partition, dtype=dtype, device=linear.weight.device)
    weight: Tensor = linear.quant_method.apply(linear, eye).T
    return weight


@contextmanager
def _quiet() -> Iterator[None]:
    """vLLM's advice on what does not apply here (no tokenizer, thread binding) would stand among the run's lines."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
