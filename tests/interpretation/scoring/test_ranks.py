"""Spearman and AUROC against pairs counted one by one, with ties and padding; on neurons whose order is known."""

from itertools import product

import numpy as np
import pytest

from cratelm.interpretation.scoring.ranks import rank_scores, ranks


def mean_rank(values: np.ndarray) -> np.ndarray:
    """By definition: the number of smaller values, and half of the number of equal ones."""
    smaller = (values[:, None] > values).sum(axis=1)
    return smaller + ((values[:, None] == values).sum(axis=1) + 1) / 2


def tied(rng: np.random.Generator, shape: tuple[int, int], step: float) -> np.ndarray:
    """Numbers of both signs, many equal and many 0."""
    return (np.round(rng.normal(size=shape) / step) * step * (rng.random(shape) < 0.6)).astype(np.float32)


def test_ranks_are_counted_numbers_of_smaller_and_equal_values(rng: np.random.Generator) -> None:
    for size, step in product((1, 2, 7, 64), (1.0, 0.25, 1e-3)):
        values, valid = tied(rng, (20, size), step), rng.random((20, size)) < 0.8
        found = ranks(values, valid)
        assert (found[~valid] == 0).all()
        for row, own in enumerate(valid):
            np.testing.assert_array_equal(found[row, own], mean_rank(values[row, own]))


def test_signs_zeros_and_extremes_rank_as_floats_compare() -> None:
    values = np.array([[-0.0, 0.0, 1e-45, -1e-45, np.inf, -np.inf, 3.4e38, -3.4e38, 1.0]], dtype=np.float32)
    found = ranks(values, np.ones(values.shape, dtype=bool))
    assert found.tolist() == [[4.5, 4.5, 6, 3, 9, 1, 8, 2, 7]]


def test_scores_equal_brute_force_over_pairs(rng: np.random.Generator) -> None:
    activations = np.maximum(tied(rng, (60, 90), 0.5), 0)
    simulated = (0.5 * activations + tied(rng, (60, 90), 0.25)).astype(np.float32)
    valid = rng.random((60, 90)) < rng.random((60, 1))
    valid[:, :4] = True
    activations[:, :2], activations[:, 2:4] = 0, (1, 3)
    simulated[:, :2] = (1, 2)
    spearman, auroc = rank_scores(activations, simulated, valid)
    for row, own in enumerate(valid):
        a, s = activations[row, own], simulated[row, own]
        assert spearman[row] == pytest.approx(np.corrcoef(mean_rank(a), mean_rank(s))[0, 1], abs=1e-12)
        pairs = [(x > y) + (x == y) / 2 for x, y in product(s[a > 0], s[a <= 0])]
        assert auroc[row] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_monotone_simulation_is_perfect_whatever_its_scale() -> None:
    a = np.array([[0, 0, 1, 2, 5, 9]], dtype=np.float32)
    everything = np.ones(a.shape, dtype=bool)
    spearman, auroc = rank_scores(a, np.exp(a).astype(np.float32) - 7, everything)
    assert spearman[0] == pytest.approx(1, abs=1e-15)
    assert auroc[0] == 1
    spearman, auroc = rank_scores(a, -a, everything)
    assert (spearman[0], auroc[0]) == (pytest.approx(-1, abs=1e-15), 0)


def test_undefined_is_nan_and_a_constant_simulation_separates_nothing() -> None:
    everything = np.ones((1, 4), dtype=bool)
    some, same = np.array([[0, 1, 0, 2]], dtype=np.float32), np.full((1, 4), 0.3, dtype=np.float32)
    spearman, auroc = rank_scores(some, same, everything)
    assert np.isnan(spearman[0])
    assert auroc[0] == 0.5
    for activations in (np.zeros((1, 4), dtype=np.float32), same):  # never active, always active
        spearman, auroc = rank_scores(activations, some, everything)
        assert np.isnan([spearman[0], auroc[0]]).all()
    assert np.isnan(rank_scores(some, some, np.zeros((1, 4), dtype=bool))).all()
