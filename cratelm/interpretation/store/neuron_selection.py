"""Which neurons of a layer a language model is asked about, where all would be too many.

The rule knows the number of neurons in the layer and nothing else, so it is the same for every model: two models of
the same width are asked about the same indices. Nobody looks first whether a neuron fires: a dead one that is drawn
is counted as dead.
"""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store, add_set, set_id
from cratelm.interpretation.store.schema import SetKey, packed, unpacked

UNDERSTOOD = "Write all, a number of neurons such as 300, or indices such as 0-99,120 (a single one as 120-120)"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A rule that chooses neurons. Made by `chosen`."""

    count: int | None = None
    """How many, spread over the layer; None for all, or where the indices are given."""
    spans: tuple[tuple[int, int], ...] = ()
    """First and last index of each stretch that was named."""
    seed: int | None = None
    """Draw so many at random with this seed; None takes them evenly spaced."""

    def of(self, num_neurons: int, *, layer: int = 0) -> Int64[np.ndarray, " chosen"]:
        """Indices in a layer of so many neurons, ascending. Refused where one is beyond the last."""
        if self.spans:
            last = max(end for _, end in self.spans)
            if last >= num_neurons:
                raise CrateError(f"layer {layer} has neurons 0 to {num_neurons - 1}, not {last}. Use other --neurons")
            return np.unique(np.concatenate([np.arange(first, end + 1) for first, end in self.spans]))
        if self.count is None or self.count >= num_neurons:
            return np.arange(num_neurons)
        if self.seed is not None:
            rng = np.random.default_rng([self.seed, layer])
            return np.sort(rng.choice(num_neurons, size=self.count, replace=False))
        return (np.arange(self.count) * num_neurons + num_neurons // 2) // self.count

    def __str__(self) -> str:
        if self.spans:
            return ",".join(f"{first}-{end}" for first, end in self.spans)
        if self.count is None:
            return "all"
        return f"{self.count}, " + ("evenly spaced" if self.seed is None else f"at random with seed {self.seed}")


def chosen(text: str, *, seed: int | None = None) -> Chosen:
    """The rule that a user wrote: `all`, `300`, or `0-99,120`."""
    if text == "all":
        return Chosen()
    if re.fullmatch(r"\d+", text):
        if int(text) == 0:
            raise CrateError(f"--neurons 0 asks about no neuron. {UNDERSTOOD}")
        return Chosen(count=int(text), seed=seed)
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise CrateError(f"--neurons {text!r} is not understood. {UNDERSTOOD}")
        first, end = int(match[1]), int(match[2] or match[1])
        if end < first:
            raise CrateError(f"--neurons {text!r} names a stretch that ends before it begins. {UNDERSTOOD}")
        spans.append((first, end))
    return Chosen(spans=tuple(spans))


def keep_chosen(store: Store, key: SetKey, neurons: Int64[np.ndarray, " chosen"]) -> None:
    """Note which neurons a set is about, those among them that cannot be explained too."""
    with store.transaction() as connection:
        own = add_set(connection, key)
        connection.execute("INSERT OR REPLACE INTO chosen VALUES (?, ?)", [own, packed(neurons, "<i4")])


def kept_chosen(store: Store, key: SetKey) -> Int64[np.ndarray, " chosen"] | None:
    """Which neurons a set is about; None for all of its layer."""
    with store.transaction() as connection:
        row = connection.execute("SELECT neurons FROM chosen WHERE set_id = ?", [set_id(connection, key)]).fetchone()
    return None if row is None else unpacked(row[0], "<i4").astype(np.int64)
