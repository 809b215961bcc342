"""The small-sample correction of intervals and p values."""

import math

import numpy as np
import pytest
from interpretation.firing.test_firing import made_up
from interpretation.scoring.test_correlation import layer_scores, population

from cratelm.interpretation.firing.means import mean_firing
from cratelm.interpretation.scoring import small_samples
from cratelm.interpretation.scoring.correlation import aggregate
from cratelm.interpretation.scoring.small_samples import (
    FEW_NEURONS,
    Z_95,
    few_neurons,
    freedom_of,
    pooled_freedom,
    rescaled,
    student,
    widened,
)
from cratelm.interpretation.scoring.statistics import bootstrap_means, correlation_of_sums, interval, p_value


def test_the_correction_makes_an_interval_students_interval(rng: np.random.Generator) -> None:
    values = rng.normal(size=12)
    means = values[rng.integers(12, size=(200_000, 12))].mean(axis=1)
    low, high = interval(rescaled(means, values), freedom_of(12))
    half = 2.201 * values.std(ddof=1) / math.sqrt(12)
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.2 * half)


def test_the_noise_of_excerpts_counts_once(rng: np.random.Generator) -> None:
    """Neurons that differ by their excerpts only: the plain bootstrap has twice the variance of their mean."""
    sums = layer_scores(0, *population(rng, 60, skills=(0.4, 0.4))).sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_samples, "FEW_NEURONS", 0)
        plain = bootstrap_means(sums, rng, 4000)
    once = bootstrap_means(sums, rng, 4000)
    values = correlation_of_sums(sums.sum(axis=1))
    assert once.std() == pytest.approx(values.std(ddof=1) / math.sqrt(60))
    assert 1.1 < plain.std() / once.std() < 1.7  # 1.35 on average, standard deviation 0.07
    assert rescaled(np.arange(5.0), np.array([0.5, 0.5, np.nan])).tolist() == [0, 1, 2, 3, 4]


def test_from_250_neurons_on_nothing_changes(rng: np.random.Generator) -> None:
    samples, values = rng.normal(3, 1, 500), rng.normal(size=FEW_NEURONS)
    assert rescaled(samples, values) is samples
    assert widened(samples, freedom_of(FEW_NEURONS)) is samples
    last = student(248) / Z_95 * values[1:].std(ddof=1) / math.sqrt(249)
    assert widened(rescaled(samples, values[1:]), freedom_of(249)).std() == pytest.approx(last)
    scores = layer_scores(0, *population(rng, FEW_NEURONS))
    model = aggregate([scores], protocol="anthropic", resamples=200)
    assert model.interval == model.layers[0].interval


def test_the_quantiles_of_t_fall_to_the_normal_one() -> None:
    quantiles = [student(freedom) for freedom in np.arange(1, 120, 0.25).tolist()]
    assert quantiles[0] == pytest.approx(12.706)
    assert all(first > second for first, second in zip(quantiles, quantiles[1:], strict=False))
    assert student(60) == pytest.approx(2.0003, abs=1e-4)


def test_degrees_of_freedom_add_up_over_equal_layers_and_are_those_of_the_largest_variance(
    rng: np.random.Generator,
) -> None:
    part = rng.normal(size=4000)
    assert pooled_freedom([part, part, part], [4.0, 4.0, 4.0]) == pytest.approx(12)
    assert pooled_freedom([part, 1e-6 * part], [4.0, 50.0]) == pytest.approx(4)
    assert pooled_freedom([part, np.full(4000, np.nan)], [4.0, 4.0]) == pytest.approx(4)
    assert pooled_freedom([part, part], [math.inf, math.inf]) == math.inf


@pytest.mark.parametrize("neurons", [5, 10])
def test_an_interval_of_few_neurons_covers_and_the_plain_one_does_not(neurons: int, rng: np.random.Generator) -> None:
    truth = 100 * float(layer_scores(0, *population(rng, 20_000)).correlation.mean())
    covers: dict[int, list[bool]] = {FEW_NEURONS: [], 0: []}
    for seed in range(200):
        scores = layer_scores(0, *population(rng, neurons))
        for few, shares in covers.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(small_samples, "FEW_NEURONS", few)
                model = aggregate([scores], protocol="anthropic", seed=seed, resamples=300)
            assert model.interval is not None
            shares.append(model.interval[0] <= truth <= model.interval[1])
    assert np.mean(covers[FEW_NEURONS]) > 0.9
    assert np.mean(covers[0]) < np.mean(covers[FEW_NEURONS])


def test_models_of_one_population_differ_once_in_twenty_also_with_three_neurons(rng: np.random.Generator) -> None:
    rejected = []
    for _ in range(200):
        parts = [bootstrap_means(layer_scores(0, *population(rng, 3)).sums, rng, 300) for _ in range(2)]
        freedom = pooled_freedom(parts, [freedom_of(3)] * 2)
        rejected.append(p_value(parts[0] - parts[1], freedom) < 0.05)
    assert np.mean(rejected) < 0.1


def test_a_mean_of_firing_is_corrected_by_the_neurons_for_which_it_is_defined(rng: np.random.Generator) -> None:
    mean = mean_firing([made_up(rng, 0, 15), made_up(rng, 1, 15)], resamples=100)
    assert mean.by_layer["random"][0].freedom.tolist() == [14] * 6
    assert (mean.overall["random"].freedom > 14).all()
    large = mean_firing([made_up(rng, 0, 260)], resamples=100)
    assert np.isinf(large.overall["random"].freedom).all()


def test_tables_warn_of_means_of_few_neurons() -> None:
    assert few_neurons([20, 500, 0]) == ()
    [warning] = few_neurons([20, 3])
    assert "only 3 neurons" in warning
