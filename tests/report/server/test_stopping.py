"""The end of `cratelm serve` while a request is pending, and its names and prefix behind a proxy."""

import contextlib
import http.client
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.llm_server import Answer, Server, completion
from fixtures.live_runs import live_runs
from fixtures.serving import Served, serve

from cratelm.commands.serve import Options, application_parts

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

BUSY_MODEL = """
import sys, time
from cratelm.cli import main
from cratelm.live_models import LiveModels
LiveModels.activations = lambda *_: time.sleep(60)
sys.exit(main(sys.argv[1:]))
"""
LATER = 90.0
"""Seconds after which the language model would answer."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return live_runs(tmp_path_factory.mktemp("runs"), np.random.default_rng(11))


def stop_with_a_request_pending(server: Served, path: str, value: dict[str, Any], with_signal: int) -> int:
    """The exit code. Checks the time and that the terminal shows no traceback."""
    server.page_token()

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.post(path, value)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(2)
    assert asking.is_alive()
    began = time.monotonic()
    server.process.send_signal(with_signal)
    code = server.process.wait(30)
    assert time.monotonic() - began < 15
    assert server.process.stderr is not None
    assert "Traceback" not in (terminal := server.process.stderr.read()), terminal
    asking.join(10)
    return code


@pytest.mark.slow
@pytest.mark.parametrize(("with_signal", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_it_stops_while_a_language_model_has_not_answered(runs: list[Path], with_signal: int, code: int) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
    place = {"model": "crate-2l", "tap": "neurons", "layer": 0, "neuron": 9}
    with (
        Server(lambda *_: Answer(completion("late"), wait=LATER)) as llm, serve(runs[0], "--llm", llm.url) as server
    ):  # fmt: skip
        assert stop_with_a_request_pending(server, "/api/explain", place, with_signal) == code
        assert llm.asked


@pytest.mark.slow
def test_it_stops_while_a_model_computes(runs: list[Path]) -> None:
    text = {"model": "crate-2l", "text": "a text"}
    with serve(runs[0], program=("-c", BUSY_MODEL)) as server:
        assert stop_with_a_request_pending(server, "/api/activations", text, signal.SIGINT) == 130


def test_names_of_a_proxy_are_answered_with_the_token_only(runs: list[Path]) -> None:
    plain = application_parts(Options(runs=tuple(runs[:1])))
    proxied = application_parts(Options(runs=tuple(runs[:1]), allow_host=("Hub.example",), root_path="/lab"))
    assert (plain.access, plain.root_path) == (None, "")
    assert "hub.example" not in (plain.hosts or ())
    assert proxied.access
    assert {"hub.example", "localhost"} <= set(proxied.hosts or ())
    assert proxied.root_path == "/lab"
    assert application_parts(Options(runs=tuple(runs[:1]), host="0.0.0.0", allow_host=("hub.example",))).hosts is None
