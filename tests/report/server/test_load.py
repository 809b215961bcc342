"""Fifty clients at a live browser: every request is answered, and memory stays flat."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fixtures.live_runs import live_runs
from fixtures.serving import serve

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

CLIENTS, SECONDS = 50, 15
HELD, GROWN = 120, 40
"""MiB: by how much memory may grow once models and layers are there, and how much of that in the last half."""


def benchmark() -> ModuleType:
    """`benchmarks/serve.py`, whose clients these are."""
    path = Path(__file__).parents[3] / "benchmarks" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of another process is read from /proc")
def test_fifty_clients_are_all_answered_and_memory_stays_flat(tmp_path: Path) -> None:
    with serve(*live_runs(tmp_path, np.random.default_rng(13))) as server:
        seen, held = benchmark().load(server.process.pid, server.place, CLIENTS, SECONDS)
        assert server.ask("/").status == 200
    assert seen.broken == []
    assert {status for _, status in seen.seconds} <= {200, 429}
    answered = {kind for kind, status in seen.seconds if status == 200}
    assert answered >= {"neuron", "layer", "list", "overview", "site", "search"}
    assert len(held) > 4
    assert max(held) < held[0] + HELD, held
    assert held[-1] < held[len(held) // 2] + GROWN, held
