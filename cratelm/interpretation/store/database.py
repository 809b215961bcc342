"""`RUN/interpretation.sqlite`: explanations, simulations, scores and failures of a run, with a full-text search.

A *set* is the result of one stage for one layer by one protocol. The identity of its records is written with it, so a
set of other records is detected. Every neuron has a separate row, with its arrays as compressed little-endian blobs: a
browser reads one neuron without its layer, and a set costs 0.1 to 0.2 ms per neuron. Sets grow row by row
(`growing_sets.py`) and are listed once they are whole. Further processes write into separate stores (`parts.py`).
"""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cratelm import rundir
from cratelm.activations.records import Mode, NeuronId, read_collection, records_folder
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.explanation import Explanation, LayerExplanations
from cratelm.interpretation.lookup.tables import tables_of
from cratelm.interpretation.scoring.correlation import LayerScores, Score
from cratelm.interpretation.simulators.simulation import LayerSimulations, Simulation
from cratelm.interpretation.store.schema import (
    KEY_COLUMNS,
    MADE,
    SCHEMA,
    SetKey,
    Stage,
    packed,
    reading_rows,
    unpacked,
    upgrade,
)

_NUMBERS = {
    "neuron": np.int64, "correlation": np.float64, "r_squared": np.float64, "absolute_deviation": np.float64,
    "spearman": np.float64, "auroc": np.float64, "tokens": np.int64, "excerpts": np.int64,
}  # fmt: skip
"""Columns of scores that are fields of `LayerScores`. NaN is NULL in a table."""
BUSY_SECONDS = 60.0
"""How long a transaction waits for other processes, whose transactions take milliseconds each."""
SEARCH_SECONDS = 5.0
"""Longest time of a full-text search."""
_ONE = " WHERE set_id = ? AND neuron = ?"
_ALL = " WHERE set_id = ? ORDER BY neuron"


class StoreBusy(CrateError):
    """Another process held the store for more than `BUSY_SECONDS`."""


@dataclass(frozen=True, slots=True)
class Store:
    """The interpretations of one run. A connection lives as long as one call, so there is nothing to close."""

    run: Path
    part: int = 0
    """0 for the run's own store; K for the process that works on the K-th share of the neurons."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.run / (f"interpretation.part-{self.part}.sqlite" if self.part else "interpretation.sqlite")

    @classmethod
    def open(cls, run: Path) -> "Store":
        """Open the store of a run. Raises `CrateError` if it has none."""
        store = cls(run)
        if not store.path.exists():
            raise CrateError(f"{store.path} is not there. Run: cratelm interpret {run}")
        store._check_format()
        return store

    def _check_format(self) -> None:
        with self.transaction() as connection:
            version = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
        rundir.check_format_version(self.path, version and version[0])
        with self.transaction() as connection:
            upgrade(connection)

    @classmethod
    def create(cls, run: Path, part: int = 0) -> "Store":
        """Open the store of a run, or a part of it; created if it does not exist."""
        store = cls(run, part)
        if store.path.exists():
            store._check_format()
            return store
        with rundir.atomic_path(store.path) as temporary, contextlib.closing(sqlite3.connect(temporary)) as new, new:
            for statement in SCHEMA:
                new.execute(statement)
            new.execute("INSERT INTO meta VALUES ('format_version', ?)", [str(rundir.FORMAT_VERSION)])
        return store

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: everything in the block is written, or nothing.

        SQLite's defaults stay: the rollback journal leaves no second file next to the store and works on network disks,
        and flushing at every commit costs milliseconds for a set that took longer to compute.
        """
        try:
            for file in (self.path, self.path.with_name(f"{self.path.name}-journal")):
                rundir.check_writable(file)
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection, connection:
                # Without spilling, changes stay in memory until the commit, and other processes can read meanwhile.
                connection.execute("PRAGMA cache_spill = OFF")
                yield connection
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise StoreBusy(
                    f"{self.path} was in use by another process for {BUSY_SECONDS:g} seconds. Run the same command "
                    "again; what is done is kept"
                ) from error
            if str(error) == "interrupted":
                raise CrateError(f"the search took more than {SEARCH_SECONDS:g} seconds. Hint: fewer words") from error
            if "full" in str(error):
                raise CrateError(f"no space left for {self.path}. Free some and run the same command again") from error
            if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
                raise
            remedy = f"Move it away and run: cratelm interpret {self.run}"
            raise CrateError(f"{self.path} is not a store of interpretations ({error}). {remedy}") from None

    def noted(self, name: str) -> str | None:
        """Read a note; a part without the note reads it from the run's own store."""
        for store in (self, Store(self.run)):
            if store.path.exists():
                with store.transaction() as connection:
                    row = connection.execute("SELECT value FROM meta WHERE key = ?", [name]).fetchone()
                if row is not None:
                    return row[0]
        return None

    def note(self, name: str, value: str) -> None:
        """Write a note about the whole store, such as the capabilities of a language model."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, value])

    def scored(self) -> list[SetKey]:
        """The sets of scores, in the order of their columns."""
        return self.sets("score")

    def sets(self, stage: Stage) -> list[SetKey]:
        """The whole sets that a stage has made, in the order of their columns."""
        with self.transaction() as connection:
            rows = connection.execute(
                f"SELECT {KEY_COLUMNS} FROM sets JOIN stages ON set_id = id WHERE stage = ? "
                "ORDER BY mode, tap, explainer, simulator, control, sample, protocol, layer",
                [stage],
            ).fetchall()
        return [SetKey.of_row(row) for row in rows]

    def is_done(self, key: SetKey, stage: Stage) -> bool:
        """Whether the set is whole and made from the current records."""
        with self.transaction() as connection:
            return records_of(connection, key, stage) == identity(self.run, key.mode)

    def check(self, key: SetKey, stage: Stage, *, verb: str = "") -> None:
        """Raise `CrateError` if a set is missing or outdated. `verb`: the command that makes it, for the hint."""
        with self.transaction() as connection:
            records = records_of(connection, key, stage)
        remedy = f"Run: {key.command(verb or stage, self.run)}"
        if records is None:
            what = f"{key.mode} {key.what} {MADE[stage]} of layer {key.layer}{key.of_tap}"
            layers = sorted(other.layer for other in self.sets(stage) if replace(other, layer=key.layer) == key)
            listed = ", ".join(map(str, layers)) or "none"
            raise CrateError(f"no {what} in {self.run} (found layers: {listed}). {remedy}")
        now = identity(self.run, key.mode)
        if now and records != now:
            raise CrateError(
                f"the {key.what} {MADE[stage]} of layer {key.layer}{key.of_tap} in {self.path} come from other records "
                f"than {records_folder(self.run, key.mode)} holds now. {remedy}"
            )

    def write_scores(self, key: SetKey, made: LayerScores) -> None:
        """Replace a set of scores."""
        columns = [getattr(made, name).tolist() for name in _NUMBERS]
        rows = (
            (reason, packed(sums, "<f8"), *numbers)
            for reason, sums, *numbers in zip(made.reason, made.sums, *columns, strict=True)
        )
        self.write(key, "score", ", ".join(("reason", "sums", *_NUMBERS)), rows)

    def write(self, key: SetKey, stage: Stage, names: str, rows: Iterable[tuple]) -> None:
        """Replace the rows of a stage; `names` are their columns, after the set."""
        table, places = MADE[stage], ", ?" * (names.count(",") + 1)
        with self.transaction() as connection:
            number = add_set(connection, key)
            connection.execute(f"DELETE FROM {table} WHERE set_id = ?", [number])
            connection.executemany(
                f"INSERT INTO {table} (set_id, {names}) VALUES (?{places})", ((number, *row) for row in rows)
            )
            connection.execute(
                "INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?)",
                [number, stage, identity(self.run, key.mode), made_by()],
            )

    @reading_rows()
    def explanations(self, key: SetKey) -> LayerExplanations:
        """Read a set of explanations. Raises `CrateError` if it is missing or outdated."""
        self.check(key, "explain")
        rows = self.rows(key, "SELECT neuron, text, tokens, means FROM explanations" + _ALL)
        return LayerExplanations(
            neuron=np.array([row[0] for row in rows], dtype=np.int64), texts=tuple(row[1] for row in rows),
            tables=tables_of([(unpacked(row[2], "<i4"), unpacked(row[3], "<f4")) for row in rows]),
        )  # fmt: skip

    @reading_rows()
    def simulations(self, key: SetKey) -> LayerSimulations:
        """Read a set of simulations. Raises `CrateError` if it is missing or outdated."""
        self.check(key, "simulate")
        rows = self.rows(key, "SELECT neuron, source, activations FROM simulations" + _ALL)
        neuron, source, blobs = zip(*rows, strict=True) if rows else ((), (), ())
        vectors = [unpacked(blob, "<f4") for blob in blobs]
        return LayerSimulations(
            neuron=np.array(neuron, dtype=np.int64), source=np.array(source, dtype=np.int64),
            first=np.cumsum([0, *map(len, vectors)], dtype=np.int64),
            activations=np.concatenate(vectors or [np.empty(0, dtype=np.float32)]),
        )  # fmt: skip

    @reading_rows()
    def scores(self, key: SetKey) -> LayerScores:
        """Read a set of scores. Raises `CrateError` if it is missing or outdated."""
        self.check(key, "score", verb="interpret")
        rows = self.rows(key, f"SELECT reason, sums, {', '.join(_NUMBERS)} FROM scores" + _ALL)
        reason, blobs, *columns = zip(*rows, strict=True)
        numbers = {name: np.array(column, _NUMBERS[name]) for name, column in zip(_NUMBERS, columns, strict=True)}
        sums = np.stack([unpacked(blob, "<f8").reshape(-1, 6) for blob in blobs])
        return LayerScores(layer=key.layer, reason=reason, sums=sums, **numbers)

    def read_scores(self, layer: int, protocol: str, **others: Any) -> LayerScores:
        """The scores of one layer by one protocol; `others` are further fields of `SetKey`."""
        return self.scores(SetKey(layer=layer, protocol=protocol, **others))

    def read_explanations(self, layer: int, protocol: str, **others: Any) -> dict[int, str]:
        """The explanations of one layer in words, by neuron; `others` are further fields of `SetKey`."""
        return self.texts(SetKey(layer=layer, protocol=protocol, **others))

    @reading_rows()
    def texts(self, key: SetKey) -> dict[int, str]:
        """The explanations of a set in words, by neuron index; for a control, those that were simulated instead."""
        self.check(key.explained, "explain")
        texts = dict(self.rows(key.explained, "SELECT neuron, text FROM explanations WHERE set_id = ?"))
        if not key.control:
            return texts
        self.check(key, "simulate")
        sources = self.rows(key, "SELECT neuron, source FROM simulations WHERE set_id = ?")
        return {neuron: texts[source] for neuron, source in sources}

    @reading_rows()
    def read_neuron(self, key: SetKey, index: int) -> tuple[Explanation | None, Simulation | None, Score | None]:
        """Read one neuron without its layer; None for rows that do not exist."""
        key_fields: dict[str, Any] = {"mode": key.mode, "protocol": key.protocol, "explainer": key.explainer}
        fields = key_fields | {"neuron": NeuronId(tap=key.tap, layer=key.layer, index=index), "control": key.control}
        explanation = simulation = score = None
        for source, blob in self.rows(key, "SELECT source, activations FROM simulations" + _ONE, index):
            simulation = Simulation(source=source, activations=unpacked(blob, "<f4"), **fields)
        used = simulation.source if simulation else index
        for text, *blobs in self.rows(key.explained, "SELECT text, tokens, means FROM explanations" + _ONE, used):
            tokens, means = (unpacked(blob, dtype).tolist() for blob, dtype in zip(blobs, ("<i4", "<f4"), strict=True))
            neuron = NeuronId(tap=key.tap, layer=key.layer, index=used)
            explanation = Explanation(
                neuron=neuron, text=text, table=dict(zip(tokens, means, strict=True)), **key_fields
            )
        names = ("reason", *(name for name in _NUMBERS if name != "neuron"))
        for row in self.rows(key, f"SELECT {', '.join(names)} FROM scores" + _ONE, index):
            score = Score(**fields, **dict(zip(names, row, strict=True)))
        return explanation, simulation, score

    def search(self, words: str, *, mode: Mode = "fixed", limit: int = 50) -> list[tuple[SetKey, int, str]]:
        """Explanations that contain all the words, best match first, as (set, neuron index, text).

        Raises `CrateError` after `SEARCH_SECONDS`.
        """
        quoted = " ".join('"{}"'.format(word.replace('"', '""')) for word in words.replace("\0", " ").split())
        query = (
            f"SELECT {KEY_COLUMNS}, neuron, explanations.text FROM explanation_search "
            "JOIN explanations ON explanations.id = explanation_search.rowid JOIN sets ON sets.id = set_id "
            "WHERE explanation_search MATCH ? AND mode = ? ORDER BY rank, layer, neuron LIMIT ?"
        )
        with self.transaction() as connection:
            deadline = time.monotonic() + SEARCH_SECONDS
            connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            rows = connection.execute(query, [quoted, mode, limit]).fetchall() if quoted else []
        return [(SetKey.of_row(key), neuron, text) for *key, neuron, text in rows]

    def rows(self, key: SetKey, query: str, *more: int) -> list[Any]:
        """The rows of a query whose first parameter is the set."""
        with self.transaction() as connection:
            return connection.execute(query, [set_id(connection, key), *more]).fetchall()


def identity(run: Path, mode: Mode) -> str:
    """A hash of a collection of records: `records.json` without its origin and its list of taps.

    Empty if the records do not exist, as for a store that was copied alone.
    """
    if not (records_folder(run, mode) / "records.json").exists():
        return ""
    facts = {k: v for k, v in read_collection(run, mode=mode).items() if k not in ("origin", "taps", "signed")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def made_by() -> str:
    """Origin of this process's sets; computed once, because it calls git."""
    return json.dumps(rundir.origin())


def add_set(connection: sqlite3.Connection, key: SetKey) -> int:
    """The number of a set in this file; assigned if it has none."""
    connection.execute("INSERT OR IGNORE INTO sets VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(key))
    number = set_id(connection, key)
    assert number is not None
    return number


def set_id(connection: sqlite3.Connection, key: SetKey) -> int | None:
    """The number of a set in this file; None if it has none."""
    row = connection.execute(
        f"SELECT id FROM sets WHERE ({KEY_COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?)", astuple(key)
    ).fetchone()
    return row and row[0]


def records_of(connection: sqlite3.Connection, key: SetKey, stage: Stage) -> str | None:
    """The identity of the records a set was made from; None if the set is not whole."""
    query = "SELECT records FROM stages WHERE set_id = ? AND stage = ?"
    row = connection.execute(query, [set_id(connection, key), stage]).fetchone()
    return row and row[0]
