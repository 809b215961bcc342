"""The simulator by a language model: sets of simulations from explanations in words, neuron by neuron."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from cratelm.interpretation.protocols import draw
from cratelm.interpretation.simulators.calibration import calibrated, calibration_excerpts
from cratelm.interpretation.simulators.contrastive import with_changes
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.interpretation.stages.concurrency import Tally
from cratelm.interpretation.stages.set_task import SetTask, explanation_from
from cratelm.interpretation.store.growing_sets import Simulated
from cratelm.interpretation.store.identities import CalibrationMethod

Simulate = Callable[[str, Sequence[Sequence[str]]], Awaitable[Sequence[Float[np.ndarray, " _"]]]]
"""(explanation, tokens of each excerpt) -> the activations of each excerpt. Raises `LLMError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMSimulator:
    """Simulates neurons with a `TextSimulator`."""

    simulator: TextSimulator
    strings: Sequence[str]
    """Text of each token id in prompts (`TextSimulator.strings_mode`)."""
    calibrate: CalibrationMethod | None = None
    """Map simulated activations to the neuron's own units (`calibration.py`)."""

    @property
    def stored_name(self) -> str:
        """Method, scale, calibration and model."""
        return str(replace(self.simulator.name, calibration=self.calibrate))

    async def simulate(self, task: SetTask) -> Tally:
        """Simulate the explained neurons among the chosen ones."""
        fitted = self.fitted(task)
        return await simulate_set(
            task, fitted.simulate, fitted.cache_settings(), self.strings, calibrate=self.calibrate
        )

    def fitted(self, task: SetTask) -> TextSimulator:
        """The simulator with the number of few-shot neurons that leaves room for every excerpt of the set."""
        excerpts_of = self.excerpts(task)
        needed = self.simulator.needs(tokens for neuron in task.explainable.tolist() for tokens in excerpts_of(neuron))
        left_out = task.left_out("simulate", needed, self.simulator.cache_settings())
        return with_changes(self.simulator, left_out=left_out)

    def excerpts(self, task: SetTask) -> Callable[[int], list[list[str]]]:
        """Neuron -> the tokens of all excerpts that it is simulated on, those for calibration included."""
        parts = [draw(task.records, task.protocol.score, "score")]
        parts += [calibration_excerpts(task.records, task.protocol)] if self.calibrate else []
        return lambda neuron: [
            [self.strings[token] for token in excerpt.tokens.tolist()] for part in parts for excerpt in part.of(neuron)
        ]


async def simulate_set(
    task: SetTask, simulate: Simulate, settings: Mapping[str, Any], strings: Sequence[str], *,
    calibrate: CalibrationMethod | None = None,
) -> Tally:  # fmt: skip
    """Simulate the explained neurons among the chosen ones. `settings`: every setting that `simulate` depends on.

    A part does not know which neurons the other parts could explain, so its set has all of them; the merge removes
    those without an explanation.
    """
    texts = task.explanations()
    sources = task.sources(texts)
    settings = {
        **settings, "calibrate": calibrate, "explained": task.explanations_hash(), "sources": _sources_hash(sources)
    }  # fmt: skip
    alone = task.store.part and not task.key.control
    wanted = task.explainable if alone else np.array(list(sources), dtype=np.int64)
    # A whole control set of an earlier version, or of a larger sample, keeps its pairs.
    growing = task.begin("simulate", wanted, settings, not_compared=("sources",))
    scored = draw(task.records, task.protocol.score, "score")
    fitting = calibration_excerpts(task.records, task.protocol) if calibrate else None

    async def simulate_neuron(neuron: int) -> Simulated:
        excerpts, extra = list(scored.of(neuron)), list(fitting.of(neuron)) if fitting else []
        tokens = [[strings[token] for token in excerpt.tokens.tolist()] for excerpt in (*excerpts, *extra)]
        predicted = await simulate(explanation_from(texts, sources[neuron]), tokens)
        values = np.concatenate(predicted[: len(excerpts)])
        if calibrate:
            activations = _concatenated([excerpt.activations for excerpt in extra])
            fit_on = _concatenated(predicted[len(excerpts) :])
            values = calibrated(calibrate, values, fit_on=fit_on, activations=activations)
        return Simulated(source=sources[neuron], activations=values.astype(np.float32))

    tally = await task.fill(growing, simulate_neuron, set(sources) & task.share if task.part != (1, 1) else sources)
    growing.finish()
    return tally


def _concatenated(parts: Sequence[Float[np.ndarray, " _"]]) -> Float[np.ndarray, " tokens"]:
    return np.concatenate([np.empty(0), *parts])


def _sources_hash(sources: Mapping[int, int]) -> str:
    """Hash which neuron is simulated from the explanation of which; the same for all sets that are not controls."""
    if all(neuron == source for neuron, source in sources.items()):
        return "own"
    return hashlib.sha256(json.dumps(list(sources.items())).encode()).hexdigest()[:16]
