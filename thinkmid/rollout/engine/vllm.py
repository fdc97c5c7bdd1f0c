"""vLLM in the trainer's own process: its scheduler and kernels, our step loop, weights replaced in place."""

from __future__ import annotations

import atexit
import gc
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from thinkmid.errors import UserError
from thinkmid.model.transformer import ModelConfig
from thinkmid.model.weights import EMBEDDING, HEAD
from thinkmid.rollout.engine import slices
from thinkmid.rollout.engine.phases import Phases
from thinkmid.rollout.engine.protocol import Answer, EngineConfig, Sampling, check_vllm
from thinkmid.rollout.engine.sequences import Rows
from thinkmid.tokenizer import Tokenizer
from thinkmid.types import Prompt, Sample

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
        self, folder, cfg: ModelConfig, tokenizer: Tokenizer, config: EngineConfig, *, max_len: int, rows: int
    ):
        """folder: Hugging Face folder whose config.json describes the model. rows: sequences decoded at a time."""
        self.tokenizer, self.version, self.max_len = tokenizer, -1, max_len
        self._cfg, self._tp, self._phases = cfg, config.tensor_parallel, Phases()
        cuda = torch.cuda.is_available()
        self._sleeps = config.sleep and cuda
        self._llm = _build(folder, config, max_len=max_len, rows=rows, cuda=cuda, sleeps=self._sleeps)
        self._core = self._llm.llm_engine.engine_core
        self._model = self._llm.llm_engine.model_executor.driver_worker.worker.get_model()
        from vllm.distributed import get_tensor_model_parallel_rank

        self._tp_rank = get_tensor_model_parallel_rank()
        self._asked: dict[str, _Question] = {}
        self._inbox: list = []  # outputs of sequences, seen while questions were answered
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

    def sleep(self):
        self._phases.enter("sleep")
        if self._sleeps:
            gc.collect()  # while it sleeps, a collector must find none of its tensors (vllm#36651)
            self._core.sleep(2)

    def wake_weights(self):
        self._phases.enter("wake_weights")
        if self._sleeps:
            torch.cuda.empty_cache()  # the trainer's cached blocks are invisible to the engine's allocator
            self._core.wake_up(["weights"])

    def wake_cache(self):
        self._phases.enter("wake_cache")
        if self._sleeps:
            self._core.wake_up(["kv_cache"])

    # weights

    def load_weights(self, named, version):
        self._phases.enter("load_weights")
        twice = self._with_tied_head(named) if self._cfg.tied else named
        with _quiet():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(twice)})
        self.reset_cache()  # keys and values of old weights would stay in use
        self.version, self._phases.loaded = version, True

    def _with_tied_head(self, named):
        """Both names: with the embedding alone the head would keep its old copy."""
        for name, tensor in named:
            yield name, tensor
            if name == EMBEDDING:
                yield HEAD, tensor

    def reset_cache(self):
        assert self._core.reset_prefix_cache(), "the prefix cache is in use: a sequence is running"

    def part(self, name, whole):
        return slices.part(self._cfg, name, whole, self._tp_rank, self._tp)

    @torch.inference_mode()
    def named_weights(self):
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

    def generate(self, prompts: list[Prompt], seeds_P_G, sampling: Sampling, stop=lambda: False):
        self._phases.enter("generate")
        self._check(prompts, sampling)
        return self._run(prompts, seeds_P_G, sampling, stop)

    def _check(self, prompts, sampling) -> None:
        for prompt in prompts:
            if len(prompt.tokens) + sampling.max_new > self.max_len:
                raise UserError(
                    f"prompt {prompt.id}: {len(prompt.tokens)} tokens and {sampling.max_new} new ones exceed the "
                    f"engine's {self.max_len} (engine.max_len)"
                )

    def _run(self, prompts, seeds_P_G, sampling, stop) -> Iterator[tuple[int, int, Sample]]:
        rows = Rows(sum(map(len, seeds_P_G)), sampling, self.tokenizer)
        running: dict[str, int] = {}  # request -> row
        queued = 0
        try:
            while True:
                self._queue(queued, rows, running, prompts, seeds_P_G, sampling)
                queued = len(prompts)
                if not running or stop():
                    return
                yield from self._advance(rows, running, prompts, sampling)
                if queued < len(prompts):  # they take the rows of those that ended
                    self._check(prompts[queued:], sampling)
                    moved = dict(rows.keep(np.array(sorted(running.values()), np.int64)))
                    running = {id: moved.get(row, row) for id, row in running.items()}
        finally:
            self._core.abort_requests(list(running))

    def _queue(self, first, rows, running, prompts, seeds_P_G, sampling):
        """Hand over the sequences of the prompts from the first on."""
        for p in range(first, len(prompts)):
            for g, seed in enumerate(seeds_P_G[p]):
                row = rows.add(p, g, seed, prompts[p].tokens)
                running[self._start(rows, row, prompts[p].tokens, sampling)] = row

    def _advance(self, rows, running, prompts, sampling):
        """One step of the engine; the samples that end with it."""
        outputs = [(o, running[o.request_id]) for o in self._step() if o.request_id in running and o.new_token_ids]
        if not outputs:
            return
        at = np.array([row for _, row in outputs])
        token = np.array([o.new_token_ids[0] for o, _ in outputs])
        logp = np.array([o.new_logprobs.logprobs[0, 0] for o, _ in outputs], np.float32)
        finished = rows.append(at, token, logp, True)
        ended = [o.request_id for (o, _), why in zip(outputs, finished, strict=True) if why and not o.finished]
        spent = rows.spent(at) & (finished == "")
        ended += [o.request_id for (o, _), out in zip(outputs, spent, strict=True) if out and not o.finished]
        self._core.abort_requests(ended)
        for (o, row), why, out in zip(outputs, finished, spent, strict=True):
            p, g = rows.owner[row]
            if why or out:
                del running[o.request_id]
            elif o.finished:
                raise RuntimeError(f"prompt {prompts[p].id}: vLLM ended a sequence by itself: {o.finish_reason}")
            if out:
                why = self._close(rows, row)
                if not why:
                    running[self._start(rows, row, prompts[p].tokens, sampling)] = row
            if why:
                yield p, g, rows.sample(row, why, self.version)

    def _close(self, rows, row) -> str:
        """Write the closing tag whose place has come; its tokens carry no gradient, so no log-prob either."""
        for token in self.tokenizer.close_ids:
            (why,) = rows.append(np.array([row]), np.array([token]), np.float32(0), False)
        return str(why)

    def _start(self, rows, row, prompt_tokens, sampling) -> str:
        written = rows.written(row)
        return self._add(
            [*prompt_tokens, *written],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            # a sequence that goes on after a forced tag draws anew: its seed moves with it
            seed=(int(rows.seed[row]) + len(written)) % 2**63,
            max_tokens=sampling.max_new - len(written),
            stop_token_ids=list(self.tokenizer.eos_ids),
            logprobs=0,
        )

    # questions

    def ask(self, tokens, choices):
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
        self._asked[id] = _Question(choices, answer := Answer(self))
        return answer

    def drain(self):
        while self._asked:
            self._inbox += self._step_engine()

    # the engine's loop

    def _add(self, tokens, **params) -> str:
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
        return request.request_id

    def _step(self) -> list:
        """Outputs of sequences: those that came while questions were answered, else those of the next step."""
        waiting, self._inbox = self._inbox, []
        return waiting or self._step_engine()

    def _step_engine(self) -> list:
        """Outputs of sequences, one token each; answers go to those who asked."""
        outputs = []
        for output in self._core.get_output().outputs:
            if question := self._asked.pop(output.request_id, None):
                question.answer.p = question.probability(output)
            else:
                assert len(output.new_token_ids) <= 1, "speculative decoding is not supported"
                outputs.append(output)
        return outputs


@dataclass
class _Question:
    choices: tuple[int, int]
    answer: Answer

    def probability(self, output) -> float:
        """Of the first choice, when nothing but the two may come."""
        ids, logps = output.new_logprobs.logprob_token_ids[0], output.new_logprobs.logprobs[0]
        found = dict(zip(ids.tolist(), logps.tolist(), strict=True))
        a, b = (found[choice] for choice in self.choices)
        return float(1 / (1 + np.exp(b - a)))


def _build(folder, config: EngineConfig, *, max_len, rows, cuda, sleeps):
    """vllm.LLM, with what it changes in this process put back."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, which we step
    check_vllm()
    import vllm

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # with seeded requests the CPU build cannot take a prompt in pieces: its generators have no offset
    device = {} if cuda else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_len)}
    # a group of one process has no launcher to say so; our children must not read it
    alone = {name: value for name, value in ALONE.items() if name not in os.environ}
    os.environ.update(alone)
    try:
        with _quiet():
            _forget_rope(vllm.__version__)
            llm = vllm.LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=config.dtype,
                # logits in fp32, as the trainer's head forms them
                hf_overrides={"head_dtype": "float32"} if config.dtype != "float32" else {},
                tensor_parallel_size=config.tensor_parallel,
                distributed_executor_backend="external_launcher",
                enable_sleep_mode=sleeps,
                kv_cache_memory_bytes=int(config.kv_gb * 1e9),
                # unused where the cache has a size, but this share of the GPU must be free at the start: the default,
                # 0.92, would refuse every GPU that holds a trainer
                gpu_memory_utilization=0.01,
                # the default on a GPU: the next step starts before we have seen the last one's tokens, and one is under
                # way at a sync or a sleep. vLLM's CPU platform, on which this is tested, has none
                async_scheduling=False,
                max_model_len=max_len,
                max_num_seqs=rows,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                enforce_eager=not config.compile,
                disable_log_stats=True,
                seed=0,
                **device,
            )
    except (ValueError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"vLLM cannot start with {folder}: {lines[0] if lines else type(error).__name__}") from error
    finally:
        for name in alone:
            del os.environ[name]
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    gc.unfreeze()
    return llm


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


def _read(linear) -> torch.Tensor:
    """A rank's (out, in) weight of a linear whose matrix was packed away: what it makes of the identity."""
    dtype = linear.weight.dtype
    eye = torch.eye(linear.input_size_per_partition, dtype=dtype, device=linear.weight.device)
    return linear.quant_method.apply(linear, eye).T


class _quiet:
    """vLLM's advice on what does not apply here (no tokenizer, thread binding) would stand among the run's lines."""

    def __enter__(self):
        import logging

        self._logger = logging.getLogger("vllm")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_):
        self._logger.setLevel(self._level)
