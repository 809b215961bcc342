"""Choose the neurons of a layer that a language model explains.

The choice depends only on the number of neurons in the layer, so models of the same width use the same indices. It does
not depend on whether a neuron fires: dead neurons are counted as dead.
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
    """Number of neurons; None for all, or if `spans` are given."""
    spans: tuple[tuple[int, int], ...] = ()
    """First and last index of each range."""
    seed: int | None = None
    """Seed of a random draw of `count` neurons; None takes evenly spaced ones."""

    def of(self, num_neurons: int, *, layer: int = 0) -> Int64[np.ndarray, " chosen"]:
        """The chosen indices in a layer, ascending. Raises `CrateError` for an index beyond the last."""
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
    """Parse `--neurons`: `all`, `300`, or `0-99,120`."""
    if text == "all":
        return Chosen()
    if re.fullmatch(r"\d+", text):
        if int(text) == 0:
            raise CrateError(f"--neurons must be at least 1, got 0. {UNDERSTOOD}")
        return Chosen(count=int(text), seed=seed)
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise CrateError(f"--neurons must be all, a number or indices, got {text!r}. {UNDERSTOOD}")
        first, end = int(match[1]), int(match[2] or match[1])
        if end < first:
            raise CrateError(f"--neurons must have ranges in ascending order, got {text!r}. {UNDERSTOOD}")
        spans.append((first, end))
    return Chosen(spans=tuple(spans))


def write_chosen(store: Store, key: SetKey, neurons: Int64[np.ndarray, " chosen"]) -> None:
    """Store which neurons were chosen for a set, unexplainable ones included."""
    with store.transaction() as connection:
        number = add_set(connection, key)
        connection.execute("INSERT OR REPLACE INTO chosen VALUES (?, ?)", [number, packed(neurons, "<i4")])


def read_chosen(store: Store, key: SetKey) -> Int64[np.ndarray, " chosen"] | None:
    """Read which neurons were chosen for a set; None for all neurons of the layer."""
    with store.transaction() as connection:
        row = connection.execute("SELECT neurons FROM chosen WHERE set_id = ?", [set_id(connection, key)]).fetchone()
    return None if row is None else unpacked(row[0], "<i4").astype(np.int64)
