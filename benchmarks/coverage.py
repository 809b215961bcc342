"""Coverage of the 95 % intervals, and false alarms of the test of two models, by simulation on two-level data.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py [SIMULATIONS [score | firing | detection | test] ...]

Neurons are drawn from a population and each has its own excerpts or items: drawn again for every simulation, an
interval should cover the mean of the whole population in 95 % of them, and the test of two models from one population
should reject in 5 %. Bounds of a share p from N simulations: p +- 2 sqrt(p (1 - p) / N).
"""

import sys
import zlib
from dataclasses import replace

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
EXCERPTS, WIDTH, ITEMS, RESAMPLES = 10, 32, 20, 1000
LARGE, PARTS = 10_000, 12
"""Neurons at a time, and how often: their mean stands for the population."""
Ends = tuple[float | None, float | None]


def excerpts_of(a: np.ndarray) -> Excerpts:
    """Made-up activations as excerpts of whole width."""
    place = np.zeros(a.shape[:2], dtype=np.int64)
    return Excerpts(tokens=np.ones(a.shape, dtype=np.int64), activations=a, position=place, document=place)


def neurons(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations and simulations: each neuron has its own skill and density, and each excerpt its own strength."""
    skill, noise = rng.uniform(0.0, 1.0, (number, 1, 1)), rng.uniform(0.02, 0.5, (number, 1, 1))
    shape = (number, EXCERPTS, WIDTH)
    s = np.maximum(rng.normal(-0.5, 1, shape), 0) * rng.uniform(0.5, 1.5, (number, EXCERPTS, 1))
    fires = np.where(s > 0, rng.random(shape) < 0.1 + 0.85 * skill, rng.random(shape) < noise)
    return (fires * (skill * s + 0.5 * rng.random(shape))).astype(np.float32), s.astype(np.float32)


def scores_of(rng: np.random.Generator, number: int, layer: int = 0) -> LayerScores:
    """The scores of a layer."""
    a, s = neurons(rng, number)
    return replace(compare(excerpts_of(a), s), layer=layer)


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


def score_ends(rng: np.random.Generator, number: int) -> list[list[Ends]]:
    """The intervals of the scores of three layers, and of their mean."""
    model = aggregate(
        [scores_of(rng, number, layer) for layer in range(3)], protocol="random-only",
        seed=int(rng.integers(1 << 30)), resamples=RESAMPLES,
    )  # fmt: skip
    return [[layer.interval or (None, None) for layer in model.layers], [model.interval or (None, None)]]


def firing_ends(rng: np.random.Generator, number: int) -> list[list[Ends]]:
    """The intervals of consistency and distinctiveness."""
    mean = mean_firing([firing_of(rng, number)], seed=int(rng.integers(1 << 30)), resamples=RESAMPLES)
    return [[mean.overall["random"].interval(name) or (None, None)] for name in ("consistency", "distinctiveness")]


def judged_ends(rng: np.random.Generator, number: int) -> list[list[Ends]]:
    """The interval of another scorer's mean."""
    scorer = aggregate_scorer("detection", judged(rng, number), rng=rng, resamples=RESAMPLES)
    return [[scorer.interval or (None, None)]]


def truths(rng: np.random.Generator, kind: str) -> list[float]:
    """The means of the population that the intervals of a kind should cover."""
    if kind == "detection":
        return [75.0]
    if kind == "score":
        return 2 * [float(np.mean([100 * scores_of(rng, LARGE).correlation.mean() for _ in range(PARTS)]))]
    means = [mean_firing([firing_of(rng, LARGE)], resamples=2).overall["random"] for _ in range(PARTS)]
    return [float(np.mean([mean.of(name) or 0.0 for mean in means])) for name in ("consistency", "distinctiveness")]


def alarms(rng: np.random.Generator, number: int) -> list[list[bool]]:
    """Whether the test finds a difference of two models from one population, in each of two layers and over both."""
    seed = int(rng.integers(1 << 30))
    means = [
        [
            bootstrap_means(scores_of(rng, number).sums, generator(seed, "random-only", layer, model), RESAMPLES)
            for model in "ab"
        ]
        for layer in range(2)
    ]

    def rejects(layers: list[list[np.ndarray]]) -> bool:
        parts = [mean for pair in layers for mean in pair]
        freedom = pooled_freedom(parts, [freedom_of(number)] * len(parts))
        return p_value(np.mean([ours - theirs for ours, theirs in layers], axis=0), freedom) < 0.05

    return [[rejects([pair]) for pair in means], [rejects(means)]]


KINDS = {
    "score": (score_ends, ("score of a layer", "score, mean of 3 layers")),
    "firing": (firing_ends, ("consistency", "distinctiveness")),
    "detection": (judged_ends, ("detection",)),
}
"""Kind -> its intervals in one simulation, and their names."""


def print_rows(heading: str, rows: list[str], sizes: tuple[int, ...], shares: list[list[float]]) -> None:
    """A table of shares in per cent: a row per name, a column per number of neurons."""
    print(f"\n| {heading} | " + " | ".join(map(str, sizes)) + " |\n|---|" + "---|" * len(sizes))
    for row, name in enumerate(rows):
        print(f"| {name} | " + " | ".join(f"{100 * column[row]:.1f}" for column in shares) + " |", flush=True)


def print_tables(wanted: list[str], simulations: int, sizes: tuple[int, ...], tested: tuple[int, ...]) -> None:
    """Coverage of every kind of interval, and false alarms of the test."""
    for kind, (ends_of, names) in KINDS.items():
        if kind in wanted:
            rng = np.random.default_rng(zlib.crc32(kind.encode()))
            true, shares = truths(rng, kind), []
            for size in sizes:
                drawn = [ends_of(rng, size) for _ in range(simulations)]
                shares.append([
                    float(np.mean([low is not None and high is not None and low <= truth <= high
                                   for ends in drawn for low, high in ends[row]]))
                    for row, truth in enumerate(true)
                ])  # fmt: skip
            print_rows("coverage, %, by neurons", list(names), sizes, shares)
    if "test" in wanted:
        rng = np.random.default_rng(1)
        shares = []
        for size in tested:
            tests = [alarms(rng, size) for _ in range(simulations)]
            shares.append([float(np.mean([rejections[row] for rejections in tests])) for row in range(2)])
        print_rows("the test rejects, %, by neurons", ["1 layer", "2 layers"], tested, shares)


def main() -> None:
    """Print the tables with the correction, and for few neurons without it."""
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    wanted = sys.argv[2:] or [*KINDS, "test"]
    print_tables(wanted, simulations, NEURONS, TESTED)
    small_samples.FEW_NEURONS = 0
    print("\nWithout the correction:")
    print_tables(wanted, simulations, NEURONS[:3], TESTED[:3])


if __name__ == "__main__":
    main()
