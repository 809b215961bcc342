"""The lookup explainer and simulator against plain dictionaries, and the sentences they are read as."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cratelm.activations.records import ABSENT, Excerpts
from cratelm.interpretation.lookup.tables import explain, legible, sentence, simulate, tables_of


def made_up(rng: np.random.Generator, neurons: int, excerpts: int, width: int, vocabulary: int) -> Excerpts:
    """Random excerpts: short ones, absent ones, many zeros, some negative activations."""
    shape = (neurons, excerpts, width)
    lengths = rng.integers(0, width + 1, size=shape[:2])
    valid = np.arange(width) < lengths[..., None]
    activations = rng.normal(size=shape) * (rng.random(shape) < 0.4) * valid
    return Excerpts(
        tokens=np.where(valid, rng.integers(0, vocabulary, size=shape), ABSENT),
        activations=activations.astype(np.float32),
        position=np.where(lengths > 0, 7, ABSENT),
        document=np.where(lengths > 0, 0, ABSENT),
    )


def brute_table(excerpts: Excerpts, row: int) -> dict[int, float]:
    seen = defaultdict(list)
    for excerpt in excerpts.of(row):
        for token, activation in zip(excerpt.tokens, excerpt.activations, strict=True):
            seen[int(token)].append(float(activation))
    return {token: float(np.mean(values)) for token, values in seen.items()}


@pytest.mark.parametrize(("neurons", "vocabulary"), [(1, 3), (37, 11), (20, 50_304)])
def test_explanations_and_simulations_equal_plain_dictionaries(
    neurons: int, vocabulary: int, rng: np.random.Generator
) -> None:
    shown, tested = made_up(rng, neurons, 5, 9, vocabulary), made_up(rng, neurons, 7, 6, vocabulary)
    tables = explain(shown)
    simulated = simulate(tables, tested.tokens)
    for row in range(neurons):
        expected = brute_table(shown, row)
        tokens, means = tables.of(row)
        found = dict(zip(tokens.tolist(), means.tolist(), strict=True))
        assert found == pytest.approx({token: mean for token, mean in expected.items() if mean}, rel=1e-6)
        assert tokens.tolist() == sorted(found)
        looked_up = [[expected.get(int(token), 0.0) for token in excerpt] for excerpt in tested.tokens[row]]
        np.testing.assert_allclose(simulated[row], np.array(looked_up) * tested.valid[row], rtol=1e-6, atol=0)


@given(
    seed=st.integers(0, 2**32 - 1), neurons=st.integers(1, 40), width=st.integers(1, 5), vocabulary=st.integers(1, 9)
)
def test_a_neuron_that_is_a_function_of_the_token_is_simulated_exactly(
    seed: int, neurons: int, width: int, vocabulary: int
) -> None:
    rng = np.random.default_rng(seed)
    shown = made_up(rng, neurons, 4, width, vocabulary)
    strength = rng.random((neurons, vocabulary)).astype(np.float32)
    exact = np.take_along_axis(strength, np.maximum(shown.tokens, 0).reshape(neurons, -1), axis=1)
    exact = exact.reshape(shown.tokens.shape) * shown.valid
    shown = Excerpts(tokens=shown.tokens, activations=exact, position=shown.position, document=shown.document)
    np.testing.assert_allclose(simulate(explain(shown), shown.tokens), exact, rtol=1e-6)


def test_no_neurons_give_no_tables_and_no_simulations() -> None:
    nothing = Excerpts(
        tokens=np.zeros((0, 5, 8), dtype=np.int64), activations=np.zeros((0, 5, 8), dtype=np.float32),
        position=np.zeros((0, 5), dtype=np.int64), document=np.zeros((0, 5), dtype=np.int64),
    )  # fmt: skip
    tables = explain(nothing)
    assert len(tables) == 0
    assert simulate(tables, nothing.tokens).shape == (0, 5, 8)


def test_tables_can_be_given_to_other_neurons() -> None:
    rows = [(np.array([3, 5]), np.array([1.0, 2.0])), (np.array([]), np.array([])), (np.array([4]), np.array([0.5]))]
    swapped = tables_of(rows).take(np.array([2, 0, 1, 0]))
    assert [(t.tolist(), m.tolist()) for t, m in map(swapped.of, range(4))] == [
        ([4], [0.5]),
        ([3, 5], [1.0, 2.0]),
        ([], []),
        ([3, 5], [1.0, 2.0]),
    ]


STRINGS = [" return", "def", "\n", "    ", "\t", "é", " a\n", *(f"w{i}" for i in range(20))]


def in_words(table: dict[int, float]) -> str:
    return sentence(np.array(list(table), dtype=np.int32), np.array(list(table.values()), dtype=np.float32), STRINGS)


def test_a_sentence_names_the_strongest_tokens_first() -> None:
    assert in_words({0: 29.4, 1: 32.1, 2: 123.4}) == 'fires on "↵" (123), "def" (32), " return" (29); on nothing else'
    assert in_words({0: 2.94, 1: 3.21}) == 'fires on "def" (3.2), " return" (2.9); on nothing else'


def test_a_sentence_counts_what_it_does_not_name() -> None:
    weak_and_negative = {0: 1.0, 1: 0.05, 2: -4.0}
    assert in_words(weak_and_negative) == 'fires on " return" (1); up to 0.05 on 1 more token; on nothing else'
    many = in_words({token: 1.0 for token in range(20)})
    assert many.count("(1)") == 8
    assert many.endswith("; up to 1 on 12 more tokens; on nothing else")


def test_a_neuron_without_positive_activations_has_a_sentence_too() -> None:
    assert in_words({}) == in_words({3: -1.0}) == "does not fire in the excerpts it was explained from"


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" the", '" the"'), ("    ", '"␣␣␣␣"'), ("\n\n\t", '"↵↵⇥"'), ("\r\n", '"␍↵"'), (" \n", '" ↵"'), ("a b", '"a b"')],
)
def test_white_space_is_legible(text: str, shown: str) -> None:
    assert legible(text) == shown
