"""`RUN/interpretation.sqlite`: explanations, simulations, scores and failures of a run, with a full-text search.

A *set* is what one stage makes of one layer by one protocol. It is written in one transaction together with the
identity of the records it came from, so a set is there whole or not at all, and one of other records is noticed.
Every neuron has a row of its own, with its arrays as compressed little-endian blobs: a browser reads one neuron without
its layer, and a set costs 0.1 to 0.2 ms per neuron. A set that a language model makes grows row by row (`growing.py`)
and counts as there once it is whole. Further processes write into parts (`parts.py`): stores beside this one.
"""

import contextlib
import hashlib
import json
import sqlite3
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
from cratelm.interpretation.store.schema import KEY_COLUMNS, MADE, SCHEMA, SetKey, Stage, packed, unpacked, upgrade

_NUMBERS = {
    "neuron": np.int64, "correlation": np.float64, "r_squared": np.float64, "absolute_deviation": np.float64,
    "spearman": np.float64, "auroc": np.float64, "tokens": np.int64, "excerpts": np.int64,
}  # fmt: skip
"""Columns of scores that are fields of `LayerScores`. NaN is NULL in a table."""
BUSY_SECONDS = 60.0
"""How long a transaction waits for those of other processes, which take milliseconds each."""
_ONE = " WHERE set_id = ? AND neuron = ?"
_ALL = " WHERE set_id = ? ORDER BY neuron"


class StoreBusy(CrateError):
    """Another process held a store for longer than anybody waits."""


@dataclass(frozen=True, slots=True)
class Store:
    """The interpretations of one run. A connection lives as long as one call, so there is nothing to close."""

    run: Path
    part: int = 0
    """0 is the run's own store; K that of the further process that was given the K-th share of the neurons."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.run / (f"interpretation.part-{self.part}.sqlite" if self.part else "interpretation.sqlite")

    @classmethod
    def open(cls, run: Path) -> "Store":
        """The store of a run that has one."""
        store = cls(run)
        if not store.path.exists():
            raise CrateError(f"{store.path} is not there. Run: cratelm interpret {run}")
        store._check_format()
        return store

    def _check_format(self) -> None:
        with self.transaction() as connection:
            found = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
        rundir.check_format_version(self.path, found[0])
        with self.transaction() as connection:
            upgrade(connection)

    @classmethod
    def create(cls, run: Path, part: int = 0) -> "Store":
        """The store of a run, or a part of it, made empty if there is none."""
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
        """One transaction: all that is written in the block is there afterwards, or nothing of it.

        SQLite's defaults stay: the rollback journal leaves no second file beside the first and works on network
        disks, and flushing at every commit costs milliseconds for a set that took longer to compute.
        """
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection, connection:
                # What does not fit the cache waits for the commit: spilled, it would shut out who reads meanwhile.
                connection.execute("PRAGMA cache_spill = OFF")
                yield connection
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise StoreBusy(
                    f"{self.path} was in use by another process for {BUSY_SECONDS:g} seconds. Run the same command "
                    "again; what is done is kept"
                ) from error
            if "full" in str(error):
                raise CrateError(f"no space left for {self.path}. Free some and run the same command again") from error
            if type(error) is not sqlite3.DatabaseError and "no such table" not in str(error):
                raise
            remedy = f"Move it away and run: cratelm interpret {self.run}"
            raise CrateError(f"{self.path} is not a store of interpretations ({error}). {remedy}") from None

    def noted(self, name: str) -> str | None:
        """What is noted under this name; in a part, what the run's own store has where the part has nothing."""
        for store in (self, Store(self.run)):
            if store.path.exists():
                with store.transaction() as connection:
                    row = connection.execute("SELECT value FROM meta WHERE key = ?", [name]).fetchone()
                if row is not None:
                    return row[0]
        return None

    def note(self, name: str, value: str) -> None:
        """Note something about the whole store, such as what a language model can be asked."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [name, value])

    def scored(self) -> list[SetKey]:
        """The sets of scores there are, in the order of their columns."""
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
        """Whether the set is there, made from the records that are there now."""
        with self.transaction() as connection:
            return records_of(connection, key, stage) == identity(self.run, key.mode)

    def check(self, key: SetKey, stage: Stage, *, verb: str = "") -> None:
        """Refuse a set that is missing or was made from other records. `verb` is the command to run then."""
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
        """Put a set of scores in place of what was there."""
        columns = [getattr(made, name).tolist() for name in _NUMBERS]
        rows = (
            (reason, packed(sums, "<f8"), *numbers)
            for reason, sums, *numbers in zip(made.reason, made.sums, *columns, strict=True)
        )
        self.write(key, "score", ", ".join(("reason", "sums", *_NUMBERS)), rows)

    def write(self, key: SetKey, stage: Stage, names: str, rows: Iterable[tuple]) -> None:
        """Put the rows of a stage in place of what was there; `names` are their columns, after the set."""
        table, places = MADE[stage], ", ?" * (names.count(",") + 1)
        with self.transaction() as connection:
            own = add_set(connection, key)
            connection.execute(f"DELETE FROM {table} WHERE set_id = ?", [own])
            connection.executemany(
                f"INSERT INTO {table} (set_id, {names}) VALUES (?{places})", ((own, *row) for row in rows)
            )
            connection.execute(
                "INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?)",
                [own, stage, identity(self.run, key.mode), made_by()],
            )

    def explanations(self, key: SetKey) -> LayerExplanations:
        """A set of explanations, refused where missing or outdated."""
        self.check(key, "explain")
        rows = self.rows(key, "SELECT neuron, text, tokens, means FROM explanations" + _ALL)
        return LayerExplanations(
            neuron=np.array([row[0] for row in rows], dtype=np.int64), texts=tuple(row[1] for row in rows),
            tables=tables_of([(unpacked(row[2], "<i4"), unpacked(row[3], "<f4")) for row in rows]),
        )  # fmt: skip

    def simulations(self, key: SetKey) -> LayerSimulations:
        """A set of simulations, refused where missing or outdated."""
        self.check(key, "simulate")
        rows = self.rows(key, "SELECT neuron, source, activations FROM simulations" + _ALL)
        neuron, source, blobs = zip(*rows, strict=True) if rows else ((), (), ())
        vectors = [unpacked(blob, "<f4") for blob in blobs]
        return LayerSimulations(
            neuron=np.array(neuron, dtype=np.int64), source=np.array(source, dtype=np.int64),
            first=np.cumsum([0, *map(len, vectors)], dtype=np.int64),
            activations=np.concatenate(vectors or [np.empty(0, dtype=np.float32)]),
        )  # fmt: skip

    def scores(self, key: SetKey) -> LayerScores:
        """A set of scores, refused where missing or outdated."""
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

    def texts(self, key: SetKey) -> dict[int, str]:
        """The explanations of a set in words, by neuron index; for a control, those that were simulated instead."""
        self.check(key.explained, "explain")
        texts = dict(self.rows(key.explained, "SELECT neuron, text FROM explanations WHERE set_id = ?"))
        if not key.control:
            return texts
        self.check(key, "simulate")
        sources = self.rows(key, "SELECT neuron, source FROM simulations WHERE set_id = ?")
        return {neuron: texts[source] for neuron, source in sources}

    def read_neuron(self, key: SetKey, index: int) -> tuple[Explanation | None, Simulation | None, Score | None]:
        """What there is of one neuron, without reading its layer."""
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
        """Explanations that hold all the words, best match first, as (set, neuron index, text)."""
        quoted = " ".join('"{}"'.format(word.replace('"', '""')) for word in words.replace("\0", " ").split())
        query = (
            f"SELECT {KEY_COLUMNS}, neuron, explanations.text FROM explanation_search "
            "JOIN explanations ON explanations.id = explanation_search.rowid JOIN sets ON sets.id = set_id "
            "WHERE explanation_search MATCH ? AND mode = ? ORDER BY rank, layer, neuron LIMIT ?"
        )
        with self.transaction() as connection:
            rows = connection.execute(query, [quoted, mode, limit]).fetchall() if quoted else []
        return [(SetKey.of_row(key), neuron, text) for *key, neuron, text in rows]

    def rows(self, key: SetKey, query: str, *more: int) -> list[Any]:
        """What a query finds whose first parameter is the set."""
        with self.transaction() as connection:
            return connection.execute(query, [set_id(connection, key), *more]).fetchall()


def identity(run: Path, mode: Mode) -> str:
    """What tells collections of records apart: `records.json` but for its origin and the taps that are there.

    Empty where the records are not there, as in a store that was passed on alone.
    """
    if not (records_folder(run, mode) / "records.json").exists():
        return ""
    told = {k: v for k, v in read_collection(run, mode=mode).items() if k not in ("origin", "taps", "signed")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@cache
def made_by() -> str:
    """Where this process's sets come from; asked once, because it asks git."""
    return json.dumps(rundir.origin())


def add_set(connection: sqlite3.Connection, key: SetKey) -> int:
    """The number of a set in this file, given to it now if it has none."""
    connection.execute("INSERT OR IGNORE INTO sets VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", astuple(key))
    found = set_id(connection, key)
    assert found is not None
    return found


def set_id(connection: sqlite3.Connection, key: SetKey) -> int | None:
    """The number of a set in this file; None if it is not there."""
    row = connection.execute(
        f"SELECT id FROM sets WHERE ({KEY_COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?)", astuple(key)
    ).fetchone()
    return row and row[0]


def records_of(connection: sqlite3.Connection, key: SetKey, stage: Stage) -> str | None:
    """The identity of the records a set was made from; None if the set is not there."""
    query = "SELECT records FROM stages WHERE set_id = ? AND stage = ?"
    row = connection.execute(query, [set_id(connection, key), stage]).fetchone()
    return row and row[0]
