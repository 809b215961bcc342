"""Coverage of the 95 % intervals, and false alarms of the test of two models, by simulation on two-level data.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py [SIMULATIONS]

Neurons are drawn from a population and each has its own excerpts or items: drawn again for every simulation, an
interval should cover the mean of the whole population in 95 % of them, and the test of two models from one population
should reject in 5 %. Bounds of a share p from N simulations: p +- 2 sqrt(p (1 - p) / N).
"""

import sys
from collections.abc import Callable

import numpy as np

from cratelm.activations.records import Excerpts
from cratelm.interpretation.firing.means import mean_firing
from cratelm.interpretation.firing.measures import Counts, LayerFiring, count
from cratelm.interpretation.scorers.registry import aggregate_scorer
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.scoring import small_samples
from cratelm.interpretation.scoring.correlation import LayerScores, aggregate, compare
from cratelm.interpretation.scoring.small_samples import freedom_of, pooled_freedom
from cratelm.interpretation.scoring.statistics import bootstrap_means, generator, p_value

NEURONS, TESTED = (5, 10, 20, 50, 200), (2, 3, 5, 10, 20)
EXCERPTS, WIDTH, ITEMS, RESAMPLES = 10, 32, 20, 400
LARGE = 20_000
"""Neurons whose mean stands for the population."""
Ends = tuple[float | None, float | None]


def excerpts_of(a: np.ndarray) -> Excerpts:
    """Made-up activations as excerpts of whole width."""
    place = np.zeros(a.shape[:2], dtype=np.int64)
    return Excerpts(tokens=np.ones(a.shape, dtype=np.int64), activations=a, position=place, document=place)


def neurons(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations and simulations: each neuron has its own skill, and each excerpt its own strength."""
    skill = rng.uniform(0.0, 1.0, (number, 1, 1))
    shape = (number, EXCERPTS, WIDTH)
    s = np.maximum(rng.normal(-0.5, 1, shape), 0) * rng.uniform(0.5, 1.5, (number, EXCERPTS, 1))
    fires = np.where(s > 0, rng.random(shape) < 0.15 + 0.8 * skill, rng.random(shape) < 0.15)
    return (fires * (skill * s + 0.5 * rng.random(shape))).astype(np.float32), s.astype(np.float32)


def scores_of(rng: np.random.Generator, number: int, layer: int = 0) -> LayerScores:
    """The scores of a layer."""
    a, s = neurons(rng, number)
    compared = compare(excerpts_of(a), s)
    return LayerScores(
        layer=layer, neuron=np.arange(number), correlation=compared.correlation, reason=("",) * number,
        r_squared=compared.r_squared, absolute_deviation=compared.absolute_deviation, spearman=compared.spearman,
        auroc=compared.auroc, tokens=np.full(number, EXCERPTS * WIDTH), excerpts=np.full(number, EXCERPTS),
        sums=compared.sums,
    )  # fmt: skip


def firing_of(rng: np.random.Generator, number: int) -> LayerFiring:
    """The firing of a layer on random excerpts."""
    a, s = neurons(rng, number)
    base, relevant = count(excerpts_of(a), s)
    counts = Counts(base=base, relevant=relevant, maximum=a.max(axis=(1, 2)).astype(np.float64))
    return LayerFiring(layer=0, neuron=np.arange(number), kinds={"random": counts})


def judged(rng: np.random.Generator, number: int) -> dict[int, Judged]:
    """A scorer's answers: each neuron has its own share of right ones."""
    truth = np.repeat([1, 0], ITEMS)
    answers = np.where(rng.random((number, 2 * ITEMS)) < rng.beta(3, 1, (number, 1)), truth, 1 - truth)
    truth_of_all = tuple(truth.tolist())
    return {i: Judged(truth=truth_of_all, answer=tuple(row)) for i, row in enumerate(answers.tolist())}


def score_ends(rng: np.random.Generator, number: int, layers: int = 1) -> Ends:
    """The interval of a mean score over layers."""
    model = aggregate(
        [scores_of(rng, number, layer) for layer in range(layers)], protocol="random-only",
        seed=int(rng.integers(1 << 30)), resamples=RESAMPLES,
    )  # fmt: skip
    return model.low, model.high


def firing_ends(rng: np.random.Generator, number: int) -> list[Ends]:
    """The intervals of consistency and distinctiveness."""
    mean = mean_firing([firing_of(rng, number)], seed=int(rng.integers(1 << 30)), resamples=RESAMPLES)
    return [mean.overall["random"].interval(name) or (None, None) for name in ("consistency", "distinctiveness")]


def judged_ends(rng: np.random.Generator, number: int) -> Ends:
    """The interval of another scorer's mean."""
    scorer = aggregate_scorer("detection", judged(rng, number), rng=rng, resamples=RESAMPLES)
    return scorer.low, scorer.high


def rejected(rng: np.random.Generator, number: int, layers: int) -> bool:
    """Whether the paired test finds a difference of two models from one population."""
    parts, seed = [], int(rng.integers(1 << 30))
    for model in "ab":
        for layer in range(layers):
            draws = generator(seed, "random-only", layer, model)
            parts.append(bootstrap_means(scores_of(rng, number, layer).sums, draws, RESAMPLES))
    difference = np.mean(parts[:layers], axis=0) - np.mean(parts[layers:], axis=0)
    return p_value(difference, pooled_freedom(parts, [freedom_of(number)] * len(parts))) < 0.05


def covered(ends: Ends, truth: float) -> bool:
    """Whether an interval covers the truth."""
    low, high = ends
    return low is not None and high is not None and low <= truth <= high


def print_row(name: str, shares: list[float]) -> None:
    """A row of shares in per cent."""
    print(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |", flush=True)


def print_tables(rng: np.random.Generator, simulations: int, sizes: tuple[int, ...], tested: tuple[int, ...]) -> None:
    """Coverage of every kind of interval, and false alarms of the paired test."""
    points = 100 * float(scores_of(rng, LARGE).correlation.mean())
    firing = mean_firing([firing_of(rng, LARGE)], resamples=2).overall["random"]
    measures = firing.of("consistency") or 0.0, firing.of("distinctiveness") or 0.0
    kinds: dict[str, tuple[tuple[float, ...], Callable[[int], list[Ends]]]] = {
        "score of a layer": ((points,), lambda n: [score_ends(rng, n)]),
        "score, mean of 3 layers": ((points,), lambda n: [score_ends(rng, n, layers=3)]),
        "consistency, distinctiveness": (measures, lambda n: firing_ends(rng, n)),
        "detection": ((75.0,), lambda n: [judged_ends(rng, n)]),
    }
    print("\n| coverage, %, by neurons | " + " | ".join(map(str, sizes)) + " |\n|---|" + "---|" * len(sizes))
    for names, (truths, ends_of) in kinds.items():
        cells = [np.mean([list(map(covered, ends_of(n), truths)) for _ in range(simulations)], axis=0) for n in sizes]
        for name, shares in zip(names.split(", ") if len(truths) > 1 else [names], np.transpose(cells), strict=True):
            print_row(name, shares.tolist())
    print("\n| the test rejects, %, by neurons | " + " | ".join(map(str, tested)) + " |\n|---|" + "---|" * len(tested))
    for layers in (1, 2):
        alarms = [float(np.mean([rejected(rng, n, layers) for _ in range(simulations)])) for n in tested]
        print_row(f"layers compared: {layers}", alarms)


def main() -> None:
    """Print the tables with the correction, and for few neurons without it."""
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    print_tables(np.random.default_rng(0), simulations, NEURONS, TESTED)
    small_samples.FEW_NEURONS = 0
    print("\nWithout the correction:")
    print_tables(np.random.default_rng(1), simulations, NEURONS[:3], TESTED[:3])


if __name__ == "__main__":
    main()
