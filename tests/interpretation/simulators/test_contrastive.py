"""Contrastive simulation: what it subtracts, what it costs, and when it is chosen."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes.rule_follower import RuleFollower

from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import Prompt
from cratelm.interpretation.simulators import self_test
from cratelm.interpretation.simulators.contrastive import (
    Contrastive,
    better_in_self_test,
    neutral_explanations,
    with_changes,
)
from cratelm.interpretation.simulators.opening import METHODS, open_simulator
from cratelm.interpretation.simulators.self_test import puzzles, require_self_test
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.workflows.llm.opening import better_in_stored


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_DONE", {})


class Biased(RuleFollower):
    """Expects the rule's number on the tokens of the rule and, whatever the explanation says, a number on others.

    The bias is the length of the token, so that it hides the rule from a plain reading.
    """

    def expects(self, text: str, top: int) -> Mapping[str, float]:
        expected = dict(super().expects(text, top))
        if text.endswith("\t"):
            token = text.rpartition("\n")[2][:-1]
            number = sum(int(value) * np.exp(p) for value, p in expected.items() if value.isdigit()) / 0.3
            share = (number + 10 * min(len(token), 9)) / 100
            expected = {"0": float(np.log(1 - share)), "10": float(np.log(share))}
        return expected


def simulate(simulator: TextSimulator, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    return asyncio.run(simulator.simulate(explanation, excerpts))


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_difference_to_the_mean_of_the_neutral_explanations(method: str) -> None:
    plain = asyncio.run(open_simulator(method, RuleFollower()))
    excerpts = [list(puzzle.tokens) for puzzle in puzzles()]
    for explanation in ("words for animals", "brackets"):
        neutral = [simulate(plain, text, excerpts) for text in neutral_explanations()]
        own = simulate(plain, explanation, excerpts)
        expected = [a - np.mean(b, axis=0) for a, *b in zip(own, *neutral, strict=True)]
        for values, reference in zip(simulate(Contrastive(inner=plain), explanation, excerpts), expected, strict=True):
            assert values == pytest.approx(reference)


def test_a_biased_model_is_read_by_contrast() -> None:
    simulator = asyncio.run(open_simulator("all-at-once", Biased()))
    with pytest.raises(CrateError, match="cannot simulate"):
        asyncio.run(require_self_test(simulator))
    chosen = asyncio.run(better_in_self_test(simulator))
    assert str(chosen.name) == "all-at-once+minus-neutral:rules"
    assert asyncio.run(require_self_test(chosen)).mean > 0.95


def test_a_model_that_simulates_well_is_not_asked_twice() -> None:
    llm = RuleFollower()
    simulator = asyncio.run(open_simulator("all-at-once", llm))
    asked = len(llm.asked)
    assert asyncio.run(better_in_self_test(simulator)) is simulator
    assert len(llm.asked) - asked == len(puzzles())


def test_the_neutral_reading_of_an_excerpt_is_asked_for_once(tmp_path: Path) -> None:
    llm, usage = RuleFollower(), Usage()
    excerpts = [list(puzzle.tokens) for puzzle in puzzles()]

    async def read(explanations: Sequence[str]) -> None:
        cached = Cached(llm, Store.create(tmp_path), usage)
        simulator = Contrastive(inner=await open_simulator("all-at-once", cached))
        await asyncio.gather(*(simulator.simulate(text, excerpts) for text in explanations))
        await cached.settle()

    asyncio.run(read(["brackets", "names"]))
    asyncio.run(read(["brackets", "numbers"]))
    about = [prompt for prompt in llm.asked if neutral_explanations()[0] in prompt.prefix]
    assert len(about) == len(excerpts) * len(neutral_explanations())


def test_settings_name_what_is_subtracted_and_changes_reach_the_inner_simulator() -> None:
    plain = asyncio.run(open_simulator("all-at-once", RuleFollower()))
    simulator = Contrastive(inner=plain)
    settings = simulator.cache_settings()
    assert settings.pop("neutral") == list(neutral_explanations())
    assert settings.pop("simulator") == "all-at-once+minus-neutral:rules"
    assert settings.items() <= plain.cache_settings().items()
    counts, other = Counter[str](), RuleFollower(name="other")
    changed = with_changes(simulator, llm=other, counts=counts, left_out=1)
    assert str(changed.name) == "all-at-once+minus-neutral:other"
    assert changed.cache_settings()["left_out"] == 1
    simulate(changed, "brackets", [["a", " ("]])
    assert counts["tokens"] == 2 * (1 + len(neutral_explanations()))
    assert all(isinstance(prompt, Prompt) for prompt in other.asked)


def test_a_dry_run_takes_the_choice_of_the_self_test_from_stored_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for llm, chosen in ((RuleFollower(), "all-at-once:rules"), (Biased(), "all-at-once+minus-neutral:rules")):
        store = Store.create(tmp_path / type(llm).__name__)
        simulator = asyncio.run(open_simulator("all-at-once", llm))
        asked = len(llm.asked)
        assert str(asyncio.run(better_in_stored(simulator, store)).name) == "all-at-once+minus-neutral:rules"
        assert len(llm.asked) == asked, "without stored answers the costs are those of the contrast, and none is asked"
        cached = Cached(llm, store)
        asyncio.run(better_in_self_test(with_changes(simulator, llm=cached)))
        monkeypatch.setattr(self_test, "_DONE", {})
        asked = len(llm.asked)
        stored = asyncio.run(better_in_stored(simulator, store))
        assert (str(stored.name), len(llm.asked)) == (chosen, asked)
        monkeypatch.setattr(self_test, "_DONE", {})
