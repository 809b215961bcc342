"""The store: what is written comes back, whole or not at all, and only for the records it was made from."""

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import NOISE, make_run, make_tokenizer

from cratelm import rundir
from cratelm.activations.records import NeuronId, read_records, records_folder
from cratelm.data.tokenizer import token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.lookup.explain import explain_layer
from cratelm.interpretation.lookup.simulate import simulate_layer
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scoring.correlation import LayerScores, score_layer
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.store import database
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import write_explanations, write_simulations
from cratelm.interpretation.store.schema import SetKey

Made = tuple[LayerExplanations, LayerSimulations, LayerScores]
KEY = SetKey(layer=1, protocol="anthropic")
SHUFFLED = SetKey(layer=1, protocol="anthropic", control="shuffled")


def make(run: Path, key: SetKey = KEY) -> Made:
    """The three stages of one set, in memory."""
    records, by = read_records(run, key.layer), protocol(key.protocol)
    explanations = explain_layer(records, by, token_strings(make_tokenizer()))
    simulations = simulate_layer(records, by, explanations, control=key.control)
    return explanations, simulations, score_layer(records, by, simulations)


def write(store: Store, key: SetKey, made: Made) -> None:
    if not key.control:
        write_explanations(store, key, made[0])
    write_simulations(store, key, made[1])
    store.write_scores(key, made[2])


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "run", rng)


@pytest.fixture
def store(run: Path) -> Store:
    return Store.create(run)


def assert_same(found: object, expected: object) -> None:
    for name in expected.__slots__:  # type: ignore[attr-defined]
        ours, theirs = getattr(found, name), getattr(expected, name)
        if hasattr(theirs, "__slots__") and not isinstance(theirs, tuple):
            assert_same(ours, theirs)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("key", [KEY, SHUFFLED], ids=["plain", "shuffled"])
def test_what_is_written_comes_back(run: Path, store: Store, key: SetKey) -> None:
    write(store, KEY, make(run))
    made = make(run, key)
    write(store, key, made)
    assert_same(store.explanations(key.explained), made[0])
    assert_same(store.simulations(key), made[1])
    assert_same(Store.open(run).read_scores(1, "anthropic", control=key.control), made[2])


def test_one_neuron_is_read_alone(run: Path, store: Store) -> None:
    write(store, KEY, make(run))
    explanations, simulations, scores = make(run, SHUFFLED)
    write(store, SHUFFLED, (explanations, simulations, scores))
    row = 2
    index, source = int(simulations.neuron[row]), int(simulations.source[row])
    explanation, simulation, score = store.read_neuron(SHUFFLED, index)
    assert explanation is not None
    assert simulation is not None
    assert score is not None
    used = int(np.flatnonzero(explanations.neuron == source)[0])
    tokens, means = explanations.tables.of(used)
    assert explanation.neuron == NeuronId(tap="neurons", layer=1, index=source)
    assert explanation.text == explanations.texts[used]
    assert explanation.table == dict(zip(tokens.tolist(), means.tolist(), strict=True))
    assert (simulation.source, score.neuron.index, score.control) == (source, index, "shuffled")
    np.testing.assert_array_equal(simulation.activations, simulations.of(row))
    assert score.correlation == scores.correlation[index]
    assert (score.tokens, score.excerpts, score.reason) == (len(simulation.activations), 47, "")


def test_a_dead_neuron_has_a_score_row_with_its_reason_and_nothing_else(run: Path, store: Store) -> None:
    write(store, KEY, make(run))
    explanation, simulation, score = store.read_neuron(KEY, 0)
    assert explanation is None
    assert simulation is None
    assert score is not None
    assert (score.correlation, score.reason, score.tokens) == (None, "dead", 0)


def test_explanations_are_read_as_texts_and_those_of_a_control_are_its_sources(run: Path, store: Store) -> None:
    explanations, *_ = made = make(run)
    write(store, KEY, made)
    _, simulations, _ = shuffled = make(run, SHUFFLED)
    write(store, SHUFFLED, shuffled)
    texts = dict(zip(explanations.neuron.tolist(), explanations.texts, strict=True))
    assert store.read_explanations(1, "anthropic") == texts
    pairs = zip(simulations.neuron.tolist(), simulations.source.tolist(), strict=True)
    assert store.read_explanations(1, "anthropic", control="shuffled") == {ours: texts[used] for ours, used in pairs}


def test_scored_lists_what_there_is(run: Path, store: Store) -> None:
    assert store.scored() == []
    for key in (KEY, SHUFFLED, SetKey(layer=0, protocol="random-only")):
        made = make(run, key)
        write(store, key, made)
    assert store.scored() == [
        KEY,
        SetKey(layer=0, protocol="random-only"),
        SHUFFLED,
    ]


def test_a_set_is_written_whole_or_not_at_all(run: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    explanations, simulations, _ = make(run)
    write_explanations(store, KEY, explanations)
    before = store.path.read_bytes()

    def broken_off(_: LayerSimulations, row: int) -> np.ndarray:
        if row == 2:
            raise KeyboardInterrupt
        return np.ones(3, dtype=np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSimulations, "of", broken_off)
        with pytest.raises(KeyboardInterrupt):
            write_simulations(store, KEY, simulations)
    assert store.path.read_bytes() == before
    assert not store.is_done(KEY, "simulate")
    assert store.is_done(KEY, "explain")


def test_writing_again_replaces_the_set_and_the_search_follows(run: Path, store: Store) -> None:
    explanations, *_ = make(run)
    write_explanations(store, KEY, explanations)
    texts = ("zebra stripes", *explanations.texts[1:])
    write_explanations(
        store, KEY, LayerExplanations(neuron=explanations.neuron, texts=texts, tables=explanations.tables)
    )
    assert [(key, text) for key, _, text in store.search("zebra")] == [(KEY, "zebra stripes")]
    assert len(store.read_explanations(1, "anthropic")) == len(texts)
    write_explanations(store, KEY, explanations)
    assert store.search("zebra") == []


def test_search_finds_all_words_in_any_order_and_takes_them_literally(run: Path, store: Store) -> None:
    explanations, *_ = make(run)
    texts = tuple(f'neuron {i} fires on "ret"' if i % 2 else "sleeps" for i in range(len(explanations.texts)))
    write_explanations(
        store, KEY, LayerExplanations(neuron=explanations.neuron, texts=texts, tables=explanations.tables)
    )
    odd = [int(neuron) for i, neuron in enumerate(explanations.neuron) if i % 2]
    assert sorted(index for _, index, _ in store.search('fires "ret"')) == odd
    assert store.search("fires sleeps") == store.search("fires NOT") == store.search("  ") == []
    assert len(store.search("fires", limit=2)) == 2


def collect_again(run: Path) -> None:
    """As if the records had been collected from another model."""
    file = records_folder(run, "fixed") / "records.json"
    collection = rundir.read_json(file, made_by="")
    rundir.write_json(file, collection | {"model_hash": "another"})


def test_scores_of_other_records_are_refused(run: Path, store: Store) -> None:
    write(store, KEY, make(run))
    collect_again(run)
    with pytest.raises(
        CrateError, match=r"come from other records than .*Run: cratelm interpret .* --protocol anthrop"
    ):
        store.read_scores(1, "anthropic")
    assert not store.is_done(KEY, "score")


def test_only_where_and_when_records_were_collected_may_differ(run: Path, store: Store) -> None:
    write(store, KEY, make(run))
    file = records_folder(run, "fixed") / "records.json"
    rundir.write_json(file, rundir.read_json(file, made_by="") | {"origin": {"date": "another day"}})
    store.read_scores(1, "anthropic")


def test_a_store_is_readable_without_its_records(run: Path, store: Store) -> None:
    write(store, KEY, make(run))
    alone = run.parent / "alone"
    alone.mkdir()
    store.path.rename(alone / store.path.name)
    assert Store.open(alone).read_scores(1, "anthropic").layer == 1


def test_what_is_missing_is_said_with_the_command_that_makes_it(run: Path, store: Store) -> None:
    write(store, KEY, make(run))
    with pytest.raises(
        CrateError, match=r"no fixed anthropic scores of layer 0 .*found layers: 1.*Run: cratelm interpret"
    ):
        store.read_scores(0, "anthropic")
    with pytest.raises(CrateError, match=r"no fixed shuffled anthropic scores.*none.*--controls shuffled"):
        store.read_scores(1, "anthropic", control="shuffled")
    with pytest.raises(CrateError, match=r"sqlite is not there. Run: cratelm interpret"):
        Store.open(run.parent)


def test_a_newer_store_is_refused(run: Path, store: Store) -> None:
    connection = sqlite3.connect(store.path)
    with connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'format_version'")
    connection.close()
    with pytest.raises(CrateError, match="format version 99"):
        Store.create(run)


def test_a_store_from_before_the_rank_scores_is_given_them_and_scored_again(run: Path, store: Store) -> None:
    made = make(run)
    write(store, KEY, made)
    connection = sqlite3.connect(store.path)
    with connection:
        for name in ("spearman", "auroc"):
            connection.execute(f"ALTER TABLE scores DROP COLUMN {name}")
        connection.execute("DROP TABLE firing")
        connection.execute("DROP TABLE answers")
    connection.close()
    opened = Store.open(run)
    assert [opened.is_done(KEY, stage) for stage in ("explain", "simulate", "score")] == [True, True, False]
    opened.write_scores(KEY, made[2])
    assert_same(Store.open(run).read_scores(1, "anthropic"), made[2])


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 100, b""])
def test_a_file_that_is_not_a_store_is_refused(run: Path, content: bytes) -> None:
    (run / "interpretation.sqlite").write_bytes(content)
    with pytest.raises(CrateError, match="is not a store of interpretations"):
        Store.open(run)


def test_a_full_disk_is_said_and_leaves_the_store_as_it_was(
    run: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    explanations, *_ = make(run)
    connect = sqlite3.connect

    def small(path: Path, **options: Any) -> sqlite3.Connection:
        connection = connect(path, **options)
        connection.execute("PRAGMA max_page_count = 30")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    texts = tuple(f"{text} " + "x" * 100_000 for text in explanations.texts)
    with pytest.raises(CrateError, match="no space left"):
        write_explanations(
            store, KEY, LayerExplanations(neuron=explanations.neuron, texts=texts, tables=explanations.tables)
        )
    assert not store.is_done(KEY, "explain")
    assert NOISE in explanations.neuron


def test_a_search_ends_in_time(run: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    explanations, *_ = make(run)
    texts = tuple("a b c d e f " * 200 for _ in explanations.texts)
    write_explanations(
        store, KEY, LayerExplanations(neuron=explanations.neuron, texts=texts, tables=explanations.tables)
    )
    monkeypatch.setattr(database, "SEARCH_SECONDS", -1)
    with pytest.raises(CrateError, match="took more than -1 seconds"):
        store.search("a b c d e f " * 10)
