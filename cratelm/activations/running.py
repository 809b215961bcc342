"""Running statistics of many neurons over a stream of activations, on the model's device, in bounded memory."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

HISTOGRAM_BINS = 64
HISTOGRAM_STRIDE = 4
"""The histogram counts every N-th token; all other statistics are over all tokens."""
_FIRST_KEY = (127 - 16) * 2  # 2^-16, in units of the 22-bit shift that leaves sign, exponent and one bit of fraction


def histogram_edges() -> Float[np.ndarray, " edges"]:
    """Lower edges of bins 1 to 63, two an octave from 1.5 * 2^-16 on (1, 1.5, 2, 3, 4, ...); bin 0 is below them.

    The last bin has no upper edge.
    """
    keys = np.arange(1, HISTOGRAM_BINS, dtype=np.int32) + _FIRST_KEY
    return (keys << 22).view(np.float32)


@dataclass
class Moments:
    """Count, mean, central sums of powers 2 to 4, density, extremes and a log-binned histogram of each neuron.

    Sums are of deviations from a value near the mean (`start`), in float64, to avoid cancellation. Blocks that stay in
    the processor's cache, and sums by matrix product, make it fast (`docs/performance.md`).
    """

    neurons: int
    device: torch.device
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.neurons, device=self.device)
        self.state = {
            "count": torch.zeros((), dtype=torch.float64, device=self.device), "shift": zeros.clone(),
            "sums": torch.zeros(5, self.neurons, dtype=torch.float64, device=self.device),
            "minimum": zeros + torch.inf, "maximum": zeros - torch.inf,
            "histogram": torch.zeros(self.neurons * HISTOGRAM_BINS, dtype=torch.int32, device=self.device),
        }  # fmt: skip
        self._first = torch.arange(self.neurons, dtype=torch.int32, device=self.device) * HISTOGRAM_BINS

    def start(self, activations: Float[Tensor, "tokens neurons"]) -> None:
        """Fix the value from which deviations are taken: the mean of some tokens, the same in all processes."""
        self.state["shift"] = activations.mean(dim=0)

    def update(self, activations: Float[Tensor, "tokens neurons"]) -> None:
        """Add the activations of some tokens."""
        state, count = self.state, activations.shape[0]
        ones = torch.ones(1, count, device=self.device)
        power = activations - state["shift"]
        square = power * power
        sums = [ones @ power, ones @ square, ones @ power.mul_(square), ones @ square.mul_(square)]
        sums.append(ones @ torch.gt(activations, 0, out=power))
        state["sums"] += torch.cat(sums)
        state["count"] += count
        state["minimum"] = torch.minimum(state["minimum"], activations.amin(dim=0))
        state["maximum"] = torch.maximum(state["maximum"], activations.amax(dim=0))
        self._add_to_histogram(activations[::HISTOGRAM_STRIDE])

    def _add_to_histogram(self, activations: Tensor) -> None:
        """The leading bits of a float32 are a logarithm; negative numbers come out below all bins, in the first."""
        key = (activations.contiguous().view(torch.int32) >> 22) - _FIRST_KEY
        cell = key.clamp_(0, HISTOGRAM_BINS - 1).add_(self._first).flatten()
        increment = torch.ones((), dtype=torch.int32, device=self.device)
        self.state["histogram"].index_add_(0, cell, increment.expand(len(cell)))

    def central(self) -> dict[str, Tensor]:
        """Count, mean and central sums, from which several collections can be added up."""
        count = self.state["count"]
        first, second, third, fourth, active = self.state["sums"]
        d = first / count  # mean of the deviations
        return {
            "count": count, "mean": self.state["shift"].double() + d, "power2": second - count * d**2,
            "power3": third - 3 * d * second + 2 * count * d**3,
            "power4": fourth - 4 * d * third + 6 * d**2 * second - 3 * count * d**4, "active": active,
        }  # fmt: skip

    def result(self) -> dict[str, Tensor]:
        """Density, mean, unbiased variance, standardised skewness and kurtosis (normal: 3), extremes, histogram."""
        c = self.central()
        spread = c["power2"] / c["count"]
        return {
            "density": c["active"] / c["count"], "mean": c["mean"], "variance": c["power2"] / (c["count"] - 1),
            "skewness": c["power3"] / c["count"] / spread**1.5, "kurtosis": c["power4"] / c["count"] / spread**2,
            "minimum": self.state["minimum"], "maximum": self.state["maximum"],
            "histogram": self.state["histogram"].view(self.neurons, HISTOGRAM_BINS),
        }  # fmt: skip

    def merge(self, other: "Moments") -> None:
        """Add the statistics of another process, after moving its sums to this shift."""
        mine, theirs, count = self.state, other.state, other.state["count"]
        d = theirs["shift"].double() - mine["shift"].double()
        first, second, third, fourth, active = theirs["sums"]
        moved = [
            first + count * d,
            second + 2 * d * first + count * d**2,
            third + 3 * d * second + 3 * d**2 * first + count * d**3,
            fourth + 4 * d * third + 6 * d**2 * second + 4 * d**3 * first + count * d**4,
            active,
        ]
        mine["sums"] += torch.stack(moved)
        mine["count"] += count
        mine["minimum"] = torch.minimum(mine["minimum"], theirs["minimum"])
        mine["maximum"] = torch.maximum(mine["maximum"], theirs["maximum"])
        mine["histogram"] += theirs["histogram"]


@dataclass
class TopExcerpts:
    """Each neuron's strongest excerpts, at most one per document, by the excerpt's maximum.

    Candidates that beat the neuron's weakest kept excerpt wait in a list until it is long enough; then all neurons'
    tables are rebuilt with one sort. Among equal maxima the earlier position wins, so the result does not depend on
    how the stream was cut into batches.
    """

    neurons: int
    keep: int
    width: int
    device: torch.device
    tables: dict[str, Tensor] = field(init=False)
    pending: list[tuple[Tensor, ...]] = field(init=False, default_factory=list)
    _waiting: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        shape = (self.neurons, self.keep)
        self.tables = {
            "maximum": torch.zeros(shape, device=self.device),
            "position": torch.full(shape, -1, dtype=torch.int64, device=self.device),
            "document": torch.full(shape, -1, dtype=torch.int64, device=self.device),
            "length": torch.zeros(shape, dtype=torch.int16, device=self.device),
            "activation": torch.zeros(*shape, self.width, device=self.device),
        }

    @property
    def threshold(self) -> Float[Tensor, " neurons"]:
        """The maximum an excerpt must exceed to be kept; an excerpt with maximum 0 is never kept."""
        return self.tables["maximum"][:, -1]

    def offer(
        self,
        neuron: Int[Tensor, " candidates"],
        maximum: Float[Tensor, " candidates"],
        position: Int[Tensor, " candidates"],
        document: Int[Tensor, " candidates"],
        length: Int[Tensor, " candidates"],
        activation: Float[Tensor, "candidates width"],
    ) -> None:
        """Propose excerpts; the strongest of each neuron are kept."""
        self.pending.append((neuron, maximum, position, document, length.to(torch.int16), activation))
        self._waiting += len(neuron)
        if self._waiting > self.neurons * self.keep:
            self.merge()

    def take(self, other: "TopExcerpts") -> None:
        """Propose all excerpts of another table."""
        other.merge()
        neuron, slot = (other.tables["position"] >= 0).nonzero(as_tuple=True)
        names = ("maximum", "position", "document", "length", "activation")
        self.offer(neuron, *(other.tables[name][neuron, slot] for name in names))

    def merge(self) -> None:
        """Rebuild the tables from the kept excerpts and the pending ones."""
        if not self.pending:
            return
        columns = [torch.cat(parts) for parts in zip(*self.pending, strict=True)]
        self.pending, self._waiting = [], 0
        occupied = self.tables["position"].flatten() >= 0
        row = torch.arange(self.neurons, device=self.device).repeat_interleave(self.keep)[occupied]
        old = [self.tables[name].flatten(0, 1)[occupied] for name in ("maximum", "position", "document", "length")]
        neuron = torch.cat([row, columns[0]])
        maximum, position, document, length = (torch.cat(pair) for pair in zip(old, columns[1:5], strict=True))
        source = torch.arange(len(neuron), device=self.device)
        best = self._one_per_document(neuron, maximum, position, document)
        neuron, maximum, position, document, length, source = (
            values[best] for values in (neuron, maximum, position, document, length, source)
        )
        first = torch.searchsorted(neuron, torch.arange(self.neurons, device=self.device))
        rank = torch.arange(len(neuron), device=self.device) - first[neuron]
        inside = rank < self.keep
        self._rebuild(
            neuron[inside], rank[inside], source[inside], int(occupied.sum()), columns[5], occupied,
            (maximum[inside], position[inside], document[inside], length[inside]),
        )  # fmt: skip

    @staticmethod
    def _one_per_document(neuron: Tensor, maximum: Tensor, position: Tensor, document: Tensor) -> Tensor:
        """Indices by (neuron, strongest first, earliest first), the best of each neuron's document only."""
        order = position.argsort(stable=True)
        order = order[maximum[order].argsort(descending=True, stable=True)]
        order = order[document[order].argsort(stable=True)]
        order = order[neuron[order].argsort(stable=True)]
        n, d = neuron[order], document[order]
        new = torch.ones(len(order), dtype=torch.bool, device=order.device)
        new[1:] = (n[1:] != n[:-1]) | (d[1:] != d[:-1])
        order = order[new]
        order = order[position[order].argsort(stable=True)]
        order = order[maximum[order].argsort(descending=True, stable=True)]
        return order[neuron[order].argsort(stable=True)]

    def _rebuild(
        self,
        neuron: Tensor,
        rank: Tensor,
        source: Tensor,
        num_old: int,
        fresh: Tensor,
        occupied: Bool[Tensor, " entries"],
        values: tuple[Tensor, ...],
    ) -> None:
        slot = neuron * self.keep + rank
        blank = TopExcerpts(self.neurons, self.keep, self.width, self.device).tables
        for name, value in zip(("maximum", "position", "document", "length"), values, strict=True):
            blank[name].view(-1)[slot] = value
        activations = blank["activation"].view(-1, self.width)
        was_old = source < num_old
        old_slots = occupied.nonzero().squeeze(1)
        activations[slot[was_old]] = self.tables["activation"].flatten(0, 1)[old_slots[source[was_old]]]
        activations[slot[~was_old]] = fresh[source[~was_old] - num_old]
        self.tables = blank


@dataclass
class SampledExcerpts:
    """A uniform sample of excerpts for each neuron, drawn before the pass.

    The numbered windows, rotated by a random offset for each neuron, are cut into `keep` equal stretches, and one is
    drawn from each: all windows have the same chance, none is drawn twice, and all parts of the corpus are present.
    """

    neurons: int
    total: int
    """Number of windows to draw from."""
    keep: int
    width: int
    seed: tuple[int, ...]
    device: torch.device
    tables: dict[str, Tensor] = field(init=False)
    _number: Tensor = field(init=False)
    _slot: Tensor = field(init=False)
    _bounds: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        keep = min(self.keep, self.total)
        shape = (self.neurons, keep)
        generator = np.random.default_rng(self.seed)
        edges = np.arange(keep + 1) * self.total // max(keep, 1)
        number = generator.integers(edges[:-1], edges[1:], shape) if keep else np.zeros(shape, dtype=np.int64)
        turn = generator.integers(0, max(self.total, 1), (self.neurons, 1))
        number = ((number + turn) % max(self.total, 1)).ravel()
        order = np.argsort(number, kind="stable")
        self._number, self._slot = (torch.from_numpy(array).to(self.device) for array in (number[order], order))
        self._bounds = number[order]
        self.tables = {
            "position": torch.full(shape, -1, dtype=torch.int64, device=self.device),
            "length": torch.zeros(shape, dtype=torch.int16, device=self.device),
            "activation": torch.zeros(*shape, self.width, device=self.device),
        }

    def wanted(self, first: int, count: int) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
        """Which of the windows numbered `first` to `first + count - 1` are in the sample: (slot, number - first).

        `slot // keep` is the neuron. The bounds are on the host, so no device sync is needed.
        """
        low, high = np.searchsorted(self._bounds, [first, first + count])
        return self._slot[low:high], self._number[low:high] - first

    def store(
        self,
        slot: Int[Tensor, " entries"],
        position: Int[Tensor, " entries"],
        length: Int[Tensor, " entries"],
        activation: Float[Tensor, "entries width"],
    ) -> None:
        """Keep the activations of sampled windows."""
        self.tables["position"].view(-1)[slot] = position
        self.tables["length"].view(-1)[slot] = length.to(torch.int16)
        self.tables["activation"].view(-1, self.width)[slot] = activation

    def take(self, other: "SampledExcerpts") -> None:
        """Copy the windows that another process has read."""
        present = other.tables["position"] >= 0
        for name, table in self.tables.items():
            table[present] = other.tables[name][present]
