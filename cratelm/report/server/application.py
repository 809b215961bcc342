"""The live browser: the pages of the static site, served, and what only a server can do.

    GET  /, /viewer/FILE                  the page
    GET  /data/NAME.json                  the chunks of the site, made when they are asked for
    GET  /api/search?q=WORDS              full-text search over explanations
    POST /api/activations                 strongest neurons of each layer at every token of a text, or one neuron
    POST /api/effect                      effect of steered neurons on the next token
    POST /api/continue                    the text continued with and without steering, streamed as lines of JSON
    POST /api/explain                     an explanation of one neuron by the configured language model
    GET, POST /api/votes                  votes, kept in SQLite

`guard.py` stands before all of it. Nothing in an address becomes a path: files and chunks are looked up by name in what
is there. docs/browser.md has the requests and answers.
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
from cratelm.report.browser.catalogue import Layer
from cratelm.report.browser.site import VIEWER, index_html, policy_of
from cratelm.report.server.chunk_cache import Chunks, NotReady
from cratelm.report.server.guard import BUSY, Guard, Slots
from cratelm.report.server.requests import Limits, Live, read_steer_request, read_text_request
from cratelm.report.server.votes import Votes

Explain = Callable[[Layer, int], Awaitable[Mapping[str, Any]]]
"""Has a language model explain a neuron of a layer, keeps it in the store, and returns what it said."""

KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
LONGEST_QUESTION = 400


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a live browser is made of."""

    runs: Sequence[Path]
    votes: Votes
    mode: Mode = "fixed"
    live: Live | None = None
    """The models; None shows the records alone."""
    explain: Explain | None = None
    explainer: str = ""
    """Name of the language model behind `explain`."""
    limits: Limits = Limits()
    hosts: Sequence[str] | None = None
    """Values of `Host` that are answered; None for any."""
    access: str | None = None
    """A token that every visitor needs."""


def application(parts: Parts) -> Guard:
    """The ASGI application."""
    server = _Server(parts)
    app = server.starlette()
    guard = Guard(
        app, policy=policy_of(served=True), hosts=parts.hosts, access=parts.access,
        requests=parts.limits.requests, body_bytes=parts.limits.body_bytes, body_seconds=parts.limits.body_seconds,
    )  # fmt: skip
    app.state.page_token = guard.page_token
    server.chunks.begin()
    return guard


class Answer(JSONResponse):
    """JSON in ASCII: half a surrogate pair, which a request can hold, has no other form."""

    def render(self, content: Any) -> bytes:
        """The content as it is sent. A number that is not finite is a programmer's mistake."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class _Server:
    def __init__(self, parts: Parts) -> None:
        self.parts, self.limits = parts, parts.limits
        self.chunks = Chunks(parts.runs, mode=parts.mode, capabilities=self._capabilities())
        self.models, self.writers = Slots(parts.limits.in_flight), Slots(1)
        self.files = {file.name: file for file in VIEWER.iterdir() if file.suffix in KINDS}

    def _capabilities(self) -> dict[str, Any]:
        """What the page may offer beyond a folder."""
        found: dict[str, Any] = {"votes": True, "fullText": True}
        if self.parts.live is not None:
            found["live"] = {"contexts": dict(self.parts.live.contexts()), "limits": asdict(self.limits)}
        if self.parts.explain is not None:
            found["explain"] = {"explainer": self.parts.explainer}
        return found

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
        """The one page, with the token that its writes carry."""
        titles = [model.title for model in self.chunks.models if model.description.get("control") is None]
        token: str = request.app.state.page_token
        html = index_html(", ".join(titles) or self.chunks.models[0].title, served=True, token=token)
        return Response(html, media_type="text/html; charset=utf-8", headers={"cache-control": "no-store"})

    async def file(self, request: Request) -> Response:
        """A script, a style or the icon."""
        path = self.files.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        content = await anyio.to_thread.run_sync(path.read_bytes)
        return Response(content, media_type=KINDS[path.suffix], headers={"cache-control": "no-cache"})

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
            raise CrateError(f"the question has {len(words)} characters, at most {LONGEST_QUESTION} are read")
        return Answer({"found": await anyio.to_thread.run_sync(self.chunks.full_text, words)})

    async def votes(self, request: Request) -> Response:
        """Some votes from one on, or one more."""
        if request.method == "POST":
            return Answer({"count": await anyio.to_thread.run_sync(self.parts.votes.add, await _body(request))})
        after = request.query_params.get("after", "0")
        if not (after.isascii() and after.isdigit() and len(after) < 16):
            raise CrateError("after is the number of a vote")
        votes, last = await anyio.to_thread.run_sync(self.parts.votes.page, int(after))
        return Answer({"format_version": 1, "votes": votes, "next": last})

    async def activations(self, request: Request) -> Response:
        """Activations of neurons on a text."""
        asked = read_text_request(await _body(request), self.limits)
        return await self._by_model(lambda live: live.activations(asked))

    async def effect(self, request: Request) -> Response:
        """The effect of steered neurons on the next token."""
        asked = read_steer_request(await _body(request), self.limits)
        return await self._by_model(lambda live: live.effect(asked))

    async def continuation(self, request: Request) -> Response:
        """A text continued with steered neurons and without."""
        asked = read_steer_request(await _body(request), self.limits)
        live = self._live()
        self.models.take()
        try:  # the first request of a model waits until it is loaded, and the other requests do not
            lines = await anyio.to_thread.run_sync(live.continuations, asked)
        except BaseException:
            self.models.free()
            raise
        return StreamingResponse(self._lines(lines), media_type="application/x-ndjson")

    async def _lines(self, values: Iterator[dict[str, Any]]) -> AsyncIterator[str]:
        """One JSON object a line. What goes wrong after the first line can only be told in one of them."""
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
            raise CrateError("no language model is configured. Start the server with --llm URL")
        value = await _body(request)
        model, tap, layer, neuron = (value.get(name) for name in ("model", "tap", "layer", "neuron"))
        if not (isinstance(model, str) and isinstance(tap, str) and type(layer) is int and type(neuron) is int):
            raise CrateError("model and tap are texts, layer and neuron whole numbers")
        place = self.chunks.find(model, tap, layer)
        neurons = (await anyio.to_thread.run_sync(self.chunks.view, place)).records.num_neurons
        if not 0 <= neuron < neurons:
            raise CrateError(f"layer {layer} has neurons 0 to {neurons - 1}, not {neuron}")
        self.writers.take()
        try:
            return Answer(dict(await self.parts.explain(place, neuron)))
        finally:
            self.writers.free()

    def _live(self) -> Live:
        if self.parts.live is None:
            raise CrateError("this server shows records alone. Start it where the models and torch are")
        return self.parts.live

    async def _by_model(self, ask: Callable[[Live], dict[str, Any]]) -> Response:
        live = self._live()
        self.models.take()
        try:
            return Answer(await anyio.to_thread.run_sync(partial(ask, live)))
        finally:
            self.models.free()


async def _body(request: Request) -> dict[str, Any]:
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):  # a ValueError is no UTF-8, no JSON, or a number of thousands of digits
        raise CrateError("the request is no JSON") from None
    if not isinstance(value, dict):
        raise CrateError("the request is no JSON object")
    return value


async def _mistake(_request: Request, error: Exception) -> Response:
    return Answer({"error": str(error)}, 400)


async def _not_ready(_request: Request, error: Exception) -> Response:
    return Answer({"error": str(error)}, 503, headers=BUSY)


async def _other(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing here", 405: "this is not answered here"}.get(error.status_code, error.detail)
    return Answer({"error": said}, error.status_code, headers=error.headers)


async def _bug(_request: Request, _error: Exception) -> Response:
    return Answer({"error": "the server made a mistake; its terminal says more"}, 500)
