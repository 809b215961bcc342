"""What a live browser does not wait for: a model that is slow to load, or not there."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.live_runs import live_runs

from cratelm.commands.serve import Options, live_models
from cratelm.report.server.requests import Limits
from cratelm.report.server.votes import Votes

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return live_runs(tmp_path_factory.mktemp("runs"), np.random.default_rng(13))


def test_a_run_without_a_model_shows_its_records_alone(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "crate-2l")
    shutil.rmtree(tmp_path / "crate-2l" / "model")
    alone = Options(runs=(tmp_path / "crate-2l",))
    both = Options(runs=(tmp_path / "crate-2l", runs[1]))
    assert live_models(alone, Limits()) is None
    found = live_models(both, Limits())
    assert found is not None
    assert list(found.contexts()) == ["gpt2-2l"]


def test_a_model_that_is_being_loaded_keeps_no_other_request_waiting(runs: list[Path], tmp_path: Path) -> None:
    loaded = threading.Event()

    class Slow:
        def contexts(self) -> dict[str, int]:
            return {"crate-2l": 48}

        def activations(self, _request: Any) -> dict[str, Any]:
            return {}

        effect = activations

        def continuations(self, _request: Any) -> Iterator[dict[str, Any]]:
            assert loaded.wait(60)
            return iter([{"done": True}])

    from cratelm.report.server.application import Parts, application

    live: Any = Slow()
    app = application(Parts(runs=runs, votes=Votes(tmp_path / "votes.sqlite"), live=live))
    body = json.dumps({"model": "crate-2l", "text": "the code"}).encode()

    async def ask(method: str, path: str, body: bytes = b"") -> int:
        head = {"content-type": "application/json", "x-cratelm-token": app.page_token}
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in head.items()], "http_version": "1.1",
        }  # fmt: skip
        sent: list[Any] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            while not waiting:
                await asyncio.sleep(60)
            return waiting.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return int(sent[0]["status"])

    async def both() -> tuple[int, int]:
        writing = asyncio.create_task(ask("POST", "/api/continue", body))
        await asyncio.sleep(0.2)
        async with asyncio.timeout(20):
            meanwhile = await ask("GET", "/")
        assert not writing.done()
        loaded.set()
        return meanwhile, await writing

    # Where the event loop itself waits, this ends it.
    threading.Timer(30, loaded.set).start()
    began = time.monotonic()
    assert asyncio.run(both()) == (200, 200)
    assert time.monotonic() - began < 25
