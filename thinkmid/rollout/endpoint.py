"""A client of OpenAI-compatible chat endpoints: failed tries are counted and repeated, each has a time limit.

The openai package retries and pauses between tries (0.5 s, doubled up to 8 s, or Retry-After). What one try is stands
here, because the package's time limit holds for each read and it takes any HTTP 200 for an answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from thinkmid.errors import UserError, plain
from thinkmid.files import is_count

try:
    import openai
except ImportError as error:
    raise UserError("an endpoint needs the openai package: pip install openai") from error
try:
    import httpx2 as httpx
except ImportError:  # openai before it moved to httpx2
    import httpx  # type: ignore[import-not-found, no-redef]

RETRIED = (408, 409, 425, 429)  # and every 5xx
SAID = 200  # characters kept of an error message
T = TypeVar("T")


class EndpointError(httpx.RequestError):
    """No usable answer; the text is the reason under which it is counted. A RequestError, so that openai tries again.

    said: the endpoint's own message, never the key. status: of an HTTP error, else 0. answered: the server responded.
    """

    def __init__(self, reason: str, said: str = "", *, status: int = 0, answered: bool = True):
        super().__init__(reason)
        self.said, self.status, self.answered = said, status, answered

    @property
    def is_final(self) -> bool:
        """The endpoint rejects this request; another try would not help."""
        return 400 <= self.status < 500 and self.status not in RETRIED


class Completion(NamedTuple):
    """A chat completion."""

    text: str  # "" where the message has no content
    cut: bool  # ended by max_tokens
    logprobs: Any  # as the server sent them, None if it did not
    prompt_tokens: int  # 0 where the server does not count them
    written_tokens: int


class OneTry(openai.DefaultAsyncHttpxClient):
    """Sends each request within timeout_s, first to last byte, and counts those that failed by reason."""

    def __init__(self, timeout_s: float, key: str, failures: Counter[str]):
        super().__init__()
        self._timeout_s, self._key, self._failures = timeout_s, key, failures

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """A completion, or an HTTP error for the package to judge. EndpointError where another try may succeed."""
        try:
            # the package's own limit holds for each read: a server that trickles bytes never meets it
            async with asyncio.timeout(self._timeout_s):
                response = await super().send(request, **options)
            self._check(response)
        except TimeoutError:
            error = EndpointError("timeout", answered=False)
        except EndpointError as unusable:
            error = unusable
        # whatever a server does to the client costs one try; texts of errors may hold the key
        except Exception as broken:
            error = EndpointError(f"no connection ({type(broken).__name__})", answered=False)
        else:
            if response.is_error:
                self._failures[f"HTTP {response.status_code}"] += 1
            return response
        self._failures[str(error)] += 1
        raise error from None

    def _check(self, response: httpx.Response) -> None:
        if response.is_success and (status := error_status(response.content)) >= 400:
            response.status_code = status  # as a gateway sends errors
        elif response.is_success:
            parse(response.content, self._key)
        if response.status_code == 425:  # which the package does not retry
            raise EndpointError("HTTP 425", message(425, response.text, self._key), status=425)


class Endpoint:
    """A model behind an endpoint, on an event loop and a connection pool of its own; for many threads.

    Call close() in the end.
    """

    def __init__(self, url: str, model: str, key_env: str, *, timeout_s: float, retries: int):
        """key_env: the environment variable that holds the key, which may be unset. timeout_s: for each try."""
        self._key = os.environ.get(key_env, "").strip() or "none"
        # http libraries write headers that they refuse into their logs
        if not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            raise UserError(f"the key in {key_env} holds white space or characters outside ASCII")
        self.failures: Counter[str] = Counter()  # tries that failed, by reason, whether repeated or not
        self._model, self._closed = model, False
        self._started: set[asyncio.Task[Any]] = set()  # cancelled before it begins, a task would never await its work
        http = OneTry(timeout_s, self._key, self.failures)
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=self._key, timeout=None, max_retries=retries, http_client=http
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts work on the endpoint's event loop. Once closed, its future raises EndpointError."""
        return asyncio.run_coroutine_threadsafe(self._unless_closed(work), self._loop)

    async def complete(self, prompt: str, **body: Any) -> Completion:
        """The answer to one user message; body: further fields of the request. EndpointError after the last try."""
        # lone surrogates cannot be sent
        question = {"role": "user", "content": prompt.encode("utf-8", errors="replace").decode()}
        create: Any = self._client.chat.completions.with_raw_response.create
        try:
            raw = await create(model=self._model, messages=[question], **body)
        except openai.APIStatusError as error:
            status, said = error.status_code, message(error.status_code, error.response.text, self._key)
            raise EndpointError(f"HTTP {status}", said, status=status) from None
        except openai.OpenAIError as error:
            cause = error.__cause__
            raise cause if isinstance(cause, EndpointError) else EndpointError(type(error).__name__) from None
        return parse(raw.content, self._key)

    def close(self) -> None:
        """Cancels requests under way; their futures raise EndpointError."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)

    async def _unless_closed(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise EndpointError("closed")
        task = asyncio.current_task()
        assert task is not None
        self._started.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            raise EndpointError("closed") from None
        finally:
            self._started.discard(task)

    async def _end(self) -> None:
        self._closed = True
        for task in (tasks := list(self._started)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()


def parse(body: bytes, key: str) -> Completion:
    """The JSON of a chat completion. EndpointError if there is none: a proxy's page, half an answer, an error."""
    found = loads(body)
    if found is None:
        raise EndpointError("answer is not JSON")
    if status := error_status(body):
        raise EndpointError(f"HTTP {status}", message(status, body.decode(), key))
    try:
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"].get("content") or ""
        counts: list[Any] = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (LookupError, TypeError, AttributeError):
        raise EndpointError("incomplete answer") from None
    if not isinstance(text, str):
        raise EndpointError("incomplete answer")
    prompt_tokens, written_tokens = (int(n) if is_count(n) else 0 for n in counts)
    cut = choice.get("finish_reason") == "length"
    return Completion(text, cut, choice.get("logprobs"), prompt_tokens, written_tokens)


def loads(body: str | bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def error_status(body: bytes) -> int:
    """Code of an error that a gateway sends with HTTP 200, 200 if it has none; 0 where the body is no error."""
    found = loads(body)
    error = found.get("error") if isinstance(found, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 200 if error else 0


def message(status: int, body: str, key: str) -> str:
    """What an error says, in one line: of JSON its message, else the body. "" where that may hold the key."""
    found = body if (loaded := loads(body)) is None else loaded
    while isinstance(found, dict):
        found = next((found[name] for name in ("error", "message", "detail") if found.get(name)), "")
    # a dummy key of a few letters stands in many words
    secret = status in (401, 403) or (len(key) >= 8 and key in str(found))
    return "" if secret else " ".join(plain(str(found)).split())[:SAID]
