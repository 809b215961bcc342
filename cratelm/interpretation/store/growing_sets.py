"""The one way to write sets of explanations, simulations and answers: begin, add rows, finish.

A set is begun with its neurons, the records they come from and the settings that its rows depend on. Rows are added as
they are ready: neuron by neuron by a language model, all at once by lookup. A set that is begun again
keeps its rows, unless the records or the settings have changed: then it is made again, with answers from the cache. It
is whole when every neuron has its row or its failure.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from cratelm import rundir
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.store.database import Store, add_set, identity, made_by, records_of, set_id
from cratelm.interpretation.store.schema import MADE, SetKey, Stage, packed, reading_rows, unpacked

_COLUMNS = {"explain": "text, tokens, means", "simulate": "source, activations"}
"""Columns of a stage's rows, after the set and the neuron; all scorers have the columns of `answers`."""
_STAGE_COLUMN = {"answers": "scorer", "failures": "stage", "stages": "stage", "begun": "stage"}
"""Tables with rows of several stages -> the column that names the stage."""


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


@dataclass(frozen=True, slots=True)
class SetRows:
    """The rows of one stage of a set, within a transaction."""

    connection: sqlite3.Connection
    key: SetKey
    stage: Stage
    number: int | None
    """Of the set in this file; None if the file does not have the set, which can then only be read."""

    @property
    def name(self) -> str:
        """For messages: which set this is."""
        return f"{self.stage}, layer {self.key.layer}{self.key.of_tap}, {self.key.what}"

    @property
    def begun(self) -> Begun | None:
        """What the set was begun with; None for a set of an earlier version by lookup."""
        row = self._of("begun", "SELECT records, settings, neurons").fetchone()
        return row and Begun(row[0], row[1], unpacked(row[2], "<i4").astype(np.int64))

    @property
    def whole_from(self) -> str | None:
        """The identity of the records that the set was made from; None if it is not whole."""
        return records_of(self.connection, self.key, self.stage)

    @reading_rows()
    def read(self) -> dict[int, Row]:
        """The rows by neuron."""
        columns = {"explain": "text", "simulate": "source, activations"}.get(self.stage, "detail")
        rows = self._of(MADE[self.stage], f"SELECT neuron, {columns}").fetchall()
        if self.stage == "explain":
            return dict(rows)
        if self.stage == "simulate":
            return {
                neuron: Simulated(source=source, activations=unpacked(blob, "<f4")) for neuron, source, blob in rows
            }
        return {neuron: json.loads(detail) for neuron, detail in rows}

    def failures(self) -> dict[int, str]:
        """The messages of failed neurons, by neuron."""
        return dict(self._of("failures", "SELECT neuron, message", " ORDER BY neuron").fetchall())

    def neurons(self) -> set[int]:
        """Neurons with a row or a failure."""
        tables = MADE[self.stage], "failures"
        return {neuron for table in tables for (neuron,) in self._of(table, "SELECT neuron")}

    def begin(self, begun: Begun) -> None:
        """Write what the set is begun with; it is not whole from then on."""
        self._of("stages", "DELETE")
        row = [self.number, self.stage, begun.records, begun.settings, packed(begun.neurons, "<i4")]
        self.connection.execute("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?)", row)

    def add(self, rows: Mapping[int, Row]) -> None:
        """Add rows; they replace earlier rows and failures of the same neurons."""
        self.remove(rows)
        columns = f"set_id, neuron, {_COLUMNS.get(self.stage, 'scorer, detail')}"
        places = ", ".join("?" * (columns.count(",") + 1))
        values = [(self.number, neuron, *self._stored(row)) for neuron, row in rows.items()]
        self.connection.executemany(f"INSERT INTO {MADE[self.stage]} ({columns}) VALUES ({places})", values)

    def add_failures(self, messages: Mapping[int, str]) -> None:
        """Write that some neurons got no usable answer."""
        rows = [(self.number, neuron, self.stage, message) for neuron, message in messages.items()]
        self.connection.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", rows)

    def remove(self, neurons: Iterable[int]) -> None:
        """Remove the rows and failures of some neurons."""
        for neuron in neurons:
            for table in (MADE[self.stage], "failures"):
                self._of(table, "DELETE", " AND neuron = ?", neuron)

    def drop(self) -> None:
        """Remove all rows of the stage."""
        for table in (MADE[self.stage], "failures", "stages", "begun"):
            self._of(table, "DELETE")

    def mark_whole(self, records: str) -> None:
        """Mark the set as whole, made from these records."""
        row = [self.number, self.stage, records, made_by()]
        self.connection.execute("INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?)", row)

    def _of(self, table: str, action: str, condition: str = "", *values: int) -> sqlite3.Cursor:
        """Select or delete this set's rows of a table."""
        selected: list[Any] = [self.number]
        if table in _STAGE_COLUMN:
            selected.append(self.stage)
            condition = f" AND {_STAGE_COLUMN[table]} = ?{condition}"
        return self.connection.execute(f"{action} FROM {table} WHERE set_id = ?{condition}", [*selected, *values])

    def _stored(self, row: Row) -> tuple[Any, ...]:
        """The values of a row's columns."""
        if isinstance(row, str):
            return row, None, None
        if isinstance(row, TableExplained):
            return row.text, packed(row.tokens, "<i4"), packed(row.means, "<f4")
        if isinstance(row, Simulated):
            return row.source, packed(row.activations, "<f4")
        return self.stage, json.dumps(row, ensure_ascii=False)


@contextlib.contextmanager
def set_rows(store: Store, key: SetKey, stage: Stage, *, create: bool = False) -> Iterator[SetRows]:
    """The rows of one stage of a set in one transaction; the set is created if `create` and it does not exist."""
    with store.transaction() as connection:
        yield SetRows(connection, key, stage, (add_set if create else set_id)(connection, key))


def begun(store: Store, key: SetKey, stage: Stage) -> Begun | None:
    """What a set was begun with; None for a set of an earlier version by lookup."""
    with set_rows(store, key, stage) as rows:
        return rows.begun


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
        with set_rows(store, key, stage, create=True) as rows:
            before = rows.begun
            if before is not None and rows.whole_from == records == before.records:
                contained = bool(np.isin(wanted, before.neurons).all())
                if contained and _without(before.settings, not_compared) == _without(settings_json, not_compared):
                    return cls(store=store, key=key, stage=stage, neurons=before.neurons)
            if before is None or (before.records, before.settings) != (records, settings_json):
                rows.drop()
            rows.remove(sorted(rows.neurons() - set(wanted.tolist())))
            rows.begin(Begun(records, settings_json, wanted))
        return cls(store=store, key=key, stage=stage, neurons=wanted)

    def missing(self) -> list[int]:
        """Neurons without a row or a failure, here and in the run's own store."""
        done: set[int] = set()
        for store in self._stores():
            with set_rows(store, self.key, self.stage) as rows:
                done |= rows.neurons()
        return [neuron for neuron in self.neurons.tolist() if neuron not in done]

    def rows(self) -> dict[int, Row]:
        """The rows so far, by neuron; in a part also those of the run's own store."""
        rows: dict[int, Row] = {}
        for store in self._stores():
            with set_rows(store, self.key, self.stage) as stored:
                rows |= stored.read()
        return {neuron: rows[neuron] for neuron in sorted(rows)}

    def failures(self) -> dict[int, str]:
        """The messages of failed neurons, by neuron."""
        with set_rows(self.store, self.key, self.stage) as rows:
            return rows.failures()

    def add(self, rows: Mapping[int, Row], *, whole: bool = False) -> None:
        """Write rows in one transaction; they replace earlier rows and failures of the same neurons.

        `whole`: these are the rows of all neurons, so the set is marked as whole.
        """
        with set_rows(self.store, self.key, self.stage, create=True) as stored:
            stored.add(rows)
            if whole:
                stored.mark_whole(identity(self.store.run, self.key.mode))

    def add_failures(self, messages: Mapping[int, str]) -> None:
        """Write that some neurons got no usable answer, with the reason or the answer."""
        with set_rows(self.store, self.key, self.stage, create=True) as rows:
            rows.add_failures(messages)

    def finish(self) -> bool:
        """Mark the set as whole if nothing is missing; a part never is. Returns whether it is whole."""
        if self.store.part or self.missing():
            return False
        with set_rows(self.store, self.key, self.stage, create=True) as rows:
            rows.mark_whole(identity(self.store.run, self.key.mode))
        return True

    def _stores(self) -> list[Store]:
        """The stores that may hold rows: the run's own store, if begun with the same settings, and this part."""
        part = self.store
        if not part.part or not Store(part.run).path.exists():
            return [part]
        main = Store.create(part.run)
        mine, other = begun(part, self.key, self.stage), begun(main, self.key, self.stage)
        same = mine is not None and other is not None and mine[:2] == other[:2]
        return [main, part] if same else [part]


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
