"""`--explainer-prompt auto`: which prompt a model gets, and that stores keep theirs."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.rule_follower import RULES, RuleFollower
from fakes.rule_server import RuleServer
from fixtures.planted_rules import make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from fakes.llm_server import Answer, Body, completion
from workflows.llm.test_interpret_llm import puzzle

from cratelm.cli import main
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.simulators import self_test
from cratelm.interpretation.store.database import Store
from cratelm.workflows.llm import run_work
from cratelm.workflows.llm.opening import needs_compact

CONTEXT = 500
"""Tokens: enough for the compact prompt of the self-test alone."""
TAR = ["--protocol", "random-only", "--neurons", "3"]


class Copying(RuleServer):
    """Copies a few-shot example whenever it is shown one, and understands the compact prompt."""

    def answer(self, path: str, body: Body) -> Answer:
        asked = body["messages"][-1]["content"] if path.endswith("/chat/completions") else ""
        if "Explanation of neuron" in asked:
            word = re.findall(r"^(.*)\t10$", asked, flags=re.MULTILINE)[0]
            return Answer(completion(f" the word '{word}' and the end of the comparison that it opens."))
        if "Begin with: The neuron fires on" in asked:
            return Answer(completion(f"The neuron fires on {rule_of_listed(asked)}."))
        return super().answer(path, body)


def rule_of_listed(question: str) -> str:
    """The rule that fires on the listed tokens best."""
    listed = question.partition("strength from 1 to 10:\n")[2].partition("\n")[0]
    pairs = [(token, int(value)) for token, value in re.findall(r'"(.*?)" (\d+)(?:, |$)', listed)]
    return max(RULES, key=lambda text: sum(value for token, value in pairs if RULES[text]([token], 0) > 0))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_planted(tmp_path / "crate-1l", np.random.default_rng(7))


@pytest.fixture
def server() -> Iterator[RuleServer]:
    with Copying() as copying:
        yield copying


def test_a_model_that_copies_examples_gets_the_compact_prompt_and_keeps_it(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR]
    assert main(command) == 0
    assert "explainer self-test: 0 copied and 0 failed of 6 obvious neurons" in capsys.readouterr().err
    [key] = [key for key in Store.open(run).scored() if key.simulator]
    assert (key.explainer, key.simulator) == ("rules+compact", "all-at-once:rules")
    assert not any("comparison" in text for text in Store.open(run).texts(key.explained).values())
    asked = len(server.asked)
    assert main(command) == 0
    assert main(["score", str(run), "--model", "rules", *TAR]) == 0
    assert "rules+compact" in capsys.readouterr().out
    assert len(server.asked) == asked


def test_a_table_asked_for_by_name_is_refused_to_a_model_that_copies(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explain", str(run), "--llm", server.url, *TAR, "--explainer-prompt", "table"]
    assert main(command) == 2
    assert "rules cannot explain: 6 of its 6 explanations of obvious neurons repeat" in capsys.readouterr().err
    assert main([*command, "--skip-self-test"]) == 0
    printed = capsys.readouterr()
    assert "6 copied and 0 failed of 6 obvious neurons: used because of --skip-self-test" in printed.err
    assert "copied: 3 of 3 explanations of crate-1l share 5 consecutive words" in printed.out
    [key] = Store.open(run).sets("explain")[-1:]
    assert key.explainer == "rules"
    assert main(["explain", str(run), "--llm", server.url, *TAR, "--skip-self-test"]) == 0
    assert {key.explainer for key in Store.open(run).sets("explain")} == {"rules"}, "the store's prompt is kept"


def test_a_model_that_does_not_copy_keeps_the_table(run: Path) -> None:
    with RuleServer() as server:
        assert main(["explain", str(run), "--llm", server.url, *TAR]) == 0
    assert {key.explainer for key in Store.open(run).sets("explain")} == {"rules"}


def test_a_dry_run_asks_no_self_test(
    run: Path, server: RuleServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def no_time(*_: object) -> str:
        return ""

    monkeypatch.setattr(self_test, "_DONE", {})
    monkeypatch.setattr(run_work, "time_trial", no_time)
    command = ["interpret", str(run), "--llm", server.url, *TAR]
    assert main([*command, "--dry-run"]) == 0
    assert "the self-test decides about --contrast in the run" in capsys.readouterr().err
    assert not [body for _, body in server.asked if puzzle(json.dumps(body))]
    assert main(command) == 0
    assert [body for _, body in server.asked if puzzle(json.dumps(body))]


def test_a_context_that_is_too_short_for_the_table_gets_the_compact_prompt(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for context, compact in ((400, True), (8000, False)):
        explainer = LLMExplainer(llm=RuleFollower(context=context), settings=explainer_settings("fixed"), strings=())
        assert asyncio.run(needs_compact(explainer, ask=False)) == compact
    with Copying(context=CONTEXT) as server:
        for more in (["--dry-run"], []):
            assert main(["explain", str(run), *TAR, "--llm", server.url, *more]) == 2
            message = " ".join(capsys.readouterr().err.split())
            assert "too long for a context of" in message
            assert "without any example" not in message, "the table is too long already"
