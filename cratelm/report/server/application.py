"""The live browser: the pages of the static site, and functions that need a server.

    GET  /, /viewer/FILE                  the page
    GET  /data/NAME.json                  the chunks of the site, made on request
    GET  /api/search?q=WORDS              full-text search over explanations
    POST /api/activations                 strongest neurons of each layer at every token of a text, or one neuron
    POST /api/effect                      effect of steered neurons on the next token
    POST /api/continue                    the text continued with and without steering, streamed as lines of JSON
    POST /api/explain                     an explanation of one neuron by the configured language model
    GET, POST /api/votes                  votes, saved in SQLite

`guard.py` checks every request first. No part of an address becomes a path: files and chunks are looked up by name.
docs/browser.md documents requests and answers.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.report.browser.catalogue import Layer, site_title
from cratelm.report.browser.site import VIEWER, index_html, policy_of
from cratelm.report.server.chunk_cache import Chunks, NotReady
from cratelm.report.server.guard import BUSY, Guard, Slots
from cratelm.report.server.requests import Limits, Live, read_steer_request, read_text_request
from cratelm.report.server.votes import Votes

Explain = Callable[[Layer, int], Awaitable[Mapping[str, Any]]]
"""Asks a language model to explain a neuron, saves the explanation in the store, and returns it."""

_KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
LONGEST_QUESTION = 400


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Configuration of a live browser."""

    runs: Sequence[Path]
    votes: Votes
    mode: Mode = "fixed"
    live: Live | None = None
    """The models; None for a server with records only."""
    explain: Explain | None = None
    explainer: str = ""
    """Name of the language model behind `explain`."""
    limits: Limits = Limits()
    hosts: Sequence[str] | None = None
    """Names that `Host` may have, with any port; None for any name."""
    access: str | None = None
    """A token that every visitor needs."""
    root_path: str = ""
    """Prefix of the addresses at a proxy."""


def application(parts: Parts) -> Guard:
    """The ASGI application."""
    server = _Server(parts)
    app = server.starlette()
    guard = Guard(
        app, policy=policy_of(served=True), hosts=parts.hosts, access=parts.access,
        requests=parts.limits.requests, body_bytes=parts.limits.body_bytes, body_seconds=parts.limits.body_seconds,
        root_path=parts.root_path,
    )  # fmt: skip
    app.state.page_token = guard.page_token
    server.chunks.begin()
    return guard


class _Answer(JSONResponse):
    """JSON in ASCII, which can represent the lone surrogates that a request may contain."""

    def render(self, content: Any) -> bytes:
        """The encoded content. All numbers must be finite."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class _Server:
    def __init__(self, parts: Parts) -> None:
        self.parts, self.limits = parts, parts.limits
        self.chunks = Chunks(parts.runs, mode=parts.mode, capabilities=self._capabilities())
        self.models, self.writers = Slots(parts.limits.in_flight), Slots(1)
        self.files = {file.name: file for file in VIEWER.iterdir() if file.suffix in _KINDS}

    def _capabilities(self) -> dict[str, Any]:
        """Functions of the page that need a server."""
        capabilities: dict[str, Any] = {"votes": True, "fullText": True}
        if self.parts.live is not None:
            capabilities["live"] = {"contexts": dict(self.parts.live.contexts()), "limits": asdict(self.limits)}
        if self.parts.explain is not None:
            capabilities["explain"] = {"explainer": self.parts.explainer}
        return capabilities

    def starlette(self) -> Starlette:
        """The routes."""
        routes = [
            Route("/", self.page),
            Route("/viewer/{name}", self.file),
            Route("/data/{name:path}.json", self.chunk),
            Route("/api/search", self.search),
            Route("/api/votes", self.votes, methods=["GET", "POST"]),
            Route("/api/activations", self.activations, methods=["POST"]),
            Route("/api/effect", self.effect, methods=["POST"]),
            Route("/api/continue", self.continuation, methods=["POST"]),
            Route("/api/explain", self.explain, methods=["POST"]),
        ]
        handlers: Any = {
            CrateError: _mistake, NotReady: _not_ready, HTTPException: _other, Exception: _bug,
        }  # fmt: skip
        return Starlette(routes=routes, exception_handlers=handlers)

    async def page(self, request: Request) -> Response:
        """The page, with the token for its writes."""
        html = index_html(site_title(self.chunks.models), served=True, token=request.app.state.page_token)
        return Response(html, media_type="text/html; charset=utf-8", headers={"cache-control": "no-store"})

    async def file(self, request: Request) -> Response:
        """A script, a style or the icon."""
        path = self.files.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        content = await anyio.to_thread.run_sync(path.read_bytes)
        return Response(content, media_type=_KINDS[path.suffix], headers={"cache-control": "no-cache"})

    async def chunk(self, request: Request) -> Response:
        """A value of the site."""
        content = await anyio.to_thread.run_sync(self.chunks.chunk, request.path_params["name"])
        if content is None:
            raise HTTPException(404)
        return Response(content, media_type="application/json", headers={"cache-control": "no-cache"})

    async def search(self, request: Request) -> Response:
        """Explanations by their words."""
        words = request.query_params.get("q", "")
        if len(words) > LONGEST_QUESTION:
            raise CrateError(f"q must have at most {LONGEST_QUESTION} characters, got {len(words)}")
        return _Answer({"found": await anyio.to_thread.run_sync(self.chunks.full_text, words)})

    async def votes(self, request: Request) -> Response:
        """A page of votes after a number, or the number of votes after adding one."""
        if request.method == "POST":
            return _Answer({"count": await anyio.to_thread.run_sync(self.parts.votes.add, await _body(request))})
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdigit() and len(after) < 16):
            raise CrateError("after must be the number of a vote")
        votes, last = await anyio.to_thread.run_sync(self.parts.votes.page, int(after))
        return _Answer({"format_version": 1, "votes": votes, "next": last})

    async def activations(self, request: Request) -> Response:
        """Activations of neurons on a text."""
        parsed = read_text_request(await _body(request), self.limits)
        return await self._by_model(lambda live: live.activations(parsed))

    async def effect(self, request: Request) -> Response:
        """The effect of steered neurons on the next token."""
        parsed = read_steer_request(await _body(request), self.limits)
        return await self._by_model(lambda live: live.effect(parsed))

    async def continuation(self, request: Request) -> Response:
        """A text continued with steered neurons and without."""
        parsed = read_steer_request(await _body(request), self.limits)
        live = self._live()
        self.models.take()
        try:  # in a thread, since the first request of a model loads it
            lines = await anyio.to_thread.run_sync(live.continuations, parsed)
        except BaseException:
            self.models.free()
            raise
        return StreamingResponse(self._lines(lines), media_type="application/x-ndjson")

    async def _lines(self, values: Iterator[dict[str, Any]]) -> AsyncIterator[str]:
        """One JSON object per line; an error after the first line is reported as a line."""
        try:
            async for value in iterate_in_threadpool(values):
                yield json.dumps(value) + "\n"
        except CrateError as error:
            yield json.dumps({"error": str(error)}) + "\n"
        finally:
            self.models.free()

    async def explain(self, request: Request) -> Response:
        """An explanation by the language model."""
        if self.parts.explain is None:
            raise CrateError("no language model is configured. Hint: start the server with --llm URL")
        value = await _body(request)
        model, tap, layer, neuron = (value.get(name) for name in ("model", "tap", "layer", "neuron"))
        if not (isinstance(model, str) and isinstance(tap, str) and type(layer) is int and type(neuron) is int):
            raise CrateError("model and tap must be texts, layer and neuron whole numbers")
        place = self.chunks.find(model, tap, layer)
        neurons = (await anyio.to_thread.run_sync(self.chunks.view, place)).records.num_neurons
        if not 0 <= neuron < neurons:
            raise CrateError(f"neuron must be from 0 to {neurons - 1} in layer {layer}, got {neuron}")
        self.writers.take()
        try:
            return _Answer(dict(await self.parts.explain(place, neuron)))
        finally:
            self.writers.free()

    def _live(self) -> Live:
        if self.parts.live is None:
            raise CrateError(
                "no models are loaded (records only). Start `cratelm serve` with torch and the model files"
            )
        return self.parts.live

    async def _by_model(self, ask: Callable[[Live], dict[str, Any]]) -> Response:
        live = self._live()
        self.models.take()
        try:
            return _Answer(await anyio.to_thread.run_sync(partial(ask, live)))
        finally:
            self.models.free()


async def _body(request: Request) -> dict[str, Any]:
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, or a number with thousands of digits
        raise CrateError("the request is not JSON") from None
    if not isinstance(value, dict):
        raise CrateError("the request is not a JSON object")
    return value


async def _mistake(_request: Request, error: Exception) -> Response:
    return _Answer({"error": str(error)}, 400)


async def _not_ready(_request: Request, error: Exception) -> Response:
    return _Answer({"error": str(error)}, 503, headers=BUSY)


async def _other(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is nothing at this address", 405: "this method is not supported"}
    return _Answer({"error": message.get(error.status_code, error.detail)}, error.status_code, headers=error.headers)


async def _bug(_request: Request, _error: Exception) -> Response:
    return _Answer({"error": "internal error of the server; see its terminal"}, 500)
