"""Contrastive simulation: what a simulator predicts from an explanation, minus what it predicts from a neutral one.

    s(token) = E[a | explanation] - E[a | neutral explanation]

A small model expects activation on nouns and names whatever the explanation says. The difference removes this bias. The
neutral prediction of an excerpt does not depend on the explanation: it is in the answer cache after the first time, so
a control does not pay for it again.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.simulators.self_test import self_test
from cratelm.interpretation.simulators.simulation import Activations, TextSimulator
from cratelm.interpretation.store.identities import SimulatorName
from cratelm.rundir import read_json

FILE = Path(__file__).parent.parent / "prompts" / "contrast.json"
GOOD = 0.9
"""Mean correlation in the self-test from which a simulator needs no contrast."""


@cache
def neutral_explanations() -> tuple[str, ...]:
    """Explanations that say nothing about a neuron."""
    return tuple(read_json(FILE, made_by="pip install --force-reinstall cratelm")["neutral"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrastive:
    """A simulator minus its mean prediction from neutral explanations."""

    inner: TextSimulator

    @property
    def llm(self) -> LLM:
        """The model that simulates."""
        llm: LLM = self.inner.llm  # type: ignore[attr-defined]
        return llm

    @property
    def name(self) -> SimulatorName:
        """The name of the inner simulator, and what is subtracted."""
        return replace(self.inner.name, contrast="minus-neutral")

    @property
    def strings_mode(self) -> Mode:
        """How tokens are converted to text."""
        return self.inner.strings_mode

    @property
    def counts(self) -> Counter[str]:
        """Tokens simulated, from explanations and from neutral ones."""
        return self.inner.counts

    def cache_settings(self) -> dict[str, Any]:
        """Every setting that the simulations depend on."""
        return {**self.inner.cache_settings(), "simulator": str(self.name), "neutral": list(neutral_explanations())}

    def needs(self, excerpts: Iterable[Sequence[str]]) -> int:
        """Few-shot neurons to leave out for these excerpts."""
        return self.inner.needs(excerpts)

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Predict the activations twice or more, and subtract; may be negative."""
        simulated = await self.inner.simulate(explanation, excerpts)
        neutral = [await self.inner.simulate(text, excerpts) for text in neutral_explanations()]
        return [values - np.mean(others, axis=0) for values, *others in zip(simulated, *neutral, strict=True)]


def with_changes(simulator: TextSimulator, **changes: Any) -> TextSimulator:
    """The simulator with another `llm`, `counts` or `left_out`, inside of a contrast too."""
    if isinstance(simulator, Contrastive):
        return replace(simulator, inner=with_changes(simulator.inner, **changes))
    return replace(simulator, **changes)  # type: ignore[type-var]


async def better_in_self_test(simulator: TextSimulator) -> TextSimulator:
    """The simulator, or its contrast if that predicts the obvious neurons of the self-test better."""
    plain = await self_test(simulator)
    if plain.mean >= GOOD:
        return simulator
    contrastive = Contrastive(inner=simulator)
    return contrastive if (await self_test(contrastive)).mean > plain.mean else simulator
