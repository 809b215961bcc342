"""The tensors of a layer's file, from the running state of a collection."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cratelm.activations.collector import Collector
from cratelm.activations.neighbours import nearest_cofiring, nearest_directions
from cratelm.activations.plan import SPLITS
from cratelm.activations.records import ABSENT
from cratelm.activations.running import Moments


def layer_arrays(
    collector: Collector, layer: int, decoders: Mapping[int, Float[Tensor, "neurons d_model"]] | None
) -> dict[str, np.ndarray]:
    """The tensors of one layer's file."""
    collector.flush()
    arrays = statistics_arrays(collector.moments[layer])
    arrays["cofiring_neuron"], arrays["cofiring_jaccard"] = nearest_cofiring(collector.fires[layer])
    if decoders is not None:
        arrays["similar_neuron"], arrays["similar_cosine"] = nearest_directions(decoders[layer])
    for width in collector.sizes:
        collector.top[width].merge()
        for which, split in enumerate(SPLITS):
            name = f"{width}.{split}"
            neurons = collector.neurons[layer]
            rows = slice(which * collector.total + neurons.start, which * collector.total + neurons.stop)
            top = {key: collector.top[width].tables[key][rows] for key in ("position", "length", "activation")}
            arrays |= {f"{name}.top.{key}": value.cpu().numpy() for key, value in top.items()}
            divided = _divide_sample(collector, layer, width, which)
            arrays |= {f"{name}.{key}": value for key, value in divided.items()}
    return arrays


def _divide_sample(collector: Collector, layer: int, width: int, which: int) -> dict[str, np.ndarray]:
    """Random excerpts, and quantile excerpts from the rest of the sample."""
    config = collector.config
    sample = {key: value.cpu().numpy() for key, value in collector.samples[layer, width, which].tables.items()}
    neurons, count = sample["position"].shape
    generator = np.random.default_rng((config.seed, layer, width, which, 1))
    shuffled = generator.random((neurons, count)).argsort(axis=1)
    chosen = {"random": shuffled[:, : config.random]}
    rest = shuffled[:, config.random :]
    maximum = np.take_along_axis(sample["activation"].max(axis=2), rest, axis=1)
    ranked = np.take_along_axis(rest, np.argsort(maximum, axis=1, kind="stable"), axis=1)  # weakest first
    intervals = config.quantiles_wide if width == config.wide else config.quantiles_narrow
    shown = intervals if width == config.wide else intervals - 1
    chosen["quantile"] = _sample_intervals(ranked, intervals, shown, config.per_quantile, shuffled)
    return {
        f"{kind}.{key}": _pick(values, slots)
        for kind, slots in chosen.items() for key, values in sample.items()
    }  # fmt: skip


def statistics_arrays(moments: Moments) -> dict[str, np.ndarray]:
    """The per-neuron statistics as written to disk."""
    result = moments.result()
    histogram = result.pop("histogram")
    arrays = {name: value.float().cpu().numpy() for name, value in result.items()}
    return arrays | {"histogram": histogram.cpu().numpy()}


def _sample_intervals(
    ranked: np.ndarray, intervals: int, shown: int, per_interval: int, shuffled: np.ndarray
) -> np.ndarray:
    """The first `per_interval` samples, in random order, of each interval of ranks; ABSENT where there are fewer."""
    neurons, count = ranked.shape
    order = np.argsort(shuffled, axis=1)  # a random number for each slot
    edges = np.arange(intervals + 1) * count // intervals
    parts = []
    for low, high in zip(edges[:shown], edges[1 : shown + 1], strict=True):
        slots = ranked[:, low:high]
        random_first = np.take_along_axis(order, slots, axis=1).argsort(axis=1)[:, :per_interval]
        picked = np.take_along_axis(slots, random_first, axis=1)
        parts.append(np.pad(picked, ((0, 0), (0, per_interval - picked.shape[1])), constant_values=ABSENT))
    return np.concatenate(parts, axis=1)


def _pick(values: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """`values[neuron, slot]`; for an absent excerpt the position is ABSENT and other values are 0."""
    index = np.maximum(slots, 0)
    picked = values[np.arange(len(values))[:, None], index]
    blank = ABSENT if values.ndim == 2 and values.dtype == np.int64 else 0
    absent = (slots == ABSENT).reshape(slots.shape + (1,) * (picked.ndim - 2))
    return np.where(absent, np.array(blank, picked.dtype), picked)
