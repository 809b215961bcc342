"""The self-test of simulators, and the calibration of what they predict."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.rule_follower import RuleFollower
from fixtures.planted_rules import make_planted
from fixtures.synthetic import make_run

from cratelm.activations.records import Mode, read_records
from cratelm.errors import CrateError
from cratelm.interpretation.llm import Message, Reply, Sampling
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.protocols import PROTOCOLS, draw, protocol
from cratelm.interpretation.scoring.correlation import compare
from cratelm.interpretation.simulators import self_test
from cratelm.interpretation.simulators.calibration import calibrated, calibration_excerpts
from cratelm.interpretation.simulators.opening import METHODS, open_simulator
from cratelm.interpretation.simulators.self_test import THRESHOLD, puzzles, require_self_test
from cratelm.interpretation.simulators.structured import Structured
from cratelm.interpretation.store.identities import CalibrationMethod


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_DONE", {})


def test_puzzles_are_whole() -> None:
    for puzzle in puzzles():
        assert len(puzzle.tokens) == len(puzzle.activations)
        assert max(puzzle.activations) == 10
        assert 0.1 < np.mean(np.array(puzzle.activations) > 0) < 0.35


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_a_model_that_follows_rules_passes(method: str, mode: Mode) -> None:
    simulator = asyncio.run(open_simulator(method, RuleFollower(), mode=mode))
    found = asyncio.run(require_self_test(simulator))
    assert found.passed
    assert found.mean > 0.95


def test_noise_does_not_pass(rng: np.random.Generator) -> None:
    """Of 4,000 random simulations none reaches the threshold."""
    known = [np.array(puzzle.activations) for puzzle in puzzles()]
    means = np.array([np.mean([np.corrcoef(one, rng.random(len(one)))[0, 1] for one in known]) for _ in range(4000)])
    assert abs(means.mean()) < 0.02
    assert means.max() < THRESHOLD


def test_a_model_that_cannot_simulate_is_refused_with_what_it_scored() -> None:
    class Ignorant(RuleFollower):
        def expects(self, text: str, top: int) -> dict[str, float]:
            return {str(len(text) % 7): 0.0, "unknown": -top}

    message = (
        r"^all-at-once-0-9:ignorant cannot simulate: on 6 obvious neurons its mean correlation is "
        r"-?0\.\d\d, and 0\.5 is the least \(words for colours -?0\.\d\d, .*\)\. Use a larger model$"
    )
    simulator = asyncio.run(open_simulator("all-at-once", Ignorant(name="ignorant", ten=False)))
    with pytest.raises(CrateError, match=message):
        asyncio.run(require_self_test(simulator))


def test_a_model_that_refuses_is_refused_with_what_it_said() -> None:
    class Refusing(RuleFollower):
        async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
            return Reply(
                text="As a language model", finish="stop", prompt_tokens=len(messages), new_tokens=sampling.max_tokens
            )

    with pytest.raises(
        CrateError, match=r'colours failed, .*It said: the answer is not JSON .* "As a language model"\.'
    ):
        asyncio.run(require_self_test(Structured(llm=Refusing())))


def test_a_context_that_is_too_short_is_what_is_said() -> None:
    simulator = asyncio.run(open_simulator("all-at-once", RuleFollower(context=300)))
    with pytest.raises(PromptTooLong, match="^the simulator's prompt has .* too long for a context of 300"):
        asyncio.run(require_self_test(simulator))


def test_a_simulator_is_tested_once_in_a_process() -> None:
    llm = RuleFollower()
    simulator = asyncio.run(open_simulator("all-at-once", llm))
    asyncio.run(require_self_test(simulator))
    asked = len(llm.asked)
    asyncio.run(require_self_test(asyncio.run(open_simulator("all-at-once", llm))))
    assert len(llm.asked) - asked == 6  # how it writes numbers; none of the puzzles


def test_linear_calibration_is_least_squares(rng: np.random.Generator) -> None:
    simulated = rng.uniform(0, 10, 200)
    activations = 0.3 * simulated + rng.normal(0, 1, 200)
    slope, intercept = np.polyfit(simulated, activations, 1)
    new = rng.uniform(-5, 15, 50)
    rising = calibrated("linear", new, fit_on=simulated, activations=activations)
    assert rising == pytest.approx(slope * new + intercept, abs=1e-9)
    falling = calibrated("linear", new, fit_on=simulated, activations=-activations)
    assert falling == pytest.approx(np.full(50, -activations.mean()), abs=1e-9)


def test_percentile_calibration_goes_between_sorted_vectors(rng: np.random.Generator) -> None:
    simulated, activations = rng.uniform(0, 10, 100), rng.exponential(1, 100)
    new = rng.uniform(-1, 11, 50)
    expected = np.interp(new, np.sort(simulated), np.sort(activations))
    assert calibrated("percentile", new, fit_on=simulated, activations=activations) == pytest.approx(
        expected, abs=1e-12
    )


def test_tokens_simulated_alike_share_the_activations_of_their_ranks() -> None:
    simulated, activations = np.array([0.0, 0, 0, 5, 5, 9]), np.array([0.0, 7, 1, 0, 2, 3])
    new = np.array([0.0, 5, 9, 7])
    assert calibrated("percentile", new, fit_on=simulated, activations=activations) == pytest.approx(
        [1 / 3, 2.5, 7, 4.75]
    )


@pytest.mark.parametrize("method", ["linear", "percentile"])
def test_without_anything_to_learn_from_the_calibration_is_a_constant(method: CalibrationMethod) -> None:
    assert calibrated(method, np.array([1.0, 2]), fit_on=np.empty(0), activations=np.empty(0)).tolist() == [0, 0]
    assert calibrated(method, np.array([1.0, 2]), fit_on=np.full(4, 3.0), activations=np.arange(4.0)).tolist() == [
        1.5,
        1.5,
    ]


@pytest.mark.parametrize("mode", ["fixed", "compat"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_calibration_has_separate_excerpts(name: str, mode: Mode, rng: np.random.Generator, tmp_path: Path) -> None:
    """None that is explained or scored; in `fixed` mode of no document that is."""
    records = read_records(make_run(tmp_path / "run", rng, mode=mode, layers=1, documents=300), 0, mode=mode)
    by = protocol(name, mode)
    own = calibration_excerpts(records, by)
    others = [draw(records, by.explain, "explain"), draw(records, by.score, "score")]
    assert own.present.any(axis=1).mean() > 0.5
    for neuron in range(records.num_neurons):
        mine = list(own.of(neuron))
        for excerpt in (excerpt for other in others for excerpt in other.of(neuron)):
            for one in mine:
                assert one.document != excerpt.document if mode == "fixed" else one.position != excerpt.position
                apart = (
                    one.position >= excerpt.position + len(excerpt.tokens),
                    excerpt.position >= one.position + len(one.tokens),
                )
                assert any(apart)
        if mode == "fixed":
            assert all(records.windows.document_split[one.document] == 0 for one in mine)


@pytest.mark.parametrize("method", ["linear", "percentile"])
def test_calibration_leaves_the_correlation_and_makes_r_squared_mean_something(
    method: CalibrationMethod, rng: np.random.Generator, tmp_path: Path
) -> None:
    from fixtures.planted_rules import EXPLANATIONS, make_tokenizer

    from cratelm.interpretation.prompts.escaping import prompt_strings

    records = read_records(make_planted(tmp_path / "run", rng), 0)
    by, strings = protocol("top-and-random"), prompt_strings(make_tokenizer())
    simulator = asyncio.run(open_simulator("all-at-once", RuleFollower()))
    scored, own = draw(records, by.score, "score"), calibration_excerpts(records, by)

    def predict(excerpts: Any, neuron: int) -> tuple[np.ndarray, np.ndarray]:
        several = list(excerpts.of(neuron))
        tokens = [[strings[token] for token in one.tokens.tolist()] for one in several]
        found = asyncio.run(simulator.simulate(EXPLANATIONS[neuron], tokens))
        return np.concatenate(found), np.concatenate([one.activations for one in several])

    for neuron in range(len(EXPLANATIONS)):
        raw, _ = predict(scored, neuron)
        one = scored.rows(np.array([neuron]))
        laid = np.zeros((2, *one.tokens.shape[1:]), dtype=np.float32)
        laid[0][one.valid[0]] = raw
        fit_on, activations = predict(own, neuron)
        laid[1][one.valid[0]] = calibrated(method, raw, fit_on=fit_on, activations=activations)
        both = compare(scored.rows(np.array([neuron, neuron])), laid)
        assert both.r_squared[1] > 0.9
        if method == "linear":
            assert both.correlation[0] == pytest.approx(both.correlation[1], abs=1e-5)
