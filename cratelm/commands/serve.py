"""Serve the neuron browser of one or more runs, with live models: try texts and steer neurons.

    cratelm serve runs/demo/crate-2l runs/demo/gpt2-2l
    cratelm serve runs/demo/crate-2l --llm http://127.0.0.1:8000/v1 --model NAME

Open the printed address. In addition to the pages of `cratelm report --site` you can type a text and see the strongest
neurons of every layer at each token, steer neurons and see how the next token and the text change, ask a language model
for an explanation, and vote on explanations. The server works offline and accepts requests from this machine only;
with `--host` it accepts others, which need the token in the printed address. Ctrl-C stops it.
"""

import os
import re
import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cratelm.activations.records import Mode
from cratelm.errors import CrateError, check_least
from cratelm.report.server.requests import Limits
from cratelm.runtime import console
from cratelm.workflows.opening import open_model
from cratelm.workflows.options.arguments import Device, RunPaths
from cratelm.workflows.options.language_model import Explaining, Name, Where

if TYPE_CHECKING:
    from cratelm.live_models import LiveModel, LiveModels
    from cratelm.report.server.application import Parts

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")

STOP_SECONDS = 3.0
"""Longest wait at the end for models that still compute, after 2 seconds for requests."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm serve`."""

    runs: RunPaths
    """Run directories with records."""
    host: str = "127.0.0.1"
    """Address to listen on. For an address other than localhost, visitors need the printed token."""
    port: int = 8080
    """Port to listen on; 0 takes a free port."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Further names that a proxy passes in the `Host` header. Visitors then need the printed token."""
    root_path: Annotated[str, tyro.conf.arg(metavar="/PREFIX", help_behavior_hint="")] = ""
    """Path at which a proxy shows this server, such as /user/ann/proxy/8080."""
    mode: Mode = "fixed"
    """Mode of the records to show."""
    votes: Path | None = None
    """SQLite file for votes; by default votes.sqlite in the first run."""
    text_tokens: int = 512
    """Maximum length of a text, in tokens."""
    new_tokens: int = 200
    """Maximum length of a continuation, in tokens."""
    in_flight: int = 4
    """Concurrent requests to models; further requests are refused and can be tried again."""
    llm: Where = ""
    """Language model that visitors can ask for explanations: a server's URL, or a Hugging Face directory or name."""
    model: Name = ""
    """Name of the model on the server of --llm; required if the server has several."""
    llm_key: Annotated[str, tyro.conf.arg(metavar="VARIABLE", help_behavior_hint="")] = ""
    """Environment variable with the key of the server of --llm; by default OPENAI_API_KEY."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Serve until Ctrl-C."""
    try:
        import uvicorn

        from cratelm.report.server.application import application
        from cratelm.report.server.connections import limited_protocol
    except ImportError as error:
        raise CrateError(f"cratelm serve needs {error.name}. Hint: pip install 'cratelm[serve]'") from None
    with listen(options.host, options.port) as listening:
        port = listening.getsockname()[1]
        parts = application_parts(options)
        app = application(parts)
        console.print(f"{address(options.host, port, parts.access)}   (Ctrl-C ends it)", markup=False, soft_wrap=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_keep_alive=10,
            timeout_graceful_shutdown=2, ws="none", http=limited_protocol(),
        )  # fmt: skip
        returned = threading.Event()

        def end() -> None:
            """End the process even while a model computes: stores and votes are written in transactions."""
            if not returned.is_set() or not threading.main_thread().is_alive():
                os._exit(130)

        class Server(uvicorn.Server):  # type: ignore[misc]
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                await super().shutdown(sockets)
                timer = threading.Timer(STOP_SECONDS, end)
                timer.daemon = True
                timer.start()

        try:
            Server(config).run(sockets=[listening])
        finally:
            returned.set()


def application_parts(options: Options) -> "Parts":
    """The parts that the application is built from."""
    from cratelm.report.server.application import Parts
    from cratelm.report.server.votes import Votes

    check_least(options, 1, "text_tokens", "new_tokens", "in_flight")
    check_addresses(options)
    limits = Limits(
        text_tokens=options.text_tokens, new_tokens=options.new_tokens, in_flight=options.in_flight
    )  # fmt: skip
    exposed, explain = options.host not in LOOPBACK, None
    hosts = (*LOOPBACK, *(name.lower() for name in options.allow_host))
    if options.llm:
        from cratelm.workflows.llm.live_explain import LiveExplainer

        asked = Explaining(llm=options.llm, model=options.model, llm_key=options.llm_key, device=options.device)
        explain = LiveExplainer(asked)
    live = live_models(options, limits)
    votes = Votes(options.votes or options.runs[0] / "votes.sqlite")
    votes.open()
    return Parts(
        runs=options.runs, mode=options.mode, limits=limits, live=live,
        explain=explain, explainer="" if explain is None else explain.name,
        votes=votes, hosts=None if exposed else hosts, root_path=options.root_path,
        access=secrets.token_urlsafe(24) if exposed or options.allow_host else None,
    )  # fmt: skip


def check_addresses(options: Options) -> None:
    """Raise `CrateError` for a name or a prefix that no request can have."""
    for name in options.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]", name):
            raise CrateError(f"--allow-host must be a name such as hub.example.org, got {name}")
    if not re.fullmatch(r"(/[A-Za-z0-9._~@%-]+)*", options.root_path):
        raise CrateError(f"--root-path must be a path such as /user/ann/proxy/8080, got {options.root_path}")


def live_models(options: Options, limits: Limits) -> "LiveModels | None":
    """The models of the runs, each opened at its first request; None if no run has a model."""
    from cratelm.live_models import LiveModels
    from cratelm.report.browser.catalogue import catalogue

    runs = {
        model.slug: model
        for model in catalogue(options.runs, options.mode)
        if model.description.get("source") is not None or (model.run / "model" / "config.json").is_file()
    }
    if not runs:
        return None
    contexts = {
        slug: min(int(model.description["model"].get("context_length") or limits.text_tokens), limits.text_tokens)
        for slug, model in runs.items()
    }
    return LiveModels(contexts, lambda slug: _open(runs[slug].run, options), limits=limits)


def _open(run: Path, options: Options) -> "LiveModel":
    from cratelm.activations.records import layer_file, read_records
    from cratelm.live_models import LiveModel

    opened = open_model(run, options.device)
    maxima: dict[int, Sequence[float]] = {}

    def maximum(layer: int, neuron: int) -> float | None:
        if layer not in maxima:
            has_records = layer_file(run, options.mode, "neurons", layer).exists()
            statistics = read_records(run, layer, mode=options.mode).statistics if has_records else None
            maxima[layer] = [] if statistics is None else statistics["maximum"].tolist()
        value = maxima[layer][neuron] if neuron < len(maxima[layer]) else 0.0
        return value if value > 0 else None

    return LiveModel(
        model=opened.model, tokenizer=opened.tokenizer, strings=opened.strings, maximum=maximum, special=opened.special
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before models are loaded, so that a port in use is reported at once."""
    if not 0 <= port <= 65535:
        raise CrateError(f"--port must be 0 to 65535, got {port}")
    listening = None
    try:
        [(family, kind, protocol, _, place), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)  # clients wait while the models are loaded
    except OSError as error:
        if listening is not None:
            listening.close()
        raise CrateError(
            f"cannot listen on {host}:{port} ({error.strerror or error}). Hint: use another --port"
        ) from None
    return listening


def address(host: str, port: int, access: str | None) -> str:
    """The URL to open in a browser."""
    name = f"[{host}]" if ":" in host else {"0.0.0.0": socket.gethostname()}.get(host, host)
    return f"http://{name}:{port}/" + (f"?token={access}" if access else "")
