"""Checks before every request of a live browser: address, access, origin, size and number of requests.

Four kinds of requests are refused before a handler sees them: a `Host` that is not this server's (a name that an
attacker's page made point at this machine), a visitor without the access token where one is required, a write that does
not come from the server's own page (such a write carries the page's token, which no other site can read), and requests
that are too large or too many at a time.
"""

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[_Message]]
Send = Callable[[_Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "cratelm_access"
"""Prefix of the name of the cookie; the port follows, since all ports of a host share their cookies."""
RETRY_SECONDS = 2
HEADERS = {
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
}  # fmt: skip
"""Headers of every answer."""
BUSY, CLOSE = {"retry-after": str(RETRY_SECONDS)}, {"connection": "close"}


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self, app: App, *, policy: str, hosts: Iterable[str] | None, access: str | None, requests: int, body_bytes: int,
        body_seconds: float = 10.0, root_path: str = "",
    ) -> None:  # fmt: skip
        """`hosts` are the names that `Host` may have, with any port; None for any name. `access` is a token that every
        visitor needs. `root_path` is the prefix of a proxy, which may leave it in the paths or not.
        """
        self.app, self.access, self.requests, self.body_bytes = app, access, requests, body_bytes
        self.body_seconds, self.root_path = body_seconds, root_path
        self.headers = [(k.encode(), v.encode()) for k, v in (HEADERS | {"content-security-policy": policy}).items()]
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.page_token = secrets.token_urlsafe(24)
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return

        started = False

        async def send_with_headers(message: _Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        prefix, path = unquote(self.root_path), scope["path"]
        if prefix and f"{path}/".startswith(f"{prefix}/"):
            scope = {**scope, "path": path.removeprefix(prefix)}
        self.under_way += 1
        try:
            answer = await self._answer(Request(scope, receive))
            await answer(scope, receive, send_with_headers)
        except HTTPException as error:
            refusal = JSONResponse({"error": error.detail}, error.status_code, error.headers)
            await refusal(scope, receive, send_with_headers)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # the server stops
            stopped = JSONResponse({"error": "the server stops"}, 503, CLOSE)
            await (send({"type": "http.response.body"}) if started else stopped(scope, receive, send_with_headers))
        finally:
            self.under_way -= 1

    async def _answer(self, request: Request) -> App:
        """The application that answers the request. Raises `HTTPException` if the request is refused."""
        if self.under_way > self.requests:
            raise HTTPException(429, "the server is busy. Try again in a moment", BUSY)
        host, port = _host_and_port(request)
        if self.hosts is not None and host not in self.hosts:
            raise HTTPException(
                421, "this server answers to its own address only. Open the address it printed, or start it with "
                "--allow-host NAME", CLOSE,
            )  # fmt: skip
        if not request.scope["path"]:  # without its slash, the page's relative links would lead elsewhere
            return Response(status_code=307, headers={"location": f"{self.root_path}/"})
        if self.access is not None:
            token, cookie = request.query_params.get("token"), f"{COOKIE}_{port}" if port else COOKIE
            admitted = _equal(request.cookies.get(cookie), self.access)
            if token is not None and request.method == "GET" and (admitted or _equal(token, self.access)):
                # A cookie replaces the token, which then does not stay in the address.
                start = (
                    f"{self.root_path}/" if self.root_path else "../" * (request.scope["path"].count("/") - 1) or "./"
                )
                to_start = Response(status_code=303, headers={"location": start})
                to_start.set_cookie(
                    cookie, self.access, path=self.root_path or "/", httponly=True, samesite="strict"
                )  # fmt: skip
                return to_start
            if not admitted:
                raise HTTPException(401, "this server requires a token. Open the whole address that it printed", CLOSE)
        if request.method not in ("GET", "HEAD", "POST"):
            raise HTTPException(405, "only GET and POST are answered")
        if request.method == "POST" and not self._is_from_our_page(request):
            raise HTTPException(403, "the request does not come from this server's own page. Reload the page")
        return self._with_body(await self._body(request))

    def _is_from_our_page(self, request: Request) -> bool:
        headers = request.headers
        is_json = headers.get("content-type", "").partition(";")[0].strip() == "application/json"
        same_site = headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
        return is_json and same_site and _equal(headers.get("x-cratelm-token"), self.page_token)

    async def _body(self, request: Request) -> bytes:
        """The whole body. It is small, so it is read before a handler starts, in limited time."""
        length, body = request.headers.get("content-length", ""), b""
        too_large = HTTPException(413, f"the request is larger than {self.body_bytes} bytes", CLOSE)
        if length.isdigit() and int(length) > self.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(self.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self.body_bytes:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, f"the request took longer than {self.body_seconds:g} s to arrive", CLOSE) from None
        return body

    def _with_body(self, body: bytes) -> App:
        """The application, which receives the body that was read, and then whether the client disconnects."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            unread: list[_Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> _Message:
                return unread.pop() if unread else await receive()

            await self.app(scope, replay, send)

        return answer


class Slots:
    """At most `most` requests at a time; further requests are refused, not queued. Used on the event loop only."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def take(self) -> None:
        """Take a slot. Raises `HTTPException` if all are taken."""
        if self.taken >= self.most:
            raise HTTPException(429, "the models are busy with other requests. Try again in a moment", BUSY)
        self.taken += 1

    def free(self) -> None:
        """Give a slot back."""
        self.taken -= 1


def _equal(given: str | None, expected: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), expected.encode())


def _host_and_port(request: Request) -> tuple[str, str]:
    """The name in `Host`, in small letters, and the port; an empty port if there is none."""
    host = request.headers.get("host", "").lower()
    name, _, port = host.rpartition(":")
    return (name, port) if port.isascii() and port.isdigit() else (host, "")
