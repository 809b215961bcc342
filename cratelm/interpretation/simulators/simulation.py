"""Simulations of one neuron and of a layer, and the protocol of simulators that read an explanation in words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from cratelm.activations.records import Mode, NeuronId
from cratelm.interpretation.store.identities import SimulatorName

Activations = Float64[np.ndarray, " _"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What an explanation predicts for one neuron on the excerpts it is scored on."""

    neuron: NeuronId
    """The neuron predicted."""
    protocol: str
    """Which excerpts it is predicted on."""
    mode: Mode
    """Which records these come from."""
    explainer: str
    """Who explained: `lookup`, or a language model."""
    control: str
    """Empty, or the control: `shuffled` or `constant`."""
    source: int
    """Index of the neuron whose explanation was used; the same neuron except in a control."""
    activations: Float32[np.ndarray, " tokens"] = field(repr=False)
    """Expected activation, in the explanation's units, on every token of the excerpts one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSimulations:
    """The simulations of a layer's explained neurons, as arrays."""

    neuron: Int64[np.ndarray, " neurons"]
    """Index of each simulated neuron in the layer, ascending."""
    source: Int64[np.ndarray, " neurons"]
    """Index of the neuron whose explanation was used."""
    first: Int64[np.ndarray, " neurons_plus_1"]
    """Where each neuron's tokens begin in `activations`; one more number for the end."""
    activations: Float32[np.ndarray, " tokens"]
    """Expected activation on every token of every neuron's excerpts, one after the other."""

    def of(self, row: int) -> Float32[np.ndarray, " tokens"]:
        """The tokens of one neuron."""
        return self.activations[self.first[row] : self.first[row + 1]]

    def laid_out(
        self, valid: Bool[np.ndarray, "neurons excerpts width"]
    ) -> Float32[np.ndarray, "neurons excerpts width"]:
        """The same numbers by excerpt, 0 for missing tokens."""
        assert (valid.sum(axis=(1, 2)) == np.diff(self.first)).all(), "these simulations are for other excerpts"
        laid_out = np.zeros(valid.shape, dtype=np.float32)
        laid_out[valid] = self.activations
        return laid_out


@runtime_checkable
class TextSimulator(Protocol):
    """Predicts activations from an explanation in words."""

    @property
    def name(self) -> SimulatorName:
        """Method, scale and model."""
        ...

    @property
    def strings_mode(self) -> Mode:
        """How tokens are converted to text: `prompt_strings(tokenizer, strings_mode)`."""
        ...

    @property
    def counts(self) -> Counter[str]:
        """`tokens` simulated; `unread`: tokens without a number among the candidates, which count as 0.

        `left out`: the largest number of few-shot excerpts that a prompt has no room for.
        """
        ...

    def cache_settings(self) -> dict[str, Any]:
        """Every setting that the simulations depend on, apart from explanations and records."""
        ...

    def needs(self, excerpts: Iterable[Sequence[str]], /) -> int:
        """Few-shot neurons that the prompts leave out for the longest of these excerpts to fit the context.

        All neurons of a set are simulated with the same number (`left_out`), so that their prompts are alike.
        """
        ...

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Predict the activation on every token of every excerpt. Raises `LLMError` if the model gives none."""
        ...
