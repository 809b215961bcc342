"""An independent server, `transformers serve`, with a small chat model of random weights: what it gives, end to end."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from fakes.language_models import make_llm
from fixtures.synthetic import make_run
from interpretation.stages.test_language_model_stages import KEY, strings, task

from cratelm.errors import CrateError
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import probe
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.simulators.language_model import simulate_set
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.stages.set_task import failures
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet

for package in ("httpx", "transformers", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed (extras llm, serve and dev)")

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    model: str
    log: Path

    def requests(self) -> int:
        """POST requests it answered so far."""
        return len(re.findall(r'"POST /v1/\S+ HTTP/1.1" 200', self.log.read_text()))

    def run(self, what: Callable[[Endpoint], Coroutine[Any, Any, T]], model: str = "") -> T:
        async def main() -> T:
            endpoint = Endpoint(self.url, model or self.model, timeout=120.0)
            try:
                return await what(endpoint)
            finally:
                await endpoint.close()

        return asyncio.run(main())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    llm = make_llm(np.random.default_rng(0), dtype=torch.float32, max_position_embeddings=16384)
    llm.reader.model.save_pretrained(folder / "small")
    llm.tokenizer.save_pretrained(folder / "small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, log = str(folder / "small"), folder / "log"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield Served(f"http://127.0.0.1:{port}/v1", model, log)
        finally:
            process.kill()


def _wait(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_the_probe_notices_what_it_ignores(served: Served) -> None:
    result = served.run(probe)
    assert (result.chat, result.prompt_logprobs, result.schema) == (True, False, False)
    notes = "\n".join(result.notes)
    assert "echo with logprobs: ignored" in notes
    assert "prompt_logprobs: the server refused (HTTP 422): Unexpected fields" in notes
    assert "answers do not follow a JSON schema" in notes


def test_another_model_is_refused_by_name(served: Served) -> None:
    with pytest.raises(CrateError, match=r"does not serve big .*pinned to"):
        served.run(probe, "big")


def test_neurons_are_explained_and_asking_again_costs_nothing(
    served: Served, tmp_path: Path, rng: np.random.Generator
) -> None:
    run, store = make_run(tmp_path / "run", rng), Store.create(tmp_path / "run")
    before, result = served.requests(), []
    for number in range(2):
        usage = Usage()

        async def explain(endpoint: Endpoint, usage: Usage = usage) -> None:
            cached = Cached(Metered(endpoint, usage), store, usage)
            explainer = LLMExplainer(llm=cached, settings=explainer_settings("fixed", samples=2), strings=strings(run))
            for sample in (0, 1):
                await explainer.explain(task(run, replace(KEY, sample=sample), neurons="4-5"))

        if number:
            _keep_only_the_cache(store)
        served.run(explain)
        keys = [replace(KEY, sample=sample) for sample in (0, 1)]
        result.append([{**store.texts(key), **failures(store, key, "explain")} for key in keys])
        assert (usage.calls, usage.cached) == ((0, 4) if number else (4, 0))
    assert served.requests() == before + 4
    assert result[0] == result[1]
    assert [sorted(one) for one in result[0]] == [[4, 5], [4, 5]]


def _keep_only_the_cache(store: Store) -> None:
    with store.transaction() as connection:
        for table in ("sets", "stages", "explanations", "failures", "begun", "chosen"):
            connection.execute(f"DELETE FROM {table}")


def test_answers_that_do_not_follow_the_form_are_failures_with_their_text(
    served: Served, tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_run(tmp_path / "run", rng)
    store, key = Store.create(run), replace(KEY, protocol="random-only", simulator="structured:small")
    explained = GrowingSet.begin(store, key.explained, "explain", [4], settings={})
    explained.add({4: "words about boats"})
    assert explained.finish()

    async def simulate(endpoint: Endpoint) -> None:
        simulator = await open_simulator("structured", Cached(endpoint, store))
        work = task(run, key, neurons="4-4")
        await simulate_set(work, simulator.simulate, simulator.cache_settings(), strings(run))

    served.run(simulate)
    failed = failures(store, key, "simulate")
    assert list(failed) == [4]
    assert len(failed[4]) > 20
