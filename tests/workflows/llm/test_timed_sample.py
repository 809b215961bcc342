"""`cratelm demo --llm`: as many neurons as fit into some minutes, next to lookup."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fakes.llm_server import Answer, Body, Server, completion
from fakes.rule_server import RuleServer
from fixtures.planted_rules import EXPLANATIONS, make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from cratelm.cli import main
from cratelm.interpretation.prompts import explainer as prompts
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.simulators import prompt_fitting
from cratelm.interpretation.store.database import Store
from cratelm.workflows.llm import timed_sample
from cratelm.workflows.llm.run import interpret_by_lookup
from cratelm.workflows.llm.timed_sample import TimedSample, fetching_lines, measure_for, neurons_of_all, sample_lines
from cratelm.workflows.options.selection import Selection


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that lookup has scored."""
    first = make_planted(tmp_path_factory.mktemp("planted") / "crate-1l", np.random.default_rng(7))
    second = shutil.copytree(first, first.with_name("gpt2-1l"))
    for run in (first, second):
        interpret_by_lookup(Selection(runs=(run,)), controls=("shuffled",))
    return [first, second]


@pytest.fixture
def runs(planted: list[Path], tmp_path: Path) -> list[Path]:
    return [shutil.copytree(run, tmp_path / run.name) for run in planted]


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prompts, prompt_fitting):
        monkeypatch.setattr(module, "few_shot_neurons", lambda: few_shot_neurons()[:1])


def measured(runs: list[Path], server: Server, minutes: float) -> TimedSample:
    return asyncio.run(measure_for(runs, server.url, minutes=minutes))


def test_the_table_has_lookup_control_and_model_on_the_same_neurons(runs: list[Path]) -> None:
    with RuleServer() as server:
        lines = list(sample_lines(measured(runs, server, minutes=10.0)))
    assert max(map(len, lines[:5])) <= 80
    for run, line in zip(runs, lines[3:5], strict=True):
        name, layer, lookup, _, llm, *_, scored = line.split()
        assert (name, layer, scored) == (run.name, "0", "6/6")
        assert float(llm) > 95
        key = next(key for key in Store.open(run).sets("score") if key.by_lookup and key.protocol == "top-and-random")
        whole = Store.open(run).scores(key).correlation
        assert float(lookup) == pytest.approx(100 * np.nanmean(whole), abs=0.06)
    assert any(f"neuron 0: {EXPLANATIONS[0]}" in line for line in lines)


def test_without_time_the_first_neurons_are_made(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with RuleServer() as server:
        sample = measured(runs, server, minutes=0.0)
    first = sorted(neurons_of_all(runs)[: timed_sample._FIRST])
    assert "2 neurons of each layer" in capsys.readouterr().err
    for work in sample.works:
        texts = work.store.texts(work.explained_keys[0])
        assert sorted(texts) == first


def test_a_model_that_cannot_simulate_only_explains(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with Server(lambda *_: Answer(completion("words about boats"))) as server:
        lines = list(sample_lines(measured(runs, server, minutes=0.0)))
    assert "so it only explains" in " ".join(capsys.readouterr().err.split())
    assert [line.split()[4:] for line in lines[3:5]] == [["-", "-", "-", "-", "0/2"]] * 2
    assert lines[5] == "the language model is not scored:"
    assert "cannot simulate" in lines[6]
    assert sum("words about boats" in line for line in lines) == 4


def test_a_model_that_copies_explains_nothing_and_the_reason_is_given(runs: list[Path]) -> None:
    copied = few_shot_neurons()[0].explanation
    with Server(lambda *_: Answer(completion(copied))) as server:
        lines = list(sample_lines(measured(runs, server, minutes=0.0)))
    assert lines[0] == "the language model explains nothing"
    assert max(map(len, lines)) <= 80


class CopiesInTheSecondRun(RuleServer):
    """Explains as `RuleServer`, until it is asked for an explanation again: every run has its cache."""

    copies = False

    def answer(self, path: str, body: Body) -> Answer:
        asked = json.dumps(body.get("messages"))
        if "Explanation of neuron" in asked:
            with self.lock:
                self.copies |= [json.dumps(earlier.get("messages")) for _, earlier in self.asked].count(asked) > 1
        if self.copies and path == "/v1/chat/completions":
            return Answer(completion(few_shot_neurons()[0].explanation))
        return super().answer(path, body)


def test_a_model_that_copies_in_the_second_run_explains_nothing(runs: list[Path]) -> None:
    with CopiesInTheSecondRun() as server:
        lines = list(sample_lines(measured(runs, server, minutes=0.0)))
    assert lines[0] == "the language model explains nothing"


def test_a_resumed_command_makes_no_more_neurons_than_fit_into_the_minutes(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RuleServer() as server:
        clock = SimpleNamespace(monotonic=lambda: float(len(server.asked)))  # a second for each request
        monkeypatch.setattr(timed_sample, "time", clock)
        measured(runs, server, minutes=0.1)
        asked = len(server.asked)
        measured(runs, server, minutes=0.1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "neuron of every layer takes" in line]
    assert lines == [lines[0]] * 2
    assert "2 neurons of each layer fit" in lines[0]
    assert len(server.asked) == asked


def test_without_a_model_two_commands_that_fetch_one_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--llm"]) == 0
    said = capsys.readouterr().out
    assert "hf download Qwen/" in said
    assert "cratelm demo --llm models/Qwen2.5-" in said
    assert not (tmp_path / "demo").exists()
    for memory, name in ((8e9, "0.5B"), (32e9, "1.5B")):
        pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(memory)}
        monkeypatch.setattr(timed_sample.os, "sysconf", pages.__getitem__)
        assert name in fetching_lines()[1]


@pytest.mark.parametrize("options", [["--llm", "./none"], ["--llm", "none.gguf"], ["--llm", "a", "b"]])
def test_a_missing_model_is_reported_before_anything_is_trained(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --llm must be")
    assert not (tmp_path / "demo").exists()


def test_the_demo_lists_the_stage_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--llm", "http://localhost:9/v1", "--minutes", "5", "--dry-run"]
    assert main(["demo", "--out", str(tmp_path / "demo"), *options]) == 0
    assert "7/8 explain and simulate with http://localhost:9/v1, 5 minutes" in capsys.readouterr().err
