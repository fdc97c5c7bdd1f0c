"""P(yes) from any OpenAI-compatible endpoint, many requests at a time."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from thinkmid.rollout.endpoint import Completion, Endpoint, EndpointError
from thinkmid.rollout.judge.breaker import Breaker
from thinkmid.rollout.judge.config import JudgeConfig
from thinkmid.rollout.judge.model import JudgeError, NotAsked

TOP = 5  # of the first token; some servers give no more
MIN_MASS = 0.1  # of yes and no together among these: with less the model was saying something else
# Questions in a row without a response, after which the endpoint is given up. Without that, a dead one costs a step of
# 4,096 questions by 16 workers at two tries of 30 s more than four hours. An endpoint that loses one in ten loses so
# many once in 10^8.
GIVE_UP = 8
BODY = {"temperature": 0, "max_tokens": 8}
LOG_PROBS = {"logprobs": True, "top_logprobs": TOP}


class RemoteAsk:
    """Asks a model behind an endpoint. Requests begin when asked, up to `workers` at a time; call close() in the end.

    A try lasts at most timeout_s. After GIVE_UP questions in a row without a response, and timeout_s without any,
    questions fail unasked but for one each timeout_s, until that one is answered; an HTTP error is a response. An
    endpoint that refuses log-probs before it ever accepted them is asked without from then on.
    """

    def __init__(self, cfg: JudgeConfig, note: Callable[[str], None]):
        """note receives a line when the endpoint's state changes, on the thread that reads answers."""
        self._endpoint = Endpoint(cfg.url, cfg.model, cfg.key_env, timeout_s=cfg.timeout_s, retries=cfg.retries)
        self._turns = asyncio.Semaphore(cfg.workers)
        self._log_probs, self._accepted = True, False
        self._breaker, self._lost = Breaker(GIVE_UP, cfg.timeout_s), ""
        self._note, self._notes = note, deque[str]()

    def __call__(self, prompt: str) -> Answer:
        """P(yes) to come; JudgeError where there is none."""
        return Answer(self, self._endpoint.submit(self._ask(prompt)))

    def report(self) -> None:
        """Hands over what has happened to the endpoint since the last call."""
        while self._notes:
            self._note(self._notes.popleft())

    def close(self) -> None:
        """Drops what waits and cancels what runs; both fail."""
        self._endpoint.close()

    async def _ask(self, prompt: str) -> float:
        async with self._turns:
            if not self._breaker.admits():
                raise NotAsked(f"not asked, the endpoint was given up ({self._lost})")
            began = time.monotonic()
            try:
                completion = await self._complete(prompt)
            except EndpointError as error:
                self._count(error.answered, began, str(error))
                raise
            self._count(True, began)
        return p_yes(completion)

    async def _complete(self, prompt: str) -> Completion:
        asked_for = self._log_probs
        try:
            completion = await self._endpoint.complete(prompt, **BODY, **(LOG_PROBS if asked_for else {}))
        except EndpointError as error:
            # once accepted, they stay: the verdicts of a run are all read in one way
            if not asked_for or self._accepted or not refuses_log_probs(error):
                raise
            # fails too if the fault lies elsewhere, and then nothing is concluded
            completion = await self._endpoint.complete(prompt, **BODY)
            if self._log_probs:
                why = f"refuses log-probs ({error})"
                self._notes.append(f"the judge's endpoint {why}: P(yes) is 1 or 0, by the text of its answers")
            self._log_probs = False
            return completion
        self._accepted |= asked_for
        return completion

    def _count(self, answered: bool, began: float, why: str = "") -> None:
        if answered:
            if self._breaker.heard():
                self._notes.append("the judge's endpoint answers again")
            return
        self._lost = why
        if self._breaker.lost(began):
            self._notes.append(f"the judge's endpoint is given up until it answers again: {why}")


class Answer:
    """P(yes) of one question, to come."""

    def __init__(self, ask: RemoteAsk, future: Future[float]):
        self._ask, self._future = ask, future

    def result(self) -> float:
        """Waits. JudgeError: there is none."""
        try:
            return self._future.result()
        except EndpointError as error:
            raise JudgeError(str(error), error.said) from None
        finally:
            self._ask.report()


def refuses_log_probs(error: EndpointError) -> bool:
    return error.status in (400, 422) and re.search("log.?prob", error.said, re.IGNORECASE) is not None


def p_yes(completion: Completion) -> float:
    """P(yes) in the first token if log-probs are given, else 1 or 0 by the text. JudgeError: neither holds one."""
    yes, no = first_token(completion)
    if yes + no >= MIN_MASS:
        return yes / (yes + no)
    said = completion.text.strip().casefold().rstrip(".!,;:")
    if said not in ("yes", "no"):
        raise JudgeError(f"unparsable answer {completion.text!r:.60}")
    return float(said == "yes")


def first_token(completion: Completion) -> tuple[float, float]:
    """Probabilities of yes and of no, in any spelling; 0 and 0 if the server gives none."""
    try:
        top = completion.logprobs["content"][0]["top_logprobs"]
        masses = [(entry["token"].strip(" \n\t▁Ġ").casefold(), math.exp(entry["logprob"])) for entry in top]
    # a server without log-probs leaves out any of these; what is no number counts as none
    except (LookupError, TypeError, AttributeError, OverflowError):
        return 0.0, 0.0
    yes, no = (sum(p for token, p in masses if token == answer) for answer in ("yes", "no"))
    return (yes, no) if math.isfinite(yes + no) else (0.0, 0.0)
