"""The stages explain, simulate and score, the same for every explainer and simulator.

    explain     excerpts of the explaining half                -> an explanation for each neuron
    simulate    an explanation, text of the scoring half       -> an activation on every token
    score       simulated and real activations                 -> a correlation

There are two explainers and two simulators: by lookup (`lookup/explain.py`, `lookup/simulate.py`), a whole layer at
once, and by a language model (`explainers/language_model.py`, `simulators/language_model.py`), neuron by neuron.
"""

from collections.abc import Awaitable
from typing import Protocol, runtime_checkable

from cratelm.interpretation.firing.measures import firing_layer, write_firing
from cratelm.interpretation.scoring.correlation import NO_EXPLANATION, NO_SIMULATION, LayerScores, score_layer
from cratelm.interpretation.stages.set_task import SetTask, failures
from cratelm.interpretation.store.neuron_selection import read_chosen


@runtime_checkable
class Explainer(Protocol):
    """Makes sets of explanations."""

    def explain(self, task: SetTask) -> Awaitable[object]:
        """Explain the chosen neurons of a set; resumed, only those that are missing."""
        ...


@runtime_checkable
class Simulator(Protocol):
    """Makes sets of simulations from sets of explanations."""

    @property
    def stored_name(self) -> str:
        """`SetKey.simulator` of its sets."""
        ...

    def simulate(self, task: SetTask) -> Awaitable[object]:
        """Simulate the explained neurons among the chosen ones; resumed, only those that are missing."""
        ...


async def score_set(task: SetTask) -> LayerScores:
    """Score a whole set of simulations and measure its firing; neurons without a usable answer are counted."""
    store, key = task.store, task.key
    store.check(key, "simulate")
    simulations = store.simulations(key)
    failed = dict.fromkeys(failures(store, key.explained, "explain"), NO_EXPLANATION)
    failed |= dict.fromkeys(failures(store, key, "simulate"), NO_SIMULATION)
    scores = score_layer(task.records, task.protocol, simulations, chosen=read_chosen(store, key), failed=failed)
    write_firing(store, key, firing_layer(task.records, task.protocol, simulations))
    store.write_scores(key, scores)
    return scores
