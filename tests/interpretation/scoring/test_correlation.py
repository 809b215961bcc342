"""Scores against numpy and the published vectors; the paper's table rebuilt; intervals against brute force."""

from dataclasses import replace

import numpy as np
import pytest

from cratelm.activations.records import ABSENT, Excerpts
from cratelm.interpretation.scoring.correlation import LayerScores, aggregate, compare
from cratelm.interpretation.scoring.statistics import (
    bootstrap_means,
    correlation_of_sums,
    interval,
    paper_table,
    resampled_correlations,
)

# Per-layer points as published: (TaR, random-only, anthropic), CRATE then GPT-2. Random-only is read off a figure.
LISTS = {
    "C1": ("3.9", "4.8", "10.1"),
    "C2": ("7.8 8.3", "8.0 5.9", "11.3 11.4"),
    "C3": ("9.6 9.3 8.4", "9.0 9.4 6.9", "12.6 10.0 11.1"),
    "C6": ("10.5 7.4 5.8 8.0 8.1 5.7", "8.2 5.1 4.6 6.4 7.5 -", "13.1 10.5 9.7 9.2 9.5 3.3"),
    "C12": (
        "13.6 8.2 6.7 5.4 5.0 7.2 5.1 5.1 3.6 5.5 9.4 5.3",
        "9.0 4.8 4.4 4.7 4.0 4.7 3.0 4.3 4.8 4.6 8.0 -",
        "20.2 11.1 10.1 8.2 5.8 9.2 6.4 4.6 3.5 8.1 10.5 0.6",
    ),
    "G1": ("8.8", "8.9", "14.2"),
    "G2": ("4.3 4.1", "2.3 1.6", "9.7 10.7"),
    "G3": ("7.3 0.8 2.6", "3.1 -0.3 1.3", "14.8 4.1 8.7"),
    "G6": ("13.7 5.2 1.9 0.6 5.6 6.9", "11.5 2.1 0.8 -0.6 1.9 -", "18.5 10.7 4.0 2.6 6.8 5.3"),
    "G12": (
        "15.3 8.0 6.4 4.2 3.2 4.0 4.7 3.9 3.9 7.2 8.9 8.0",
        "11.2 2.3 1.9 1.4 1.4 1.8 2.7 1.0 1.6 1.8 2.3 -",
        "21.1 15.9 9.8 6.0 4.9 6.3 7.4 5.0 4.8 7.2 6.7 5.4",
    ),
}
PUBLISHED = {
    "C1": ((3.9, 0), (4.8, 0), (10.1, 0)),
    "C2": ((8.05, 0.06), (6.95, 1.1), (11.35, 0.0)),
    "C3": ((9.1, 0.26), (8.43, 1.2), (11.23, 1.14)),
    "C6": ((7.96, 2.29), (6.36, 1.87), (10.4, 2.01)),
    "C12": ((6.8, 7.09), (5.12, 2.83), (8.88, 18.3)),
    "G1": ((8.8, 0), (8.9, 0), (14.2, 0)),
    "G2": ((4.2, 0.01), (1.95, 0.12), (10.2, 0.25)),
    "G3": ((3.57, 7.51), (1.37, 1.93), (9.2, 19.21)),
    "G6": ((5.4, 20.85), (3.14, 18.39), (8.52, 32.56)),
    "G12": ((6.34, 11.35), (2.67, 7.48), (8.65, 24.65)),
}


@pytest.mark.parametrize("model", LISTS)
@pytest.mark.parametrize("metric", range(3), ids=["top-and-random", "random-only", "anthropic"])
def test_the_papers_table_follows_from_its_lists(model: str, metric: int) -> None:
    points = [None if cell == "-" else float(cell) for cell in LISTS[model][metric].split()]
    mean, variance = paper_table(points)
    # Half a unit of the table's last digit: cells like 11.35 and 0.0025 lie on it.
    assert mean == pytest.approx(PUBLISHED[model][metric][0], abs=0.005 + 1e-9)
    assert variance == pytest.approx(PUBLISHED[model][metric][1], abs=0.005 + 1e-9)


def excerpts_of(activations: np.ndarray, lengths: np.ndarray) -> Excerpts:
    """Excerpts with these activations, each ending after its length."""
    valid = np.arange(activations.shape[2]) < lengths[..., None]
    place = np.where(lengths > 0, 0, ABSENT)
    return Excerpts(
        tokens=np.where(valid, 1, ABSENT), activations=np.where(valid, activations, 0).astype(np.float32),
        position=place, document=place,
    )  # fmt: skip


def compared(activations: list[float], simulated: list[float]) -> LayerScores:
    a, s = (np.array(values, dtype=np.float32).reshape(1, 1, -1) for values in (activations, simulated))
    return compare(excerpts_of(a, np.array([[len(activations)]])), s)


def test_scores_of_a_published_vector() -> None:
    found = compared([0, 0, 1, 4, 0, 2], [0, 1, 2, 9, 0, 0])
    assert found.correlation[0] == pytest.approx(0.8508356128, abs=1e-10)
    assert found.r_squared[0] == pytest.approx(-0.4761904762, abs=1e-10)
    assert found.absolute_deviation[0] == pytest.approx(-0.2857142857, abs=1e-10)


def test_a_constant_side_has_no_score_and_the_reason() -> None:
    for value in (0.0, 0.1, 1e6 + 0.1):
        dead, blind = compared([value] * 7, [1, 2, 3, 4, 5, 6, 7]), compared([1, 2, 3, 4, 5, 6, 7], [value] * 7)
        assert dead.reason == ("constant activations",)
        assert blind.reason == ("constant simulation",)
        for found in (dead, blind):
            assert np.isnan([found.correlation[0], found.r_squared[0], found.absolute_deviation[0]]).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_scores_equal_numpy_on_excerpts_of_any_length(offset: float, rng: np.random.Generator) -> None:
    shape = (70, 6, 9)
    a = (rng.normal(size=shape) + offset).astype(np.float32)
    s = (0.5 * a + rng.normal(size=shape)).astype(np.float32)
    lengths = rng.integers(0, 10, size=shape[:2])
    lengths[:, 0] = 9
    excerpts = excerpts_of(a, lengths)
    found = compare(excerpts, np.where(excerpts.valid, s, 0))
    assert set(found.reason) == {""}
    for row in range(shape[0]):
        there = excerpts.valid[row]
        true, guess = a[row][there].astype(np.float64), s[row][there].astype(np.float64)
        assert found.correlation[row] == pytest.approx(np.corrcoef(true, guess)[0, 1], abs=1e-12)
        assert found.r_squared[row] == pytest.approx(1 - np.mean((true - guess) ** 2) / np.mean(true**2), rel=1e-9)
        expected = 1 - np.mean(np.abs(true - guess)) / np.mean(np.abs(true))
        assert found.absolute_deviation[row] == pytest.approx(expected, rel=1e-9)
        sums = found.sums[row].sum(axis=0)
        np.testing.assert_allclose(sums, [
            len(true), true.sum(), guess.sum(), true @ true, guess @ guess, true @ guess,
        ], rtol=1e-9, atol=1e-9)  # fmt: skip
    np.testing.assert_allclose(correlation_of_sums(found.sums.sum(axis=1)), found.correlation, atol=1e-6)


def layer_scores(layer: int, a: np.ndarray, s: np.ndarray, *, reasons: list[str] | None = None) -> LayerScores:
    """Scores of made-up activations and simulations; neurons with a reason have none."""
    a, s = a.astype(np.float32), s.astype(np.float32)
    lengths = np.full(a.shape[:2], a.shape[2])
    found = compare(excerpts_of(a, lengths), s)
    reasons = reasons or [""] * len(a)
    undefined = np.array([bool(reason) for reason in reasons])
    correlation = np.where(undefined, np.nan, found.correlation)
    return replace(found, layer=layer, correlation=correlation, reason=tuple(reasons))


def population(
    rng: np.random.Generator, neurons: int, excerpts: int = 6, width: int = 10,
    skills: tuple[float, float] = (-0.2, 0.9),
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Neurons that are predicted more or less well, each excerpt with a different strength."""
    skill = rng.uniform(*skills, size=(neurons, 1, 1))
    s = rng.normal(size=(neurons, excerpts, width)) * rng.uniform(0.3, 2, size=(neurons, excerpts, 1))
    return skill * s + np.sqrt(1 - skill**2) * rng.normal(size=s.shape), s


def test_aggregates_follow_the_papers_rule_and_count_the_undefined(rng: np.random.Generator) -> None:
    reasons = ["dead", "", "too rare", "", "", "", "dead", ""]
    layers = [layer_scores(i, *population(rng, 8), reasons=reasons) for i in range(6)]
    found = aggregate(layers, protocol="random-only", resamples=50)
    means = [100 * np.nanmean(layer.correlation) for layer in layers]
    rounded = [round(float(mean), 1) for mean in means]
    assert [line.points for line in found.layers] == rounded
    assert (found.mean, found.variance) == pytest.approx((np.mean(rounded[:5]), np.var(rounded[:5])))
    assert (found.mean_all_layers, found.variance_all_layers) == pytest.approx((np.mean(rounded), np.var(rounded)))
    assert found.mean_undefined_zero == pytest.approx(np.mean(means[:5]) * 5 / 8)
    assert found.spearman == pytest.approx(np.mean([line.spearman for line in found.layers[:5]]))
    for line, layer, mean in zip(found.layers, layers, means, strict=True):
        assert line.points_undefined_zero == pytest.approx(mean * 5 / 8)
        assert line.deviation == pytest.approx(100 * np.nanstd(layer.correlation, ddof=1))
        scored = ~np.isnan(layer.correlation)
        assert line.spearman == pytest.approx(100 * layer.spearman[scored].mean())
        assert line.auroc == pytest.approx(100 * layer.auroc[scored].mean())
        assert (line.scored, line.total, line.undefined) == (5, 8, {"dead": 2, "too rare": 1})
        assert line.interval is not None
        assert line.interval[0] < mean < line.interval[1]


def test_a_layer_without_scores_has_no_points_and_takes_no_part_in_the_mean(rng: np.random.Generator) -> None:
    empty = layer_scores(0, *population(rng, 3), reasons=["dead"] * 3)
    scored = layer_scores(1, *population(rng, 3))
    found = aggregate([empty, scored], protocol="anthropic", resamples=20)
    first = found.layers[0]
    assert (first.points, first.interval, first.deviation, first.points_undefined_zero) == (None, None, None, 0)
    assert found.mean == found.layers[1].points
    nothing = aggregate([empty], protocol="anthropic", resamples=20)
    assert (nothing.mean, nothing.variance, nothing.interval, nothing.mean_undefined_zero) == (None, None, None, 0)


def test_the_same_seed_gives_the_same_interval(rng: np.random.Generator) -> None:
    layers = [layer_scores(0, *population(rng, 10))]
    ends = [aggregate(layers, protocol="anthropic", seed=seed, resamples=100).interval for seed in (3, 3, 4)]
    assert ends[0] == ends[1] != ends[2]


def test_an_interval_does_not_depend_on_other_layers_and_protocols(rng: np.random.Generator) -> None:
    layers = [layer_scores(layer, *population(rng, 8)) for layer in (0, 1, 4)]
    together = aggregate(layers, protocol="anthropic", resamples=100)
    for layer, line in zip(layers, together.layers, strict=True):
        assert aggregate([layer], protocol="anthropic", resamples=100).layers == (line,)
        assert aggregate([layer], protocol="random-only", resamples=100).layers[0].interval != line.interval
    reversed_layers = aggregate(layers[::-1], protocol="anthropic", resamples=100)
    assert reversed_layers.interval == pytest.approx(together.interval)


def test_the_layers_of_a_model_are_resampled_independently(rng: np.random.Generator) -> None:
    """Of four layers with the same scores the mean is surer than each; with the same draws it would not be."""
    a, s = population(rng, 30)
    found = aggregate([layer_scores(layer, a, s) for layer in range(4)], protocol="anthropic", resamples=1000)
    widths = [high - low for low, high in (line.interval or (np.nan, np.nan) for line in found.layers)]
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] == pytest.approx(np.mean(widths) / 2, rel=0.2)


def brute_bootstrap(
    a: np.ndarray, s: np.ndarray, present: list[int], rng: np.random.Generator, times: int
) -> np.ndarray:
    means = []
    for _ in range(times):
        correlations = []
        for i in rng.integers(len(a), size=len(a)):
            drawn = rng.integers(present[i], size=present[i])
            correlations.append(np.corrcoef(a[i, drawn].ravel(), s[i, drawn].ravel())[0, 1])
        means.append(np.mean(correlations))
    return np.array(means)


def test_the_bootstrap_equals_brute_force_also_where_excerpts_are_absent(rng: np.random.Generator) -> None:
    a, s = population(rng, 9, excerpts=4, width=6)
    present = [4, 4, 4, 2, 3, 4, 3, 4, 2]
    lengths = np.array([[6] * count + [0] * (4 - count) for count in present])
    found = compare(excerpts_of(a, lengths), s.astype(np.float32) * (lengths[..., None] > 0))
    shuffled = np.take_along_axis(found.sums, rng.permuted(np.tile(np.arange(4), (9, 1)), axis=1)[..., None], axis=1)
    fast = bootstrap_means(shuffled, rng, 4000)
    brute = brute_bootstrap(a, s, present, rng, 800)
    assert fast.std() == pytest.approx(brute.std(), rel=0.15)
    assert fast.mean() == pytest.approx(found.correlation.mean())
    plain = resampled_correlations(shuffled, rng, 4000).mean()
    assert plain == pytest.approx(brute.mean(), abs=6 * brute.std() / 800**0.5)


def test_the_interval_lies_around_the_mean_where_few_excerpts_lower_every_resample(rng: np.random.Generator) -> None:
    a, s = np.zeros((400, 5, 16)), np.zeros((400, 5, 16))
    s[:, :, 0] = rng.uniform(1, 3, size=(400, 5))  # one strong token in each excerpt, predicted nearly
    a = s + 0.1 * rng.random(s.shape) * (rng.random(s.shape) < 0.3)
    scores = layer_scores(0, a, s)
    low, high = interval(bootstrap_means(scores.sums, rng, 500))
    assert resampled_correlations(scores.sums, rng, 100).mean() < scores.correlation.mean()
    assert low < scores.correlation.mean() < high


def test_intervals_cover_the_population_mean(rng: np.random.Generator) -> None:
    large = layer_scores(0, *population(rng, 20_000))
    truth = large.correlation.mean()
    spread = large.correlation.std() / np.sqrt(20)
    ends = [interval(bootstrap_means(layer_scores(0, *population(rng, 20)).sums, rng, 300)) for _ in range(150)]
    covered = np.mean([low <= truth <= high for low, high in ends])
    width = np.mean([high - low for low, high in ends])
    assert covered > 0.86
    assert width < 1.5 * 2 * 1.96 * spread
