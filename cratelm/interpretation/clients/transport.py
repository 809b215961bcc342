"""Requests to a server that speaks OpenAI's protocol: so many at once, asked again where it helps, the key kept secret.

What is asked again: 408, 409, 429 and 5xx, timeouts, cut connections, and answers that cannot be read; after a wait
that doubles, varies by chance, and is never shorter than the server's `Retry-After`. While one request waits on that,
the others hold back too.
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
from cratelm.interpretation.clients.usage import LOST, Usage
from cratelm.interpretation.llm import Declined, LLMError

T = TypeVar("T")
KEY = "OPENAI_API_KEY"
"""Environment variable that the key is read from unless another is named."""
NO_KEY = "none"
"""What is sent as a key where there is none: servers without keys ignore it."""
QUOTED = 500
"""Characters of a server's own words in an error."""


class Refused(LLMError):
    """The server understood and said no: a status of 4xx that asking again does not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unreadable(Exception):
    """An answer that is not what it should be: not JSON, of the wrong lengths, cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often and after what wait a request is made again."""

    attempts: int = 7
    """In all; the waits between them add up to about a minute."""
    unreadable: int = 3
    """In all, where the server answers and the answer cannot be read: it is paid for each time."""
    first: float = 1.0
    """Seconds before the second attempt, on average three quarters of this."""
    longest: float = 60.0
    """Seconds that a wait grows to."""
    most_asked: float = 600.0
    """Seconds: where a server asks for a longer wait than this, the work stops."""

    def wait(self, attempt: int, asked: float) -> float:
        """Seconds to wait after this many failed attempts, where the server asked for `asked`."""
        grown = min(self.longest, self.first * 2.0 ** (attempt - 1))
        return max(grown * random.uniform(0.5, 1.0), asked * random.uniform(1.0, 1.1))


class Transport:
    """A server's base URL, and how it is asked. Belongs to one event loop at a time."""

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
        """The client of the loop that runs; a loop that was left has taken its connections with it."""
        try:
            import openai
        except ImportError:
            raise CrateError("asking a server needs the package openai. Run: pip install 'cratelm[llm]'") from None
        if self._client is None or self._loop is not asyncio.get_running_loop():
            self._loop, self._slots = asyncio.get_running_loop(), asyncio.Semaphore(self.in_flight)
            self._client = openai.AsyncOpenAI(
                base_url=self.url, api_key=self._key or NO_KEY, max_retries=0, timeout=self.timeout
            )
        return self._client

    async def close(self) -> None:
        """Give the connections back."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close()
        self._client = None

    async def ask(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """Post a request until there is an answer that `read` can read (it raises `Unreadable` where it cannot).

        Raises `Refused`, or `LLMError` where this request gets no answer from a server that is there, or `CrateError`
        where no request would.
        """
        client, unreadable = self._connection(), 0
        async with self._slots:
            for attempt in range(1, self.retry.attempts + 1):
                await asyncio.sleep(self._not_before - time.monotonic())
                self.usage.requests += 1
                answer: dict[str, Any] | None = None
                try:
                    answer = _parsed(await client.post(path, cast_to=str, body=body))
                    return read(answer)
                except Unreadable as error:
                    failure: Exception = error
                    unreadable += 1
                    again = attempt < self.retry.attempts and unreadable < self.retry.unreadable
                    await self._lost(answer, again=again)
                except Exception as error:
                    failure = error
                    if answer is not None and not isinstance(error, Declined):
                        await self._lost(answer, again=False)
                asked = self._asked_wait(failure)  # raises where asking again does not help
                if attempt == self.retry.attempts or unreadable == self.retry.unreadable:
                    break
                if asked:
                    self._not_before = max(self._not_before, time.monotonic() + asked)
                self.usage.retries += 1
                await asyncio.sleep(self.retry.wait(attempt, asked))
        raise await self._given_up(failure, attempt)

    async def _lost(self, answer: dict[str, Any] | None, *, again: bool) -> None:
        """Have an answer counted that is of no use. Who waits for the budget meanwhile keeps nobody from asking."""
        lost = LOST.get()
        if lost is None:
            return
        found = (answer or {}).get("usage")
        told = found if isinstance(found, dict) else {}
        read, written = (told.get(name) for name in ("prompt_tokens", "completion_tokens"))
        self._slots.release()
        try:
            await lost(
                read if isinstance(read, int) else None, written if isinstance(written, int) else None, again
            )  # fmt: skip
        finally:
            await self._slots.acquire()

    def _asked_wait(self, failure: Exception) -> float:
        """Seconds that the server asks to wait. Raises where asking again does not help."""
        import openai

        if isinstance(failure, Unreadable | openai.APIConnectionError):
            return 0.0
        if not isinstance(failure, openai.APIStatusError):
            raise failure
        status, headers = failure.status_code, failure.response.headers
        if status in (401, 403):
            told = f"the key in {self.variable}" if self._key else f"a request without a key (set {KEY})"
            raise CrateError(f"{self.url} refuses {told} (HTTP {status})") from None
        if getattr(failure, "code", None) == "insufficient_quota":
            raise CrateError(f"{self.url} says that the account has no quota left: {self._said(failure)}") from None
        if status not in (408, 409, 429) and status < 500:
            raise Refused(f"the server refused (HTTP {status}): {self._said(failure)}", status) from None
        asked = retry_after(headers)
        if asked > self.retry.most_asked:
            raise CrateError(
                f"{self.url} asks to wait {asked:.0f} seconds (HTTP {status}). Run the same command again then"
            ) from None
        return asked

    async def _given_up(self, failure: Exception, attempts: int) -> CrateError:
        """What to raise after the last attempt: is it this request, or the server?"""
        import openai

        times = f"{attempts} times"
        if isinstance(failure, Unreadable):
            return LLMError(f"the server's answer could not be read, {times}: {self._hidden(str(failure))}")
        if isinstance(failure, openai.APIStatusError):
            if failure.status_code == 429:
                return CrateError(f"{self.url} refused {times} because of its rate limit. Ask less at once, or later")
            return LLMError(f"the server failed {times} (HTTP {failure.status_code}): {self._said(failure)}")
        try:
            await self.get("/models", timeout=10.0)
        except LLMError:
            pass  # it is there, and answers that it cannot
        except CrateError as error:
            return error
        late = isinstance(failure, openai.APITimeoutError)
        why = f"no answer within {self.timeout:g} seconds" if late else "the connection was cut"
        return LLMError(f"{why}, {times}")

    async def get(self, path: str, *, timeout: float = 30.0) -> dict[str, Any]:
        """Read something, asked twice at most.

        Raises `LLMError` where the server is there and fails, and `CrateError` where it cannot be reached.
        """
        import openai

        client = self._connection()
        for attempt in (1, 2):
            try:
                return _parsed(await client.get(path, cast_to=str, options={"timeout": timeout}))
            except Unreadable as error:
                failure = f"{self.url} does not speak OpenAI's protocol ({error})"
            except openai.APIStatusError as error:
                if error.status_code < 500:
                    self._asked_wait(error)
                failure = ""
                failed = LLMError(f"{self.url} failed (HTTP {error.status_code}): {self._said(error)}")
            except openai.APIConnectionError as error:
                reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
                failure = f"no server can be reached at {self.url} ({self._hidden(reason)})"
            if attempt == 1:
                await asyncio.sleep(self.retry.first / 2)
        if not failure:
            raise failed
        raise CrateError(f"{failure}. Start one, or give another URL (such as http://localhost:8000/v1)")

    def _said(self, error: Any) -> str:
        """The server's words, in one line and without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        inner = body.get("error", body)
        said = inner.get("message") if isinstance(inner, dict) else inner
        said = said or body.get("message") or body.get("detail") or error.response.text
        return self._hidden(" ".join(str(said).split())[:QUOTED] or "no reason given")

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text


def check_url(url: str) -> str:
    """A base URL as it is used. Refuses one without http, and one that holds a password: it would be written down."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CrateError(f"{url!r} is no URL of a server. Give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise CrateError(f"the URL of {parts.hostname} holds a secret or a query. Give it without, the key in {KEY}")
    return url.rstrip("/")


def find_key(url: str, variable: str) -> tuple[str, str]:
    """The environment variable and the key in it; no key where none is set.

    Unless the variable is named, nothing is sent over a connection that others could read.
    """
    if variable and not os.environ.get(variable):
        raise CrateError(f"the environment variable {variable} is empty. Put the key of {url} into it")
    parts = urlsplit(url)
    private = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
    name = variable or KEY
    return name, os.environ.get(name, "") if variable or private else ""


def retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait: `Retry-After` in seconds or as a date, or OpenAI's own in milliseconds."""
    exact, told = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if exact:
            return max(float(exact) / 1000, 0.0)
        return max(float(told), 0.0) if told else 0.0
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _parsed(text: str) -> dict[str, Any]:
    import jiter  # openai needs it, so it is there; on a table of a prompt's probabilities it is twice as fast as json

    try:
        value = jiter.from_json(text.encode(), cache_mode="all")
    except ValueError as error:
        raise Unreadable(f"no JSON ({error}): {text[:80]!r}") from None
    if not isinstance(value, dict):
        raise Unreadable(f"a {type(value).__name__} and no JSON object")
    return value
