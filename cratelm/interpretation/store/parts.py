"""Merge the parts of a run that several processes or machines work on.

A part is `interpretation.part-K.sqlite` next to the run's own store. It has the rows of its share of the neurons, and
the answers that it paid for. Merging again changes nothing; parts may be merged while processes still write them.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cratelm.activations.records import records_folder
from cratelm.errors import CrateError
from cratelm.interpretation.store.answer_cache import add_new_calls
from cratelm.interpretation.store.database import Store, add_set, identity, records_of, set_id
from cratelm.interpretation.store.growing_sets import (
    Begun,
    Row,
    Simulated,
    add_rows,
    begun,
    drop_rows,
    mark_whole,
    read_failures,
    read_set,
    remove_rows,
)
from cratelm.interpretation.store.schema import KEY_COLUMNS, SetKey, Stage, packed, unpacked

COPIED = 500
"""Answers per transaction, so that neither store is locked for more than milliseconds."""
NAMED = 3
"""Conflicts that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The result of a merge."""

    parts: tuple[int, ...]
    """Numbers of the parts that were joined."""
    rows: int
    """Rows that were new."""
    failures: int
    """Neurons without a usable answer that were new."""
    calls: int
    """Answers that were new."""
    whole: int
    """Sets of the parts that are whole now."""
    missing: int
    """Neurons that the other sets still miss, in total."""


def parts_of(run: Path) -> list[Store]:
    """The parts of a run, by number."""
    numbers = (path.name.split("-")[1].split(".")[0] for path in run.glob("interpretation.part-*.sqlite"))
    return [Store(run, int(number)) for number in sorted(numbers, key=int)]


def merge(run: Path) -> Merged:
    """Merge all parts of a run into its own store. The caller holds the run (`rundir.claim`); parts may still grow.

    Rows and failures are merged in one transaction, then answers in batches. Raises `CrateError` if a part comes from
    other records or settings, or has a different row for a neuron.
    """
    parts = parts_of(run)
    if not parts:
        raise CrateError(f"{run} has no parts to merge. Run: cratelm interpret {run} --llm URL --part K/N")
    main = Store.create(run)
    counts = {"rows": 0, "failures": 0, "calls": 0}
    with main.transaction() as ours:
        touched: dict[tuple[SetKey, Stage], None] = {}
        for part in parts:
            Store.create(run, part.part)  # checks its version
            with part.transaction() as theirs:
                for key, stage in _sets(theirs):
                    _check(run, part, theirs, key, stage)
                    touched[key, stage] = None
                    _begin(part, ours, theirs, key, stage)
                    for what, count in _join(part, ours, theirs, key, stage).items():
                        counts[what] += count
                _copy_chosen(ours, theirs)
                notes = theirs.execute("SELECT * FROM meta WHERE key != 'format_version'").fetchall()
                ours.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", notes)
        explanations_first = sorted(touched, key=lambda pair: pair[1] != "explain")
        missing = [_finish(ours, run, key, stage) for key, stage in explanations_first]
    for part in parts:
        counts["calls"] += _copy_calls(main, part)
    return Merged(
        parts=tuple(part.part for part in parts), whole=missing.count(0), missing=sum(missing), **counts,
    )  # fmt: skip


def _sets(connection: sqlite3.Connection) -> Iterator[tuple[SetKey, Stage]]:
    """The sets that were begun in a store, with their stage."""
    rows = connection.execute(f"SELECT stage, {KEY_COLUMNS} FROM begun JOIN sets ON sets.id = begun.set_id").fetchall()
    for stage, *key in rows:
        yield SetKey.of_row(key), stage


def _begun(connection: sqlite3.Connection, key: SetKey, stage: Stage) -> Begun:
    started = begun(connection, key, stage)
    assert started is not None
    return started


def _name(key: SetKey, stage: Stage) -> str:
    return f"{stage}, layer {key.layer}{key.of_tap}, {key.what}"


def _check(run: Path, part: Store, theirs: sqlite3.Connection, key: SetKey, stage: Stage) -> None:
    """Raise `CrateError` if a part comes from other records than the current ones."""
    now = identity(run, key.mode)
    if _begun(theirs, key, stage).records != now:
        raise CrateError(
            f"{part.path} comes from other records than {records_folder(run, key.mode)} holds now "
            f"({_name(key, stage)}). Move it away, or run its command again"
        )


def _begin(part: Store, ours: sqlite3.Connection, theirs: sqlite3.Connection, key: SetKey, stage: Stage) -> None:
    """Begin a part's set in the run's own store, with the neurons of both. Raises `CrateError` for other settings."""
    number, new, old = add_set(ours, key), _begun(theirs, key, stage), begun(ours, key, stage)
    if old is not None and old.records == new.records:
        if difference := old.difference(new):
            raise CrateError(
                f"{part.path} was made with other settings than {Path(part.run, 'interpretation.sqlite')} or an "
                f"earlier part ({_name(key, stage)}: {difference}). Run its command again with the same ones"
            )
        neurons = np.union1d(old.neurons, new.neurons)
        if len(neurons) == len(old.neurons):
            return
    else:
        neurons = new.neurons
        drop_rows(ours, number, stage)
    ours.execute("DELETE FROM stages WHERE set_id = ? AND stage = ?", [number, stage])
    ours.execute(
        "INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?)",
        [number, stage, new.records, new.settings, packed(neurons, "<i4")],
    )


def _join(
    part: Store, ours: sqlite3.Connection, theirs: sqlite3.Connection, key: SetKey, stage: Stage
) -> dict[str, int]:
    """Add the rows and failures of a part that the run's own store lacks. A row replaces a failure."""
    number, their_number = add_set(ours, key), set_id(theirs, key)
    old, new = read_set(ours, number, stage), read_set(theirs, their_number, stage)
    differing = [neuron for neuron in old.keys() & new.keys() if not _equal(old[neuron], new[neuron])]
    if differing:
        named = "; ".join(
            f"neuron {neuron}: {_short(old[neuron])} and {_short(new[neuron])}" for neuron in sorted(differing)[:NAMED]
        )
        raise CrateError(
            f"{part.path} has different rows for {len(differing)} neurons than "
            f"{Path(part.run, 'interpretation.sqlite')} or an earlier part ({_name(key, stage)}; {named}). "
            "Move one of the two away"
        )
    added = {neuron: row for neuron, row in new.items() if neuron not in old}
    remove_rows(ours, number, stage, added)
    add_rows(ours, number, stage, added)
    known = read_failures(ours, number, stage)
    failed = {
        neuron: message
        for neuron, message in read_failures(theirs, their_number, stage).items()
        if neuron not in old and neuron not in new and neuron not in known
    }
    ours.executemany(
        "INSERT INTO failures VALUES (?, ?, ?, ?)", [(number, n, stage, message) for n, message in failed.items()]
    )
    return {"rows": len(added), "failures": len(failed)}


def _equal(first: Row, second: Row) -> bool:
    if isinstance(first, str | Mapping) or isinstance(second, str | Mapping):
        return first == second
    assert isinstance(first, Simulated)
    assert isinstance(second, Simulated)
    return first.source == second.source and np.array_equal(first.activations, second.activations)


def _short(row: Row) -> str:
    return repr(row if len(repr(row)) <= 60 else repr(row)[:60] + "...")


def _copy_chosen(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    """Copy which neurons were chosen: the union over all parts."""
    rows = theirs.execute(f"SELECT neurons, {KEY_COLUMNS} FROM chosen JOIN sets ON sets.id = set_id").fetchall()
    for blob, *columns in rows:
        number = add_set(ours, SetKey.of_row(columns))
        had = ours.execute("SELECT neurons FROM chosen WHERE set_id = ?", [number]).fetchone()
        both = np.union1d(unpacked(blob, "<i4"), unpacked(had and had[0], "<i4"))
        ours.execute("INSERT OR REPLACE INTO chosen VALUES (?, ?)", [number, packed(both, "<i4")])


def _copy_calls(main: Store, part: Store) -> int:
    """Copy the answers that the run's own store lacks. Returns their number."""
    new, last = 0, 0
    while True:
        with part.transaction() as theirs:
            query = "SELECT rowid, * FROM calls WHERE rowid > ? ORDER BY rowid LIMIT ?"
            rows = theirs.execute(query, [last, COPIED]).fetchall()
        if not rows:
            return new
        last = rows[-1][0]
        new += add_new_calls(main, [row[1:] for row in rows])


def _finish(ours: sqlite3.Connection, run: Path, key: SetKey, stage: Stage) -> int:
    """Mark a set as whole if it is. Returns the number of missing neurons.

    A part does not know which neurons the other parts could explain: neurons without an explanation are removed here.
    """
    number, started = add_set(ours, key), _begun(ours, key, stage)
    neurons = started.neurons
    if stage != "explain" and begun(ours, key.explained, "explain") is not None:
        unexplained = read_failures(ours, set_id(ours, key.explained), "explain")
        neurons = neurons[~np.isin(neurons, list(unexplained))]
        if len(neurons) < len(started.neurons):
            ours.execute(
                "UPDATE begun SET neurons = ? WHERE set_id = ? AND stage = ?", [packed(neurons, "<i4"), number, stage]
            )
    done = read_set(ours, number, stage).keys() | read_failures(ours, number, stage).keys()
    missing = len(set(neurons.tolist()) - done)
    if not missing and records_of(ours, key, stage) is None:
        mark_whole(ours, number, stage, identity(run, key.mode))
    return missing
