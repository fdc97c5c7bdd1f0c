"""P(yes) from any OpenAI-compatible endpoint, many requests at a time, none for longer than its deadline."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from thinkmid.augment.endpoint import words
from thinkmid.errors import UserError
from thinkmid.rollout.judge.breaker import Breaker
from thinkmid.rollout.judge.model import JudgeError, NotAsked

TOP = 5  # of the first token; some servers give no more
MIN_MASS = 0.1  # of yes and no together among these: with less the model was saying something else
# questions in a row: an endpoint that loses one in ten loses so many once in 10^8, and a dead one has lost them after
# the first deadline where workers are as many
GIVE_UP = 8
LOG_PROBS = {"logprobs": True, "top_logprobs": TOP}


@dataclass(frozen=True)
class RemoteAnswer:
    """P(yes) from an endpoint."""

    remote: RemoteAsk
    future: Future[float]
    begun: threading.Event

    def result(self) -> float:
        return self.remote.wait(self.future, self.begun)


class RemoteAsk:
    """Asks a model behind an endpoint. Requests begin when asked, up to `workers` at a time; call close() in the end.

    One try lasts timeout_s without a byte, the whole request timeout_s for each try and the pauses between them. After
    GIVE_UP requests in a row that nobody answered, and timeout_s in which nothing was heard, questions fail unasked
    but for one each timeout_s, until that one is answered; an HTTP error is an answer. An endpoint that refuses
    log-probs before it ever accepted them is asked without from then on.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout_s: float = 30.0,
        workers: int = 16,
        retries: int = 2,
        max_tokens: int = 8,
        note: Callable[[str], None] = lambda line: None,
    ):
        """note is told what happens to the endpoint, on the thread that reads answers."""
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "a judge behind an endpoint needs the openai package: pip install 'thinkmid[judge]'"
            ) from error
        if timeout_s <= 0 or workers < 1 or retries < 0 or max_tokens < 1:
            raise ValueError(f"timeout_s {timeout_s}, workers {workers}, retries {retries}, max_tokens {max_tokens}")
        key = key.strip() or "none"
        # http libraries write headers that they refuse into their logs
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError("the judge's key holds white space or characters outside ASCII")
        self._openai = openai
        self._options = {"base_url": url, "api_key": key, "timeout": timeout_s, "max_retries": retries}
        # the client pauses 0.5 s, 1 s, ... 8 s
        self._deadline_s = timeout_s * (retries + 1) + sum(min(8.0, 0.5 * 2**i) for i in range(retries)) + 0.5
        self._grace_s = timeout_s + 1.0
        self._body = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        self._log_probs, self._accepted, self._lock = LOG_PROBS, False, threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self._mine, self._clients = threading.local(), set[openai.OpenAI]()
        self._breaker, self._lost = Breaker(GIVE_UP, timeout_s), ""
        self._note, self._notes = note, deque[str]()

    def __call__(self, prompt: str) -> RemoteAnswer:
        begun = threading.Event()
        future = self._pool.submit(self._work, prompt, begun)
        future.add_done_callback(lambda _: begun.set())  # cancelled ones never begin
        return RemoteAnswer(self, future, begun)

    def wait(self, future: Future[float], begun: threading.Event) -> float:
        """P(yes) of a question that was put, or JudgeError. Notes what happened to the endpoint meanwhile."""
        begun.wait()
        try:
            # NOTE: the worker ends by itself, except where no timeout reaches, such as in a name lookup
            return future.result(self._deadline_s + self._grace_s)
        except TimeoutError:
            raise JudgeError("no answer before the deadline") from None
        except CancelledError:
            raise JudgeError("closed") from None
        finally:
            while self._notes:
                self._note(self._notes.popleft())

    def close(self) -> None:
        """Drops what waits and breaks what runs off; both fail."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in list(self._clients):
            client.close()

    def _work(self, prompt: str, begun: threading.Event) -> float:
        begun.set()
        if not self._breaker.admits():
            raise NotAsked(f"not asked, the endpoint was given up ({self._lost})")
        began, client, late = time.monotonic(), self._client(), threading.Event()

        def end():
            late.set()
            client.close()

        # timeouts of the client hold for each read: an endpoint that trickles bytes never meets one
        watchdog = threading.Timer(self._deadline_s, end)
        watchdog.daemon = True
        watchdog.start()
        try:
            reply = self._reply(client, [{"role": "user", "content": prompt}])
            self._heard()
            return p_yes(reply)
        except JudgeError:
            raise
        # whatever an endpoint does to the client costs one verdict, not the run; texts of errors may hold the key
        except Exception as error:
            why = "no answer before the deadline" if late.is_set() else self._reason(error)
            said = ""
            if isinstance(error, self._openai.APIStatusError):
                self._heard()
                said = words(error.status_code, error.response.text, self._options["api_key"])
            elif late.is_set() or isinstance(error, self._openai.APIConnectionError):
                self._count_lost(began, why)
            raise JudgeError(why, said) from None
        finally:
            watchdog.cancel()

    def _reply(self, client, messages: list[dict]) -> bytes:
        create = partial(client.chat.completions.with_raw_response.create, messages=messages, **self._body)
        log_probs = self._log_probs
        try:
            reply = create(**log_probs).content
        except self._openai.APIStatusError as error:
            # once accepted, they stay: the verdicts of a run are all read in one way
            if not log_probs or self._accepted or not refuses_log_probs(error.status_code, error.response.text):
                raise
            reply = create().content  # fails too if the fault lies elsewhere, and then nothing is concluded
            with self._lock:
                first, self._log_probs = bool(self._log_probs), {}
            if first:
                why = f"refuses log-probs (HTTP {error.status_code})"
                self._notes.append(f"the judge's endpoint {why}: P(yes) is 1 or 0, by the text of its answers")
            return reply
        self._accepted |= bool(log_probs)
        return reply

    def _heard(self) -> None:
        if self._breaker.heard():
            self._notes.append("the judge's endpoint answers again")

    def _count_lost(self, began: float, why: str) -> None:
        self._lost = why
        if self._breaker.lost(began):
            self._notes.append(f"the judge's endpoint is given up until it answers again: {why}")

    def _client(self):
        """This thread's own: to close it ends no other's request."""
        client = getattr(self._mine, "client", None)
        if client is None or client.is_closed():
            self._clients.discard(client)
            client = self._mine.client = self._openai.OpenAI(**self._options)
            self._clients.add(client)
        return client

    def _reason(self, error: Exception) -> str:
        if isinstance(error, self._openai.APITimeoutError):
            return "timeout"
        if isinstance(error, self._openai.APIStatusError):
            return f"HTTP {error.status_code}"
        return f"no connection ({type(error.__cause__ or error).__name__})"


def refuses_log_probs(status: int, body: str) -> bool:
    return status in (400, 422) and re.search("log.?prob", body, re.IGNORECASE) is not None


def p_yes(reply: bytes) -> float:
    """P(yes) in the JSON of a chat completion: of its first token if log-probs are given, else 1 or 0 by its text."""
    try:
        choice = json.loads(reply)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, RecursionError):
        raise JudgeError("answer is not JSON") from None
    except (LookupError, TypeError) as error:
        raise JudgeError(f"incomplete answer ({type(error).__name__})") from None
    yes, no = first_token(choice)
    if yes + no >= MIN_MASS:
        return yes / (yes + no)
    said = text.strip().casefold().rstrip(".!,;:") if isinstance(text, str) else ""
    if said not in ("yes", "no"):
        raise JudgeError(f"unparsable answer {text!r:.60}")
    return float(said == "yes")


def first_token(choice: dict) -> tuple[float, float]:
    """Probabilities of yes and of no, in any spelling; 0 and 0 if the server gives none."""
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        masses = [(entry["token"].strip(" \n\t▁Ġ").casefold(), math.exp(entry["logprob"])) for entry in top]
    # a server without log-probs leaves out any of these; what is no number counts as none
    except (LookupError, TypeError, AttributeError, OverflowError):
        return 0.0, 0.0
    yes, no = (sum(p for token, p in masses if token == answer) for answer in ("yes", "no"))
    return (yes, no) if math.isfinite(yes + no) else (0.0, 0.0)
