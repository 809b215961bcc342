"""Neurons per second of explaining, simulating and scoring by lookup, on made-up activations and one thread.

    OMP_NUM_THREADS=1 python benchmarks/lookup.py [NEURONS]

Measures tables, simulated activations and scores from excerpts in memory, for each protocol and two vocabularies.
Beside it stand what the stages add: drawing the excerpts, sentences, writing the store, and the bootstrap.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from cratelm.activations.records import Excerpts
from cratelm.interpretation.explainers.explanation import LayerExplanations
from cratelm.interpretation.lookup import tables as lookup
from cratelm.interpretation.protocols import PROTOCOLS, Draw, protocol
from cratelm.interpretation.scoring.correlation import compare
from cratelm.interpretation.scoring.statistics import bootstrap_means
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.store.database import SetKey, Store
from cratelm.interpretation.store.growing_sets import write_explanations, write_simulations

T = TypeVar("T")
BLOCK = 2_000
"""Neurons of one call, about a layer; as many calls as it takes."""


def made_up(rng: np.random.Generator, draws: tuple[Draw, ...], vocabulary: int) -> Excerpts:
    """Excerpts in the shape of a draw: frequent tokens frequent, one activation in ten positive."""
    widths = np.array([one.crop or one.width for one in draws for _ in one.picks])
    shape = (BLOCK, len(widths), int(widths.max()))
    valid = np.broadcast_to(np.arange(shape[2]) < widths[:, None], shape)
    tokens = (vocabulary * rng.random(shape) ** 3).astype(np.int64)
    activations = np.maximum(rng.normal(-1.3, 1, size=shape), 0) * valid
    place = np.zeros(shape[:2], dtype=np.int64)
    return Excerpts(
        tokens=np.where(valid, tokens, -1), activations=activations.astype(np.float32), position=place, document=place
    )


def timed(times: dict[str, float], what: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    times[what] = times.get(what, 0) + time.perf_counter() - start
    return result


def measure(name: str, vocabulary: int, neurons: int) -> None:
    rng, times = np.random.default_rng(0), dict[str, float]()
    asked, strings = protocol(name), [f" token{i}" for i in range(vocabulary)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder))
        for layer in range(max(neurons // BLOCK, 1)):
            shown, tested = made_up(rng, asked.explain, vocabulary), made_up(rng, asked.score, vocabulary)
            key, index = SetKey(layer=layer, protocol=name), np.arange(BLOCK)
            tables = timed(times, "explain", lambda: lookup.explain(shown))  # noqa: B023
            simulated = timed(times, "simulate", lambda: lookup.simulate(tables, tested.tokens))  # noqa: B023
            scores = timed(times, "score", lambda: compare(tested, simulated))  # noqa: B023
            texts = timed(
                times, "sentences", lambda: tuple(lookup.sentence(*tables.of(i), strings) for i in range(BLOCK))  # noqa: B023
            )  # fmt: skip
            explained = LayerExplanations(neuron=index, texts=texts, tables=tables)
            first = np.arange(BLOCK + 1) * int(tested.valid[0].sum())
            made = LayerSimulations(neuron=index, source=index, first=first, activations=simulated[tested.valid])
            timed(times, "store", lambda: write_explanations(store, key, explained))  # noqa: B023
            timed(times, "store", lambda: write_simulations(store, key, made))  # noqa: B023
            timed(times, "bootstrap", lambda: bootstrap_means(scores.sums, rng, 2000))  # noqa: B023
        size = store.path.stat().st_size
    done = (layer + 1) * BLOCK
    core = sum(times[what] for what in ("explain", "simulate", "score"))
    parts = ", ".join(f"{what} {1e6 * seconds / done:.1f}" for what, seconds in times.items())
    print(f"{name:<15} vocabulary {vocabulary:>6}: {done / core:>8,.0f} neurons/s   (us per neuron: {parts}; "
          f"{size / done / 1024:.1f} KiB stored)")  # fmt: skip


if __name__ == "__main__":
    for size in (4_096, 50_304):
        for each in PROTOCOLS:
            measure(each, size, int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
