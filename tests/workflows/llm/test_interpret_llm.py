"""The commands with a language model behind a server or in the process, from the command line to the tables."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.rule_server import RuleServer
from fixtures.planted_rules import EXPLANATIONS, make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from fakes.llm_server import Answer, Body, Server, completion

from cratelm.cli import main
from cratelm.interpretation.prompts import explainer as prompts
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.simulators import prompt_fitting as simulators
from cratelm.interpretation.simulators.self_test import puzzles
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey

TAR = ["--protocol", "random-only"]
KEY = SetKey(layer=0, protocol="random-only", explainer="rules", simulator="all-at-once:rules")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test writes into."""
    return make_planted(tmp_path_factory.mktemp("planted") / "crate-1l", np.random.default_rng(7))


@pytest.fixture
def run(planted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    import shutil

    return shutil.copytree(planted, tmp_path / "crate-1l")


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One solved neuron instead of three: what is asked costs a third, and nothing here is about that."""
    for module in (prompts, simulators):
        monkeypatch.setattr(module, "few_shot_neurons", lambda: few_shot_neurons()[:1])


@pytest.fixture
def server() -> Iterator[RuleServer]:
    with RuleServer() as one:
        yield one


def questions(server: Server) -> list[Body]:
    """What was asked about neurons: not the probe, not the self-test."""
    prompts = ((body, json.dumps(body)) for _, body in server.asked)
    return [body for body, prompt in prompts if "euron 2" in prompt and not puzzle(prompt)]


def by_model(run: Path) -> list[SetKey]:
    """What was scored of a language model's simulations."""
    return [key for key in Store.open(run).scored() if key.simulator]


def puzzle(prompt: str) -> bool:
    """Whether a prompt is of the self-test of simulators or explainers."""
    known = [(one.explanation, "\\n".join(map("{}\\t{}".format, one.tokens, one.activations))) for one in puzzles()]
    return any(re.search(rf"fires on {re.escape(a)}(?![ ,\w])", prompt) or table in prompt for a, table in known)


def test_interpret_with_a_server_finds_the_planted_rules(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--controls", "shuffled", "constant"]
    assert main(command) == 0
    message = capsys.readouterr()
    assert max(map(len, message.out.splitlines())) <= 80
    store = Store.open(run)
    assert store.texts(KEY) == dict(enumerate(EXPLANATIONS))
    scores, shuffled = (store.scores(replace(KEY, control=control)) for control in ("", "shuffled"))
    assert (scores.correlation > 0.95).all()
    assert np.nanmean(shuffled.correlation) < 0.2
    assert "explained by rules, simulated by all-at-once:rules" in message.out
    assert "control: constant explanations" in message.out
    assert "returns prompt logprobs" in message.err
    assert "self-test: mean correlation" in message.err
    tables = message.out[message.out.index("crate-1l (fixed mode") : message.out.index("\nasked:")]
    asked, everything = len(questions(server)), len(server.asked)
    assert 6 + 2 * 6 * 5 < asked <= 6 + 3 * 6 * 5, "what two neurons ask alike is asked once"
    assert main(command) == 0
    again = capsys.readouterr().out
    assert tables in again
    assert (len(questions(server)), len(server.asked)) == (asked, everything)
    assert main(["score", str(run), "--model", "rules", *TAR]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(["", *tables.splitlines()])
    assert len(questions(server)) == asked


def test_a_dry_run_prints_the_calls_and_makes_none(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), f"--llm={server.url}", *TAR, "--price-in=2", "--price-out=8", "--contrast=none"]
    assert main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert questions(server) == []
    assert not (run / "interpretation.sqlite").exists()
    calls = {line.split()[0]: line.split()[3] for line in plan.splitlines() if re.match(r"(explain|simulate) ", line)}
    assert calls == {"explain": "6", "simulate": "30"}
    assert "price" in plan
    assert max(map(len, plan.splitlines())) <= 80
    assert main(command) == 0
    assert len(questions(server)) == 36
    assert main([*command, "--dry-run"]) == 0
    done = [line.split()[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("explain ")]
    assert done[-1] == ["6", "6", "0"]


def test_the_stages_one_by_one_give_what_interpret_gives(run: Path, server: RuleServer) -> None:
    asked = ["--llm", server.url, *TAR, "--neurons", "3"]
    assert main(["explain", str(run), *asked]) == 0
    assert main(["simulate", str(run), *asked, "--controls", "shuffled"]) == 0
    assert main(["score", str(run), *asked, "--controls", "shuffled"]) == 0
    scores = Store.open(run).scores(KEY)
    assert scores.neuron.tolist() == [1, 3, 5]
    assert (scores.correlation > 0.95).all()


def test_lookup_explanations_can_be_simulated_by_a_language_model(run: Path, server: RuleServer) -> None:
    command = ["interpret", str(run), *TAR, "--explainer", "lookup", "--llm", server.url]
    assert main([*command, "--skip-lookup"]) == 0
    assert [key.simulator for key in Store.open(run).sets("simulate")] == ["all-at-once:rules"]


def test_several_explanations_of_each_neuron_are_separate_sets(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["interpret", str(run), "--llm", server.url, *TAR, "--samples", "2", "--neurons", "2"]) == 0
    assert "explanation 2" in capsys.readouterr().out
    assert {key.sample for key in by_model(run)} == {0, 1}
    seeds = {body.get("seed", 0) for body in questions(server) if "messages" in body}
    assert seeds == {0, 1}


def test_without_probabilities_a_chat_simulates_and_the_reason_is_printed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RuleServer(probabilities=False) as server:
        assert main(["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2"]) == 0
        message = capsys.readouterr().err
        assert "simulator: structured:rules (it returns no prompt logprobs, but answers chats)" in message
        asked = len(server.asked)
        assert main(["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2"]) == 0
        again = [line for line in message.splitlines() if not re.match("probe of|explainer self-test", line)]
        assert capsys.readouterr().err.splitlines() == again
        assert len(server.asked) == asked, "a second run asks nothing, not even what the model can"
        assert main(["simulate", str(run), "--llm", server.url, *TAR, "--simulator", "all-at-once"]) == 2
    assert "needs the probabilities of a prompt, and rules does not give them" in capsys.readouterr().err
    [key] = by_model(run)
    assert key.simulator == "structured:rules"
    assert (Store.open(run).scores(key).correlation > 0.9).all()


def test_the_other_scorers_are_asked_for_by_name(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--scorer", "detection", "intruder"]
    assert main([*command, "--controls", "shuffled"]) == 0
    printed = capsys.readouterr().out
    assert "crate-1l: detection (balanced accuracy, chance 50 %" in printed
    assert "control: shuffled explanations" in printed
    assert "crate-1l: intruder" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert Store.open(run).sets("simulate") == []
    assert "failed: intruder" in printed


def test_a_model_that_cannot_follow_the_format_is_given_up_with_what_it_said(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    from fixtures.synthetic import make_run

    def answer(_path: str, _body: Body) -> Answer:
        return Answer(completion("I am sorry, I only write poems."))

    run = make_run(tmp_path / "run", rng, layers=1, neurons=30)
    with Server(answer) as server:
        assert main(["explain", str(run), "--llm", server.url, *TAR]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: stopped: the first \d+ neurons got no usable answer\. The last one: refused:", message)
    assert "I only write poems" in message


def test_a_context_that_is_too_short_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RuleServer(context=300) as server:
        assert main(["explain", str(run), "--llm", server.url, *TAR]) == 2
        assert questions(server) == []
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: the explainer's prompt has")
    assert "too long for a context of 300" in message


def test_simulations_of_other_records_are_refused(
    run: Path, server: RuleServer, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert main(["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2"]) == 0
    shutil.rmtree(run / "records")
    make_planted(run, rng)
    assert main(["score", str(run), "--model", "rules", *TAR]) == 2
    assert "come from other records than" in capsys.readouterr().err
    asked = len(questions(server))
    assert main(["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2"]) == 0
    assert len(questions(server)) > asked


MISTAKES = [
    (["--llm", "http://127.0.0.1:9/v1"], "no server can be reached at http://127.0.0.1:9/v1"),
    (["--llm", "URL", "--model", "other"], "does not serve other (it serves: rules)"),
    (["--llm", "URL", "--controls", "swapped"], "there is no control 'swapped'. Use: shuffled, constant"),
    (["--llm", "URL", "--scorer", "guessing"], "got 'guessing'"),
    (["--llm", "URL", "--neurons", "0-99"], "has neurons 0 to 5, not 99"),
    (["--llm", "URL", "--samples", "2", "--temperature", "0"], "the same explanation every time"),
    (["--llm", "URL", "--part", "3/2"], "got '3/2'"),
    (["--llm", "URL", "--budget-price", "1"], "use --price-in and --price-out"),
    (["--explainer", "llm"], "--explainer llm needs a language model"),
    (["--scorer", "detection"], "the scorer detection asks a language model"),
]
NUMBERS = [
    ["--samples", "0"], ["--samples", "-1"], ["--neuron-seed", "-1", "--neurons", "2"], ["--temperature", "nan"],
    ["--temperature", "-3"], ["--temperature", "inf"], ["--budget-tokens", "-5"], ["--budget-tokens", "0"],
    ["--price-in", "-3"], ["--price-out", "nan"], ["--budget-price", "-1", "--price-in", "1"], ["--in-flight", "0"],
]  # fmt: skip
NOT_THERE = [
    (["--neurons", "-5"], "--neurons must be all, a number or indices, got '-5'"),
    (["--neurons", "99-100"], "has neurons 0 to 5, not 100"),
    (["--neurons", "0"], "--neurons must be at least 1, got 0"),
    (["--protocol", "bogus"], "bogus"),
    (["--layer", "7"], "--layer must be one with fixed records"),
    (["--explainer", "lookup", "--part", "1/2"], "interpretation.sqlite is not there"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_is_reported_in_one_line(
    options: list[str], message: str, run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [server.url if option == "URL" else option for option in options]
    assert main(["interpret", str(run), *TAR, *named]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    assert questions(server) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [*((options, f"{options[0]} must be ") for options in NUMBERS), *NOT_THERE],
)
def test_invalid_options_are_refused_before_the_first_request(
    options: list[str], message: str, run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["interpret", str(run), *TAR, "--llm", server.url, *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
    assert server.asked == []


def test_parts_are_merged_into_what_one_process_makes(
    run: Path, planted: Path, server: RuleServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    alone = shutil.copytree(planted, tmp_path / "alone")
    command = ["--llm", server.url, *TAR, "--neurons", "4"]
    assert main(["interpret", str(alone), *command]) == 0
    for number in (1, 2):
        assert main(["interpret", str(run), *command, "--part", f"{number}/2"]) == 0
    assert not (run / "interpretation.sqlite").exists()
    asked = len(questions(server))
    capsys.readouterr()
    assert main(["interpret", str(run), "--merge", *command]) == 0
    printed = capsys.readouterr().out
    assert "merged parts 1, 2: 8 new rows, 0 failures" in printed
    assert len(questions(server)) == asked
    np.testing.assert_array_equal(Store.open(run).scores(KEY).correlation, Store.open(alone).scores(KEY).correlation)
    assert set(Store.open(run).scored()) == set(Store.open(alone).scored()), "lookup is scored there too"
    assert main(["interpret", str(run), "--merge"]) == 0
    assert "explained by rules" in capsys.readouterr().out


def test_a_budget_stops_cleanly_and_a_larger_budget_resumes(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "3", "--in-flight", "1"]
    assert main([*command, "--budget-tokens", "30000"]) == 2
    assert "the budget is spent" in capsys.readouterr().err
    assert 0 < len(questions(server)) < 18
    assert main(command) == 0
    assert len(questions(server)) == 18


def test_a_model_in_this_process_that_is_random_is_refused_unless_asked_otherwise(
    run: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    from fakes.language_models import make_llm

    llm = make_llm(rng)
    folder = tmp_path / "random"
    llm.reader.model.float().save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    capsys.readouterr()
    lookup = ["--explainer", "lookup", *TAR, "--neurons", "2", "--contrast", "none"]
    assert main(["explain", str(run), *TAR]) == 0
    assert main(["simulate", str(run), "--llm", str(folder), *lookup]) == 2
    message = capsys.readouterr().err
    assert "error: all-at-once:random cannot simulate: on 6 obvious neurons" in message
    assert Store.open(run).sets("simulate") == []
    assert main(["interpret", str(run), "--llm", str(folder), *lookup, "--skip-self-test"]) == 0
    assert "its scores are not meaningful" in capsys.readouterr().err
    [key] = by_model(run)
    assert (key.explainer, key.simulator) == ("lookup", "all-at-once:random")
    assert len(Store.open(run).scores(key).neuron) == 2


def test_calibration_has_separate_excerpts_that_the_plan_counts(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons=1", "--calibrate=linear", "--contrast=none"]
    assert main([*command, "--dry-run"]) == 0
    [planned] = [line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("simulate ")]
    assert main(command) == 0
    assert len(questions(server)) == 1 + int(planned)
    [key] = by_model(run)
    assert key.simulator == "all-at-once+linear:rules"
    scores = Store.open(run).scores(key)
    assert scores.correlation[0] > 0.95
    assert scores.r_squared[0] > 0.9, "the activations are not in the neuron's own units"


def test_a_budget_of_one_token_pays_for_the_probe_alone(run: Path, server: RuleServer, capsys: Any) -> None:
    assert main(["interpret", str(run), "--llm", server.url, *TAR, "--budget-tokens", "1"]) == 2
    assert re.search("probe of rules: 1 call.*the budget is spent", capsys.readouterr().err, re.DOTALL)
    assert len(server.asked) == 1
