"""Self-test: can a model simulate obvious neurons?

A model that cannot follow the prompt still returns activations, and its scores near 0 look like a finding. So each
simulator first predicts the puzzles of `puzzles.json`: a plain explanation and one sentence whose activations follow
from it. The prompts are always the same, so repeated runs are cache hits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.rundir import read_json

THRESHOLD = 0.5
"""Least mean correlation. For uniformly random simulations the mean has a standard deviation of 0.11: one in 500 is
above 0.3, and none of 40,000 was above 0.5."""
_FILE = Path(__file__).with_name("puzzles.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Puzzle:
    """An obvious neuron: its explanation determines where it fires."""

    explanation: str
    tokens: tuple[str, ...]
    activations: tuple[int, ...]
    """On the scale of prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """The result of a simulator's self-test."""

    simulator: str
    correlations: Mapping[str, float]
    """Explanation -> Pearson correlation on its sentence; 0 where the simulation is constant."""
    failures: Mapping[str, str]
    """Explanation -> the unusable answer; its correlation counts as 0."""

    @property
    def mean(self) -> float:
        """Mean correlation over all puzzles."""
        return float(np.mean(list(self.correlations.values())))

    @property
    def passed(self) -> bool:
        """Whether the mean correlation reaches the threshold."""
        return self.mean >= THRESHOLD


class CannotSimulate(CrateError):
    """A model returns no simulations, or its simulations are not meaningful."""


@cache
def puzzles() -> tuple[Puzzle, ...]:
    """The obvious neurons."""
    entries = read_json(_FILE, made_by="pip install --force-reinstall cratelm")["puzzles"]
    return tuple(
        Puzzle(explanation=entry["explanation"], tokens=tuple(entry["tokens"]), activations=tuple(entry["activations"]))
        for entry in entries
    )


_DONE: dict[str, SelfTest] = {}
"""Results in this process, by the settings of the simulator."""


async def self_test(simulator: TextSimulator) -> SelfTest:
    """Let a simulator predict the puzzles, once in a process.

    Raises `PromptTooLong` if they do not fit the model's context.
    """
    settings = json.dumps(simulator.cache_settings(), sort_keys=True)
    if settings not in _DONE:
        correlations, failures = {}, {}
        for puzzle in puzzles():
            correlations[puzzle.explanation] = 0.0
            try:
                (simulated,) = await simulator.simulate(puzzle.explanation, [puzzle.tokens])
            except PromptTooLong:
                raise  # more helpful than a low score
            except LLMError as error:
                failures[puzzle.explanation] = str(error)
                continue
            if np.ptp(simulated) > 0:
                correlations[puzzle.explanation] = float(np.corrcoef(puzzle.activations, simulated)[0, 1])
        _DONE[settings] = SelfTest(simulator=str(simulator.name), correlations=correlations, failures=failures)
    return _DONE[settings]


async def require_self_test(simulator: TextSimulator) -> SelfTest:
    """Raise `CannotSimulate` with the scores if a simulator cannot predict the puzzles."""
    result = await self_test(simulator)
    if result.passed:
        return result
    each = ", ".join(
        f"{text} {'failed' if text in result.failures else format(value, '.2f')}"
        for text, value in result.correlations.items()
    )
    first_failure = f" It said: {next(iter(result.failures.values()))}." if result.failures else ""
    raise CannotSimulate(
        f"{result.simulator} cannot simulate: on {len(result.correlations)} obvious neurons its mean "
        f"correlation is {result.mean:.2f}, and {THRESHOLD} is the least ({each}).{first_failure} Use a larger model"
    )
