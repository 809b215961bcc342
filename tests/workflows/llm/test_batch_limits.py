"""Batches that fail, wait, or exceed a budget: nothing is sent without end, and what waits is printed."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.batch_server import BatchServer
from fakes.llm_server import Answer, refusal
from fakes.rule_server import RuleServer
from fixtures.planted_rules import make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from cratelm.cli import main
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.usage import Budget, Metered, Usage
from cratelm.interpretation.llm import Message, Queued, Sampling
from cratelm.interpretation.prompts import explainer as prompts
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.stages.batches import BatchLLM
from cratelm.interpretation.stages.set_task import all_failures
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.batches import open_batches
from cratelm.interpretation.store.database import Store
from cratelm.workflows.llm.batches import RunBatches
from cratelm.workflows.options.language_model import Spending


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted(tmp_path_factory.mktemp("planted") / "crate-1l", np.random.default_rng(7))


@pytest.fixture
def run(planted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(planted, tmp_path / "crate-1l")


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "few_shot_neurons", lambda: few_shot_neurons()[:1])


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as batch_server:
        yield batch_server


def explain(run: Path, server: RuleServer, *more: str) -> int:
    return main(["explain", str(run), "--protocol", "random-only", "--llm", server.url, "--batch", *more])


@pytest.mark.parametrize("answer", [refusal("the prompt is bad", 400), refusal("flagged by moderation", 403)])
def test_a_short_queue_whose_requests_all_fail_is_paid_once_and_counted(
    answer: Answer, run: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted, submit = list[RunBatches](), RunBatches.submit

    async def counted(self: RunBatches) -> bool:
        submitted.append(self)
        assert len(submitted) < 4, "the same requests are sent without end"
        return await submit(self)

    monkeypatch.setattr(RunBatches, "submit", counted)
    server.refused["/v1/chat/completions"] = answer
    assert explain(run, server, "--neurons", "2") == 0
    assert [stage for stage, _ in all_failures(Store.open(run))] == ["explain"] * 2
    assert server.files == {}


def test_a_budget_covers_the_batches_of_all_models_together(run: Path, server: BatchServer) -> None:
    async def submit() -> None:
        store, usage, work = Store.create(run), Usage(), RunBatches(Store(run), Spending(batch=True))
        endpoint = Endpoint(server.url, "rules", usage=usage)
        await endpoint.connect()
        for text in ("first", "other"):
            llm = BatchLLM(endpoint)
            cached = work.add(llm, Cached(Metered(llm, usage, Budget(tokens=550)), store, usage))
            work.start()
            for number in range(4):
                with pytest.raises(Queued):
                    await cached.chat([Message("user", f"{text} {number}")], Sampling(max_tokens=100))
        await work.submit()
        await endpoint.close()

    asyncio.run(submit())
    assert [len(record.requests) for record in open_batches(Store.open(run))] == [3, 1]


def test_a_batch_of_another_url_is_printed_with_the_way_to_collect_it(
    run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(run, server) == 0
    assert "is not collected" not in capsys.readouterr().err
    with RuleServer(probabilities=False) as other:
        assert explain(run, other) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "is not collected" in line]
    assert line.startswith("batch batch_0 is not collected")
    assert f"{server.url} for the model rules" in line
    assert "--forget-batches" in line


def test_no_next_command_is_printed_while_requests_wait_in_a_batch(
    run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert explain(run, server) == 0
        assert "next:" not in capsys.readouterr().err
    server.finish()
    assert explain(run, server) == 0
    assert "next: cratelm simulate" in capsys.readouterr().err
