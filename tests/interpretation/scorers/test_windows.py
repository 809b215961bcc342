"""Windows to tell apart: where they come from, what the neuron does on them, and that nothing leaks or repeats."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import CONSTANT, DEAD, FIRST_TOKEN_NEURON, make_run

from cratelm import CrateError, read_records
from cratelm.activations.records import Excerpt, LayerRecords
from cratelm.interpretation.scorers.windows import (
    SIGNS,
    Contrast,
    Windows,
    contrast,
    drawn_marks,
    marked,
    num_marks_for_negatives,
    signs_for,
    strong,
)

WINDOWS = Windows(seed=3)


@pytest.fixture
def records(tmp_path: Path, rng: np.random.Generator) -> LayerRecords:
    return read_records(make_run(tmp_path / "run", rng), 0)


def window(tokens: list[int], activations: list[float], position: int = 0) -> Excerpt:
    return Excerpt(
        tokens=np.array(tokens), activations=np.array(activations, dtype=np.float32), position=position, document=0
    )


def drawn(records: LayerRecords, windows: Windows = WINDOWS) -> list[Contrast]:
    return [contrast(records[index], windows) for index in range(records.num_neurons)]


def test_a_neuron_fires_on_positives_and_on_no_token_of_a_negative(records: LayerRecords) -> None:
    found = drawn(records)
    assert all(one.positives and one.negatives for one in found[FIRST_TOKEN_NEURON:])
    for one in found:
        assert all(len(w.tokens) == WINDOWS.width for w in (*one.positives, *one.negatives))
        assert all(w.activations.max() > 0 for w in one.positives)
        assert all(w.activations.max() <= 0 for w in one.negatives)
        assert len(one.positives) == min(one.active, WINDOWS.positives)
        assert len(one.negatives) == min(one.silent, WINDOWS.negatives)
        strengths = [w.activations.max() for w in one.positives]
        assert strengths == sorted(strengths, reverse=True)


def test_windows_are_what_the_records_hold_at_their_place(records: LayerRecords) -> None:
    """Every window is a stretch of some scoring excerpt, tokens and activations alike."""
    record = records[FIRST_TOKEN_NEURON]
    found = contrast(record, WINDOWS)
    scored = [e for (_, part, _), excerpts in record.excerpts.items() if part == "score" for e in excerpts]
    for one in (*found.positives, *found.negatives):
        places = [(e, one.position - e.position) for e in scored if 0 <= one.position - e.position <= len(e.tokens) - 8]
        cuts = [(e.tokens[at : at + 8].tolist(), e.activations[at : at + 8].tolist()) for e, at in places]
        assert (one.tokens.tolist(), one.activations.tolist()) in cuts


def test_no_document_explains_and_is_scored_on(records: LayerRecords) -> None:
    for index, one in enumerate(drawn(records)):
        sets = records[index].excerpts.items()
        explained = {e.document for (_, part, _), excerpts in sets if part == "explain" for e in excerpts}
        assert explained
        assert explained.isdisjoint(w.document for w in (*one.positives, *one.negatives))


def test_a_leak_is_noticed(records: LayerRecords) -> None:
    record = records[FIRST_TOKEN_NEURON]
    leaky = {
        (width, part, kind): tuple(replace(e, document=0) for e in excerpts)
        for (width, part, kind), excerpts in record.excerpts.items()
    }
    with pytest.raises(AssertionError, match="documents it was explained from"):
        contrast(replace(record, excerpts=leaky), WINDOWS)


def test_no_token_is_in_two_windows(records: LayerRecords) -> None:
    for one in drawn(records, Windows(width=5, positives=50, negatives=50)):
        assert all(abs(a.position - b.position) >= 5 for a, b in combinations((*one.positives, *one.negatives), 2))


def test_the_peak_lies_anywhere_in_a_positive(records: LayerRecords) -> None:
    peaks = [int(w.activations.argmax()) for one in drawn(records)[FIRST_TOKEN_NEURON:] for w in one.positives]
    assert set(peaks) == set(range(WINDOWS.width))


def test_positives_are_of_all_strengths(records: LayerRecords) -> None:
    """Of many windows some are drawn, as many from the strongest fifth as from the weakest."""
    record = records[FIRST_TOKEN_NEURON]
    everything = contrast(record, replace(WINDOWS, positives=10_000)).positives
    few = contrast(record, replace(WINDOWS, positives=10)).positives
    order = [w.position for w in everything]
    groups = np.array_split(np.arange(len(everything)), WINDOWS.strengths)
    ranks = [order.index(w.position) for w in few]
    assert [sum(rank in group for rank in ranks) for group in groups] == [2] * 5


def test_the_same_seed_draws_the_same_windows_and_another_seed_others(records: LayerRecords) -> None:
    draws = [contrast(records[FIRST_TOKEN_NEURON], replace(WINDOWS, seed=seed)) for seed in (1, 1, 2)]
    places = [[w.position for w in (*one.positives, *one.negatives)] for one in draws]
    assert places[0] == places[1] != places[2]


def test_a_dead_neuron_has_no_positives_and_one_that_never_rests_no_negatives(records: LayerRecords) -> None:
    found = drawn(records)
    assert (found[DEAD].active, found[DEAD].positives) == (0, ())
    assert (found[CONSTANT].silent, found[CONSTANT].negatives) == (0, ())


def test_records_without_a_scoring_half_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "run", rng, mode="compat")
    with pytest.raises(CrateError, match="held-out documents.*Run: cratelm collect"):
        contrast(read_records(run, 0, mode="compat")[FIRST_TOKEN_NEURON], WINDOWS)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(CrateError, match="at least 1"):
        Windows(width=0)
    with pytest.raises(CrateError, match="at least 4"):
        Windows(positives=3, least=4)


def test_marks_of_a_known_window() -> None:
    one = window([5, 6, 7, 8, 9], [0, 1, 0.29, 0.3, 0.9])
    assert strong(one).tolist() == [False, True, False, True, True]
    table = [b"?"] * 5 + [b"if", b" a", b" <", b" b", b":"]
    assert marked(one, strong(one), table, ("<<", ">>")) == "if <<a>> < <<b:>>"
    assert num_marks_for_negatives([one, window([1, 2], [0, 3])]) == 2
    silent = window([5, 6], [-1, -2])
    assert not strong(silent).any()


def test_marks_are_drawn_from_what_is_allowed(rng: np.random.Generator) -> None:
    allowed = np.array([True, False, True, True, False])
    for count in (1, 3, 9):
        marks = drawn_marks(allowed, count, rng)
        assert marks.sum() == min(count, 3)
        assert not marks[~allowed].any()
    assert {int(drawn_marks(allowed, 1, rng).argmax()) for _ in range(100)} == {0, 2, 3}


def test_signs_that_the_text_holds_itself_are_not_used() -> None:
    assert signs_for(["a b", "c"]) == SIGNS[0]
    assert signs_for(["x << 3"]) == SIGNS[1]
    assert signs_for(["x >> 3", "a[[0]]"]) == SIGNS[2]
    assert signs_for(["<< [[ {{ "]) == SIGNS[3]
