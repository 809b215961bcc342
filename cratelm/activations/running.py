"""Running statistics of many neurons over a stream of activations, on the model's device, in bounded memory."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Moments:
    """Count, mean, central sums of powers 2 to 4, density, minimum and maximum of each neuron, in float64.

    Each update computes the batch's own central sums and merges them (Chan, Golub & LeVeque 1979; Pebay 2008 for the
    higher powers), so nothing cancels however long the stream is.
    """

    neurons: int
    device: torch.device
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros(self.neurons, dtype=torch.float64, device=self.device)
        names = ("mean", "power2", "power3", "power4", "active")
        self.state = {"count": torch.zeros((), dtype=torch.float64, device=self.device)}
        self.state |= {name: zeros.clone() for name in names}
        self.state |= {"minimum": zeros + torch.inf, "maximum": zeros - torch.inf}

    def update(self, activations: Float[Tensor, "tokens neurons"]) -> None:
        """Take in the activations of some tokens."""
        count = activations.shape[0]
        mean = activations.mean(dim=0)
        centred = activations - mean
        square = centred * centred
        power2 = square.sum(dim=0)
        power3 = centred.mul_(square).sum(dim=0)
        power4 = square.mul_(square).sum(dim=0)
        self._merge(float(count), *(value.double() for value in (mean, power2, power3, power4)))
        self.state["active"] += (activations > 0).sum(dim=0)
        self.state["minimum"] = torch.minimum(self.state["minimum"], activations.amin(dim=0).double())
        self.state["maximum"] = torch.maximum(self.state["maximum"], activations.amax(dim=0).double())

    def _merge(self, count: float, mean: Tensor, power2: Tensor, power3: Tensor, power4: Tensor) -> None:
        s, old = self.state, self.state["count"].clone()
        total = old + count
        delta = mean - s["mean"]
        step = delta / total
        s["power4"] += (
            power4
            + delta * step**3 * old * count * (old**2 - old * count + count**2)
            + 6 * step**2 * (old**2 * power2 + count**2 * s["power2"])
            + 4 * step * (old * power3 - count * s["power3"])
        )
        s["power3"] += (
            power3 + delta * step**2 * old * count * (old - count) + 3 * step * (old * power2 - count * s["power2"])
        )
        s["power2"] += power2 + delta * step * old * count
        s["mean"] += step * count
        s["count"] = total

    def result(self) -> dict[str, Tensor]:
        """Density, mean, unbiased variance, standardised skewness and kurtosis (3 for a normal), minimum, maximum."""
        s, count = self.state, self.state["count"]
        spread = s["power2"] / count
        return {
            "density": s["active"] / count, "mean": s["mean"], "variance": s["power2"] / (count - 1),
            "skewness": s["power3"] / count / spread**1.5, "kurtosis": s["power4"] / count / spread**2,
            "minimum": s["minimum"], "maximum": s["maximum"],
        }  # fmt: skip


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
        """The maximum an excerpt must reach to be kept; one of 0 is never kept."""
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
        """Propose excerpts."""
        self.pending.append((neuron, maximum, position, document, length.to(torch.int16), activation))
        self._waiting += len(neuron)
        if self._waiting > self.neurons * self.keep:
            self.merge()

    def merge(self) -> None:
        """Rebuild the tables from what is kept and what waits."""
        if not self.pending:
            return
        columns = [torch.cat(parts) for parts in zip(*self.pending, strict=True)]
        self.pending, self._waiting = [], 0
        kept = self.tables["position"].flatten() >= 0
        row = torch.arange(self.neurons, device=self.device).repeat_interleave(self.keep)[kept]
        old = [self.tables[name].flatten(0, 1)[kept] for name in ("maximum", "position", "document", "length")]
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
            neuron[inside], rank[inside], source[inside], int(kept.sum()), columns[5], kept,
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
        kept: Bool[Tensor, " entries"],
        values: tuple[Tensor, ...],
    ) -> None:
        slot = neuron * self.keep + rank
        blank = TopExcerpts(self.neurons, self.keep, self.width, self.device).tables
        for name, value in zip(("maximum", "position", "document", "length"), values, strict=True):
            blank[name].view(-1)[slot] = value
        activations = blank["activation"].view(-1, self.width)
        was_old = source < num_old
        old_slots = kept.nonzero().squeeze(1)
        activations[slot[was_old]] = self.tables["activation"].flatten(0, 1)[old_slots[source[was_old]]]
        activations[slot[~was_old]] = fresh[source[~was_old] - num_old]
        self.tables = blank


@dataclass
class SampledExcerpts:
    """A uniform sample of excerpts for each neuron, drawn before the pass.

    The numbered windows, turned by a random number for each neuron, are cut into `keep` equal stretches and one window
    is drawn from each: every window has the same chance, none comes twice, and all parts of the corpus are present.
    """

    neurons: int
    total: int
    """Windows there are to draw from."""
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

        `slot // kept` is the neuron. The host knows the bounds, so that no device is waited for.
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
