"""Activations as prompts show them, and the solved neurons that prompts begin with."""

import math

import numpy as np
import pytest

from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.prompts.normalisation import Rounding, normalised, shown_maximum


def test_openais_rule_gives_its_published_vector() -> None:
    given = np.array([0, -1, 0.5, 1.19, 1.2, 1.999, 2, 2.5])
    assert normalised(given, 2.0).tolist() == [0, 0, 2, 5, 6, 9, 10, 10]
    assert normalised(given, 0.0).tolist() == [0] * 8
    assert normalised(given, -1.0).tolist() == [0] * 8


def test_delphis_rule_gives_its_published_vector() -> None:
    given = np.array([0, 0.01, 0.5, 1.19, 1.2, 1.999, 2])
    assert normalised(given, 2.0, rounding="ceil").tolist() == [0, 1, 3, 6, 6, 10, 10]


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_both_rules_are_their_formulas_on_fresh_numbers(rounding: Rounding, rng: np.random.Generator) -> None:
    given = rng.normal(0, 3, 500).astype(np.float32)
    maximum = float(rng.uniform(0.1, 8))
    whole = math.floor if rounding == "floor" else math.ceil
    expected = [min(10, whole(10 * max(float(a), 0) / maximum)) for a in given]
    assert normalised(given, maximum, rounding=rounding).tolist() == expected
    nine = normalised(given, maximum, rounding=rounding, top=9).tolist()
    assert nine == [min(9, one) for one in expected]


def test_the_maximum_is_that_of_the_excerpts_shown() -> None:
    assert shown_maximum([np.array([1.0, 3.0]), np.array([2.0]), np.empty(0)]) == 3.0
    assert shown_maximum([]) == 0.0


def test_the_solved_neurons_are_whole() -> None:
    neurons = few_shot_neurons()
    assert len(neurons) == 3
    for neuron in neurons:
        assert neuron.explanation == neuron.explanation.strip().rstrip(".")
        values = [value for record in neuron.records for value in record.activations]
        assert min(values) == 0
        assert max(values) in (9, 10)
        for record in neuron.records:
            assert len(record.tokens) == len(record.activations) > record.unknown >= 0
            assert not any("\t" in token or "\n" in token for token in record.tokens)
    assert any(10 in record.activations for neuron in neurons for record in neuron.records)
