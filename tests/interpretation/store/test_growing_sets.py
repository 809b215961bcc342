"""Sets that grow neuron by neuron: what is there after each step, after a break, after a change of their making."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import make_run

from cratelm import rundir
from cratelm.activations.records import records_folder
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, Simulated
from cratelm.interpretation.store.schema import SetKey, Stage

KEY = SetKey(layer=1, protocol="anthropic", explainer="a-model")
SETTINGS = {"temperature": 1.0}


@pytest.fixture
def store(tmp_path: Path, rng: np.random.Generator) -> Store:
    return Store.create(make_run(tmp_path / "run", rng))


def begin(
    store: Store, stage: Stage = "explain", neurons: tuple[int, ...] = (1, 4, 7), **changes: object
) -> GrowingSet:
    return GrowingSet.begin(store, KEY, stage, neurons, settings=SETTINGS | changes)


def test_a_set_is_there_once_each_neuron_has_its_row_or_its_failure(store: Store) -> None:
    growing = begin(store)
    assert growing.missing() == [1, 4, 7]
    growing.add({4: "words about \x00 and café", 1: "digits"})
    assert (begin(store).missing(), growing.finish(), store.is_done(KEY, "explain")) == ([7], False, False)
    growing.add_failures({7: "I cannot help with that."})
    assert begin(store).missing() == []
    assert not store.is_done(KEY, "explain")
    assert growing.finish()
    assert store.is_done(KEY, "explain")
    assert store.read_explanations(1, "anthropic", explainer="a-model") == {1: "digits", 4: "words about \x00 and café"}
    assert growing.failures() == {7: "I cannot help with that."}
    made = store.explanations(KEY)
    assert (made.neuron.tolist(), len(made.tables), made.tables.of(0)[0].tolist()) == ([1, 4], 2, [])
    explanation, *_ = store.read_neuron(KEY, 4)
    assert explanation is not None
    assert (explanation.text, explanation.table) == ("words about \x00 and café", {})
    assert [neuron for _, neuron, _ in store.search("digits")] == [1]


def test_simulations_come_back_as_those_of_a_whole_set(store: Store, rng: np.random.Generator) -> None:
    rows = {n: Simulated(source=9 - n, activations=rng.random(5 + n).astype(np.float32)) for n in (7, 1, 4)}
    growing = begin(store, "simulate")
    for neuron, row in rows.items():
        growing.add({neuron: row})
    assert growing.finish()
    made = store.simulations(KEY)
    assert (made.neuron.tolist(), made.source.tolist()) == ([1, 4, 7], [8, 5, 2])
    for number, neuron in enumerate((1, 4, 7)):
        np.testing.assert_array_equal(made.of(number), rows[neuron].activations)
    assert {n: row.source for n, row in growing.rows().items() if isinstance(row, Simulated)} == {1: 8, 4: 5, 7: 2}


def test_results_of_two_stages_of_one_set_do_not_meet(store: Store) -> None:
    detection, fuzzing = begin(store, "detection"), begin(store, "fuzzing")
    detection.add({1: {"hits": [1, 0], "text": "é"}})
    fuzzing.add({1: {"hits": []}, 4: {"hits": [1]}})
    assert (detection.rows(), detection.missing()) == ({1: {"hits": [1, 0], "text": "é"}}, [4, 7])
    assert fuzzing.rows() == {1: {"hits": []}, 4: {"hits": [1]}}
    fuzzing.add_failures({7: "no"})
    assert fuzzing.finish()
    assert not detection.finish()


def test_a_row_takes_the_place_of_a_failure_and_of_an_older_row(store: Store) -> None:
    growing = begin(store)
    growing.add({1: "zebra"})
    growing.add_failures({4: "no"})
    growing.add({1: "horse", 4: "yes"})
    assert (growing.rows(), growing.failures(), store.search("zebra")) == ({1: "horse", 4: "yes"}, {}, [])


def test_other_settings_or_records_make_a_set_again(store: Store) -> None:
    begin(store).add({1: "digits"})
    assert begin(store).missing() == [4, 7]
    assert begin(store, temperature=0.5).missing() == [1, 4, 7]
    growing = begin(store, temperature=0.5)
    growing.add({1: "a", 4: "b", 7: "c"})
    assert growing.finish()
    file = records_folder(store.run, "fixed") / "records.json"
    rundir.write_json(file, rundir.read_json(file, made_by="") | {"model_hash": "another"})
    assert begin(store, temperature=0.5).missing() == [1, 4, 7]


def test_a_larger_sample_keeps_what_is_there_and_a_smaller_one_takes_it(store: Store) -> None:
    growing = begin(store)
    growing.add({1: "a", 4: "b", 7: "c"})
    assert growing.finish()
    smaller = begin(store, neurons=(4,))
    assert (smaller.missing(), smaller.neurons.tolist()) == ([], [1, 4, 7])
    assert store.is_done(KEY, "explain")
    assert begin(store, neurons=(1, 4, 7, 8)).missing() == [8]
    assert not store.is_done(KEY, "explain")


def test_rows_of_a_sample_that_was_never_whole_do_not_stay_in_another(store: Store) -> None:
    begin(store, neurons=(1, 2, 3)).add({2: "out", 1: "in"})
    growing = begin(store, neurons=(1, 4))
    assert (growing.rows(), growing.missing()) == ({1: "in"}, [4])


def test_an_older_store_gets_the_tables_it_lacks(store: Store) -> None:
    with sqlite3.connect(store.path) as connection:
        for table in ("begun", "answers", "calls"):
            connection.execute(f"DROP TABLE {table}")
    connection.close()
    assert begin(Store.create(store.run)).missing() == [1, 4, 7]


def test_a_whole_set_keeps_its_rows_if_only_a_setting_that_is_not_compared_differs(tmp_path: Path) -> None:
    """A control set of an earlier version has other pairs of neurons; it is not simulated again."""
    store, key = Store.create(tmp_path), SetKey(layer=0, protocol="anthropic", explainer="m", control="shuffled")

    def begin(pairs: str, neurons: range, temperature: int = 0) -> GrowingSet:
        settings = {"sources": pairs, "temperature": temperature}
        return GrowingSet.begin(store, key, "explain", neurons, settings=settings, not_compared=("sources",))

    begin("old", range(3)).add({neuron: "text" for neuron in range(3)}, whole=True)
    assert begin("new", range(2)).missing() == []
    assert store.is_done(key, "explain")
    assert begin("new", range(4)).missing() == [0, 1, 2, 3]
    begin("new", range(3)).add({neuron: "text" for neuron in range(3)}, whole=True)
    assert begin("new", range(3), temperature=1).missing() == [0, 1, 2]
