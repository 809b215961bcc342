"""The one way to write sets of explanations, simulations and answers: begin, add rows, finish.

A set is begun with its neurons, the records they come from and the settings that its rows depend on. Rows are added as
they are ready: neuron by neuron by a language model, all at once by lookup. A set that is begun again
keeps its rows, unless the records or the settings have changed: then it is made again, with answers from the cache. It
is whole when every neuron has its row or its failure.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cratelm import rundir
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.store.database import Store, add_set, identity, made_by, records_of, set_id
from cratelm.interpretation.store.schema import MADE, SetKey, Stage, packed, reading_rows, unpacked


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """The row of one neuron in a set of simulations."""

    source: int
    """Index of the neuron whose explanation was used; the same neuron except in a control."""
    activations: Float32[np.ndarray, " tokens"] = field(repr=False)
    """Expected activation on every token of the scoring excerpts, one after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableExplained:
    """The row of one neuron in a set of explanations by lookup."""

    text: str
    tokens: Int32[np.ndarray, " entries"] = field(repr=False)
    means: Float32[np.ndarray, " entries"] = field(repr=False)
    """Mean activation on each of the tokens."""


Row = str | TableExplained | Simulated | Mapping[str, Any]
"""Row of one neuron: a sentence or a table (`explain`), `Simulated` (`simulate`), or JSON (scorers)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowingSet:
    """A set that is being written, by one or more processes. Made by `begin`."""

    store: Store
    key: SetKey
    stage: Stage
    neurons: Int64[np.ndarray, " neurons"] = field(repr=False)
    """All neurons of the set, ascending."""

    @classmethod
    def begin(
        cls, store: Store, key: SetKey, stage: Stage, neurons: Iterable[int], *, settings: Mapping[str, Any],
        not_compared: tuple[str, ...] = (),
    ) -> "GrowingSet":  # fmt: skip
        """Begin or resume a set. `settings`: everything that its rows depend on, apart from the records.

        A whole set that contains these neurons stays as it is, even if the settings `not_compared` differ. If a set is
        not whole, rows of other neurons are removed, so that a uniform sample stays one.
        """
        wanted = np.unique(np.fromiter(neurons, dtype=np.int64))
        records, settings_json = identity(store.run, key.mode), json.dumps(settings, sort_keys=True)
        with store.transaction() as connection:
            number, before = add_set(connection, key), begun(connection, key, stage)
            if before is not None and records_of(connection, key, stage) == records == before.records:
                contained = bool(np.isin(wanted, before.neurons).all())
                if contained and _without(before.settings, not_compared) == _without(settings_json, not_compared):
                    return cls(store=store, key=key, stage=stage, neurons=before.neurons)
            if before is None or (before.records, before.settings) != (records, settings_json):
                drop_rows(connection, number, stage)
            connection.execute("DELETE FROM stages WHERE set_id = ? AND stage = ?", [number, stage])
            extra = sorted(_there(connection, number, stage) - set(wanted.tolist()))
            remove_rows(connection, number, stage, extra)
            connection.execute(
                "INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?)",
                [number, stage, records, settings_json, packed(wanted, "<i4")],
            )
        return cls(store=store, key=key, stage=stage, neurons=wanted)

    def missing(self) -> list[int]:
        """Neurons without a row or a failure, here and in the run's own store."""
        done: set[int] = set()
        for store in self._stores():
            with store.transaction() as connection:
                done |= _there(connection, set_id(connection, self.key), self.stage)
        return [neuron for neuron in self.neurons.tolist() if neuron not in done]

    def rows(self) -> dict[int, Row]:
        """The rows so far, by neuron; in a part also those of the run's own store."""
        rows: dict[int, Row] = {}
        for store in self._stores():
            with store.transaction() as connection:
                rows |= read_set(connection, set_id(connection, self.key), self.stage)
        return {neuron: rows[neuron] for neuron in sorted(rows)}

    def failures(self) -> dict[int, str]:
        """The messages of failed neurons, by neuron."""
        with self.store.transaction() as connection:
            return read_failures(connection, set_id(connection, self.key), self.stage)

    def add(self, rows: Mapping[int, Row], *, whole: bool = False) -> None:
        """Write rows in one transaction; they replace earlier rows and failures of the same neurons.

        `whole`: these are the rows of all neurons, so the set is marked as whole.
        """
        with self.store.transaction() as connection:
            number = add_set(connection, self.key)
            remove_rows(connection, number, self.stage, rows)
            add_rows(connection, number, self.stage, rows)
            if whole:
                mark_whole(connection, number, self.stage, identity(self.store.run, self.key.mode))

    def add_failures(self, messages: Mapping[int, str]) -> None:
        """Write that some neurons got no usable answer, with the reason or the answer."""
        rows = [(neuron, self.stage, message) for neuron, message in messages.items()]
        with self.store.transaction() as connection:
            number = add_set(connection, self.key)
            connection.executemany(
                "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", ((number, *row) for row in rows)
            )

    def finish(self) -> bool:
        """Mark the set as whole if nothing is missing; a part never is. Returns whether it is whole."""
        if self.store.part or self.missing():
            return False
        with self.store.transaction() as connection:
            mark_whole(connection, add_set(connection, self.key), self.stage, identity(self.store.run, self.key.mode))
        return True

    def _stores(self) -> list[Store]:
        """The stores that may hold rows: the run's own store, if begun with the same settings, and this part."""
        part = self.store
        if not part.part or not Store(part.run).path.exists():
            return [part]
        main = Store.create(part.run)
        with part.transaction() as ours, main.transaction() as theirs:
            mine, other = begun(ours, self.key, self.stage), begun(theirs, self.key, self.stage)
        same = mine is not None and other is not None and mine[:2] == other[:2]
        return [main, part] if same else [part]


class Begun(NamedTuple):
    """The records, settings and neurons that a set was begun with."""

    records: str
    """Identity of the records."""
    settings: str
    """Settings, as JSON."""
    neurons: np.ndarray
    """All neurons of the set, ascending."""

    @reading_rows()
    def difference(self, other: "Begun") -> str:
        """The settings that differ; empty if none does."""
        return rundir.differing_fields(json.loads(self.settings), json.loads(other.settings))


def begun(connection: sqlite3.Connection, key: SetKey, stage: Stage) -> Begun | None:
    """Read what a set was begun with; None for a set of an earlier version by lookup."""
    query = "SELECT records, settings, neurons FROM begun WHERE set_id = ? AND stage = ?"
    row = connection.execute(query, [set_id(connection, key), stage]).fetchone()
    return row and Begun(row[0], row[1], unpacked(row[2], "<i4").astype(np.int64))


def add_rows(connection: sqlite3.Connection, number: int, stage: Stage, rows: Mapping[int, Row]) -> None:
    """Add the rows of some neurons that have none."""
    values: list[tuple[Any, ...]] = []
    for neuron, row in rows.items():
        if isinstance(row, str):
            values.append((number, neuron, row, None, None))
        elif isinstance(row, TableExplained):
            values.append((number, neuron, row.text, packed(row.tokens, "<i4"), packed(row.means, "<f4")))
        elif isinstance(row, Simulated):
            values.append((number, neuron, row.source, packed(row.activations, "<f4")))
        else:
            values.append((number, neuron, stage, json.dumps(row, ensure_ascii=False)))
    columns = {"explain": "set_id, neuron, text, tokens, means", "simulate": "set_id, neuron, source, activations"}
    names = columns.get(stage, "set_id, neuron, scorer, detail")
    places = ", ".join("?" * (names.count(",") + 1))
    connection.executemany(f"INSERT INTO {MADE[stage]} ({names}) VALUES ({places})", values)


def mark_whole(connection: sqlite3.Connection, number: int, stage: Stage, records: str) -> None:
    """Mark a set as whole."""
    connection.execute("INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?)", [number, stage, records, made_by()])


@reading_rows()
def read_set(connection: sqlite3.Connection, number: int | None, stage: Stage) -> dict[int, Row]:
    """The rows of a set, by neuron."""
    if stage == "explain":
        return dict(connection.execute("SELECT neuron, text FROM explanations WHERE set_id = ?", [number]).fetchall())
    if stage == "simulate":
        rows = connection.execute("SELECT neuron, source, activations FROM simulations WHERE set_id = ?", [number])
        return {neuron: Simulated(source=source, activations=unpacked(blob, "<f4")) for neuron, source, blob in rows}
    rows = connection.execute("SELECT neuron, detail FROM answers WHERE set_id = ? AND scorer = ?", [number, stage])
    return {neuron: json.loads(value) for neuron, value in rows}


def read_failures(connection: sqlite3.Connection, number: int | None, stage: Stage) -> dict[int, str]:
    """The failures of a set, by neuron."""
    query = "SELECT neuron, message FROM failures WHERE set_id = ? AND stage = ? ORDER BY neuron"
    return dict(connection.execute(query, [number, stage]).fetchall())


def _of(stage: Stage) -> tuple[str, list[str]]:
    """The SQL condition for a stage's rows of a set, and its further parameters."""
    return ("set_id = ? AND scorer = ?", [stage]) if MADE[stage] == "answers" else ("set_id = ?", [])


def _there(connection: sqlite3.Connection, number: int | None, stage: Stage) -> set[int]:
    """Neurons with a row or a failure."""
    condition, more = _of(stage)
    rows = connection.execute(f"SELECT neuron FROM {MADE[stage]} WHERE {condition}", [number, *more])
    failed = connection.execute("SELECT neuron FROM failures WHERE set_id = ? AND stage = ?", [number, stage])
    return {neuron for (neuron,) in (*rows, *failed)}


def remove_rows(connection: sqlite3.Connection, number: int, stage: Stage, neurons: Iterable[int]) -> None:
    """Remove the rows and failures of some neurons."""
    condition, more = _of(stage)
    chosen = list(neurons)
    connection.executemany(
        f"DELETE FROM {MADE[stage]} WHERE {condition} AND neuron = ?", ((number, *more, neuron) for neuron in chosen)
    )
    connection.executemany(
        "DELETE FROM failures WHERE set_id = ? AND stage = ? AND neuron = ?", ((number, stage, n) for n in chosen)
    )


def drop_rows(connection: sqlite3.Connection, number: int, stage: Stage) -> None:
    """Remove all rows of a stage of a set."""
    condition, more = _of(stage)
    connection.execute(f"DELETE FROM {MADE[stage]} WHERE {condition}", [number, *more])
    for table in ("failures", "stages", "begun"):
        connection.execute(f"DELETE FROM {table} WHERE set_id = ? AND stage = ?", [number, stage])


def write_explanations(store: Store, key: SetKey, made: LayerExplanations) -> None:
    """Write a whole set of explanations by lookup."""
    tables = (made.tables.of(row) for row in range(len(made.neuron)))
    rows = {
        neuron: TableExplained(text=text, tokens=tokens, means=means)
        for neuron, text, (tokens, means) in zip(made.neuron.tolist(), made.texts, tables, strict=True)
    }
    GrowingSet.begin(store, key, "explain", rows, settings={}).add(rows, whole=True)


def write_simulations(store: Store, key: SetKey, made: LayerSimulations) -> None:
    """Write a whole set of simulations by lookup."""
    rows = {
        neuron: Simulated(source=source, activations=made.of(row))
        for row, (neuron, source) in enumerate(zip(made.neuron.tolist(), made.source.tolist(), strict=True))
    }
    GrowingSet.begin(store, key, "simulate", rows, settings={}).add(rows, whole=True)


@reading_rows()
def _without(settings: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Settings, given as JSON, without some of them."""
    return {name: value for name, value in json.loads(settings).items() if name not in names}
