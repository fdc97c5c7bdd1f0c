"""Prompts to an OpenAI-compatible endpoint, many at a time: each try has a deadline, what passes is tried again."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass

from thinkmid.augment.annotators import Reply, Unanswered
from thinkmid.errors import UserError, plain

LONGEST_PAUSE = 60.0  # seconds, also where the endpoint asks for more
PASSING = {408, 409, 425, 429}  # and every 5xx
PROBE = "Reply with the word yes."  # whoever refuses this too is not put off by a chunk
WORDS = 200  # characters of what an endpoint says of an error


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Where the annotator's model answers."""

    url: str = ""  # where /chat/completions lies, up to /v1
    model: str = ""  # its name there
    key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; may be unset
    workers: int = 32  # requests on their way at a time
    timeout_s: float = 300.0  # for one try, first to last byte
    retries: int = 6  # further tries after a timeout, a broken connection, HTTP 408, 409, 425, 429 or 5xx
    pause_s: float = 1.0  # before the second try, doubled each time up to a minute; Retry-After counts if given
    temperature: float = 0.8
    max_tokens: int = 4096  # of one answer
    price_prompt: float = 0.0  # per million tokens, for the report
    price_written: float = 0.0  # per million tokens, for the report

    def __post_init__(self):
        for name, low in (("workers", 1), ("retries", 0), ("max_tokens", 1), ("temperature", 0), ("pause_s", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")


class Passing(Exception):
    """A failure that another try may not meet."""

    def __init__(self, reason: str, pause_s: float = 0.0, said: str = ""):
        super().__init__(reason)
        self.pause_s, self.said = pause_s, said


class Rejected(Exception):
    """The endpoint takes this request at no time."""

    def __init__(self, status: int, said: str):
        super().__init__(f"HTTP {status}")
        self.status, self.said = status, said


class Endpoint:
    """A write function for annotators.by_model, safe to call from many threads. Call close() in the end."""

    def __init__(self, cfg: EndpointConfig, key: str = ""):
        try:
            import openai
        except ImportError as error:
            need = "annotator.kind 'openai' needs the openai package: pip install 'thinkmid[judge]'"
            raise UserError(need) from error
        key = key.strip() or "none"
        # http libraries write headers that they refuse into their logs
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"the key in {cfg.key_env} holds white space or characters outside ASCII")
        self.failures: Counter[str] = Counter()  # tries that were repeated or given up, by reason
        self._openai, self._cfg, self._key, self._answered = openai, cfg, key, False
        self._body = {"model": cfg.model, "temperature": cfg.temperature, "max_tokens": cfg.max_tokens}
        self._lock, self._closed = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        options = {"base_url": cfg.url, "api_key": key, "timeout": cfg.timeout_s, "max_retries": 0}
        self._client = openai.AsyncOpenAI(**options)

    def __call__(self, asked: list[str]) -> list[Reply]:
        """Replies in order. Unanswered if the endpoint fails for good, UserError if it refuses whatever it is asked."""
        with self._lock:  # nothing is begun once close() has looked at what there is
            if self._closed:
                raise Unanswered("closed")
            future = asyncio.run_coroutine_threadsafe(self._all(asked), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Unanswered("closed") from None

    def close(self) -> None:
        """Breaks off what is on its way; whoever waits for it gets Unanswered."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    async def _end(self) -> None:
        mine = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _all(self, asked: list[str]) -> list[Reply]:
        return list(await asyncio.gather(*map(self._ask, asked)))

    async def _ask(self, prompt: str) -> Reply:
        try:
            return await self._tried(prompt)
        except Rejected as error:
            refusal = error
        # of the key, the address or the model, unless it did answer with these
        if self._answered or refusal.status not in (401, 403, 404):
            with suppress(Rejected):
                await self._tried(PROBE)
                return Reply(refusal.said, fault=str(refusal))
        said = f": {refusal.said}" if refusal.said else ""
        raise UserError(f"endpoint.url {self._cfg.url} answers {refusal} for model {self._cfg.model!r}{said}")

    async def _tried(self, prompt: str) -> Reply:
        pause_s = self._cfg.pause_s
        for more in reversed(range(self._cfg.retries + 1)):
            try:
                reply = await self._try(prompt)
            except Passing as failure:
                self.failures[str(failure)] += 1
                if not more:
                    raise Unanswered(str(failure), failure.said) from None
                # spread, so that those who failed together do not come back together
                wait_s = max(failure.pause_s, pause_s * random.uniform(0.5, 1.5))
                await asyncio.sleep(min(wait_s, LONGEST_PAUSE))
                pause_s *= 2
            else:
                self._answered = True
                return reply
        raise AssertionError("unreachable: the last try returns or raises")

    async def _try(self, prompt: str) -> Reply:
        # lone surrogates cannot be sent
        messages = [{"role": "user", "content": prompt.encode("utf-8", errors="replace").decode()}]
        try:
            # the client's own timeout holds for each read: an endpoint that trickles bytes never meets it
            async with asyncio.timeout(self._cfg.timeout_s):
                create = self._client.chat.completions.with_raw_response.create
                raw = await create(messages=messages, **self._body)
            if status := error_status(raw.content):
                raise self._failure(status, raw.text)
            return parse(raw.content)
        except (TimeoutError, self._openai.APITimeoutError):
            raise Passing("timeout") from None
        except self._openai.APIStatusError as error:
            pause_s = seconds(error.response.headers.get("retry-after", ""))
            raise self._failure(error.status_code, error.response.text, pause_s) from None
        # texts of errors may hold the key
        except (self._openai.OpenAIError, OSError) as error:
            raise Passing(f"no connection ({type(error.__cause__ or error).__name__})") from None

    def _failure(self, status: int, body: str, pause_s: float = 0.0) -> Passing | Rejected:
        said = words(status, body, self._key)
        if status in PASSING or status >= 500 or status == 200:
            return Passing(f"HTTP {status}", pause_s, said)
        return Rejected(status, said)


def words(status: int, body: str, key: str) -> str:
    """What an error says, in one line: of JSON its message, else the body. Nothing where that may hold the key."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = body
    while isinstance(found, dict):
        found = next((found[name] for name in ("error", "message", "detail") if found.get(name)), "")
    # a dummy key of a few letters stands in many words
    secret = status in (401, 403) or (len(key) >= 8 and key in str(found))
    return "" if secret else " ".join(plain(str(found)).split())[:WORDS]


def error_status(body: bytes) -> int:
    """Of an error that comes with HTTP 200, as gateways send it: its own code, or 200; 0 where there is none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return 0
    error = found.get("error") if isinstance(found, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 200 if error else 0


def seconds(header: str) -> float:
    """Retry-After where it is a number; the date form counts as none."""
    return float(header) if header.replace(".", "", 1).isdecimal() else 0.0


def parse(body: bytes) -> Reply:
    """The reply in the JSON of a chat completion. Passing if there is none: a proxy's page, half an answer."""
    try:
        found = json.loads(body)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"].get("content") or ""
        tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, RecursionError):
        raise Passing("answer is not JSON") from None
    except (LookupError, TypeError, AttributeError):
        raise Passing("incomplete answer") from None
    if not isinstance(text, str):
        raise Passing("incomplete answer")
    known = [n if type(n) is int and n >= 0 else 0 for n in tokens]
    return Reply(text, *known, cut=choice.get("finish_reason") == "length")
