"""Runs and stores of earlier versions open, show the numbers they showed, and are not made again."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.rule_server import RuleServer
from fixtures.earlier import (
    BY_LOOKUP,
    BY_MODEL,
    READING,
    RUN,
    chunk_value,
    csv_rows,
    neuron_record,
    printed_rows,
    score_values,
    site_scores,
    store_contents,
    unpack,
)

from cratelm.cli import main
from cratelm.interpretation.scoring import small_samples
from cratelm.report.server.chunk_cache import Chunks

Show = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive unpacked, once for all tests: reading commands change nothing in it, and tests check that."""
    folder = tmp_path_factory.mktemp("earlier")
    unpack(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    """What the earlier code showed."""
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture
def show(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """Run a command next to the earlier run, check that the store stays as it is; returns what the command printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(small_samples, "FEW_NEURONS", 0)  # the earlier version's intervals had no such correction

    def run_command(*arguments: str) -> str:
        before = store_contents(Path(RUN))
        assert main(arguments) == 0
        after = store_contents(Path(RUN))
        assert {name: after.get(name) for name in before} == before
        return capsys.readouterr().out

    return run_command


def assert_rows_are_among(expected: list[list[float]], rows: list[list[float]]) -> None:
    """Each expected row of numbers is a row, in order; a row may have more numbers than it had."""
    assert expected
    remaining = iter(rows)
    for wanted in expected:
        assert any(_is_within(wanted, row) for row in remaining), f"{wanted} is not in its place among {rows}"


def _is_within(wanted: list[float], row: list[float]) -> bool:
    remaining = iter(row)
    return all(any(value == pytest.approx(number, rel=1e-6, abs=1e-12) for number in remaining) for value in wanted)


@pytest.mark.parametrize("name", READING)
def test_a_reading_command_prints_the_numbers_it_printed(name: str, show: Show, expected: Any) -> None:
    rows = expected["printed"][name]
    if name.startswith("list"):
        rows = rows[1:]  # the heading names the layers in other words today
    assert_rows_are_among(rows, printed_rows(show(*READING[name])))


def test_simulations_with_one_repair_of_the_read_out_are_still_scored(show: Show, expected: Any) -> None:
    printed = show("score", RUN, "--model", "rules", "--layer", "1", "--mode", "compat", "--protocol", "random-only")
    assert "simulated by all-at-once+spaced-numbers:rules" in printed
    scores = expected["printed"]["model repaired"][-2:]  # the plan comes first
    assert_rows_are_among(scores, printed_rows(printed))


@pytest.mark.parametrize("name", BY_LOOKUP)
def test_sets_of_lookup_are_complete(name: str, show: Show, expected: Any) -> None:
    printed = show("interpret", RUN, *BY_LOOKUP[name])
    assert_rows_are_among(expected["printed"][f"lookup {name}"], printed_rows(printed))


@pytest.mark.parametrize("name", BY_MODEL)
def test_sets_of_a_language_model_are_complete_and_it_is_not_asked_again(name: str, show: Show, expected: Any) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
    with RuleServer() as server:
        printed = show("interpret", RUN, "--layer", "1", "--skip-lookup", "--llm", server.url, *BY_MODEL[name])
    assert server.asked == []
    assert_rows_are_among(expected["printed"][f"model {name}"], printed_rows(printed))


def test_a_set_that_is_made_again_takes_every_answer_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    empty = Path("empty")
    shutil.copytree(RUN, empty, ignore=shutil.ignore_patterns("interpretation.sqlite"))
    _keep_only_calls(Path(RUN, "interpretation.sqlite"), empty / "interpretation.sqlite")
    with RuleServer() as server:
        for options in BY_MODEL.values():
            # Which neurons exchange explanations was another draw: that control of the earlier version stays as it is.
            options = tuple(word for word in options if word != "shuffled")
            arguments = ("interpret", str(empty), "--layer", "1", "--skip-lookup", "--llm", server.url, *options)
            assert main(arguments) == 0
    from workflows.llm.test_interpret_llm import puzzle

    assert all(puzzle(json.dumps(body)) for _, body in server.asked), "only the self-test of explainers is new"
    made_again = [row for row in score_values(Path(RUN)) if row[2] != "shuffled" and "+spaced-numbers" not in row[1]]
    assert score_values(empty) == made_again


def _keep_only_calls(source: Path, out: Path) -> None:
    """Copy a store without its sets."""
    shutil.copyfile(source, out)
    connection = sqlite3.connect(out)
    for table in (
        "explanations", "simulations", "scores", "failures", "firing", "answers", "begun", "chosen", "stages", "sets"
    ):  # fmt: skip
        connection.execute(f"DELETE FROM {table}")
    connection.commit()
    connection.close()


def test_the_report_has_the_tables_it_had(show: Show, expected: Any, tmp_path: Path) -> None:
    show("report", RUN, "--out", str(tmp_path))
    tables = csv_rows(tmp_path)
    for name, rows in expected["tables"]["report"].items():
        assert_rows_are_among([row for row in rows if row], tables[name])


def test_the_site_and_the_server_show_the_scores_they_showed(show: Show, expected: Any, tmp_path: Path) -> None:
    show("report", RUN, "--site", "--out", str(tmp_path))
    assert sorted(map(repr, site_scores(tmp_path))) == sorted(map(repr, expected["site"]))
    chunks = Chunks([Path(RUN)], capabilities={})
    files = sorted(tmp_path.rglob("neurons-*.js"))
    assert len(files) == 3
    for file in files:
        served = chunks.chunk(file.relative_to(tmp_path / "data").with_suffix("").as_posix())
        assert served is not None
        assert json.loads(served)["neurons"] == chunk_value(file)["neurons"]


def test_the_export_writes_the_neurons_it_wrote(show: Show, expected: Any, tmp_path: Path) -> None:
    show("export", RUN, "--format", "neuronrecord", "--out", str(tmp_path))
    assert neuron_record(tmp_path) == expected["neuronrecord"]


def test_the_dial_finds_its_points(show: Show, folder: Path, tmp_path: Path) -> None:
    before = (folder / RUN / "dial.json").read_bytes()
    show(
        "dial", RUN, "--data", "tokens", "--penalty", "1", "2", "--step-size", "1", "--steps", "2", "--threshold", "0",
        "--tokens", "1k", "--loss-only", "--out", str(tmp_path),
    )  # fmt: skip
    assert (folder / RUN / "dial.json").read_bytes() == before
