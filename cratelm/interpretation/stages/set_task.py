"""One set to make: which neurons of which layer, from which records, into which store.

Explainers, simulators and scorers all get a `SetTask`, begin the set with the settings that its rows depend on, and add
rows. With other settings (temperature, model, prompts) the set is made again.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from cratelm.activations.records import LayerRecords
from cratelm.interpretation.explainers.explanation import unexplained
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import Protocol
from cratelm.interpretation.simulators.controls import CONSTANT_EXPLANATION, NO_NEURON, sources_of
from cratelm.interpretation.stages.concurrency import Tally, each
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, begun, set_rows
from cratelm.interpretation.store.neuron_selection import Chosen, read_chosen, write_chosen
from cratelm.interpretation.store.schema import SetKey, Stage
from cratelm.runtime import ProgressBar


@dataclass(frozen=True, kw_only=True)
class SetTask:
    """One set of one layer, and how it is to be made."""

    store: Store
    key: SetKey
    records: LayerRecords
    protocol: Protocol
    chosen: Chosen | None
    """Which neurons of the layer; None for all, as lookup takes them."""
    part: tuple[int, int] = (1, 1)
    """(K, N): this process makes the K-th of N shares of the neurons."""
    in_flight: int = 32
    """Neurons in progress at once."""
    bar: ProgressBar | None = None
    note: Callable[[], str] = str
    """Text at the end of the progress bar."""

    @cached_property
    def neurons(self) -> Int64[np.ndarray, " chosen"]:
        """The chosen neurons."""
        total = self.records.num_neurons
        return np.arange(total) if self.chosen is None else self.chosen.of(total, layer=self.records.layer)

    @cached_property
    def candidates(self) -> Int64[np.ndarray, " candidates"]:
        """All neurons of the layer that the protocol can explain and score."""
        return np.flatnonzero(np.array(unexplained(self.records, self.protocol)) == "")

    @cached_property
    def explainable(self) -> Int64[np.ndarray, " explainable"]:
        """The chosen neurons that the protocol can explain and score."""
        return self.neurons[np.isin(self.neurons, self.candidates)]

    @cached_property
    def share(self) -> set[int]:
        """This process's share of the explainable neurons, which are consecutive."""
        part, parts = self.part
        return set(np.array_split(self.explainable, parts)[part - 1].tolist())

    def sources(self, explained: Iterable[int]) -> dict[int, int]:
        """Map the chosen neurons that have an explanation to the neuron whose explanation they are simulated from."""
        neurons = np.array(sorted(set(explained) & set(self.explainable.tolist())), dtype=np.int64)
        return sources_of(self.key.control, neurons, self.candidates, layer=self.key.layer, protocol=self.protocol.name)

    def begin(
        self, stage: Stage, neurons: Int64[np.ndarray, " neurons"], settings: Mapping[str, Any], *,
        not_compared: tuple[str, ...] = (),
    ) -> GrowingSet:  # fmt: skip
        """Begin or resume the set, and record which neurons were chosen."""
        growing = GrowingSet.begin(
            self.store, self.key, stage, neurons.tolist(), settings=settings, not_compared=not_compared
        )
        if self.chosen is not None and (
            len(growing.neurons) == len(neurons) or read_chosen(self.store, self.key) is None
        ):
            write_chosen(self.store, self.key, self.neurons)
        return growing

    def fill(
        self, growing: GrowingSet, make_row: Callable[[int], Awaitable[Any]], neurons: Iterable[int]
    ) -> Awaitable[Tally]:
        """Make the missing rows of these neurons, several at once."""
        missing = sorted(set(neurons) & set(growing.missing()))

        def advance(count: int) -> None:
            if self.bar:
                self.bar.advance(count, note=self.note())

        return each(
            missing, make_row, keep=growing.add, fail=growing.add_failures, progress=advance, in_flight=self.in_flight
        )

    def explanations(self) -> dict[int, str]:
        """Read the explanations that the set is made from. A part has those of other parts only after a merge."""
        key = self.key.explained
        in_part = self.store.part and key.explainer != EXPLAINER and not self.key.control
        if in_part and (started := begun(self.store, key, "explain")) is not None:
            growing = GrowingSet(store=self.store, key=key, stage="explain", neurons=started.neurons)
            return {neuron: str(text) for neuron, text in growing.rows().items()}
        return Store.open(self.store.run).texts(key)

    def explanations_hash(self) -> str:
        """A hash of the settings of the explanations; those by lookup depend on the records alone."""
        key = self.key.explained
        if key.explainer == EXPLAINER:
            return EXPLAINER
        for store in self._stores():
            if (started := begun(store, key, "explain")) is not None:
                return settings_hash(started.settings)
        raise AssertionError("simulated before it was explained")

    def left_out(self, stage: Stage, needed: int, settings: Mapping[str, Any]) -> int:
        """How many few-shot examples the prompts of the set leave out: as many as when it was begun, if enough.

        So a set that is resumed for fewer neurons, or with a better count of tokens, keeps its prompts.
        """
        wanted = json.loads(json.dumps(settings))
        for store in self._stores():
            started = begun(store, self.key, stage)
            stored = json.loads(started.settings) if started is not None else {}
            alike = started is not None and all(stored.get(name) == value for name, value in wanted.items())
            if alike and stored.get("left_out", 0) >= needed:
                return stored.get("left_out", 0)
        return needed

    def _stores(self) -> list[Store]:
        return [store for store in (self.store, Store(self.store.run)) if store.path.exists()]


def explanation_from(texts: Mapping[int, str], source: int) -> str:
    """The explanation of a source (`SetTask.sources`)."""
    return CONSTANT_EXPLANATION if source == NO_NEURON else texts[source]


def settings_hash(settings: str) -> str:
    """Hash the settings of a set, given as JSON: 16 hexadecimal digits."""
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def failures(store: Store, key: SetKey, stage: Stage) -> dict[int, str]:
    """Read the unusable answers of a set, by neuron."""
    with set_rows(store, key, stage) as rows:
        return rows.failures()


def all_failures(store: Store) -> list[tuple[str, str]]:
    """Read all unusable answers in a store, as (stage, message)."""
    with store.transaction() as connection:
        return connection.execute("SELECT stage, message FROM failures").fetchall()
