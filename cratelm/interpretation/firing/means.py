"""Means of consistency and distinctiveness over neurons, layers and models, with two-level bootstrap intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Float64

from cratelm.interpretation.firing.measures import KINDS, MEASURES, STATED, Counts, LayerFiring, measured
from cratelm.interpretation.scoring.small_samples import freedom_of, pooled_freedom, rescaled
from cratelm.interpretation.scoring.statistics import generator, interval, sets_each, shown_layers

FIRING_RESAMPLES = 64
"""Fewest bootstrap sets of excerpts per neuron (`sets_each`); each draw of a neuron uses one."""
RESAMPLES = 500
"""Bootstrap draws of the neurons."""
_CHUNK = 32
"""Neurons, and bootstrap draws, at a time."""
ALL = (*MEASURES, "firing", "relevant")
"""The numbers that are averaged, in the order of the arrays' last axis."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The means of one kind of excerpts over the neurons of a layer, or over the layers of a model. In per cent."""

    values: Float64[np.ndarray, "thresholds 6"]
    """Means of `ALL` at every threshold, each over the neurons for which it is defined; NaN where there is none."""
    samples: Float32[np.ndarray, "resamples 6"] = field(repr=False)
    """Bootstrap means at the stated threshold (neurons and excerpts resampled), shifted to the observed mean."""
    permuted: Float64[np.ndarray, " 2"]
    """Chance level of consistency and distinctiveness, the simulation permuted within excerpts (`Counts.permuted`)."""
    freedom: Float64[np.ndarray, " 6"]
    """Degrees of freedom of each of `ALL`; infinite where no small-sample correction applies (`small_samples.py`)."""
    neurons: int
    """Neurons counted."""
    unpredicted: int
    """Neurons without a relevant token at the stated threshold: their consistency is undefined."""
    silent: int
    """Neurons that fire on no token of their excerpts: their distinctiveness is undefined."""

    def of(self, name: str, threshold: int = STATED) -> float | None:
        """The mean of a measure, in per cent; None if it is undefined for all neurons."""
        value = float(self.values[threshold, ALL.index(name)])
        return None if np.isnan(value) else value

    def column(self, name: str) -> Float64[np.ndarray, " resamples"]:
        """Bootstrap means of a measure, at the stated threshold."""
        return self.samples[:, ALL.index(name)].astype(np.float64)

    def interval(self, name: str) -> tuple[float, float] | None:
        """95 % interval of a measure, at the stated threshold."""
        return None if self.of(name) is None else interval(self.column(name), self.freedom[ALL.index(name)])

    @property
    def fewest(self) -> int:
        """Neurons behind the mean with the fewest: consistency or distinctiveness, whichever has more undefined."""
        return self.neurons - max(self.unpredicted, self.silent)

    def curve(self, name: str) -> Float64[np.ndarray, " thresholds"]:
        """The means of a measure at every threshold."""
        return self.values[:, ALL.index(name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiring:
    """Firing of one model, from one set of explanations."""

    layers: tuple[int, ...]
    """Zero-based."""
    by_layer: dict[str, tuple[Mean, ...]]
    """Kind of excerpts -> the mean of each layer."""
    overall: dict[str, Mean]
    """Kind of excerpts -> the mean over layers; from 6 layers on without the last, as the paper's table."""


def mean_firing(
    layers: Sequence[LayerFiring], *, seed: int = 0, resamples: int = RESAMPLES, model: str = ""
) -> ModelFiring:
    """Average over the neurons of each layer and over layers. A layer's interval does not depend on the other layers.

    `model` seeds the bootstrap: models whose samples are subtracted need independent draws.
    """
    by_layer: dict[str, tuple[Mean, ...]] = {}
    for kind in KINDS:
        if all(kind in layer.kinds for layer in layers):
            by_layer[kind] = tuple(
                _mean(layer.kinds[kind], generator(seed, f"firing {kind}", layer.layer, model), resamples)
                for layer in layers
            )
    shown = shown_layers(len(layers))
    return ModelFiring(
        layers=tuple(layer.layer for layer in layers), by_layer=by_layer,
        overall={kind: _over_layers(means[:shown]) for kind, means in by_layer.items()},
    )  # fmt: skip


def _mean(counts: Counts, rng: np.random.Generator, resamples: int) -> Mean:
    observed = _all_measures(counts.base.sum(axis=1), counts.relevant.sum(axis=1), counts.maximum)
    values = _nanmean(observed)
    samples = _resampled(counts, rng, resamples) if len(observed) else np.full((resamples, len(ALL)), np.nan)
    moved = 100 * (samples - _nanmean(samples) + values[STATED])
    defined = (~np.isnan(observed[:, STATED])).sum(axis=0).tolist()
    columns = [rescaled(*pair) for pair in zip(moved.T, 100 * observed[:, STATED].T, strict=True)]
    return Mean(
        values=100 * values, samples=np.stack(columns, axis=1).astype(np.float32), neurons=len(observed),
        permuted=100 * _nanmean(counts.permuted[:, STATED]), freedom=np.array([freedom_of(count) for count in defined]),
        unpredicted=int(np.isnan(observed[:, STATED, 0]).sum()), silent=int(np.isnan(observed[:, STATED, 2]).sum()),
    )  # fmt: skip


def _over_layers(means: Sequence[Mean]) -> Mean:
    return Mean(
        values=_nanmean(np.stack([mean.values for mean in means])),
        samples=_nanmean(np.stack([mean.samples for mean in means])).astype(np.float32),
        permuted=_nanmean(np.stack([mean.permuted for mean in means])),
        freedom=np.array([
            pooled_freedom([mean.column(name) for mean in means], [float(mean.freedom[place]) for mean in means])
            for place, name in enumerate(ALL)
        ]),
        neurons=sum(mean.neurons for mean in means), unpredicted=sum(mean.unpredicted for mean in means),
        silent=sum(mean.silent for mean in means),
    )  # fmt: skip


def _all_measures(
    base: Float64[np.ndarray, "*any 3"], relevant: Float64[np.ndarray, "*any thresholds 3"],
    maximum: Float64[np.ndarray, "*any"],
) -> Float64[np.ndarray, "*any thresholds 6"]:  # fmt: skip
    """Compute the measures of `ALL` from sums over tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        tokens = base[..., 0, None]
        fires = np.broadcast_to(base[..., 1, None] / tokens, relevant.shape[:-1])
        chance = np.stack([fires, relevant[..., 0] / tokens], axis=-1)
    return np.concatenate([measured(base, relevant, maximum), chance], axis=-1)


def _resampled(counts: Counts, rng: np.random.Generator, resamples: int) -> Float64[np.ndarray, "resamples 6"]:
    """Two-level bootstrap at the stated threshold: draw neurons, and for each one of its resampled sets of excerpts.

    Only this threshold: no table shows an interval at another one, and all ten would take ten times as long.
    """
    sets = sets_each(len(counts.base), resamples, FIRING_RESAMPLES)
    table = np.concatenate(list(_resampled_excerpts(counts, rng, sets)))
    neurons = len(table)
    flat = table.reshape(neurons * sets, len(ALL))
    known = ~np.isnan(flat)
    flat = np.where(known, flat, 0)
    resampled = np.empty((resamples, flat.shape[1]))
    for start in range(0, resamples, _CHUNK):
        drawn = rng.integers(len(flat), size=(min(_CHUNK, resamples - start), neurons))
        resampled[start : start + _CHUNK] = _share(flat[drawn].sum(axis=1), known[drawn].sum(axis=1))
    return resampled


def _resampled_excerpts(
    counts: Counts, rng: np.random.Generator, sets: int
) -> Iterator[Float32[np.ndarray, "chunk times 6"]]:
    """`ALL` of every neuron over its excerpts, drawn with replacement, `sets` times."""
    for start in range(0, len(counts.base), _CHUNK):
        rows = slice(start, start + _CHUNK)
        present = _there(counts.base[rows])
        number = np.maximum(present.sum(axis=1), 1)
        chances = np.where(present.any(axis=1, keepdims=True), present, np.eye(1, present.shape[1])) / number[:, None]
        drawn = rng.multinomial(
            number[:, None], chances[:, None], size=(len(number), sets)
        ).astype(np.float64)  # fmt: skip
        base = drawn @ counts.base[rows]
        relevant = drawn @ counts.relevant[rows, :, STATED]
        maximum = np.broadcast_to(counts.maximum[rows, None], base.shape[:2])
        yield _all_measures(base, relevant[:, :, None], maximum)[:, :, 0].astype(np.float32)


def _there(base: Float64[np.ndarray, "chunk excerpts 3"]) -> Bool[np.ndarray, "chunk excerpts"]:
    return base[:, :, 0] > 0


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where all values are."""
    known = ~np.isnan(values)
    return _share(np.where(known, values, 0).sum(axis=0), known.sum(axis=0))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
