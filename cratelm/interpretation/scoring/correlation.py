"""Simulations -> scores -> aggregates: how well explanations predict neurons, per neuron, layer and model.

All excerpts of a neuron are taken together: with a the activations and s the simulation on their tokens,

    correlation          Pearson r of a and s: the paper's score
    R squared            1 - mean (a - s)^2 / mean a^2
    absolute deviation   1 - mean |a - s| / mean |a|

and, from ranks alone, Spearman's correlation and the AUROC of active tokens (`ranks.py`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from cratelm.activations.records import Excerpts, LayerRecords, Mode, NeuronId
from cratelm.interpretation.explainers.explanation import unexplained
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.scoring.ranks import rank_scores
from cratelm.interpretation.scoring.small_samples import freedom_of, pooled_freedom
from cratelm.interpretation.scoring.statistics import (
    bootstrap_means,
    generator,
    interval,
    mean_and_variance,
    paper_table,
    shown_layers,
)
from cratelm.interpretation.simulators.simulation import LayerSimulations

NOT_SIMULATED = "not simulated"
"""Reason: there is no simulation, as for a control in a layer with no second explained neuron."""
CONSTANT_ACTIVATIONS = "constant activations"
"""Reason: the neuron has one value on all tokens scored, most often 0."""
CONSTANT_SIMULATION = "constant simulation"
"""Reason: the explanation predicts one value on all tokens scored, most often 0."""
NO_EXPLANATION, NO_SIMULATION = "explanation failed", "simulation failed"
"""Reasons: the language model gave no usable answer; the table `failures` has the answer."""
NOT_CHOSEN = "not sampled"
"""Reason: the neuron was not chosen."""
SCORE_MEASURES = ("correlation", "r_squared", "absolute_deviation", "spearman", "auroc")
"""Fields of `LayerScores` that are undefined for a neuron without a score."""
COUNTS = ("tokens", "excerpts", "sums")
"""Fields of `LayerScores` that are 0 for a neuron without a score."""
_CHUNK = 32
"""Neurons at a time: their working arrays stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How well an explanation predicts one neuron on held-out excerpts.

    The numbers are those of `LayerScores`; None if undefined.
    """

    neuron: NeuronId
    """The neuron predicted."""
    protocol: str
    """Which excerpts it was explained from and scored on."""
    mode: Mode
    """Which records these come from."""
    explainer: str
    """Who explained: `lookup`, or the name of a language model."""
    control: str
    """Empty, or the control: `shuffled` or `constant`."""
    correlation: float | None
    reason: str
    r_squared: float | None
    absolute_deviation: float | None
    spearman: float | None
    auroc: float | None
    tokens: int
    excerpts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScores:
    """The scores of all neurons of one layer by one protocol, explainer and control, as arrays."""

    layer: int
    """Zero-based."""
    neuron: Int64[np.ndarray, " neurons"]
    """Index in the layer; every neuron of the layer is here."""
    correlation: Float64[np.ndarray, " neurons"]
    """Pearson correlation in [-1, 1]; NaN where undefined."""
    reason: tuple[str, ...]
    """Why it is undefined: `dead`, `too rare`, `constant activations`, ...; empty where it is defined."""
    r_squared: Float64[np.ndarray, " neurons"]
    """1 - mean squared error / mean squared activation; NaN where undefined."""
    absolute_deviation: Float64[np.ndarray, " neurons"]
    """1 - mean absolute error / mean absolute activation; NaN where undefined."""
    spearman: Float64[np.ndarray, " neurons"]
    """Pearson correlation of the ranks, in [-1, 1]; NaN where undefined."""
    auroc: Float64[np.ndarray, " neurons"]
    """Chance that an active token has the higher simulation than a silent one; NaN also where all are active."""
    tokens: Int64[np.ndarray, " neurons"]
    """Tokens compared."""
    excerpts: Int64[np.ndarray, " neurons"]
    """Excerpts compared."""
    sums: Float64[np.ndarray, "neurons excerpts 6"] = field(repr=False)
    """Per excerpt: n, sum a, sum s, sum a^2, sum s^2, sum a s, for the bootstrap over excerpts."""

    def take(self, rows: Int64[np.ndarray, " chosen"]) -> "LayerScores":
        """Some of the rows."""
        values = {name: getattr(self, name) for name in self.__slots__ if name not in ("layer", "reason")}
        reason = tuple(self.reason[row] for row in rows.tolist())
        return LayerScores(layer=self.layer, reason=reason, **{name: array[rows] for name, array in values.items()})

    def of_layer(self, num_neurons: int) -> "LayerScores":
        """A row for every neuron of the layer; a neuron without a row gets the reason `NOT_CHOSEN`."""

        def spread(name: str, missing: float) -> np.ndarray:
            values = getattr(self, name)
            everyone = np.full((num_neurons, *values.shape[1:]), missing, dtype=values.dtype)
            everyone[self.neuron] = values
            return everyone

        reason = np.full(num_neurons, NOT_CHOSEN, dtype=object)
        reason[self.neuron] = self.reason
        return LayerScores(
            layer=self.layer, neuron=np.arange(num_neurons), reason=tuple(reason),
            **{name: spread(name, np.nan) for name in SCORE_MEASURES}, **{name: spread(name, 0.0) for name in COUNTS},
        )  # fmt: skip


def score_layer(
    records: LayerRecords, protocol: Protocol, simulations: LayerSimulations,
    *, chosen: Int64[np.ndarray, " chosen"] | None = None, failed: Mapping[int, str] | None = None,
) -> LayerScores:  # fmt: skip
    """Compare a layer's simulations with its activations; a neuron without a score gets the reason.

    `chosen`: the neurons to score, by default all. `failed`: neuron -> reason, for neurons without a usable answer of a
    language model.
    """
    excerpts = draw(records, protocol.score, "score").rows(simulations.neuron)
    simulated = replace(
        compare(excerpts, simulations.laid_out(excerpts.valid)), layer=records.layer, neuron=simulations.neuron
    )
    without = dict(enumerate(reason or NOT_SIMULATED for reason in unexplained(records, protocol))) | dict(failed or {})
    scores = simulated.of_layer(records.num_neurons)
    reasons = [without[n] if reason == NOT_CHOSEN else reason for n, reason in enumerate(scores.reason)]
    scores = replace(scores, reason=tuple(reasons))
    return scores if chosen is None else scores.take(chosen)


def compare(excerpts: Excerpts, simulated: Float32[np.ndarray, "neurons excerpts width"]) -> LayerScores:
    """Compare activations with simulations over the tokens of all excerpts of each neuron.

    The neurons are numbered from 0, in layer 0.
    """
    valid = excerpts.valid
    parts = [
        _compare(excerpts.activations[rows], simulated[rows], valid[rows])
        for rows in (slice(i, i + _CHUNK) for i in range(0, max(len(simulated), 1), _CHUNK))
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    constant_a, constant_s = columns.pop("constant_a"), columns.pop("constant_s")
    return LayerScores(
        layer=0, neuron=np.arange(len(simulated)), tokens=valid.sum(axis=(1, 2)), excerpts=excerpts.present.sum(axis=1),
        reason=tuple(
            CONSTANT_ACTIVATIONS if a else CONSTANT_SIMULATION if s else ""
            for a, s in zip(constant_a, constant_s, strict=True)
        ), **columns,
    )  # fmt: skip


def _compare(
    activations: Float32[np.ndarray, "chunk excerpts width"], simulated: Float32[np.ndarray, "chunk excerpts width"],
    valid: Bool[np.ndarray, "chunk excerpts width"],
) -> dict[str, np.ndarray]:  # fmt: skip
    shape = (len(valid), valid.shape[1] * valid.shape[2])
    a, s = activations.astype(np.float64), simulated.astype(np.float64)
    products = (np.einsum("new,new->ne", x, y) for x, y in ((a, a), (s, s), (a, s)))
    sums = np.stack([valid.sum(axis=2), a.sum(axis=2), s.sum(axis=2), *products], axis=2).astype(np.float64)
    count, sum_a, sum_s, square_a, _, _ = sums.sum(axis=1).T
    a, s, flat_valid = a.reshape(shape), s.reshape(shape), valid.reshape(shape)
    error = a - s
    with np.errstate(divide="ignore", invalid="ignore"):
        r_squared = 1 - _dot(error, error) / square_a
        absolute_deviation = 1 - np.abs(error).sum(axis=1) / np.abs(a).sum(axis=1)
        # Centred first and then multiplied: sums of squares would lose digits where the mean is large.
        a, s = (a - (sum_a / count)[:, None]) * flat_valid, (s - (sum_s / count)[:, None]) * flat_valid
        correlation = _dot(a, s) / np.sqrt(_dot(a, a) * _dot(s, s))
    flat = activations.reshape(shape), simulated.reshape(shape)
    spearman, auroc = rank_scores(*flat, flat_valid)
    constant_a, constant_s = (_constant(side, flat_valid) for side in flat)
    undefined = constant_a | constant_s
    return {
        "correlation": np.where(undefined, np.nan, np.clip(correlation, -1, 1)), "sums": sums,
        "r_squared": np.where(undefined, np.nan, r_squared), "constant_a": constant_a,
        "absolute_deviation": np.where(undefined, np.nan, absolute_deviation), "constant_s": constant_s,
        "spearman": np.where(undefined, np.nan, spearman), "auroc": np.where(undefined, np.nan, auroc),
    }  # fmt: skip


def _dot(
    a: Float64[np.ndarray, "chunk tokens"], b: Float64[np.ndarray, "chunk tokens"]
) -> Float64[np.ndarray, " chunk"]:
    return np.einsum("nt,nt->n", a, b)


def _constant(
    values: Float32[np.ndarray, "chunk tokens"], valid: Bool[np.ndarray, "chunk tokens"]
) -> Bool[np.ndarray, " chunk"]:
    """Where all valid values are the same (exactly: a variance would only come near 0), or there are none."""
    first = np.take_along_axis(values, valid.argmax(axis=1)[:, None], axis=1)
    return ~((values != first) & valid).any(axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAggregate:
    """The scores of one layer in one line. Points are correlations x 100."""

    layer: int
    """Zero-based."""
    points: float | None
    """Mean over scored neurons, rounded to 0.1 as in the paper; None if no neuron is scored."""
    points_undefined_zero: float
    """Mean over all neurons, an undefined score counted as 0; not rounded."""
    interval: tuple[float, float] | None
    """95 % interval of the mean over scored neurons (two-level bootstrap), in points; None without a score."""
    scored: int
    """Neurons with a score."""
    total: int
    """Neurons of the layer."""
    undefined: dict[str, int]
    """Reason -> neurons without a score."""
    deviation: float | None
    """Standard deviation over scored neurons (ddof 1), in points; None for fewer than two."""
    spearman: float | None = None
    """Mean of Spearman's correlation over scored neurons, x 100; None if no neuron has one."""
    auroc: float | None = None
    """Mean AUROC of active tokens over scored neurons, in per cent: 50 is chance; None if no neuron has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelAggregate:
    """The scores of one model by one protocol: a row of the paper's table, and more statistics.

    For models of 6 layers and more the paper leaves the last layer out of `mean`, `variance`, `mean_undefined_zero`
    and `interval`. None if no layer has a score.
    """

    protocol: str
    """Name of the protocol."""
    layers: tuple[LayerAggregate, ...]
    """All layers, first to last."""
    mean: float | None
    """Mean over layers of the rounded points."""
    variance: float | None
    """Population variance over layers of the rounded points, in points squared."""
    mean_all_layers: float | None
    """The mean with the last layer."""
    variance_all_layers: float | None
    """The variance with the last layer."""
    mean_undefined_zero: float
    """Mean over layers of the points with undefined scores counted as 0."""
    interval: tuple[float, float] | None
    """95 % interval of the mean over layers, in points."""
    spearman: float | None = None
    """Mean over layers of Spearman's correlation, x 100, by the same rule as `mean`."""
    auroc: float | None = None
    """Mean over layers of the AUROC of active tokens, in per cent, likewise."""

    @property
    def scored(self) -> tuple[int, int]:
        """Neurons with a score, and all neurons, over all layers."""
        return sum(layer.scored for layer in self.layers), sum(layer.total for layer in self.layers)


def aggregate(
    layers: Sequence[LayerScores], *, protocol: str, seed: int = 0, resamples: int = 2000
) -> ModelAggregate:  # fmt: skip
    """Summarise a model's scores, layer by layer and over its layers.

    `seed`: seed of the bootstrap. A layer's interval does not depend on other layers and protocols.
    """
    aggregated = [_aggregate_layer(layer, generator(seed, protocol, layer.layer), resamples) for layer in layers]
    lines, samples = zip(*aggregated, strict=True)
    shown = shown_layers(len(lines))
    mean, variance = paper_table([line.points for line in lines])
    mean_all_layers, variance_all_layers = mean_and_variance([line.points for line in lines])
    means = [sample for sample in samples[:shown] if sample is not None]
    freedom = pooled_freedom(means, [freedom_of(line.scored) for line in lines[:shown] if line.scored])
    return ModelAggregate(
        protocol=protocol, layers=tuple(lines), mean=mean, variance=variance, mean_all_layers=mean_all_layers,
        variance_all_layers=variance_all_layers, interval=interval(np.mean(means, axis=0), freedom) if means else None,
        mean_undefined_zero=float(np.mean([line.points_undefined_zero for line in lines[:shown]])),
        spearman=mean_and_variance([line.spearman for line in lines[:shown]])[0],
        auroc=mean_and_variance([line.auroc for line in lines[:shown]])[0],
    )  # fmt: skip


def layer_points(correlation: Float64[np.ndarray, " neurons"]) -> float | None:
    """Mean over the scored neurons of a layer in points, rounded to 0.1 as in the paper; None without a score."""
    defined = correlation[~np.isnan(correlation)]
    return round(float((100 * defined).mean()), 1) + 0.0 if len(defined) else None


def _aggregate_layer(
    scores: LayerScores, rng: np.random.Generator, resamples: int
) -> tuple[LayerAggregate, np.ndarray | None]:
    """One layer's line, and the resampled means behind its interval, in points."""
    defined = ~np.isnan(scores.correlation)
    points = 100 * scores.correlation[defined]
    samples = 100 * bootstrap_means(scores.sums[defined], rng, resamples) if len(points) else None
    return LayerAggregate(
        layer=scores.layer, points=layer_points(scores.correlation),
        interval=None if samples is None else interval(samples, freedom_of(len(points))),
        points_undefined_zero=float(points.sum()) / len(scores.neuron), scored=len(points), total=len(scores.neuron),
        undefined=dict(Counter(reason for reason in scores.reason if reason).most_common()),
        deviation=float(points.std(ddof=1)) if len(points) > 1 else None,
        spearman=_mean_points(scores.spearman[defined]), auroc=_mean_points(scores.auroc[defined]),
    ), samples  # fmt: skip


def _mean_points(values: Float64[np.ndarray, " scored"]) -> float | None:
    known = values[~np.isnan(values)]
    return 100 * float(known.mean()) if len(known) else None
