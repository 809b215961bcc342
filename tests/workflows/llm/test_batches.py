"""Batches: submitted, collected and continued by the same command, paid once under faults."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.batch_server import BatchServer
from fakes.llm_server import refusal
from fakes.rule_server import RuleServer
from fixtures.planted_rules import make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from cratelm.cli import main
from cratelm.interpretation.prompts import explainer as prompts
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.stages import batches
from cratelm.interpretation.stages.set_task import all_failures
from cratelm.interpretation.store.answer_cache import spent
from cratelm.interpretation.store.batches import open_batches
from cratelm.interpretation.store.database import Store

TAR = ["--protocol", "random-only", "--skip-lookup"]


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
    with BatchServer() as one:
        yield one


def explain(run: Path, server: RuleServer, *more: str) -> int:
    return main(["explain", str(run), "--protocol", "random-only", "--llm", server.url, "--batch", *more])


def custom_ids(server: BatchServer) -> list[str]:
    return [line["custom_id"] for line in server.lines]


def explained(run: Path) -> int:
    with Store.open(run).transaction() as connection:
        return int(connection.execute("SELECT count(*) FROM explanations").fetchone()[0])


def test_the_same_command_submits_collects_and_goes_through_the_stages(
    run: Path, server: BatchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--controls", "shuffled", "--neurons", "3"]
    assert main([*command, "--batch"]) == 0
    said = capsys.readouterr()
    assert "batch batch_0: submitted 2 requests" in said.err
    assert "points" not in said.out
    assert [line["url"] for line in server.lines] == ["/v1/chat/completions"] * 2
    live = server.chats
    assert main([*command, "--batch"]) == 0
    assert "batch_0: in_progress, 0 of 2 requests answered" in capsys.readouterr().err
    assert main(command) == 0, "without --batch, what waits is not sent either"
    assert (server.chats, len(server.batches)) == (live, 1)
    server.finish()
    assert main([*command, "--batch"]) == 0
    said = capsys.readouterr()
    assert "batch_0 (completed): 2 answers" in said.err
    assert "batch batch_1: submitted" in said.err
    server.finish()
    assert main([*command, "--batch"]) == 0
    said = capsys.readouterr()
    assert "explained by rules, simulated by structured:rules" in said.out
    assert server.chats == live + 1, "one request of each stage is tried alone"
    assert len(set(custom_ids(server))) == len(server.lines)
    assert open_batches(Store.open(run)) == []
    other = shutil.copytree(run.parent / "crate-1l", tmp_path / "other", ignore=shutil.ignore_patterns("*.sqlite"))
    with RuleServer(probabilities=False) as live_server:
        assert main(["interpret", str(other), "--llm", live_server.url, *TAR, "--neurons", "3"]) == 0
    for stage in ("explanations", "simulations"):
        rows = [_rows(path, stage) for path in (run, other)]
        assert rows[1] <= rows[0]


def _rows(run: Path, table: str) -> set[Any]:
    column = {"explanations": "text", "simulations": "activations"}[table]
    with Store.open(run).transaction() as connection:
        return set(connection.execute(f"SELECT neuron, {column} FROM {table}").fetchall())


PERMANENT = {"response": {"status_code": 400, "body": {"error": {"message": "the prompt is bad"}}}}
FLAGGED = {"response": {"status_code": 403, "body": {"error": {"message": "flagged by moderation"}}}}
SAID_NOTHING = {"response": {"status_code": 200, "body": {"choices": [{"message": {"content": None}}]}}}
ODD = {"response": {"status_code": 200, "body": {"choices": 7, "usage": {"prompt_tokens": 9, "completion_tokens": 1}}}}
LATE = {"response": None, "error": {"code": "batch_expired", "message": "This request could not be executed in time"}}
BUSY = {"response": {"status_code": 503, "body": {"error": {"message": "overloaded"}}}}
LIMITED = {"response": {"status_code": 429, "body": None}}
UNPAID = {"response": {"status_code": 402, "body": {"error": {"message": "Insufficient credits"}}}}


@pytest.mark.parametrize("row", [PERMANENT, FLAGGED, SAID_NOTHING, ODD])
def test_a_request_that_fails_for_good_is_a_counted_failure(row: Any, run: Path, server: BatchServer) -> None:
    assert explain(run, server) == 0
    server.finish(spoil={2: row})
    assert explain(run, server) == 0
    assert explained(run) == 5
    [(stage, message)] = all_failures(Store.open(run))
    assert stage == "explain"
    assert any(words in message for words in ("prompt is bad", "flagged", "answered nothing", "could not parse"))
    assert explain(run, server) == 0
    assert len(server.batches) == 1


ROWS = [LATE, BUSY, LIMITED, UNPAID, None, "{broken", '{"custom_id": "other"}', "[1]"]
STATES = ["completed", "expired", "CANCELLED", "completed", "expired", "completed", "cancelled", "expired"]


@pytest.mark.parametrize(("row", "status"), list(zip(ROWS, STATES, strict=True)))
def test_only_the_requests_without_an_answer_are_submitted_again(
    row: Any, status: str, run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(run, server) == 0
    ids = custom_ids(server)
    assert len(ids) == 5
    server.finish(status=status, spoil={1: row, 3: row})
    assert explain(run, server) == 0
    assert "3 answers" in capsys.readouterr().err
    assert explained(run) == 4
    assert custom_ids(server)[:5] == ids
    assert set(custom_ids(server)[5:]) < {ids[1], ids[3]}
    server.finish()
    assert explain(run, server) == 0
    assert explained(run) == 6
    assert all_failures(Store.open(run)) == []


@pytest.mark.parametrize("listed", [True, False])
def test_a_batch_whose_number_was_lost_is_not_submitted_twice(
    listed: bool, run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut_creation = True
    assert explain(run, server) == 2
    assert "Run the same command again" in capsys.readouterr().err
    server.cut_creation = False
    server.batches["other"] = {"id": "other", "input_file_id": "else", "status": "completed"}
    if not listed:
        server.refused["/v1/batches"] = refusal("no list", 404)
        assert explain(run, server) == 2
        assert "--forget-batches" in capsys.readouterr().err.splitlines()[-1]
        assert len(server.batches) == 2
        return
    assert explain(run, server) == 0
    assert len(server.batches) == 2
    server.finish()
    assert explain(run, server) == 0
    assert explained(run) == 6
    assert len(set(custom_ids(server))) == 5


def test_a_batch_that_was_never_created_is_created_from_its_file(run: Path, server: BatchServer) -> None:
    server.refused["/v1/batches"] = refusal("overloaded", 503)
    assert explain(run, server) == 2
    assert len(server.files) == 1
    server.refused.clear()
    assert explain(run, server) == 0
    assert (len(server.files), len(server.batches)) == (1, 1)
    server.finish()
    assert explain(run, server) == 0
    assert explained(run) == 6


def test_a_crash_while_answers_are_stored_neither_loses_nor_counts_them_twice(
    run: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explain(run, server) == 0
    before = spent(Store.open(run))
    server.finish()
    whole = batches.close_batch

    def crash_before(*_: Any) -> None:
        raise KeyboardInterrupt

    def crash_after(*args: Any) -> None:
        whole(*args)
        raise KeyboardInterrupt

    for crash in (crash_before, crash_after):
        monkeypatch.setattr(batches, "close_batch", crash)
        assert explain(run, server) != 0
    monkeypatch.setattr(batches, "close_batch", whole)
    assert explain(run, server) == 0
    assert explained(run) == 6
    assert len(server.batches) == 1
    added = np.subtract(spent(Store.open(run)), before)
    assert added[1] == 5 * 8, "each answer of 8 tokens is counted once"


@pytest.mark.parametrize(("path", "answer", "message"), [
    ("/v1/files", refusal("Not Found", 404), "has no Batch API"),
    ("/v1/files", refusal("bad purpose", 400), "bad purpose"),
    ("/v1/files", refusal("credit", 402), "no quota or credit left"),
    ("/v1/batches", refusal("limit", 400), "refuses the batch"),
])  # fmt: skip
def test_a_server_without_batches_is_one_line(
    path: str, answer: Any, message: str, run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refused[path] = answer
    assert explain(run, server) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_a_batch_that_fails_as_a_whole_reports_the_servers_words(
    run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(run, server) == 0
    batch = next(iter(server.batches.values()))
    errors = {"data": [{"code": "token_limit", "message": "Enqueued token limit reached"}]}
    batch |= {"status": "failed", "errors": errors, "output_file_id": None}
    assert explain(run, server) == 2
    assert "Enqueued token limit reached" in capsys.readouterr().err.splitlines()[-1]
    assert explain(run, server) == 0
    before, again = custom_ids(server)[:5], custom_ids(server)[5:]
    assert len(again) == 4, "one more is tried alone, the others wait again"
    assert set(again) < set(before)


def test_the_first_requests_are_tried_alone_and_nothing_is_submitted_if_they_fail(
    run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refused["/v1/chat/completions"] = refusal("model is not allowed here", 400)
    assert explain(run, server) == 2
    assert "the first 3 requests failed" in capsys.readouterr().err
    assert server.files == {}


def test_a_budget_limits_what_is_submitted_and_counts_open_batches(
    run: Path, server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    with BatchServer() as unlimited:
        assert explain(other, unlimited) == 0
    [record] = open_batches(Store.open(other))
    budget = str(sum(spent(Store.open(other))) + int(0.6 * sum(record.bound)) + 20)
    assert explain(run, server, "--budget-tokens", budget) == 0
    submitted = len(server.lines)
    assert 0 < submitted < 5
    assert f"the budget covers {submitted} of 5 requests" in capsys.readouterr().err
    assert explain(run, server, "--budget-tokens", budget) == 2
    assert "the budget is spent" in capsys.readouterr().err
    assert len(server.lines) == submitted
    server.finish()
    assert explain(run, server) == 0
    server.finish()
    assert explain(run, server) == 0
    assert explained(run) == 6
    assert len(set(custom_ids(server))) == len(server.lines)


def test_forgotten_batches_are_submitted_again(run: Path, server: BatchServer) -> None:
    assert explain(run, server) == 0
    assert explain(run, server, "--forget-batches") == 0
    assert len(server.batches) == 2
    assert len(server.lines) == 9


def test_large_work_is_divided_into_several_batches(
    run: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MOST_REQUESTS", 2)
    assert explain(run, server) == 0
    assert len(server.batches) == 3
    server.finish()
    assert explain(run, server) == 0
    assert explained(run) == 6


def test_other_scorers_wait_in_the_same_batch(run: Path, server: BatchServer) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2", "--scorer", "detection", "--batch"]
    for _ in range(4):
        assert main(command) == 0
        server.finish()
    assert "detection" in json.dumps([stage for stage in _scorers(run)])


def _scorers(run: Path) -> list[str]:
    with Store.open(run).transaction() as connection:
        return [row[0] for row in connection.execute("SELECT DISTINCT scorer FROM answers")]
