"""How far an explanation is from the command to its HTTP request: frames and files of the package on the way."""

import asyncio
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from fakes.rule_server import RuleServer
from fixtures.planted_rules import make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

import httpx

import cratelm
from cratelm.cli import main

PACKAGE = str(Path(cratelm.__file__).parent)
Place = tuple[str, str]
"""File of the package, and function."""


def places(frame: FrameType | None) -> list[Place]:
    """Frames of the package from the outermost to this one; comprehensions and lambdas count for their function."""
    result: list[Place] = []
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(PACKAGE) and not name.startswith("<"):
            result.insert(0, (file.removeprefix(PACKAGE + "/"), name))
        frame = frame.f_back
    return result


def walk_to_request(command: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """Run a command, and return the frames from `run` to the first request that asks for an explanation of a neuron.

    A task begins with the frames that created it: they are what called it.
    """
    created: dict[Any, list[Place]] = {}
    walks: list[list[Place]] = []
    create_task = asyncio.base_events.BaseEventLoop.create_task
    stream = httpx.AsyncClient.stream

    def here(frame: FrameType | None) -> list[Place]:
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        return created.get(task, []) + [place for place in places(frame) if place not in created.get(task, [])]

    def creating(self: Any, coroutine: Any, **more: Any) -> Any:
        task = create_task(self, coroutine, **more)
        created[task] = here(sys._getframe(1))
        return task

    def streaming(self: Any, *args: Any, **more: Any) -> Any:
        walks.append(here(sys._getframe(1)))
        return stream(self, *args, **more)

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "create_task", creating)
    monkeypatch.setattr(httpx.AsyncClient, "stream", streaming)
    assert main(command) == 0
    asking = ("interpretation/explainers/language_model.py", "ask")
    tested = "interpretation/explainers/self_test.py"
    walk = next(walk for walk in walks if asking in walk and all(file != tested for file, _ in walk))
    return walk[walk.index(("commands/explain.py", "run")) + 1 :]


def test_an_explanation_is_few_frames_and_files_away_from_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_planted(tmp_path / "crate-1l", np.random.default_rng(7))
    with RuleServer() as server:
        walk = walk_to_request(
            ["explain", str(run), "--llm", server.url, "--protocol", "random-only", "--neurons", "1"], monkeypatch
        )
    shown = "\n".join(f"{file}: {name}" for file, name in walk)
    assert walk[-1][0] == "interpretation/clients/transport.py", shown
    assert len(walk) <= 9, shown
    assert len({file for file, _ in walk}) + 1 <= 9, shown
