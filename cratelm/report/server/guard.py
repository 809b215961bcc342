"""The door of a live browser: who is let in, how much at a time, and what a page may do.

Four things are refused before a handler sees them: a `Host` that is not ours (a name that an attacker's page made point
at this machine), a visitor without the access token where one is asked for, a write that does not come from our own
page (it carries the page's token, which no other site can read), and whatever is too large or too much at a time.
"""

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "cratelm_access"
"""Begins the name of the cookie; the address's port follows, since a browser keeps one jar for all ports of a host."""
TOKEN_HEADER = b"x-cratelm-token"
RETRY_SECONDS = 2
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""On every answer."""


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self, app: App, *, policy: str, hosts: Iterable[str] | None, access: str | None, requests: int, body_bytes: int,
        body_seconds: float = 10.0,
    ) -> None:  # fmt: skip
        """`hosts` are the values of `Host` that are served, None for any; `access` is a token every visitor needs."""
        self.app, self.policy, self.access, self.requests, self.body_bytes = app, policy, access, requests, body_bytes
        self.body_seconds = body_seconds
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.page_token = secrets.token_urlsafe(24)
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        send = self._with_headers(send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.under_way >= self.requests:
            await refuse(send, 429, "the server is busy. Try again in a moment", retry=RETRY_SECONDS)
            return
        self.under_way += 1
        try:
            answered = await self._answered(scope, headers, send)
            if not answered:
                await self.app(scope, self._limited(receive), send)
        except Refused as error:
            await refuse(send, error.status, str(error))
        finally:
            self.under_way -= 1

    async def _answered(self, scope: Scope, headers: dict[bytes, bytes], send: Send) -> bool:
        """Whether the request was refused, or sent on its way, here."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and host not in self.hosts:
            why = "this server answers to its own address only. Open the address it printed"
            await refuse(send, 421, why, close=True)
        elif self.access is not None and (token := _token(scope)) is not None and self._may_enter(headers, token):
            await self._admit(headers, send)
        elif self.access is not None and not self._has_access(headers):
            why = "this server asks for a token. Open the whole address that it printed"
            await refuse(send, 401, why, close=True)
        elif scope["method"] not in ("GET", "HEAD", "POST"):
            await refuse(send, 405, "only GET and POST are answered")
        elif scope["method"] == "POST" and not self._is_our_page(headers):
            await refuse(send, 403, "the request does not come from this server's own page. Reload the page")
        elif _length(headers) > self.body_bytes:
            await refuse(send, 413, f"the request is larger than {self.body_bytes} bytes")
        else:
            return False
        return True

    def _has_access(self, headers: dict[bytes, bytes]) -> bool:
        assert self.access is not None
        try:
            cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(_cookie_name(headers))
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.access.encode())

    def _may_enter(self, headers: dict[bytes, bytes], token: str) -> bool:
        assert self.access is not None
        return hmac.compare_digest(token.encode(), self.access.encode()) or self._has_access(headers)

    async def _admit(self, headers: dict[bytes, bytes], send: Send) -> None:
        """Change the token in an address for a cookie, so that it does not stay in the address."""
        cookie = f"{_cookie_name(headers)}={self.access}; HttpOnly; SameSite=Strict; Path=/"
        head = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 303, "headers": head})
        await send({"type": "http.response.body", "body": b""})

    def _is_our_page(self, headers: dict[bytes, bytes]) -> bool:
        site = headers.get(b"sec-fetch-site", b"same-origin")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip()
        token = headers.get(TOKEN_HEADER, b"")
        own = hmac.compare_digest(token, self.page_token.encode())
        return own and kind == b"application/json" and site in (b"same-origin", b"none")

    def _limited(self, receive: Receive) -> Receive:
        """A body whose length was not told, or not truly, is cut off too, and so is one that does not arrive."""
        seen, whole, until = 0, False, asyncio.get_running_loop().time() + self.body_seconds

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:  # what is waited for now is that the reader goes away
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, f"the request took longer than {self.body_seconds:g} s to arrive") from None
            whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self.body_bytes:
                raise Refused(413, f"the request is larger than {self.body_bytes} bytes")
            return message

        return limited

    def _with_headers(self, send: Send) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [*HEADERS, (b"content-security-policy", self.policy.encode())]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        return wrapped


class Refused(Exception):
    """A body that went on beyond the limit, or did not come; the message says which."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Slots:
    """At most so many at a time; one more is refused rather than kept waiting."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def take(self) -> bool:
        """Whether there was a place. Called on the event loop alone, so nothing comes between look and take."""
        asyncio.get_running_loop()
        if self.taken >= self.most:
            return False
        self.taken += 1
        return True

    def free(self) -> None:
        """Give a place back."""
        self.taken -= 1


async def refuse(send: Send, status: int, why: str, *, retry: int | None = None, close: bool = False) -> None:
    """Answer with one line as JSON, and when to come again; `close` ends the connection of whom is not let in."""
    body = json.dumps({"error": why}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry is not None:
        head.append((b"retry-after", str(retry).encode()))
    if close:
        head.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _token(scope: Scope) -> str | None:
    """The token in the address that is to be shown; None where there is none."""
    given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
    return given[0] if given and scope["method"] == "GET" else None


def _cookie_name(headers: dict[bytes, bytes]) -> str:
    port = headers.get(b"host", b"").decode("latin-1").rpartition(":")[2]
    return f"{COOKIE}_{port}" if port.isascii() and port.isdigit() else COOKIE


def _length(headers: dict[bytes, bytes]) -> int:
    told = headers.get(b"content-length", b"0")
    return int(told) if told.isdigit() else 0
