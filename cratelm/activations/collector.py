"""The running records of every neuron of every layer: what one forward pass adds, and what is kept at the end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.activations.plan import SPLITS, CollectConfig, Plan
from cratelm.activations.records import ABSENT
from cratelm.activations.running import Moments, SampledExcerpts, TopExcerpts


class Collector:
    """The running records of all layers: `update` once per forward pass, `layer_arrays` at the end."""

    def __init__(self, config: CollectConfig, plan: Plan, layers: Mapping[int, int], *, device: torch.device) -> None:
        """`layers` gives the number of neurons of each layer."""
        self.config, self.plan, self.device = config, plan, device
        ends = np.cumsum([0, *layers.values()])
        self.neurons = {layer: slice(ends[i], ends[i + 1]) for i, layer in enumerate(layers)}
        self.total = int(ends[-1])
        self.moments = {layer: Moments(count, device) for layer, count in layers.items()}
        self.sizes = {
            config.wide: (config.top_wide, config.sample_wide),
            config.narrow: (config.top_narrow, config.sample_narrow),
        }
        self.windows = {width: plan.windows(width) for width in self.sizes}
        split = plan.row_split()
        self.numbers = {
            (width, which): np.concatenate([[0], np.cumsum(np.where(split == which, self.windows[width], 0))])
            for width in self.sizes for which in range(len(SPLITS))
        }  # fmt: skip
        self.top = {
            width: TopExcerpts(len(SPLITS) * self.total, keep, width, device) for width, (keep, _) in self.sizes.items()
        }
        self.samples = {
            (layer, width, which): SampledExcerpts(
                count, int(self.numbers[width, which][-1]), self.sizes[width][1], width,
                (config.seed, layer, width, which), device,
            )
            for layer, count in layers.items() for width in self.sizes for which in range(len(SPLITS))
        }  # fmt: skip

    def update(self, codes: Mapping[int, Float[Tensor, "rows length neurons"]], rows: slice) -> None:
        """Take in the codes of some rows of the plan, longest row first."""
        batch = _Batch(self, rows)
        for layer, code in codes.items():
            inside = code[:, self.plan.warmup :]
            if batch.padding is None:
                self.moments[layer].update(inside.flatten(0, 1))
            else:
                self.moments[layer].update(inside[~batch.padding])
                inside = inside.masked_fill(batch.padding[..., None], -math.inf)
            for width, windows in batch.windows.items():
                self._offer_top(layer, inside, width, windows)
                for which in range(len(SPLITS)):
                    self._store_sample(layer, inside, width, windows, which)

    def _offer_top(self, layer: int, inside: Tensor, width: int, windows: "_Windows") -> None:
        """Each row proposes, to each neuron, its strongest window."""
        padded = torch.nn.functional.pad(inside, (0, 0, 0, -inside.shape[1] % width), value=-math.inf)
        maxima = padded.unflatten(1, (-1, width)).amax(dim=2)[:, : windows.most]
        maxima = maxima if windows.missing is None else maxima.masked_fill(windows.missing[..., None], -math.inf)
        strongest, which = maxima.max(dim=1)  # (rows, neurons)
        neurons = self.neurons[layer]
        threshold = self.top[width].threshold.view(len(SPLITS), -1)[:, neurons][windows.split]
        row, neuron = ((strongest >= threshold) & (strongest > 0)).nonzero(as_tuple=True)
        index = which[row, neuron]
        first = index * width
        self.top[width].offer(
            neuron + neurons.start + windows.split[row] * self.total, strongest[row, neuron],
            windows.position[row] + first, windows.document[row], windows.length[row],
            _gather(inside, row, first, neuron, windows.length[row], width),
        )  # fmt: skip

    def _store_sample(self, layer: int, inside: Tensor, width: int, windows: "_Windows", which: int) -> None:
        """Keep the windows that were drawn for some neuron."""
        sample = self.samples[layer, width, which]
        slot, number = sample.wanted(windows.first_number[which], windows.count[which])
        if len(slot) == 0:
            return
        row, index = windows.place[which][number].unbind(dim=1)
        neuron = slot // sample.tables["position"].shape[1]
        length, first = windows.length[row], index * width
        activation = _gather(inside, row, first, neuron, length, width)
        sample.store(slot, windows.position[row] + first, length, activation)

    def state(self) -> dict[str, Tensor]:
        """Everything that a later process needs to go on from here, as named tensors."""
        state: dict[str, Tensor] = {}
        for layer, moments in self.moments.items():
            state |= {f"moments.{layer}.{name}": value for name, value in moments.state.items()}
        for width, top in self.top.items():
            top.merge()
            state |= {f"top.{width}.{name}": value for name, value in top.tables.items()}
        for key, sample in self.samples.items():
            state |= {f"sample.{'.'.join(map(str, key))}.{name}": value for name, value in sample.tables.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for layer, moments in self.moments.items():
            moments.state = {name: state[f"moments.{layer}.{name}"] for name in moments.state}
        for width, top in self.top.items():
            top.tables = {name: state[f"top.{width}.{name}"] for name in top.tables}
        for key, sample in self.samples.items():
            sample.tables = {name: state[f"sample.{'.'.join(map(str, key))}.{name}"] for name in sample.tables}

    def layer_arrays(self, layer: int) -> dict[str, np.ndarray]:
        """The tensors of one layer's file."""
        arrays = {name: value.float().cpu().numpy() for name, value in self.moments[layer].result().items()}
        for width in self.sizes:
            self.top[width].merge()
            for which, split in enumerate(SPLITS):
                name = f"{width}.{split}"
                neurons = self.neurons[layer]
                rows = slice(which * self.total + neurons.start, which * self.total + neurons.stop)
                top = {key: self.top[width].tables[key][rows] for key in ("position", "length", "activation")}
                arrays |= {f"{name}.top.{key}": value.cpu().numpy() for key, value in top.items()}
                divided = self._divide_sample(layer, width, which)
                arrays |= {f"{name}.{key}": value for key, value in divided.items()}
        return arrays

    def _divide_sample(self, layer: int, width: int, which: int) -> dict[str, np.ndarray]:
        """Random excerpts, and quantile excerpts from the rest of the sample."""
        config = self.config
        sample = {key: value.cpu().numpy() for key, value in self.samples[layer, width, which].tables.items()}
        neurons, kept = sample["position"].shape
        generator = np.random.default_rng((config.seed, layer, width, which, 1))
        shuffled = generator.random((neurons, kept)).argsort(axis=1)
        chosen = {"random": shuffled[:, : config.random]}
        rest = shuffled[:, config.random :]
        maximum = np.take_along_axis(sample["activation"].max(axis=2), rest, axis=1)
        ranked = np.take_along_axis(rest, np.argsort(maximum, axis=1, kind="stable"), axis=1)  # weakest first
        intervals = config.quantiles_wide if width == config.wide else config.quantiles_narrow
        shown = intervals if width == config.wide else intervals - 1
        chosen["quantile"] = _one_interval_after_another(ranked, intervals, shown, config.per_quantile, shuffled)
        return {
            f"{kind}.{key}": _pick(values, slots)
            for kind, slots in chosen.items() for key, values in sample.items()
        }  # fmt: skip


def _one_interval_after_another(
    ranked: np.ndarray, intervals: int, shown: int, per_interval: int, shuffled: np.ndarray
) -> np.ndarray:
    """From each interval of ranks the `per_interval` samples that come first in random order; ABSENT where too few."""
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
    """`values[neuron, slot]`, with an absent excerpt's position ABSENT and the rest 0."""
    index = np.maximum(slots, 0)
    picked = values[np.arange(len(values))[:, None], index]
    blank = ABSENT if values.ndim == 2 and values.dtype == np.int64 else 0
    absent = (slots == ABSENT).reshape(slots.shape + (1,) * (picked.ndim - 2))
    return np.where(absent, np.array(blank, picked.dtype), picked)


def _gather(
    inside: Float[Tensor, "rows length neurons"],
    row: Int[Tensor, " entries"],
    first: Int[Tensor, " entries"],
    neuron: Int[Tensor, " entries"],
    length: Int[Tensor, " entries"],
    width: int,
) -> Float[Tensor, "entries width"]:
    """Each entry's neuron over the tokens of its window, 0 beyond the window's length."""
    columns = torch.arange(width, device=inside.device)
    token = (first[:, None] + columns).clamp(max=inside.shape[1] - 1)
    values = inside[row[:, None], token, neuron[:, None]]
    return torch.where(columns < length[:, None], values, 0.0)


@dataclass
class _Windows:
    """The windows of one width in a batch of rows."""

    position: Int[Tensor, " rows"]
    """Index in the corpus of each row's first window."""
    document: Int[Tensor, " rows"]
    split: Int[Tensor, " rows"]
    length: Int[Tensor, " rows"]
    """Tokens in a window of the row."""
    most: int
    """Windows of the row that has most."""
    missing: Bool[Tensor, "rows most"] | None
    """Where a row has fewer; None if none has."""
    first_number: list[int]
    """Per split: the number, among all windows of the split, of the batch's first."""
    count: list[int]
    """Per split: windows in the batch."""
    place: list[Int[Tensor, "_ 2"]]
    """Per split: row in the batch and index in the row of each window."""


class _Batch:
    """What the collector must know about some rows of the plan."""

    def __init__(self, collector: Collector, rows: slice) -> None:
        plan, device = collector.plan, collector.device
        length = plan.row_length[rows] - plan.warmup
        padding = np.arange(length[0]) >= length[:, None]
        self.padding = torch.from_numpy(padding).to(device) if padding.any() else None
        self.windows = {width: self._windows(collector, rows, width) for width in collector.sizes}

    @staticmethod
    def _windows(collector: Collector, rows: slice, width: int) -> _Windows:
        plan, device = collector.plan, collector.device
        count, split = collector.windows[width][rows], plan.row_split()[rows]
        number = [collector.numbers[width, which][[rows.start, rows.stop]] for which in range(len(SPLITS))]
        most = max(1, int(count.max()))
        missing = np.arange(most) >= count[:, None]
        places = [np.argwhere(~missing & (split == which)[:, None]) for which in range(len(SPLITS))]

        def send(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        return _Windows(
            position=send(plan.row_position[rows] + plan.warmup), document=send(plan.row_document[rows]),
            split=send(split), length=send(plan.window_length(rows, width)), most=most,
            missing=send(missing) if missing.any() else None,
            first_number=[int(pair[0]) for pair in number], count=[int(pair[1] - pair[0]) for pair in number],
            place=[send(place) for place in places],
        )  # fmt: skip
