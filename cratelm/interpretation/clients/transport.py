"""HTTP requests to a server that speaks OpenAI's protocol: a limit of concurrent requests, retries, and a hidden key.

Statuses 408, 409, 429 and 5xx, timeouts and cut connections are retried after an exponential wait with jitter that is
never shorter than the server's `Retry-After`. While one request waits for that, the others hold back too.
"""

import asyncio
import email.utils
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import LLMError, Unparsed

T = TypeVar("T")
KEY = "OPENAI_API_KEY"
"""Environment variable of the key, unless another one is named."""
NO_KEY = "none"
"""Sent as the key if there is none: servers without keys ignore it."""
LONGEST_QUOTE = 500
"""Characters of a server's message that an error quotes."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds: if a server asks for a longer wait, the work stops."""


class Refused(LLMError):
    """The server refused the request with a 4xx status that a retry does not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Malformed(Exception):
    """Content of a response that does not have the expected form: not JSON, wrong lengths, cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often a request is retried, and after what wait."""

    attempts: int = 7
    """Attempts in total; the waits add up to about a minute."""
    first: float = 1.0
    """Seconds before the second attempt; the wait doubles after each attempt."""
    longest: float = 60.0
    """Seconds: upper limit of the wait, unless the server asks for more."""


class Transport:
    """Sends requests to a server's base URL. Used by one event loop at a time."""

    def __init__(
        self, url: str, *, key_from: str = "", in_flight: int = 32, timeout: float = 300.0,
        retry: Retry | None = None, usage: Usage | None = None,
    ) -> None:  # fmt: skip
        self.url = check_url(url)
        self.variable, self._key = find_key(self.url, key_from)
        self.in_flight, self.timeout, self.retry = in_flight, timeout, retry or Retry()
        self.usage = usage or Usage()
        self._slots = asyncio.Semaphore(in_flight)
        self._not_before = 0.0
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    def _connection(self) -> Any:
        """The client of the running loop; the connections of an earlier loop are gone with that loop."""
        try:
            import openai
        except ImportError:
            raise CrateError("package openai is not installed. Run: pip install 'cratelm[llm]'") from None
        if self._client is None or self._loop is not asyncio.get_running_loop():
            self._loop, self._slots = asyncio.get_running_loop(), asyncio.Semaphore(self.in_flight)
            self._client = openai.AsyncOpenAI(
                base_url=self.url, api_key=self._key or NO_KEY, max_retries=0, timeout=self.timeout
            )
        return self._client

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close()
        self._client = None

    async def post(self, path: str, body: dict[str, Any], parse: Callable[[dict[str, Any]], T]) -> T:
        """Post a request and parse the response with `parse`, which raises `Malformed` if it cannot.

        Raises `Refused`; `Unparsed` with the reported cost; `LLMError` if only this request failed; `CrateError` if
        every request would fail.
        """
        import openai
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        client = self._connection()
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.retry.attempts), wait=self._wait, reraise=True,
            retry=retry_if_exception_type(openai.APIError),
        )  # fmt: skip
        async with self._slots:
            try:
                async for attempt in retrying:
                    with attempt:
                        await asyncio.sleep(self._not_before - time.monotonic())
                        self.usage.requests += 1
                        try:
                            text = str(await client.post(path, cast_to=str, body=body))
                        except openai.APIStatusError as error:
                            self._check_status(error)
                            raise
            except openai.APIError as error:
                raise await self._given_up(error) from None
        return self._parsed(text, parse)

    def _parsed(self, text: str, parse: Callable[[dict[str, Any]], T]) -> T:
        answer: dict[str, Any] = {}
        try:
            answer = _json(text)
            return parse(answer)
        except Malformed as error:
            reported = answer.get("usage")
            usage = reported if isinstance(reported, dict) else {}
            read, generated = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
            raise Unparsed(
                self._hidden(str(error)), prompt_tokens=read if isinstance(read, int) else None,
                new_tokens=generated if isinstance(generated, int) else None,
            ) from None  # fmt: skip

    def _wait(self, state: Any) -> float:
        """Seconds before the next attempt (tenacity calls this)."""
        asked = _retry_after_of(state.outcome.exception())
        if asked:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        self.usage.retries += 1
        grown = min(self.retry.longest, self.retry.first * 2.0 ** (state.attempt_number - 1))
        return max(grown * random.uniform(0.5, 1.0), asked)

    def _check_status(self, error: Any) -> None:
        """Raise `Refused` or `CrateError` if a retry cannot help."""
        status = error.status_code
        if status in (401, 403):
            key = f"the key in {self.variable}" if self._key else f"a request without a key (set {KEY})"
            raise CrateError(f"{self.url} refuses {key} (HTTP {status})") from None
        if getattr(error, "code", None) == "insufficient_quota":
            raise CrateError(f"{self.url}: the account has no quota left: {self._message(error)}") from None
        if status not in (408, 409, 429) and status < 500:
            raise Refused(f"the server refused (HTTP {status}): {self._message(error)}", status) from None
        asked = _retry_after_of(error)
        if asked > LONGEST_RETRY_AFTER:
            raise CrateError(
                f"{self.url} asks to wait {asked:.0f} seconds (HTTP {status}). Run the same command again after that"
            ) from None

    async def _given_up(self, failure: Any) -> CrateError:
        """The error after the last attempt: does only this request fail, or the whole server?"""
        import openai

        times = f"{self.retry.attempts} times"
        if isinstance(failure, openai.APIStatusError):
            if failure.status_code == 429:
                return CrateError(f"{self.url} refused {times}: rate limit. Lower --in-flight, or run again later")
            return LLMError(f"the server failed {times} (HTTP {failure.status_code}): {self._message(failure)}")
        try:
            await self.get("/models", timeout=10.0)
        except LLMError:
            pass  # the server is up, and reports an error
        except CrateError as error:
            return error
        late = isinstance(failure, openai.APITimeoutError)
        return LLMError(
            f"{f'no answer within {self.timeout:g} seconds' if late else 'the connection was cut'}, {times}"
        )

    async def get(self, path: str, *, timeout: float = 30.0) -> dict[str, Any]:
        """Get a JSON object, with two attempts.

        Raises `LLMError` if the server reports an error, and `CrateError` if it cannot be reached.
        """
        import openai

        client, failure = self._connection(), CrateError("")
        for attempt in (1, 2):
            try:
                return _json(await client.get(path, cast_to=str, options={"timeout": timeout}))
            except Malformed as error:
                failure = self._unreachable(f"{self.url} does not speak OpenAI's protocol ({error})")
            except openai.APIStatusError as error:
                self._check_status(error)
                failure = LLMError(f"{self.url} failed (HTTP {error.status_code}): {self._message(error)}")
            except openai.APIConnectionError as error:
                reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
                failure = self._unreachable(f"no server can be reached at {self.url} ({self._hidden(reason)})")
            if attempt == 1:
                await asyncio.sleep(self.retry.first / 2)
        raise failure

    def _unreachable(self, reason: str) -> CrateError:
        return CrateError(f"{reason}. Start a server, or give another URL (such as http://localhost:8000/v1)")

    def _message(self, error: Any) -> str:
        """The server's error message, on one line and without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        inner = body.get("error", body)
        message = inner.get("message") if isinstance(inner, dict) else inner
        message = message or body.get("message") or body.get("detail") or error.response.text
        return self._hidden(" ".join(str(message).split())[:LONGEST_QUOTE] or "no reason given")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text


def check_url(url: str) -> str:
    """A base URL without its trailing slash. Refuses one without http, or with a password: URLs are stored."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CrateError(f"{url!r} is not a server URL; expected something like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise CrateError(f"the URL of {parts.hostname} holds a secret or a query. Put the key in {KEY} instead")
    return url.rstrip("/")


def find_key(url: str, variable: str) -> tuple[str, str]:
    """The environment variable and the key in it; an empty key if none is set.

    Unless the variable is named, no key is sent over a connection that others could read.
    """
    if variable and not os.environ.get(variable):
        raise CrateError(f"the environment variable {variable} is empty. Put the key of {url} into it")
    parts = urlsplit(url)
    private = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    name = variable or KEY
    return name, os.environ.get(name, "") if variable or private else ""


def retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait: `Retry-After` in seconds or as a date, or OpenAI's header in milliseconds."""
    exact, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        return max(float(exact) / 1000 if exact else float(value or 0), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _retry_after_of(error: Any) -> float:
    response = getattr(error, "response", None)
    return 0.0 if response is None else retry_after(response.headers)


def _json(text: str) -> dict[str, Any]:
    import jiter  # a dependency of openai; twice as fast as json on tables of prompt logprobs

    try:
        value = jiter.from_json(text.encode(), cache_mode="all")
    except ValueError as error:
        raise Malformed(f"not JSON ({error}): {text[:80]!r}") from None
    if not isinstance(value, dict):
        raise Malformed(f"JSON {type(value).__name__} instead of an object")
    return value
