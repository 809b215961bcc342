"""Commands that ask a language model: their plans, lookup beside them, and models that are not as usual, end to end."""

import asyncio
import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fakes.rule_server import RuleServer
from fixtures.planted_rules import EXPLANATIONS, make_planted

pytest.importorskip("openai", reason="openai is not installed (extra llm)")

from workflows.llm.test_interpret_llm import TAR, questions

from cratelm.cli import main
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.llm import Prompt
from cratelm.interpretation.prompts import explainer as prompts
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.simulators import prompt_fitting as simulators
from cratelm.interpretation.stages.estimate import Asked, CountingLLM
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import begun
from cratelm.interpretation.store.schema import SetKey
from cratelm.workflows.llm.pace import Pace


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


def planned(said: str) -> dict[str, list[str]]:
    """Stage -> neurons, those that are there, and calls, of the plan that was printed last."""
    lines = said[said.rindex("stage ") :].splitlines()
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
    found = planned(capsys.readouterr().out)
    assert found["explain"] == ["3", "0", "3"]
    assert found["simulate"][:2] == ["3", "0"]
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
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert questions(server) == []
    assert main(command) == 0
    asked = questions(server)
    total = re.search(r"^in all +\S+ +\S+ +(\d+) ", said, re.M)
    assert total is not None
    judged = sum("Pieces:" in json.dumps(body) for _, body in server.asked)
    assert judged > 0
    assert int(total[1]) == len(asked) + judged
    assert re.search(r"^\d+ duplicate calls skipped$", said, re.M)
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    assert planned(capsys.readouterr().out)["explain"] == ["4", "4", "0"]


def test_a_plan_expects_the_likely_tokens_and_a_budget_the_possible_ones(tmp_path: Path) -> None:
    endpoint = Endpoint("http://localhost:1/v1", "x")
    text = "a" * 1000
    assert endpoint.expected(text) == endpoint.count(text) == 1000, "nothing is known yet: a token for each byte"
    endpoint.tokens_per_byte = 0.4
    assert (endpoint.expected(text), endpoint.count(text)) == (400, 500)
    counting = CountingLLM(Cached(endpoint, Store(tmp_path)), Store(tmp_path))
    asyncio.run(counting.prompt_logprobs([Prompt(prefix=text, rest=text), Prompt(prefix=text, rest=text)]))
    assert counting.asked == Asked(calls=1, read=800, computed=800, again=1)


def test_a_plan_says_how_long_it_takes_by_trying_some_simulations(
    run: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--dry-run"]
    for method, count in (("all-at-once", 8), ("token-by-token", 8), ("structured", 8)):
        before = len(server.asked)
        assert main([*command, "--simulator", method]) == 0
        said = capsys.readouterr().out
        assert re.search(rf"^time: about \S+ \S+, as one call took \S+ s now and {count} at once \S+ s$", said, re.M)
        assert questions(server) == []
        longest = max(len(json.dumps(body)) for _, body in server.asked[before:])
        assert longest > (1000 if method == "structured" else 1500), "as long as those of the work"
    assert main([*command, "--in-flight", "1"]) == 0
    assert "and 1 at once" in capsys.readouterr().out
    asked = Asked(calls=960, read=60_000, computed=30_000, written=6_000)
    pace = Pace(alone=0.5, together=0.5, calls=8, tokens=1000, here=False)
    assert [pace.seconds(asked, one) for one in (32, 8, 1, 100_000)] == [15, 60, 480, 0.5]
    busy = Pace(alone=0.5, together=4.0, calls=8, tokens=1000, here=False)
    assert [busy.seconds(asked, one) for one in (32, 100_000)] == [480, 480], "one after the other, however many wait"
    assert busy.seconds(Asked(calls=1), 32) == 0.5
    here = Pace(alone=0.1, together=0.5, calls=4, tokens=1000, here=True)
    assert here.line(asked, 32) == "time: about 18 seconds, at 2k tokens a second"
    with RuleServer(context=500) as short:
        assert main(["interpret", str(run), "--llm", short.url, *TAR, "--dry-run"]) == 2
    assert (
        "time: unknown, because a simulation that was tried failed: the simulator's prompt" in capsys.readouterr().out
    )


def test_a_plan_says_what_a_short_context_leaves_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for context in (8192, 1800, 1600):
        with RuleServer(context=context) as server:
            assert main(["interpret", str(run), "--llm", server.url, *TAR, "--dry-run"]) == 0
        said = re.search(r"prompts leave out up to (\d) of 6 few-shot excerpts", capsys.readouterr().out)
        found[context] = int(said[1]) if said else 0
    assert found[8192] == 0 < found[1800] <= found[1600] == 2, found


def test_a_plan_in_which_no_prompt_fits_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RuleServer(context=700) as server:
        for more in ([], ["--dry-run"]):
            command = ["interpret", str(run), "--llm", server.url, *TAR, "--skip-self-test", *more]
            assert main(command) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert re.search(r"error: the \w+'s prompt has .* too long for a context of 700\.", said), said


def test_what_is_whole_is_scored_and_the_rest_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RuleServer() as server:
        asked = ["interpret", str(run), "--llm", server.url, "--neurons", "3", "--skip-lookup"]
        assert main([*asked, "--protocol", "random-only", "--controls", "constant"]) == 0
        assert main([*asked, "--protocol", "anthropic"]) == 0
    capsys.readouterr()
    assert main(["score", str(run), "--model", "rules"]) == 0
    said = capsys.readouterr().out
    assert said.count("anthropic") == 2
    assert "own explanations by top-and-random" in said
    assert "constant by anthropic" in said
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
        said = " ".join(capsys.readouterr().err.split())
        assert "the controls shuffled need the explanations of all parts" in said
        assert f"merge first (cratelm interpret {run} --merge), then run the same command" in said
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


def test_each_flaw_of_the_released_read_out_can_be_left_out_alone(
    tmp_path: Path, server: RuleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_planted(tmp_path / "compat", np.random.default_rng(7), mode="compat")
    command = ["interpret", str(run), "--llm", server.url, *TAR, "--neurons", "2"]
    assert main([*command, "--read-out-repair", "spaced-numbers"]) == 2
    assert "--read-out-repair is for --mode compat" in capsys.readouterr().err
    command += ["--mode", "compat"]
    assert main([*command, "--read-out-repair", "all"]) == 2
    assert "there is no repair 'all' of the read-out. Use: fifteen-candidates, " in capsys.readouterr().err
    found = {}
    for repairs in ([], ["spaced-numbers"], ["fifteen-candidates", "escaped-tokens"]):
        before = set(Store.open(run).sets("simulate")) if repairs else set()
        assert main([*command, *(["--read-out-repair", *repairs] if repairs else [])]) == 0
        [key] = set(by_model(Store.open(run).sets("simulate"))) - before
        with Store.open(run).transaction() as connection:
            had = begun(connection, key, "simulate")
        told = json.loads(had.settings) if had else {}
        found[key.simulator] = (told["candidates"], told["spaces"], told["escaped"])
    assert found == {
        "all-at-once:rules": (5, False, False), "all-at-once+spaced-numbers:rules": (5, True, False),
        "all-at-once+fifteen-candidates+escaped-tokens:rules": (15, False, True),
    }  # fmt: skip
    assert explainers_table(run, tmp_path) >= {("rules", name) for name in found}


def explainers_table(run: Path, folder: Path) -> set[tuple[str, str]]:
    """Explainer and simulator of each row of the report's table that sets them side by side."""
    assert main(["report", str(run), "--mode", "compat", "--out", str(folder / "report")]) == 0
    with (folder / "report" / "explainers.csv").open(encoding="utf-8") as file:
        return {(row["Explained by"], row["Simulated by"]) for row in csv.DictReader(file)}


def test_the_rounding_of_prompts_is_switched_by_itself_and_kept_beside(
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
    """The last turns of the questions for explanations."""
    chats = [body["messages"][-1]["content"] for _, body in server.asked if "messages" in body]
    return [text for text in chats if text.endswith("this neuron fires on")]


def test_lookup_and_its_control_stand_beside_the_model_on_the_same_neurons(
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
    assert "there already" not in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "with")]) == 0
    rows = list(csv.DictReader((run / "with" / "explainers.csv").read_text().splitlines()))
    assert [row["Explained by"] for row in rows] == ["lookup", "rules"]
    same = [1, 3, 5]
    lookup = 100 * float(np.nanmean(Store.open(run).read_scores(0, "random-only").correlation[same]))
    assert float(rows[1]["Lookup, same neurons (points)"]) == pytest.approx(lookup, abs=0.06)
    assert rows[0]["Shuffled (points)"]
    assert rows[1]["Failed"] == "0"
    assert "explained by rules" in (run / "with" / "report.html").read_text(), "the page is about the model"
