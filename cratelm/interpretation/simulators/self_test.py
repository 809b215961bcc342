"""Whether a model can simulate at all: neurons of which everybody would say the same, before it is asked about others.

A model that cannot follow the prompt gives activations all the same, and scores near 0 that look like a finding. So
each simulator first predicts the puzzles of `puzzles.json`: a plain explanation and one sentence whose activations
follow from it. Its questions are the same each time, so where answers are cached they are asked once per model.
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
"""Least mean correlation. Of uniformly random simulations the mean has a standard deviation of 0.11: one in 500 comes
above 0.3, and of 40,000 none came above 0.5."""
FILE = Path(__file__).with_name("puzzles.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Puzzle:
    """A neuron whose firing is obvious."""

    explanation: str
    tokens: tuple[str, ...]
    activations: tuple[int, ...]
    """On the scale of prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTest:
    """How a simulator did."""

    simulator: str
    correlations: Mapping[str, float]
    """Explanation -> Pearson correlation on its sentence; 0 where the simulation is constant."""
    failures: Mapping[str, str]
    """Explanation -> what the model said where it gave no usable answer; its correlation counts as 0."""

    @property
    def mean(self) -> float:
        """Mean correlation over all puzzles."""
        return float(np.mean(list(self.correlations.values())))

    @property
    def passed(self) -> bool:
        """Whether it can simulate."""
        return self.mean >= THRESHOLD


@cache
def puzzles() -> tuple[Puzzle, ...]:
    """The neurons known to everybody."""
    found = read_json(FILE, made_by="pip install --force-reinstall cratelm")["puzzles"]
    return tuple(
        Puzzle(explanation=one["explanation"], tokens=tuple(one["tokens"]), activations=tuple(one["activations"]))
        for one in found
    )


_DONE: dict[str, SelfTest] = {}
"""What simulators did in this process, by all that their simulations depend on."""


async def self_test(simulator: TextSimulator) -> SelfTest:
    """Let a simulator predict the puzzles; once for each in a process.

    Raises `PromptTooLong` where they do not fit the model's context.
    """
    told = json.dumps(simulator.cache_settings(), sort_keys=True)
    if told not in _DONE:
        correlations, failures = {}, {}
        for puzzle in puzzles():
            correlations[puzzle.explanation] = 0.0
            try:
                (simulated,) = await simulator.simulate(puzzle.explanation, [puzzle.tokens])
            except PromptTooLong:
                raise  # says more than a score would
            except LLMError as error:
                failures[puzzle.explanation] = str(error)
                continue
            if np.ptp(simulated) > 0:
                correlations[puzzle.explanation] = float(np.corrcoef(puzzle.activations, simulated)[0, 1])
        _DONE[told] = SelfTest(simulator=str(simulator.name), correlations=correlations, failures=failures)
    return _DONE[told]


async def require_self_test(simulator: TextSimulator) -> SelfTest:
    """Refuse a simulator that cannot predict the puzzles, saying what it scored."""
    found = await self_test(simulator)
    if found.passed:
        return found
    each = ", ".join(
        f"{text} {'failed' if text in found.failures else format(value, '.2f')}"
        for text, value in found.correlations.items()
    )
    said = f" It said: {next(iter(found.failures.values()))}." if found.failures else ""
    raise CrateError(
        f"{found.simulator} cannot simulate: on {len(found.correlations)} obvious neurons its mean "
        f"correlation is {found.mean:.2f}, and {THRESHOLD} is the least ({each}).{said} Use a larger model"
    )
