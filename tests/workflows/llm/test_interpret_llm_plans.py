"""Commands that ask a language model: their plans, lookup next to them, and unusual models, end to end."""

import asyncio
import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.rule_follower import RuleFollower
from fakes.rule_server import RuleServer
from fixtures.planted_rules import EXPLANATIONS, make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from workflows.llm.test_interpret_llm import TAR, puzzle, questions

from cratelm.cli import main
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.llm import Message, Prompt, Sampling
from cratelm.interpretation.prompts import explainer as prompts
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.simulators import prompt_fitting as simulators
from cratelm.interpretation.simulators.contrastive import Contrastive
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.stages.estimate import Cost, CountingLLM, estimated_seconds
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.workflows.llm import plan
from cratelm.workflows.llm.plan import time_trial


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_planted(tmp_path / "crate-1l", np.random.default_rng(7))


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One solved neuron instead of three: what is asked costs a third, and nothing here is about that."""
    for module in (prompts, simulators):
        monkeypatch.setattr(module, "few_shot_neurons", lambda: few_shot_neurons()[:1])


@pytest.fixture
def server() -> Iterator[RuleServer]:
    with RuleServer() as one:
        yield one


def by_model(keys: list[SetKey]) -> list[SetKey]:
    """Those that a language model simulated."""
    return [key for key in keys if key.simulator]


def planned(message: str) -> dict[str, list[str]]:
    """Stage -> neurons, those that are there, and calls, of the plan that was printed last."""
    lines = message[message.rindex("stage ") :].splitlines()
    return {line.split()[0]: line.split()[1:4] for line in lines if re.match(r"(explain|simulate) ", line)}


def test_a_plan_counts_as_there_only_what_was_made_with_these_settings(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "3"]
    assert main(command) == 0
    assert main([*command, "--dry-run"]) == 0
    assert planned(capsys.readouterr().out) == {"explain": ["3", "3", "0"], "simulate": ["3", "3", "0"]}
    assert main([*command, "--calibrate", "linear", "--dry-run"]) == 0
    assert planned(capsys.readouterr().out)["explain"] == ["3", "3", "0"]
    warmer = [*command, "--temperature", "0.5"]
    assert main([*warmer, "--dry-run"]) == 0
    result = planned(capsys.readouterr().out)
    assert result["explain"] == ["3", "0", "3"]
    assert result["simulate"][:2] == ["3", "0"]
    before = len(questions(server))
    assert main(warmer) == 0
    assert len(questions(server)) == before + 3, "the same explanations: their simulations are in the cache"
    assert main([*warmer, "--dry-run"]) == 0
    assert planned(capsys.readouterr().out) == {"explain": ["3", "3", "0"], "simulate": ["3", "3", "0"]}


def test_a_plan_counts_what_will_really_be_asked(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protocols share excerpts and explanations, controls have their own: what is asked twice is counted once."""
    command = ["interpret", str(run), "--llm", server.url, "--protocol", "top-and-random", "random-only"]
    command += ["--controls", "shuffled", "constant", "--neurons", "2", "--scorer", "simulation", "detection"]
    command.append("--contrast=none")
    assert main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert questions(server) == []
    assert main(command) == 0
    asked = questions(server)
    total = re.search(r"^in all +\S+ +\S+ +(\d+) ", printed, re.M)
    assert total is not None
    judged = sum("Pieces:" in json.dumps(body) for _, body in server.asked)
    assert judged > 0
    assert int(total[1]) == len(asked) + judged
    assert re.search(r"^\d+ duplicate calls skipped$", printed, re.M)
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    assert planned(capsys.readouterr().out)["explain"] == ["4", "4", "0"]


def test_a_plan_counts_a_request_for_each_next_token_and_what_the_server_computes_of_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RuleServer(probabilities=False, next_token=True) as server:
        command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "1", "--contrast", "none"]
        assert main([*command, "--dry-run"]) == 0
        said = capsys.readouterr()
        assert "simulator: next-token:rules (it returns candidates of the next token" in " ".join(said.err.split())
        line = re.search(r"^simulate +1 +0 +(\d+) +(\S+)k +(\S+)k", said.out, re.M)
        assert line is not None
        assert questions(server) == []
        assert main(command) == 0
        asked = [body for body in questions(server) if "prompt" in body]
        assert len(asked) == int(line[1]) == len({body["prompt"] for body in asked}) > 100
        assert float(line[3]) > 0.9 * float(line[2]), "almost all tokens are those of the request before"
        assert main(command) == 0
        assert len([body for body in questions(server) if "prompt" in body]) == len(asked)


def test_a_plan_expects_the_likely_tokens_and_a_budget_the_possible_ones(tmp_path: Path) -> None:
    endpoint = Endpoint("http://localhost:1/v1", "x")
    text = "a" * 1000
    assert endpoint.expected(text) == endpoint.count(text) == 1000, "nothing is known yet: a token for each byte"
    endpoint.tokens_per_byte = 0.4
    assert (endpoint.expected(text), endpoint.count(text)) == (400, 500)
    counting = CountingLLM(Cached(endpoint, Store(tmp_path)), Store(tmp_path))
    asyncio.run(counting.prompt_logprobs([Prompt(prefix=text, rest=text), Prompt(prefix=text, rest=text)]))
    assert counting.cost == Cost(calls=1, read=800, computed=800, duplicates=1)


def test_a_beginning_that_chats_share_is_computed_once_for_all_neurons(tmp_path: Path) -> None:
    endpoint, total = Endpoint("http://localhost:1/v1", "x", counter=len), Cost()
    counting, longest = CountingLLM(endpoint, Store(tmp_path)), Sampling(max_tokens=5)
    for number in range(4):
        asyncio.run(counting.chat([Message("system", "a" * 92), Message("user", f"{number}")], longest))
    assert counting.cost == Cost(calls=4, read=4 * 109, computed=100 + 4 * 9, once=100, written=20)
    total.add(counting.cost, 10.0)
    assert total == Cost(calls=40, read=4360, computed=100 + 360, once=100, written=200)


def test_a_slow_trial_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower, cost = RuleFollower(), Cost(calls=100, read=1000, computed=1000)
    simulator = asyncio.run(open_simulator("all-at-once", follower))
    excerpts = list[int]()

    async def counted(prompts: list[Prompt], *, top: int = 15) -> Any:
        excerpts.append(len(prompts))
        return await RuleFollower.prompt_logprobs(follower, prompts, top=top)

    monkeypatch.setattr(follower, "prompt_logprobs", counted)
    for limit, expected in ((0.0, [1]), (1000.0, [1, 8])):
        excerpts.clear()
        monkeypatch.setattr(plan, "LONGEST_TRIAL", limit)
        assert asyncio.run(time_trial(simulator, Store(tmp_path), 32, cost)).startswith("time: about")
        assert excerpts == expected


@pytest.mark.parametrize("method", ["all-at-once", "next-token"])
def test_a_contrast_of_a_model_in_this_process_is_timed(method: str, tmp_path: Path) -> None:
    simulator = Contrastive(inner=asyncio.run(open_simulator(method, RuleFollower())))
    cost = Cost(calls=100, read=1000, computed=1000)
    assert asyncio.run(time_trial(simulator, Store(tmp_path), 32, cost)).startswith("time: about")


def test_a_plan_says_how_long_it_takes_by_trying_some_simulations(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--dry-run", "--contrast", "none"]
    server.next_token = True
    for method, count in (("all-at-once", 8), ("token-by-token", 8), ("next-token", 8), ("structured", 8)):
        before = len(server.asked)
        assert main([*command, "--simulator", method]) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^time: about \S+ \S+, as one call took \S+ s now and {count} at once \S+ s$", printed, re.M)
        assert questions(server) == []
        longest = max(len(json.dumps(body)) for _, body in server.asked[before:])
        assert longest > (1000 if method == "structured" else 1500), "as long as those of the work"
    assert main([*command, "--in-flight", "1"]) == 0
    assert "and 1 at once" in capsys.readouterr().out
    with RuleServer(context=500) as short:
        assert main(["interpret", str(run), "--llm", short.url, *TAR, "--dry-run"]) == 2
    assert (
        "time: unknown, because a simulation that was tried failed: the simulator's prompt" in capsys.readouterr().out
    )


def test_the_time_of_a_plan_follows_from_a_trial() -> None:
    cost = Cost(calls=960, read=60_000, computed=30_000, written=6_000)
    trial = Cost(calls=8, read=2000, computed=1000)

    def seconds(alone: float, together: float, in_flight: int, cost: Cost = cost, *, remote: bool = True) -> float:
        return estimated_seconds(
            cost, alone=alone, together=together, trial=trial, in_flight=in_flight, remote=remote
        )  # fmt: skip

    assert [seconds(0.5, 0.5, in_flight) for in_flight in (32, 8, 1, 100_000)] == [15, 60, 480, 0.5]
    assert [seconds(0.5, 4.0, in_flight) for in_flight in (32, 100_000)] == [480, 480], "a server that takes turns"
    assert seconds(0.5, 4.0, 32, Cost(calls=1)) == 0.5, "never less than one call"
    assert seconds(0.1, 0.5, 32, remote=False) == 18, "a model in this process computes 2,000 tokens a second"


def test_a_plan_says_what_a_short_context_leaves_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {}
    for context in (8192, 1800, 1600):
        with RuleServer(context=context) as server:
            assert main(["interpret", str(run), "--llm", server.url, *TAR, "--dry-run"]) == 0
        printed = re.search(r"prompts leave out up to (\d) of 6 few-shot excerpts", capsys.readouterr().out)
        result[context] = int(printed[1]) if printed else 0
    assert result[8192] == 0 < result[1800] <= result[1600] == 2, result


def test_a_plan_in_which_no_prompt_fits_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RuleServer(context=700) as server:
        for more in ([], ["--dry-run"]):
            command = ["interpret", str(run), "--llm", server.url, *TAR, "--skip-self-test", *more]
            assert main(command) == 2
            message = " ".join(capsys.readouterr().err.split())
            assert re.search(r"error: the \w+'s prompt has .* too long for a context of 700\.", message), message


def test_what_is_whole_is_scored_and_the_rest_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RuleServer() as server:
        asked = ["interpret", str(run), "--llm", server.url, "--neurons", "3", "--skip-lookup"]
        assert main([*asked, "--protocol", "random-only", "--controls", "constant"]) == 0
        assert main([*asked, "--protocol", "anthropic"]) == 0
    capsys.readouterr()
    assert main(["score", str(run), "--model", "rules"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("anthropic") == 2
    assert "own explanations by top-and-random" in printed
    assert "constant by anthropic" in printed
    assert main(["score", str(run), "--model", "rules", "--protocol", "top-and-random"]) == 2
    assert "top-and-random simulations of layer 0" in capsys.readouterr().err


def test_interpret_makes_the_lookup_explanations_that_a_language_model_simulates(
    run: Path, server: RuleServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--simulator-llm", server.url, *TAR]
    parted = shutil.copytree(run, tmp_path / "parted")
    assert main(["interpret", str(run), *command, "--dry-run"]) == 0
    assert not (run / "interpretation.sqlite").exists()
    assert main(["interpret", str(run), *command]) == 0
    assert "explained by lookup, simulated by all-at-once:rules" in capsys.readouterr().out
    [key] = by_model(Store.open(run).scored())
    assert main(["explain", str(parted), *TAR]) == 0
    for number in (1, 2):
        assert main(["interpret", str(parted), *command, "--part", f"{number}/2"]) == 0
    assert main(["interpret", str(parted), *command, "--merge"]) == 0
    np.testing.assert_array_equal(Store.open(parted).scores(key).correlation, Store.open(run).scores(key).correlation)


def test_controls_of_parts_wait_for_the_merge(
    run: Path, server: RuleServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(run, tmp_path / "alone")
    command = ["--llm", server.url, *TAR, "--neurons", "4", "--controls", "shuffled"]
    for number in (1, 2):
        assert main(["interpret", str(run), *command, "--part", f"{number}/2"]) == 0
        message = " ".join(capsys.readouterr().err.split())
        assert "the controls shuffled need the explanations of all parts" in message
        assert f"merge first (cratelm interpret {run} --merge), then run the same command" in message
    assert main(["interpret", str(run), "--merge"]) == 0
    for number in (1, 2):
        assert main(["interpret", str(run), *command, "--part", f"{number}/2"]) == 0
        assert "merge first" not in capsys.readouterr().err
    before = len(questions(server))
    assert main(["interpret", str(run), *command, "--merge"]) == 0
    assert len(questions(server)) == before
    assert main(["interpret", str(alone), *command]) == 0
    key = next(key for key in Store.open(alone).scored() if key.control)
    np.testing.assert_array_equal(Store.open(run).scores(key).correlation, Store.open(alone).scores(key).correlation)


def test_a_model_without_a_system_role_explains_and_simulates(run: Path) -> None:
    with RuleServer(probabilities=False, system=False) as server:
        assert main(["interpret", str(run), "--llm", server.url, *TAR]) == 0
        read = [body["messages"] for body in questions(server) if body["messages"][0]["role"] == "user"]
    store = Store.open(run)
    [key] = by_model(store.scored())
    assert store.texts(key.explained) == dict(enumerate(EXPLANATIONS))
    assert (store.scores(key).correlation > 0.95).all()
    assert len(read) == 6
    assert all(messages[0]["content"].startswith("Each neuron of a language model") for messages in read)


def test_the_rounding_of_prompts_is_a_separate_switch_and_set(
    tmp_path: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, own, other, name in (("compat", "down", "up", "rounded-up"), ("fixed", "up", "down", "rounded-down")):
        run = make_planted(tmp_path / mode, np.random.default_rng(7), mode=mode)  # type: ignore[arg-type]
        command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2", "--mode", mode]
        asked = {}
        for way in ("auto", own, other):
            first = len(explained_with(server))
            assert main([*command, "--rounding", way]) == 0
            asked[way] = explained_with(server)[first:]
        assert asked[own] == [], "auto is the mode's own"
        assert len(asked["auto"]) == len(asked[other]) == 2
        assert set(asked["auto"]).isdisjoint(asked[other])
        assert {key.explainer for key in by_model(Store.open(run).scored())} == {"rules", f"rules+{name}"}
        [key] = [key for key in by_model(Store.open(run).scored()) if "+" in key.explainer]
        assert f"--llm URL --model rules --rounding {other}" in key.command("interpret", run)
        capsys.readouterr()
        assert main(["score", str(run), "--model", "rules", "--rounding", other, *TAR, "--mode", mode]) == 0
        assert f"explained by rules+{name}" in capsys.readouterr().out


def explained_with(server: RuleServer) -> list[str]:
    """The last turns of the questions for explanations of the run's neurons."""
    chats = [body["messages"][-1]["content"] for _, body in server.asked if "messages" in body]
    return [text for text in chats if text.endswith("this neuron fires on") and not puzzle(json.dumps(text))]


@pytest.mark.usefixtures("quick_report")
def test_lookup_and_its_control_are_scored_on_the_same_neurons_as_the_model(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "3"]
    assert main([*command, "--skip-lookup"]) == 0
    assert Store.open(run).scored() == by_model(Store.open(run).scored())
    assert main(["report", str(run), "--out", str(run / "without")]) == 0
    assert "A dash under lookup: not made" in (run / "without" / "explainers.md").read_text()
    asked = len(questions(server))
    assert main(command) == 0
    assert len(questions(server)) == asked
    others = [key for key in Store.open(run).scored() if not key.simulator]
    assert [(key.protocol, key.control) for key in others] == [("random-only", ""), ("random-only", "shuffled")]
    capsys.readouterr()
    assert main(command) == 0, "a second time it is all there"
    assert "exist already" not in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "with")]) == 0
    rows = list(csv.DictReader((run / "with" / "explainers.csv").read_text().splitlines()))
    assert [row["Explained by"] for row in rows] == ["lookup", "rules"]
    same = [1, 3, 5]
    lookup = 100 * float(np.nanmean(Store.open(run).read_scores(0, "random-only").correlation[same]))
    assert float(rows[1]["Lookup, same neurons (points)"]) == pytest.approx(lookup, abs=0.06)
    assert rows[0]["Shuffled (points)"]
    assert rows[1]["Failed"] == "0"
    assert "explained by rules" in (run / "with" / "report.html").read_text(), "the page is about the model"
