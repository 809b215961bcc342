"""How an activation is read from candidates: the published vector, and the flaws that `compat` keeps."""

import math

import numpy as np
import pytest

from cratelm.interpretation.simulators.readout import ReadOut

K6 = {"unknown": 5.0, "0": 2.0, "3": 1.0, "10": 0.5, " 1": 3.0, "foo": 4.0}
"""Published candidates, as raw logits."""
ALL = ReadOut(spaces=False)


def mean(weights: dict[int, float]) -> float:
    total = sum(math.exp(weight) for weight in weights.values())
    return sum(value * math.exp(weight) for value, weight in weights.items()) / total


def test_the_published_vector() -> None:
    assert ALL.expected(K6) == pytest.approx(2.0961155245, abs=1e-10)
    assert ReadOut().expected(K6) == pytest.approx(mean({0: 2, 3: 1, 10: 0.5, 1: 3}), abs=1e-12)


def test_five_candidates_lose_what_is_beyond_them() -> None:
    released = ReadOut.of("compat", ten_is_one_token=True)
    assert released == ReadOut(candidates=5, spaces=False, escaped=False, strict=False)
    assert released.expected(K6) == pytest.approx(mean({0: 2, 3: 1}), abs=1e-12)
    assert released.expected({name: K6[name] for name in ("unknown", "foo", " 1")}) is None


def test_the_scale_ends_at_nine_only_in_fixed_mode_for_a_model_that_writes_ten_as_two_tokens() -> None:
    assert ReadOut.of("fixed", ten_is_one_token=True) == ReadOut(top=10)
    assert ReadOut.of("fixed", ten_is_one_token=False) == ReadOut(top=9)
    assert ReadOut.of("compat", ten_is_one_token=False) == ReadOut.of("compat", ten_is_one_token=True)


def test_it_is_a_weighted_mean_whatever_is_added_to_all(rng: np.random.Generator) -> None:
    weights = dict(zip(range(11), rng.normal(0, 3, 11).tolist(), strict=True))
    candidates = {str(value): weight for value, weight in weights.items()} | {"unknown": 3.0, "the": -1.0}
    shift = float(rng.normal(0, 500))
    assert ReadOut().expected(candidates) == pytest.approx(mean(weights), abs=1e-10)
    assert ReadOut().expected({text: one + shift for text, one in candidates.items()}) == pytest.approx(
        mean(weights), abs=1e-9
    )
    below = {value: weight for value, weight in weights.items() if value < 10}
    assert ReadOut(top=9).expected(candidates) == pytest.approx(mean(below), abs=1e-10)


@pytest.mark.parametrize(
    "text", ["", " ", "11", "100", "07", "-1", "+3", "1.", "1e0", "³", "٣", "４", "one", "unknown", "\t3", "3\n"]
)
def test_a_token_outside_the_scale_is_ignored(text: str) -> None:
    assert ReadOut().expected({text: 0.0}) is None
    assert ReadOut().expected({text: 5.0, "4": 0.0}) == 4


def test_nothing_is_nothing() -> None:
    assert ReadOut().expected({}) is None
