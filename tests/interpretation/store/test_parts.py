"""Parts of a run and their merge: the same store as one process makes, again and again, and only of the same making."""

import multiprocessing
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import make_run

from cratelm import rundir
from cratelm.activations.records import records_folder
from cratelm.errors import CrateError
from cratelm.interpretation.store import parts
from cratelm.interpretation.store.answer_cache import add_calls, spent
from cratelm.interpretation.store.batches import BatchRecord, open_batches, write_batch
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, Row, Simulated
from cratelm.interpretation.store.neuron_selection import read_chosen, write_chosen
from cratelm.interpretation.store.parts import merge, parts_of
from cratelm.interpretation.store.schema import SetKey, Stage
from cratelm.rundir import claim

KEY = SetKey(layer=1, protocol="anthropic", explainer="a-model")
SIMULATED = SetKey(layer=1, protocol="anthropic", explainer="a-model", simulator="all-at-once of b")
NEURONS = (1, 2, 4, 7, 8, 9)


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "run", rng)


def begin(store: Store, key: SetKey = KEY, stage: Stage = "explain", **settings: Any) -> GrowingSet:
    return GrowingSet.begin(store, key, stage, NEURONS, settings={"temperature": 1.0} | settings)


def row(neuron: int) -> Row:
    return Simulated(source=neuron, activations=np.arange(neuron, dtype=np.float32))


def fill(run: Path, part: int, neurons: tuple[int, ...], *, failing: int = -1, **settings: Any) -> None:
    """What a process does with its share."""
    store = Store.create(run, part)
    explained, simulated = begin(store, **settings), begin(store, SIMULATED, "simulate", **settings)
    explained.add({neuron: f"words of {neuron}" for neuron in neurons if neuron != failing})
    simulated.add({neuron: row(neuron) for neuron in neurons if neuron != failing})
    detected = begin(store, SIMULATED, "detection", **settings)
    detected.add({neuron: {"hits": [neuron]} for neuron in neurons if neuron != failing})
    if failing in neurons:
        explained.add_failures({failing: "no"})
    write_chosen(store, KEY, np.arange(12))
    add_calls(store, [(f"{neuron:040}", "a-model", 5, 3, "2026", b"answer") for neuron in (*neurons, 99)])
    assert not explained.finish()


def contents(run: Path) -> list[Any]:
    store = Store.open(run)
    with store.transaction() as connection:
        calls = connection.execute("SELECT * FROM calls ORDER BY hash").fetchall()
    sets = [(KEY, "explain"), (SIMULATED, "simulate"), (SIMULATED, "detection")]
    found = [GrowingSet(store=store, key=key, stage=stage, neurons=np.array([0])) for key, stage in sets]
    return [calls, *(repr(one.rows()) for one in found), *(one.failures() for one in found)]


def test_parts_make_what_one_process_makes(run: Path) -> None:
    fill(run, 1, (1, 2), failing=2)
    fill(run, 2, (4, 7))
    assert not Store(run).path.exists()
    halfway = merge(run)
    assert (halfway.parts, halfway.rows, halfway.failures, halfway.calls) == ((1, 2), 9, 1, 5)
    assert (halfway.whole, halfway.missing) == (0, 6)
    fill(run, 3, (8, 9))
    merged = merge(run)
    assert (merged.parts, merged.rows, merged.calls, merged.whole, merged.missing) == ((1, 2, 3), 6, 2, 3, 0)
    store = Store.open(run)
    for key, stage in ((KEY, "explain"), (SIMULATED, "simulate"), (SIMULATED, "detection")):
        assert store.is_done(key, stage)
    assert store.simulations(SIMULATED).neuron.tolist() == [1, 4, 7, 8, 9]
    kept = read_chosen(store, KEY)
    assert kept is not None
    assert kept.tolist() == list(range(12))
    before = contents(run)
    again = merge(run)
    assert (again.rows, again.failures, again.calls, again.whole, again.missing) == (0, 0, 0, 3, 0)
    assert contents(run) == before
    assert store.is_done(KEY, "explain")


def test_a_part_leaves_out_what_the_run_has(run: Path) -> None:
    begin(Store.create(run)).add({1: "mine", 2: "mine too"})
    part = begin(Store.create(run, 1))
    assert part.missing() == [4, 7, 8, 9]
    part.add({4: "part's"})
    assert part.rows() == {1: "mine", 2: "mine too", 4: "part's"}
    assert begin(Store.create(run, 2), temperature=0.5).missing() == list(NEURONS)


def test_a_row_counts_more_than_a_failure_whichever_comes_first(run: Path) -> None:
    for first, second in ((1, 2), (2, 1)):
        begin(Store.create(run, first)).add({1: "words"})
        begin(Store.create(run, second)).add_failures({1: "no"})
    merge(run)
    growing = begin(Store.create(run))
    assert (growing.rows(), growing.failures()) == ({1: "words"}, {})


def test_conflicts_are_named_and_nothing_is_merged(run: Path) -> None:
    fill(run, 1, (1, 2))
    begin(Store.create(run, 2)).add({2: "other words", 4: "more"})
    with pytest.raises(
        CrateError, match=r"part-2.sqlite has different rows for 1 neurons .*neuron 2: 'words of 2' and 'other words'"
    ):
        merge(run)
    assert begin(Store.create(run)).rows() == {}


def test_a_part_of_other_records_is_refused(run: Path) -> None:
    fill(run, 1, (1, 2))
    file = records_folder(run, "fixed") / "records.json"
    rundir.write_json(file, rundir.read_json(file, made_by="") | {"model_hash": "another"})
    with pytest.raises(CrateError, match=r"part-1.sqlite comes from other records"):
        merge(run)


def test_a_part_of_other_settings_is_refused(run: Path) -> None:
    fill(run, 1, (1, 2))
    fill(run, 2, (4, 7), temperature=0.5)
    with pytest.raises(CrateError, match=r"part-2.sqlite was made with other settings .*temperature 1.0 -> 0.5"):
        merge(run)


def test_a_run_without_parts_is_refused_with_the_command(run: Path) -> None:
    with pytest.raises(CrateError, match=r"no parts to merge. Run: cratelm interpret .* --part K/N"):
        merge(run)


def test_a_part_needs_no_hold_of_the_run_and_is_held_itself(run: Path) -> None:
    with claim(run), claim(run, part=1), claim(run, part=2):
        fill(run, 1, (1,))
        with pytest.raises(CrateError, match=r"part 1 of .* is in use by process"), claim(run, part=1):
            raise AssertionError
    with claim(run, part=1):
        pass


def _write(run: Path, part: int) -> None:
    for neuron in NEURONS[part - 1 :: 3]:
        fill(run, part, (neuron,))


def test_parts_are_written_at_the_same_time_and_merged_meanwhile(run: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write, args=(run, part)) for part in (1, 2, 3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if parts_of(run):
            merge(run)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert merge(run).missing == 0
    assert Store.open(run).is_done(KEY, "explain")


def test_a_merge_does_not_block_writing_the_part(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its answers are copied, a part can be written at once."""
    fill(run, 1, (1, 2, 4, 7))
    monkeypatch.setattr(parts, "COPIED", 2)
    written, copy = [], parts.add_new_calls

    def copied(store: Store, rows: Any) -> int:
        with closing(sqlite3.connect(Store(run, 1).path, timeout=0)) as connection, connection:
            connection.execute("UPDATE meta SET value = value")
        with closing(sqlite3.connect(store.path, timeout=0)) as connection, connection:
            connection.execute("UPDATE meta SET value = value")
        written.append(len(rows))
        return copy(store, rows)

    monkeypatch.setattr(parts, "add_new_calls", copied)
    assert merge(run).calls == 5
    assert written == [2, 2, 1]


def test_answers_wait_for_a_store_that_is_in_use_and_then_say_so_in_a_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, opened, transaction = Store.create(run, 1), [], Store.transaction
    monkeypatch.setattr("cratelm.interpretation.store.database.BUSY_SECONDS", 0.01)
    holder = sqlite3.connect(part.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    answer = ("a" * 40, "a-model", 5, 3, "2026", b"answer")
    with pytest.raises(CrateError, match=r"part-1.sqlite was in use by another process for 0.01 seconds") as caught:
        add_calls(part, [answer])
    assert "\n" not in str(caught.value)

    def counted(self: Store) -> Any:
        opened.append(self)
        if len(opened) == 3:
            holder.rollback()
        return transaction(self)

    monkeypatch.setattr(Store, "transaction", counted)
    add_calls(part, [answer])
    assert spent(part) == (5, 3)
    holder.close()


def test_the_batches_of_a_part_stay_in_the_part(run: Path) -> None:
    fill(run, 1, (1, 2))
    part = Store.create(run, 1)
    part.note("tokens per byte of a-model", "0.25")
    write_batch(part, BatchRecord(file="file-1", id="batch_1", url="http://a/v1", model="a-model", path="/v1"))
    merge(run)
    assert Store.open(run).noted("tokens per byte of a-model") == "0.25"
    assert open_batches(Store.open(run)) == []
    assert [record.id for record in open_batches(part)] == ["batch_1"]
