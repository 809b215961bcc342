"""The rank correlation of two scores over the neurons of some layers, against brute force."""

import numpy as np
import pytest

from cratelm.interpretation.scorers.agreement import LEAST, Agreement, rank_agreement


def agreement(rng: np.random.Generator, *layers: tuple[np.ndarray, np.ndarray], resamples: int = 200) -> Agreement:
    made = rank_agreement(layers, rng, resamples=resamples)
    assert made is not None
    return made


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    ranked = [np.array([np.sum(x < v) + np.sum(x == v) / 2 for v in x]) for x in (first, second)]
    return float(np.corrcoef(np.stack(ranked))[0, 1])


def test_one_layer_gives_spearmans_correlation_with_ties(rng: np.random.Generator) -> None:
    first = rng.integers(0, 9, 60).astype(float)
    second = first + rng.normal(0, 3, 60)
    assert agreement(rng, (first, second)).correlation == pytest.approx(spearman(first, second))
    assert agreement(rng, (first, -first)).correlation == pytest.approx(-1)
    assert agreement(rng, (first, np.exp(first))).correlation == pytest.approx(1)


def test_a_difference_between_layers_gives_no_agreement(rng: np.random.Generator) -> None:
    layers = [(rng.normal(size=300) + 10 * layer, rng.normal(size=300) + 10 * layer) for layer in range(2)]
    made = agreement(rng, *layers)
    assert abs(made.correlation) < 0.15
    assert made.low < 0 < made.high
    assert spearman(*(np.concatenate([layer[side] for layer in layers]) for side in (0, 1))) > 0.7


def test_neurons_without_a_score_and_small_layers_are_left_out(rng: np.random.Generator) -> None:
    first, second = rng.normal(size=30), rng.normal(size=30)
    holes = first.copy()
    holes[:10] = np.nan
    made = agreement(rng, (holes, second), (first[: LEAST - 1], second[: LEAST - 1]))
    assert made.neurons == 20
    assert made.correlation == pytest.approx(spearman(first[10:], second[10:]))
    assert rank_agreement([(first[:3], second[:3])], rng) is None
    assert rank_agreement([(np.ones(9), second[:9])], rng) is None
    assert rank_agreement([], rng) is None


def test_the_interval_covers_the_correlation_of_many_neurons(rng: np.random.Generator) -> None:
    covered = []
    for _ in range(60):
        shared = rng.normal(size=60)
        made = agreement(rng, (shared + rng.normal(size=60), shared + rng.normal(size=60)))
        covered.append(made.low <= 6 / np.pi * np.arcsin(0.25) <= made.high)
    assert np.mean(covered) > 0.85
