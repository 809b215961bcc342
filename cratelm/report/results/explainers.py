"""The scores of every explainer, simulator and control of a report's runs, and how they compare.

`sampling_variance` splits the variance of a score into neurons and repetitions; `model_difference` compares two models
layer by layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float64

from cratelm.interpretation.scoring.correlation import LayerScores, layer_points
from cratelm.interpretation.scoring.small_samples import Z_95, freedom_of, pooled_freedom
from cratelm.interpretation.scoring.statistics import (
    bootstrap_means,
    components,
    generator,
    interval,
    mean_and_variance,
    p_value,
    shown_layers,
)
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import RESAMPLES, SEED, Results, RunResult

Z_POWER = 0.841621
"""Standard errors of a power of 80 %, above the `Z_95` of a two-sided 95 % test."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The scores of one run by one protocol, explainer, simulator, control and sample."""

    run: RunResult
    key: SetKey
    """Its layer is a placeholder."""
    layers: tuple[LayerScores, ...] = field(repr=False)

    @property
    def is_main(self) -> bool:
        """Whether the scores are of first explanations, and not of a control."""
        return not self.key.control and not self.key.sample

    @property
    def scored(self) -> list[int]:
        """Neurons with a score, by layer."""
        return [int(np.isfinite(layer.correlation).sum()) for layer in self.layers]


def score_groups(results: Results) -> list[Measured]:
    """All scores of a report's runs, ordered by run, protocol, explainer and simulator."""

    def kind(key: SetKey) -> tuple[str | int, ...]:
        return (key.protocol, key.explainer, key.simulator, key.control, key.sample)

    groups = []
    for run in results.rows:
        store = Store.open(run.path)
        keys = [key for key in store.scored() if (key.mode, key.tap) == (results.mode, run.tap)]
        for _, same in groupby(sorted(keys, key=lambda key: (kind(key), key.layer)), key=kind):
            first, *rest = same
            layers = tuple(store.scores(key) for key in (first, *rest))
            groups.append(Measured(run, replace(first, layer=0), layers))
    return groups


def find(groups: Sequence[Measured], like: Measured, **changes: Any) -> Measured | None:
    """The scores of the same run whose key differs by `changes`."""
    key = replace(like.key, **changes)
    return next((group for group in groups if group.run is like.run and group.key == key), None)


def mean_on_same_neurons(scores: Measured | None, sample: Measured) -> float | None:
    """Mean over layers by the rule of `aggregate`, of the neurons that `sample` scored."""
    if scores is None:
        return None
    neurons = {layer.layer: layer.neuron[~np.isnan(layer.correlation)] for layer in sample.layers}
    return mean_and_variance([
        layer_points(layer.correlation[np.isin(layer.neuron, neurons[layer.layer])])
        for layer in scores.layers[: shown_layers(len(scores.layers))] if layer.layer in neurons
    ])[0]  # fmt: skip


def sampling_variance(repetitions: Sequence[Measured]) -> tuple[int, float, float, float | None] | None:
    """Neurons that every repetition scored, standard deviation over them and over the repetitions, and the share of
    the repetitions in the variance (%). None with too few neurons.
    """
    scores = np.concatenate([
        np.stack([scores.of_layer(1 + _last_neuron(layers)).correlation for scores in layers], axis=1)
        for layers in zip(*(repetition.layers for repetition in repetitions), strict=False)
    ])  # fmt: skip
    split = components(100 * scores[np.isfinite(scores).all(axis=1)])
    if split is None:
        return None
    between, within, neurons = split
    share = 100 * within / (between + within) if between + within else None
    return neurons, math.sqrt(between), math.sqrt(within), share


def _last_neuron(layers: Sequence[LayerScores]) -> int:
    return max(int(scores.neuron.max(initial=0)) for scores in layers)


@dataclass(frozen=True, slots=True)
class ModelDifference:
    """Two models compared by one protocol, layer by layer."""

    layers: tuple[int, ...]
    """Zero-based layers in which both models have a score."""
    difference: Float64[np.ndarray, " resamples"] = field(repr=False)
    """Resampled means over these layers of the differences of layer means, in points; empty without such a layer."""
    freedom: float
    """Degrees of freedom of the difference; infinite where no small-sample correction applies."""
    fewest: int
    """Neurons behind the layer mean with the fewest; 0 without such a layer."""
    deviation: float
    """Standard deviation over neurons within these layers, pooled, in points."""
    left_out: str
    """The other layers and the model without a score there; empty if there is none."""

    @property
    def mean(self) -> float | None:
        """The difference in points."""
        return float(self.difference.mean()) if self.layers else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the difference."""
        return interval(self.difference, self.freedom) if self.layers else None

    @property
    def p(self) -> float | None:
        """Two-sided p value of the difference."""
        return p_value(self.difference, self.freedom) if self.layers else None

    @property
    def neurons_needed(self) -> int | None:
        """Neurons of each model with which a layer's mean shows 2 points (two-sided 5 %, power 80 %)."""
        return math.ceil(2 * ((Z_95 + Z_POWER) * self.deviation / 2) ** 2) if self.layers else None


def model_difference(first: Measured, second: Measured) -> ModelDifference:
    """Compare two models in the layers in which both have a score.

    From 6 layers on the last one is left out, as in the paper's table, and not listed in `left_out`.
    """
    models = (first, second)
    depths = sorted({layer.layer for model in models for layer in model.layers})
    shown = depths[: shown_layers(len(depths))]
    scored = [{layer.layer: layer for layer in m.layers if np.isfinite(layer.correlation).any()} for m in models]
    layers = tuple(layer for layer in shown if all(layer in by_layer for by_layer in scored))
    left_out = []
    for layer in shown:
        without = [m.run.title for m, by_layer in zip(models, scored, strict=True) if layer not in by_layer]
        left_out += [f"{layer}: no score in {' and '.join(without)}"] if without else []
    pairs = [(_resampled_mean(scored[0][i], first), _resampled_mean(scored[1][i], second)) for i in layers]
    neurons = [int(np.isfinite(by_layer[i].correlation).sum()) for i in layers for by_layer in scored]
    return ModelDifference(
        layers=layers,
        difference=100 * np.mean([ours - theirs for ours, theirs in pairs], axis=0) if layers else np.empty(0),
        freedom=pooled_freedom([mean for pair in pairs for mean in pair], [freedom_of(count) for count in neurons]),
        fewest=min(neurons, default=0),
        deviation=_deviation([by_layer[layer] for by_layer in scored for layer in layers]),
        left_out="; ".join(left_out),
    )  # fmt: skip


def _resampled_mean(layer: LayerScores, model: Measured) -> Float64[np.ndarray, " resamples"]:
    """Resampled means of one layer, independent of those of other models."""
    rng = generator(SEED, model.key.protocol, layer.layer, model.run.identity)
    return bootstrap_means(layer.sums[np.isfinite(layer.correlation)], rng, RESAMPLES)


def _deviation(layers: Sequence[LayerScores]) -> float:
    """Standard deviation over neurons within layers, pooled, in points."""
    parts = [layer.correlation[np.isfinite(layer.correlation)] for layer in layers]
    freedom = sum(max(len(part) - 1, 0) for part in parts)
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in parts if len(part))
    return 100 * math.sqrt(squares / freedom) if freedom else 0.0
