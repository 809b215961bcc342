"""Several processes or machines on one run: each writes a part, a store of its own, and a merge joins them.

A part is `interpretation.part-K.sqlite` beside the run's own store. It has the rows of its share of the neurons, and
the answers that it paid for. Merging again does nothing; parts may be merged while they are still worked on.
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
    read_rows,
    remove_rows,
)
from cratelm.interpretation.store.schema import KEY_COLUMNS, SetKey, Stage, packed, unpacked

COPIED = 500
"""Answers that are copied at once, so that neither store is held for longer than milliseconds."""
NAMED = 3
"""Conflicts that an error names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What a merge did."""

    parts: tuple[int, ...]
    """Numbers of the parts that were joined."""
    rows: int
    """Rows that were new."""
    failures: int
    """Neurons without a usable answer that were new."""
    calls: int
    """Answers that were new."""
    whole: int
    """Sets that are whole now, of those in the parts."""
    missing: int
    """Neurons that the other sets still miss, added up."""


def parts_of(run: Path) -> list[Store]:
    """The parts of a run, by number."""
    numbers = (path.name.split("-")[1].split(".")[0] for path in run.glob("interpretation.part-*.sqlite"))
    return [Store(run, int(number)) for number in sorted(numbers, key=int)]


def merge(run: Path) -> Merged:
    """Join all parts of a run into its own store. Hold the run (`rundir.claim`) meanwhile; parts may be worked on.

    Rows and failures are joined in one transaction. Answers follow a few at a time: they are found by what was asked,
    so any of them may be there. Refused where a part is of other records, was made with other settings, or says
    something else of a neuron.
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
    """The sets that grow in a store, with their stage."""
    rows = connection.execute(f"SELECT stage, {KEY_COLUMNS} FROM begun JOIN sets ON sets.id = begun.set_id").fetchall()
    for stage, *key in rows:
        yield SetKey.of_row(key), stage


def _begun(connection: sqlite3.Connection, key: SetKey, stage: Stage) -> Begun:
    found = begun(connection, key, stage)
    assert found is not None
    return found


def _name(key: SetKey, stage: Stage) -> str:
    return f"{stage}, layer {key.layer}{key.of_tap}, {key.what}"


def _check(run: Path, part: Store, theirs: sqlite3.Connection, key: SetKey, stage: Stage) -> None:
    """Refuse a part of other records than those that are there now."""
    now = identity(run, key.mode)
    if _begun(theirs, key, stage).records != now:
        raise CrateError(
            f"{part.path} comes from other records than {records_folder(run, key.mode)} holds now "
            f"({_name(key, stage)}). Move it away, or run its command again"
        )


def _begin(part: Store, ours: sqlite3.Connection, theirs: sqlite3.Connection, key: SetKey, stage: Stage) -> None:
    """Begin a part's set here, with the neurons of both; one that is here must have been made in the same way."""
    own, new, old = add_set(ours, key), _begun(theirs, key, stage), begun(ours, key, stage)
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
        drop_rows(ours, own, stage)
    ours.execute("DELETE FROM stages WHERE set_id = ? AND stage = ?", [own, stage])
    ours.execute(
        "INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?)",
        [own, stage, new.records, new.settings, packed(neurons, "<i4")],
    )


def _join(
    part: Store, ours: sqlite3.Connection, theirs: sqlite3.Connection, key: SetKey, stage: Stage
) -> dict[str, int]:
    """Add what a part has of a set and we have not. A row counts more than a failure."""
    own, other = add_set(ours, key), set_id(theirs, key)
    old, new = read_rows(ours, own, stage), read_rows(theirs, other, stage)
    differing = [neuron for neuron in old.keys() & new.keys() if not _equal(old[neuron], new[neuron])]
    if differing:
        named = "; ".join(
            f"neuron {neuron}: {_short(old[neuron])} and {_short(new[neuron])}" for neuron in sorted(differing)[:NAMED]
        )
        raise CrateError(
            f"{part.path} says something else of {len(differing)} neurons than "
            f"{Path(part.run, 'interpretation.sqlite')} or an earlier part ({_name(key, stage)}; {named}). "
            "Move one of the two away"
        )
    added = {neuron: row for neuron, row in new.items() if neuron not in old}
    remove_rows(ours, own, stage, added)
    add_rows(ours, own, stage, added)
    known = read_failures(ours, own, stage)
    failed = {
        neuron: message
        for neuron, message in read_failures(theirs, other, stage).items()
        if neuron not in old and neuron not in new and neuron not in known
    }
    ours.executemany(
        "INSERT INTO failures VALUES (?, ?, ?, ?)", [(own, n, stage, message) for n, message in failed.items()]
    )
    return {"rows": len(added), "failures": len(failed)}


def _equal(one: Row, other: Row) -> bool:
    if isinstance(one, str | Mapping) or isinstance(other, str | Mapping):
        return one == other
    assert isinstance(one, Simulated)
    assert isinstance(other, Simulated)
    return one.source == other.source and np.array_equal(one.activations, other.activations)


def _short(row: Row) -> str:
    return repr(row if len(repr(row)) <= 60 else repr(row)[:60] + "...")


def _copy_chosen(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    """Which neurons the sets are about: those of all parts together."""
    rows = theirs.execute(f"SELECT neurons, {KEY_COLUMNS} FROM chosen JOIN sets ON sets.id = set_id").fetchall()
    for blob, *columns in rows:
        own = add_set(ours, SetKey.of_row(columns))
        had = ours.execute("SELECT neurons FROM chosen WHERE set_id = ?", [own]).fetchone()
        both = np.union1d(unpacked(blob, "<i4"), unpacked(had and had[0], "<i4"))
        ours.execute("INSERT OR REPLACE INTO chosen VALUES (?, ?)", [own, packed(both, "<i4")])


def _copy_calls(main: Store, part: Store) -> int:
    """Copy the answers that the run's own store lacks; how many. Each batch is read to its end before it is written."""
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
    """Say that a set is whole if it is; how many neurons it misses.

    A part does not know which neurons the others could explain: those without an explanation leave the sets that use
    them.
    """
    own, here = add_set(ours, key), _begun(ours, key, stage)
    neurons = here.neurons
    if stage != "explain" and begun(ours, key.explained, "explain") is not None:
        unexplained = read_failures(ours, set_id(ours, key.explained), "explain")
        neurons = neurons[~np.isin(neurons, list(unexplained))]
        if len(neurons) < len(here.neurons):
            ours.execute(
                "UPDATE begun SET neurons = ? WHERE set_id = ? AND stage = ?", [packed(neurons, "<i4"), own, stage]
            )
    there = read_rows(ours, own, stage).keys() | read_failures(ours, own, stage).keys()
    missing = len(set(neurons.tolist()) - there)
    if not missing and records_of(ours, key, stage) is None:
        mark_whole(ours, own, stage, identity(run, key.mode))
    return missing
