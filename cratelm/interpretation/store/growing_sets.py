"""Sets that grow neuron by neuron, as a language model makes them: every finished neuron is kept, whatever comes after.

A set is begun with the neurons it is to hold, the records they come from and the settings of whoever makes it. Rows
are then added as they are ready. Begun again, it has what it had, unless records or settings are others: then it is
made anew, which costs nothing where the answers are in the cache. It counts as there once every neuron has its row or
its failure.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from cratelm import rundir
from cratelm.interpretation.store.database import Store, add_set, identity, made_by, records_of, set_id
from cratelm.interpretation.store.schema import MADE, SetKey, Stage, packed, unpacked

FAILED = "failed"
"""Reason: the language model gave no usable answer; the table `failures` has what it said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """The row of one neuron in a set of simulations."""

    source: int
    """Index of the neuron whose explanation was used: the same neuron, unless this is a control."""
    activations: Float32[np.ndarray, " tokens"] = field(repr=False)
    """Expected activation on every token of the scoring excerpts one after the other."""


Row = str | Simulated | Mapping[str, Any]
"""What a stage keeps of a neuron: `explain` a sentence, `simulate` a `Simulated`, others anything that JSON can say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowingSet:
    """A set that one or more processes fill. Made by `begin`."""

    store: Store
    key: SetKey
    stage: Stage
    neurons: Int64[np.ndarray, " neurons"] = field(repr=False)
    """Every neuron that the whole set is to hold, ascending."""

    @classmethod
    def begin(
        cls, store: Store, key: SetKey, stage: Stage, neurons: Iterable[int], *, settings: Mapping[str, Any]
    ) -> "GrowingSet":
        """Begin a set or take it up again. `settings`: all that its rows depend on beside the records and the model.

        A whole set that has these neurons among others stays as it is. Rows of other neurons go where it is not whole,
        so that a uniform sample stays one.
        """
        wanted = np.unique(np.fromiter(neurons, dtype=np.int64))
        records, told = identity(store.run, key.mode), json.dumps(settings, sort_keys=True)
        with store.transaction() as connection:
            own, had = add_set(connection, key), begun(connection, key, stage)
            if had is not None and (had.records, had.settings) != (records, told):
                drop_rows(connection, own, stage)
            elif had is not None and records_of(connection, key, stage) == records:
                if np.isin(wanted, had.neurons).all():
                    return cls(store=store, key=key, stage=stage, neurons=had.neurons)
                connection.execute("DELETE FROM stages WHERE set_id = ? AND stage = ?", [own, stage])
            elif had is None:
                drop_rows(connection, own, stage)  # a whole set of another kind, or of older records
            extra = sorted(_there(connection, own, stage) - set(wanted.tolist()))
            remove_rows(connection, own, stage, extra)
            connection.execute(
                "INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?)",
                [own, stage, records, told, packed(wanted, "<i4")],
            )
        return cls(store=store, key=key, stage=stage, neurons=wanted)

    def missing(self) -> list[int]:
        """Neurons that have neither a row nor a failure yet, here or in the run's own store."""
        there: set[int] = set()
        for store in self._stores():
            with store.transaction() as connection:
                there |= _there(connection, set_id(connection, self.key), self.stage)
        return [neuron for neuron in self.neurons.tolist() if neuron not in there]

    def rows(self) -> dict[int, Row]:
        """The rows there are, by neuron, whole set or not; in a part also those of the run's own store."""
        found: dict[int, Row] = {}
        for store in self._stores():
            with store.transaction() as connection:
                found |= read_rows(connection, set_id(connection, self.key), self.stage)
        return {neuron: found[neuron] for neuron in sorted(found)}

    def failures(self) -> dict[int, str]:
        """What the model said where it gave no usable answer, by neuron."""
        with self.store.transaction() as connection:
            return read_failures(connection, set_id(connection, self.key), self.stage)

    def add(self, rows: Mapping[int, Row]) -> None:
        """Keep the rows of some neurons, in one transaction; an earlier row or failure of the same neuron goes."""
        with self.store.transaction() as connection:
            own = add_set(connection, self.key)
            remove_rows(connection, own, self.stage, rows)
            add_rows(connection, own, self.stage, rows)

    def add_failures(self, messages: Mapping[int, str]) -> None:
        """Keep that some neurons got no usable answer, and what was said instead."""
        rows = [(neuron, self.stage, message) for neuron, message in messages.items()]
        with self.store.transaction() as connection:
            own = add_set(connection, self.key)
            connection.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", ((own, *row) for row in rows))

    def forget_failures(self) -> None:
        """Let the failed neurons be missing again, to ask once more."""
        with self.store.transaction() as connection:
            own = add_set(connection, self.key)
            for table in ("failures", "stages"):
                connection.execute(f"DELETE FROM {table} WHERE set_id = ? AND stage = ?", [own, self.stage])

    def finish(self) -> bool:
        """Say that the set is whole, if it is; a part never is. Returns whether it is."""
        if self.store.part or self.missing():
            return False
        with self.store.transaction() as connection:
            mark_whole(connection, add_set(connection, self.key), self.stage, identity(self.store.run, self.key.mode))
        return True

    def _stores(self) -> list[Store]:
        """Where rows may be: the run's own store, if it is of the same making, and then a part's."""
        own = self.store
        if not own.part or not Store(own.run).path.exists():
            return [own]
        main = Store.create(own.run)
        with own.transaction() as ours, main.transaction() as theirs:
            mine, other = begun(ours, self.key, self.stage), begun(theirs, self.key, self.stage)
        same = mine is not None and other is not None and mine[:2] == other[:2]
        return [main, own] if same else [own]


class Begun(NamedTuple):
    """What a growing set was begun with."""

    records: str
    """Identity of the records its rows are made from."""
    settings: str
    """Settings of whoever makes it, as JSON."""
    neurons: np.ndarray
    """Every neuron it is to hold, ascending."""

    def difference(self, other: "Begun") -> str:
        """In which settings two differ; empty if they agree."""
        return rundir.differing_fields(json.loads(self.settings), json.loads(other.settings))


def begun(connection: sqlite3.Connection, key: SetKey, stage: Stage) -> Begun | None:
    """What a set was begun with; None if it never grew."""
    query = "SELECT records, settings, neurons FROM begun WHERE set_id = ? AND stage = ?"
    row = connection.execute(query, [set_id(connection, key), stage]).fetchone()
    return row and Begun(row[0], row[1], unpacked(row[2], "<i4").astype(np.int64))


def add_rows(connection: sqlite3.Connection, own: int, stage: Stage, rows: Mapping[int, Row]) -> None:
    """Add the rows of some neurons that have none."""
    values: list[tuple[Any, ...]] = []
    for neuron, row in rows.items():
        if isinstance(row, str):
            assert stage == "explain"
            values.append((own, neuron, row))
        elif isinstance(row, Simulated):
            assert stage == "simulate"
            values.append((own, neuron, row.source, packed(row.activations, "<f4")))
        else:
            values.append((own, neuron, stage, json.dumps(row, ensure_ascii=False)))
    columns = {"explain": "set_id, neuron, text", "simulate": "set_id, neuron, source, activations"}
    names = columns.get(stage, "set_id, neuron, scorer, detail")
    places = ", ".join("?" * (names.count(",") + 1))
    connection.executemany(f"INSERT INTO {MADE[stage]} ({names}) VALUES ({places})", values)


def mark_whole(connection: sqlite3.Connection, own: int, stage: Stage, records: str) -> None:
    """Write the row that says that a set is whole."""
    connection.execute("INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?)", [own, stage, records, made_by()])


def read_rows(connection: sqlite3.Connection, own: int | None, stage: Stage) -> dict[int, Row]:
    """The rows of a set, by neuron."""
    if stage == "explain":
        return dict(connection.execute("SELECT neuron, text FROM explanations WHERE set_id = ?", [own]).fetchall())
    if stage == "simulate":
        found = connection.execute("SELECT neuron, source, activations FROM simulations WHERE set_id = ?", [own])
        return {neuron: Simulated(source=source, activations=unpacked(blob, "<f4")) for neuron, source, blob in found}
    found = connection.execute("SELECT neuron, detail FROM answers WHERE set_id = ? AND scorer = ?", [own, stage])
    return {neuron: json.loads(value) for neuron, value in found}


def read_failures(connection: sqlite3.Connection, own: int | None, stage: Stage) -> dict[int, str]:
    """The failures of a set, by neuron."""
    query = "SELECT neuron, message FROM failures WHERE set_id = ? AND stage = ? ORDER BY neuron"
    return dict(connection.execute(query, [own, stage]).fetchall())


def _of(stage: Stage) -> tuple[str, list[str]]:
    """The condition that picks a stage's rows of a set from its table, and what to fill in after the set."""
    return ("set_id = ? AND scorer = ?", [stage]) if MADE[stage] == "answers" else ("set_id = ?", [])


def _there(connection: sqlite3.Connection, own: int | None, stage: Stage) -> set[int]:
    """Neurons with a row or a failure."""
    condition, more = _of(stage)
    rows = connection.execute(f"SELECT neuron FROM {MADE[stage]} WHERE {condition}", [own, *more])
    failed = connection.execute("SELECT neuron FROM failures WHERE set_id = ? AND stage = ?", [own, stage])
    return {neuron for (neuron,) in (*rows, *failed)}


def remove_rows(connection: sqlite3.Connection, own: int, stage: Stage, neurons: Iterable[int]) -> None:
    """Remove the rows and failures of some neurons."""
    condition, more = _of(stage)
    chosen = list(neurons)
    connection.executemany(
        f"DELETE FROM {MADE[stage]} WHERE {condition} AND neuron = ?", ((own, *more, neuron) for neuron in chosen)
    )
    connection.executemany(
        "DELETE FROM failures WHERE set_id = ? AND stage = ? AND neuron = ?", ((own, stage, n) for n in chosen)
    )


def drop_rows(connection: sqlite3.Connection, own: int, stage: Stage) -> None:
    """Remove all that a stage made of a set."""
    condition, more = _of(stage)
    connection.execute(f"DELETE FROM {MADE[stage]} WHERE {condition}", [own, *more])
    for table in ("failures", "stages", "begun"):
        connection.execute(f"DELETE FROM {table} WHERE set_id = ? AND stage = ?", [own, stage])
