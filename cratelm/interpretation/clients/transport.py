"""HTTP requests to a server that speaks OpenAI's protocol: a limit of concurrent requests, retries, and a hidden key.

What an error means is decided by its status, or by the status in the body where a server reports an error with 200:

    401, 402, no quota or credit     every request would fail: `CrateError`
    403                              the same on the first request; later, only this prompt is refused (moderation)
    400, 404, 413, 422, ...          the request is refused, and a retry does not change that: `Refused`
    all others                       retried, also timeouts and cut connections

A retry follows an exponential wait with jitter that is never shorter than the server's `Retry-After`. While one request
waits for that, the others hold back too. A server that still fails with 500 fails this call (`LLMError`), one that is
limited ends the work (`CrateError`), and any other failure is left to the next run (`Postponed`).
"""

import asyncio
import email.utils
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cratelm.errors import CrateError
from cratelm.interpretation.clients.address import KEY, NO_KEY, check_url, find_key
from cratelm.interpretation.clients.responses import Malformed, error_in, error_message, json_object, reported_usage
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import LLMError, Postponed, Unparsed
from cratelm.runtime import printable

T = TypeVar("T")
_JSON = {"Content-Type": "application/json"}
LONGEST_RETRY_AFTER = 600.0
"""Seconds: if a server asks for a longer wait, the work stops."""
LONGEST_ANSWER = 64 << 20
"""Bytes of a response that are read; prompt logprobs of the longest prompts have a few million."""
PERMANENT = frozenset({400, 403, 404, 405, 406, 410, 411, 413, 414, 415, 422, 431, 451})
"""Statuses of a request that a retry does not change."""
UNPAID_CODE = re.compile(r"insufficient_|billing|deactivated|suspended", re.I)
"""Error codes of an account that cannot pay. A 429 without them is a limit of the rate, whatever its words."""
UNPAID = re.compile(
    r"insufficient.{0,12}(credit|balance|fund|quota)|credit balance|billing|payment required|arrears"
    r"|account.{0,40}(suspended|deactivated|disabled|closed)",
    re.I | re.S,
)
MODERATION = re.compile(r"moderat|flagged|content.{0,3}(polic|filter|management)|safety|guardrail|harmful|violat", re.I)
"""Error messages that are about a prompt, not about the key."""


class Refused(LLMError):
    """The server refused the request, and a retry does not change that. `detail` has the names of parameters too."""

    def __init__(self, message: str, status: int, detail: str = "") -> None:
        super().__init__(message)
        self.status, self.detail = status, detail or message


class _Failure(Exception):
    """An error of the server that may pass."""

    def __init__(self, message: str, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


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
        self.answered = False
        """Whether the server has answered a request of this process."""
        self._slots = asyncio.Semaphore(in_flight)
        self._not_before = 0.0
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"Transport({self.url!r})"

    def _connection(self) -> Any:
        """The client of the running loop; the connections of an earlier loop are gone with that loop."""
        try:
            import httpx
        except ImportError:
            raise CrateError("package httpx is not installed. Run: pip install 'cratelm[llm]'") from None
        if self._client is None or self._loop is not asyncio.get_running_loop():
            self._loop, self._slots = asyncio.get_running_loop(), asyncio.Semaphore(self.in_flight)
            headers = {"Authorization": f"Bearer {self._key or NO_KEY}"}
            self._client = httpx.AsyncClient(
                headers=headers, timeout=self.timeout, follow_redirects=True,
                limits=httpx.Limits(max_connections=None), event_hooks={"request": [self._check_redirect]},
            )  # fmt: skip
        return self._client

    async def _check_redirect(self, request: Any) -> None:
        """Refuse a redirect to another host, which would get the prompts."""
        target, base = urlsplit(str(request.url)), urlsplit(self.url)
        ports = {"http": 80, "https": 443}
        origins = [(url.scheme, url.hostname, url.port or ports.get(url.scheme)) for url in (target, base)]
        if origins[0] != origins[1]:
            where = printable(f"{target.scheme}://{target.hostname}:{target.port or ''}".rstrip(":"))
            raise CrateError(f"{self.url} redirects to {where}, which is refused. Give that URL if you trust it")

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = None

    async def post(
        self, path: str, body: dict[str, Any], parse: Callable[[dict[str, Any]], T], *, same_500s: int = 0
    ) -> T:
        """Post a request and parse the response with `parse`, which raises `Malformed` if it cannot.

        Raises `Refused`, also after `same_500s` identical errors with status 500 (0: never); `Unparsed` with the
        reported cost; `LLMError` if only this request failed; `CrateError` if every request would fail.
        """
        client, content, failures = self._connection(), json.dumps(body).encode(), list[Exception]()
        import httpx
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        def passes(error: BaseException) -> bool:
            if isinstance(error, httpx.RequestError | _Failure):
                failures.append(error)
            return bool(failures) and failures[-1] is error and not _repeated(failures, same_500s)

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.retry.attempts), wait=self._wait, reraise=True,
            retry=retry_if_exception(passes),
        )  # fmt: skip
        answer: dict[str, Any] = {}
        async with self._slots:
            try:
                async for attempt in retrying:
                    with attempt:
                        await asyncio.sleep(self._not_before - time.monotonic())
                        self.usage.requests += 1
                        async with client.stream("POST", self.url + path, content=content, headers=_JSON) as response:
                            answer = await self._read(response)
                limits = (body.get(f"max_{name}tokens") for name in ("", "completion_", "output_"))
                answer["usage"] = reported_usage(answer, len(content), next(filter(None, limits), None))
                parsed = parse(answer)
            except Malformed as error:
                read, generated = (answer.get("usage", {}).get(name) for name in ("prompt_tokens", "completion_tokens"))
                raise Unparsed(self._shown(str(error)), prompt_tokens=read, new_tokens=generated) from None
            except (httpx.RequestError, _Failure) as error:
                if _repeated(failures, same_500s):
                    raise Refused(f"the server failed (HTTP 500): {error}", 500) from None
                raise await self._given_up(error) from None
        self.answered = True
        self.usage.prompt_cached += answer["usage"].get("cached_tokens", 0)
        return parsed

    async def send(self, path: str, *, root: bool = False, **content: Any) -> dict[str, Any]:
        """Post once, without a retry (httpx's `json`, or `data` and `files`), and read the JSON of the response.

        `root`: as in `get`. Raises `Refused`, or `CrateError` if the request may have been carried out.
        """
        client = self._connection()
        import httpx

        try:
            async with client.stream("POST", self._base(root) + path, **content) as response:
                return await self._read(response)
        except (httpx.RequestError, _Failure, Malformed) as error:
            reason = self._shown(" ".join(str(error).split()) or type(error).__name__)
            raise CrateError(f"{self.url}{path} failed ({reason}). Run the same command again") from None

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The lines of a file on the server, without keeping the file in memory. Raises `CrateError`."""
        client, rest = self._connection(), b""
        import httpx

        try:
            async with client.stream("GET", self.url + path) as response:
                if response.status_code >= 300:
                    await self._read(response)
                async for part in response.aiter_bytes():
                    *whole, rest = (rest + part).split(b"\n")
                    for line in whole:
                        yield line
                    if len(rest) > LONGEST_ANSWER:
                        raise Malformed(f"a line of more than {LONGEST_ANSWER >> 20} MB")
        except (httpx.RequestError, _Failure, Malformed) as error:
            reason = self._shown(" ".join(str(error).split()) or type(error).__name__)
            raise CrateError(f"{self.url}{path} cannot be read ({reason}). Run the same command again") from None
        yield rest

    def limit(self, in_flight: int) -> None:
        """Lower the number of requests in flight, before any is sent: to the slots of the server."""
        self.in_flight = min(self.in_flight, in_flight)
        self._slots = asyncio.Semaphore(self.in_flight)

    async def _read(self, response: Any) -> dict[str, Any]:
        """The JSON of a response. Raises `Malformed`, or the error that its status or its body reports."""
        content, status = bytearray(), response.status_code
        async for part in response.aiter_bytes():
            content += part
            if len(content) > LONGEST_ANSWER:
                break
        try:
            if len(content) > LONGEST_ANSWER:
                raise Malformed(f"an answer of more than {LONGEST_ANSWER >> 20} MB")
            answer = json_object(bytes(content))
        except Malformed:
            if status < 300:
                raise
            answer = {"error": bytes(content[:2000]).decode(errors="replace")}
        status, code, error = error_in(answer, status)
        if status:
            raise self.error(status, code, error, response.headers)
        return answer

    def _wait(self, state: Any) -> float:
        """Seconds before the next attempt (tenacity calls this)."""
        asked = retry_after(getattr(state.outcome.exception(), "headers", {}))
        if asked:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        self.usage.retries += 1
        grown = min(self.retry.longest, self.retry.first * 2.0 ** (state.attempt_number - 1))
        return max(grown * random.uniform(0.5, 1.0), asked)

    def error(self, status: int, code: str, error: Any, headers: Mapping[str, str]) -> Exception:
        """The exception for an error that the server reports."""
        message, asked = self._shown(error_message(error)), retry_after(headers)
        if status == 402 or UNPAID_CODE.search(code) or (status in (400, 403) and UNPAID.search(message)):
            return CrateError(
                f"{self.url}: the account has no quota or credit left (HTTP {status}): {message}. "
                "All answers are cached. Run the same command again to resume"
            )
        if status == 401 or (status == 403 and not self.answered and not MODERATION.search(message)):
            key = f"the key in {self.variable}" if self._key else f"a request without a key (set {KEY})"
            return CrateError(f"{self.url} refuses {key} (HTTP {status}): {message}")
        if status in PERMANENT or status < 400:
            return Refused(f"the server refused (HTTP {status}): {message}", status, f"{message} {error}")
        if asked > LONGEST_RETRY_AFTER:
            return CrateError(
                f"{self.url} asks to wait {asked:.0f} seconds (HTTP {status}). Run the same command again after that"
            )
        return _Failure(message, status, headers)

    async def _given_up(self, failure: Any) -> CrateError:
        """The error after the last attempt: does only this request fail, or the whole server?"""
        import httpx

        times = f"{self.retry.attempts} times"
        if isinstance(failure, _Failure):
            if failure.status == 429:
                return CrateError(f"{self.url} refused {times}: rate limit. Lower --in-flight, or run again later")
            kind = LLMError if failure.status == 500 else Postponed
            return kind(f"the server failed {times} (HTTP {failure.status}): {failure}")
        try:
            await self.get("/models", timeout=10.0)
        except LLMError:
            pass  # the server is up, and reports an error
        except CrateError as error:
            return error
        late = isinstance(failure, httpx.TimeoutException)
        reason = f"no answer within {self.timeout:g} seconds (--timeout)" if late else "the connection was cut"
        return LLMError(f"{reason}, {times}")

    async def get(self, path: str, *, timeout: float = 30.0, root: bool = False) -> dict[str, Any]:
        """Get a JSON object, or the list that a server returns in its place as `data`, with two attempts.

        `root`: the path stands next to `/v1`, not below it. Raises `LLMError` if the server reports an error, and
        `CrateError` if it cannot be reached.
        """
        client, failure = self._connection(), CrateError("")
        import httpx

        for attempt in (1, 2):
            try:
                async with client.stream("GET", self._base(root) + path, timeout=timeout) as response:
                    return await self._read(response)
            except Malformed as error:
                failure = self._unreachable(f"{self.url} does not speak OpenAI's protocol ({self._shown(str(error))})")
            except _Failure as error:
                failure = LLMError(f"{self.url} failed (HTTP {error.status}): {error}")
            except httpx.RequestError as error:
                reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
                failure = self._unreachable(f"no server can be reached at {self.url} ({self._shown(reason)})")
            if attempt == 1:
                await asyncio.sleep(self.retry.first / 2)
        raise failure

    def _base(self, root: bool) -> str:
        return self.url.removesuffix("/v1") if root else self.url

    def _unreachable(self, reason: str) -> CrateError:
        return CrateError(f"{reason}. Start a server, or give another URL (such as http://localhost:8000/v1)")

    def _shown(self, text: str) -> str:
        return printable(text.replace(self._key, "(the key)") if self._key else text)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait: `Retry-After` in seconds or as a date, or OpenAI's header in milliseconds."""
    for value, unit in ((headers.get("retry-after-ms"), "ms"), (headers.get("retry-after"), "s")):
        if match := re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(ms|s|m|h|)\s*", value or "", re.I):
            return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2].lower() or unit]
    try:
        return max(email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(), 0.0)
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0


def _repeated(failures: list[Exception], times: int) -> bool:
    """Whether the last failures, that many, are the same error with status 500."""
    last = {str(error) if isinstance(error, _Failure) and error.status == 500 else "" for error in failures[-times:]}
    return 0 < times <= len(failures) and len(last) == 1 and last != {""}
