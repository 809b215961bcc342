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
from cratelm.interpretation.store.batches import NOTE
from cratelm.interpretation.store.database import Store, add_set, identity, set_id
from cratelm.interpretation.store.growing_sets import Row, SetRows, Simulated
from cratelm.interpretation.store.schema import KEY_COLUMNS, SetKey, Stage, packed, unpacked

COPIED = 500
"""Answers per transaction, so that neither store is locked for more than milliseconds."""
_NAMED = 3
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
        touched: dict[tuple[SetKey, Stage], SetRows] = {}
        for part in parts:
            Store.create(run, part.part)  # checks its version
            with part.transaction() as theirs:
                for key, stage in _sets(theirs):
                    new = SetRows(theirs, key, stage, set_id(theirs, key))
                    old = touched[key, stage] = SetRows(ours, key, stage, add_set(ours, key))
                    _begin(part, old, new)
                    for what, count in _join(part, old, new).items():
                        counts[what] += count
                _copy_chosen(ours, theirs)
                # The part collects its batches itself.
                query = "SELECT * FROM meta WHERE key != 'format_version' AND key NOT LIKE ?"
                notes = theirs.execute(query, [f"{NOTE}%"]).fetchall()
                ours.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", notes)
        explanations_first = sorted(touched.values(), key=lambda rows: rows.stage != "explain")
        missing = [_finish(rows) for rows in explanations_first]
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


def _begin(part: Store, ours: SetRows, theirs: SetRows) -> None:
    """Begin a part's set in the run's own store, with the neurons of both.

    Raises `CrateError` if the part comes from other records than the current ones, or has other settings.
    """
    new, old = theirs.begun, ours.begun
    assert new is not None
    if new.records != identity(part.run, theirs.key.mode):
        raise CrateError(
            f"{part.path} comes from other records than {records_folder(part.run, theirs.key.mode)} holds now "
            f"({theirs.name}). Move it away, or run its command again"
        )
    if old is not None and old.records == new.records:
        if difference := old.difference(new):
            raise CrateError(
                f"{part.path} was made with other settings than {Store(part.run).path} or an earlier part "
                f"({theirs.name}: {difference}). Run its command again with the same ones"
            )
        both = new._replace(neurons=np.union1d(old.neurons, new.neurons))
        if len(both.neurons) > len(old.neurons):
            ours.begin(both)
    else:
        ours.drop()
        ours.begin(new)


def _join(part: Store, ours: SetRows, theirs: SetRows) -> dict[str, int]:
    """Add the rows and failures of a part that the run's own store lacks. A row replaces a failure."""
    old, new = ours.read(), theirs.read()
    differing = [neuron for neuron in old.keys() & new.keys() if not _equal(old[neuron], new[neuron])]
    if differing:
        named = "; ".join(
            f"neuron {neuron}: {_short(old[neuron])} and {_short(new[neuron])}" for neuron in sorted(differing)[:_NAMED]
        )
        raise CrateError(
            f"{part.path} has different rows for {len(differing)} neurons than {Store(part.run).path} or an earlier "
            f"part ({theirs.name}; {named}). Move one of the two away"
        )
    added = {neuron: row for neuron, row in new.items() if neuron not in old}
    ours.add(added)
    known = old.keys() | new.keys() | ours.failures().keys()
    failed = {neuron: message for neuron, message in theirs.failures().items() if neuron not in known}
    ours.add_failures(failed)
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


def _finish(rows: SetRows) -> int:
    """Mark a set as whole if it is. Returns the number of missing neurons.

    A part does not know which neurons the other parts could explain: neurons without an explanation are removed here.
    """
    begun, key = rows.begun, rows.key.explained
    assert begun is not None
    explained = SetRows(rows.connection, key, "explain", set_id(rows.connection, key))
    if rows.stage != "explain" and explained.begun is not None:
        neurons = begun.neurons[~np.isin(begun.neurons, list(explained.failures()))]
        if len(neurons) < len(begun.neurons):
            begun = begun._replace(neurons=neurons)
            rows.begin(begun)
    missing = len(set(begun.neurons.tolist()) - rows.neurons())
    if not missing and rows.whole_from is None:
        rows.mark_whole(begun.records)
    return missing
