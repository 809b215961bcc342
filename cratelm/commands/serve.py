"""The live browser: the neurons of one or more runs, and a text box to steer them.

    cratelm serve runs/demo/crate-2l runs/demo/gpt2-2l
    cratelm serve runs/demo/crate-2l --llm http://127.0.0.1:8000/v1 --model NAME

Open the address it prints. Besides what `cratelm report --site` puts into a folder: type a text and see every layer's
strongest neurons at each token, steer neurons and see how the next token and the text change, ask a language
model for an explanation, and vote with others. It works offline and answers this machine only; `--host` opens it to
others, who then need the token in the printed address. Ctrl-C ends it.
"""

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, console
from cratelm.workflows.options.language_model import Explaining, Name, Where

if TYPE_CHECKING:
    from cratelm.live_models import LiveModel, LiveModels
    from cratelm.report.server.application import Parts
    from cratelm.report.server.requests import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECTIONS = 800
"""Open at a time; a process may usually open 1,024 files."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm serve`."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories with records."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own asks every visitor for a token."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    mode: Mode = "fixed"
    """Which records to show."""
    votes: Path | None = None
    """SQLite file that keeps votes; by default votes.sqlite in the first run."""
    text_tokens: int = 512
    """Longest text to read, in tokens."""
    new_tokens: int = 200
    """Longest continuation to write, in tokens."""
    in_flight: int = 4
    """Requests to models at a time; one more is answered: try again."""
    llm: Where = ""
    """Let readers ask this language model for explanations: a server's URL, or a Hugging Face directory or name."""
    model: Name = ""
    """What that server calls the model; needed where it serves several."""
    llm_key: Annotated[str, tyro.conf.arg(metavar="VARIABLE", help_behavior_hint="")] = ""
    """Environment variable that holds that server's key; left out, OPENAI_API_KEY."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Serve until Ctrl-C."""
    try:
        import uvicorn

        from cratelm.report.server.application import application
    except ImportError as error:
        raise CrateError(f"{error.name} is not installed. Run: pip install 'cratelm[serve]'") from None
    with listen(options.host, options.port) as listening:
        port = listening.getsockname()[1]
        parts = application_parts(options, port)
        app = application(parts)
        console.print(f"{address(options.host, port, parts.access)}   (Ctrl-C ends it)", markup=False, soft_wrap=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_keep_alive=10,
            timeout_graceful_shutdown=2, limit_concurrency=CONNECTIONS, ws="none",
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])


def application_parts(options: Options, port: int) -> "Parts":
    """Everything the application is made of."""
    from cratelm.report.server.application import Parts
    from cratelm.report.server.requests import Limits
    from cratelm.report.server.votes import Votes

    if not options.runs:
        raise CrateError("no run was named. Run: cratelm serve RUN...")
    for name in ("text_tokens", "new_tokens", "in_flight"):
        if getattr(options, name) < 1:
            raise CrateError(f"--{name.replace('_', '-')} is {getattr(options, name)}, at least 1 is needed")
    limits = Limits(
        text_tokens=options.text_tokens, new_tokens=options.new_tokens, in_flight=options.in_flight
    )  # fmt: skip
    exposed, explain = options.host not in LOOPBACK, None
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
        votes=votes, hosts=None if exposed else own_hosts(port),
        access=secrets.token_urlsafe(24) if exposed else None,
    )  # fmt: skip


def own_hosts(port: int) -> tuple[str, ...]:
    """The values of `Host` with which a browser on this machine asks for this port. It leaves out http's own, 80."""
    names = ("127.0.0.1", "localhost", "[::1]")
    return (*(f"{name}:{port}" for name in names), *(names if port == 80 else ()))


def live_models(options: Options, limits: "Limits") -> "LiveModels | None":
    """The models of the runs that have one, each opened when it is first asked for; None where no run has."""
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
    from cratelm.workflows.opening import open_model

    opened = open_model(run, options.device)
    maxima: dict[int, Sequence[float]] = {}

    def maximum(layer: int, neuron: int) -> float | None:
        if layer not in maxima:
            has_records = layer_file(run, options.mode, "neurons", layer).exists()
            statistics = read_records(run, layer, mode=options.mode).statistics if has_records else None
            maxima[layer] = [] if statistics is None else statistics["maximum"].tolist()
        value = maxima[layer][neuron] if neuron < len(maxima[layer]) else 0.0
        return value if value > 0 else None

    return LiveModel(model=opened.model, tokenizer=opened.tokenizer, strings=opened.strings, maximum=maximum)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded: a port in use is reported at once."""
    if not 0 <= port <= 65535:
        raise CrateError(f"--port is {port}, a number from 0 to 65535 is needed")
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
        raise CrateError(f"cannot listen on {host}:{port} ({error.strerror or error}). Give another --port") from None
    return listening


def address(host: str, port: int, access: str | None) -> str:
    """What to open."""
    name = f"[{host}]" if ":" in host else {"0.0.0.0": socket.gethostname()}.get(host, host)
    return f"http://{name}:{port}/" + (f"?token={access}" if access else "")
