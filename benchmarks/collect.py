"""What collection costs over the bare forward pass, and against the released procedure; ratios from one run.

    python benchmarks/collect.py [--layers 2] [--width 768] [--batches 12] [--threads 2]

Three times are measured in turn, batch by batch, on a model of this shape with random weights: the bare forward pass
(up to the last LayerNorm, no head); the same pass with all records kept; and, for one layer, the released procedure on
activations of the layer that are held in memory: per neuron a full argsort and the draws from intervals of ranks
(docs/compat.md). 64 neurons are sorted; a layer costs in proportion. The released procedure reads one layer per pass,
so for L layers it costs L passes and L sorts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from cratelm.activations.collector import Collector
from cratelm.activations.plan import CollectConfig, make_plan, read_rows
from cratelm.activations.released import NARROW, PER_INTERVAL, RANDOM, WIDE, rank_bounds
from cratelm.activations.taps import capture
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel

CORPUS_TOKENS = 8_192_000
SORTED_NEURONS = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batches", type=int, default=12, help="batches of 4 rows that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    config = ModelConfig(
        arch="crate", num_layers=options.layers, d_model=options.width, num_heads=12, vocab_size=50304,
        context_length=1024,
    )  # fmt: skip
    bare, kept, tokens, held = time_passes(config, options.batches, clock)
    sort = time_released(held, clock)
    report(config, bare, kept, tokens, sort, options.threads)


def time_passes(
    config: ModelConfig, batches: int, clock: Callable[[], float]
) -> tuple[list[float], list[float], int, torch.Tensor]:
    """Seconds of each bare and each recorded pass, tokens per batch, and one layer's activations of all batches."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(500, 6000, CORPUS_TOKENS // 3250)
    tokens = rng.integers(1, config.vocab_size, int(lengths.sum()), dtype=np.uint16)
    documents = np.concatenate([[0], np.cumsum(lengths)])
    model = LanguageModel(config).initialise(0).eval()
    plan = make_plan(tokens, documents, context=config.context_length)
    layers = dict.fromkeys(range(config.num_layers), config.num_neurons)
    collector = Collector(CollectConfig(batch_rows=4), plan, layers, device=torch.device("cpu"))
    bare, kept, held = [], [], []
    for batch in range(batches + 2):  # the first two warm up: thresholds are still low, memory is touched first
        rows = slice(4 * batch, 4 * batch + 4)
        ids = torch.from_numpy(read_rows(tokens, plan.row_position[rows], int(plan.row_length[rows.start]), 0))
        with torch.inference_mode():
            started = clock()
            model.features(ids)
            bare.append(clock() - started)
            started = clock()
            with capture(model, model.neuron_taps) as codes:
                model.features(ids)
            collector.update({layer: codes[tap] for layer, tap in enumerate(model.neuron_taps)}, rows)
            kept.append(clock() - started)
        held.append(codes[model.neuron_taps[0]].flatten(0, 1).clone())
    return bare[2:], kept[2:], ids.numel(), torch.cat(held)


def time_released(held: torch.Tensor, clock: Callable[[], float]) -> float:
    """Seconds per token and layer of 3072 neurons that sorting and drawing take, from some neurons' activations."""
    rng = np.random.default_rng(0)
    count = len(held)
    activations = held.numpy()
    started = clock()
    for neuron in range(SORTED_NEURONS):
        order = np.argsort(-activations[:, neuron])
        rng.integers(0, count, RANDOM)
        for width in (WIDE, NARROW):
            bounds = rank_bounds(np.array(count), width).ravel().tolist()
            for low, high in zip(bounds[1:], bounds[:-1], strict=True):
                rng.choice(order[low:high], min(PER_INTERVAL, high - low), replace=False)
    return (clock() - started) / count / SORTED_NEURONS


def report(config: ModelConfig, bare: list[float], kept: list[float], tokens: int, sort: float, threads: int) -> None:
    """The ratios, and what they are made of."""
    forward = statistics.median(bare) / tokens
    ratio = statistics.median(b / a for a, b in zip(bare, kept, strict=True))
    keep = (ratio - 1) * forward  # all layers
    sorting = sort * config.num_neurons  # one layer
    released = config.num_layers * (forward + sorting)
    print(
        f"{config.num_layers} layers of width {config.d_model}, {tokens} tokens a batch, {threads} threads; us = 1e-6 s"
    )
    print(f"bare forward pass            {1e6 * forward:10.1f} us per token")
    print(f"with all records             {1e6 * forward * ratio:10.1f} us per token: {ratio:.2f} x the bare pass")
    print(f"record keeping alone         {1e6 * keep / config.num_layers:10.1f} us per token and layer")
    times = sorting * config.num_layers / keep
    print(f"sorting and drawing          {1e6 * sorting:10.1f} us per token and layer: {times:.1f} x")
    print(f"the job, released procedure  {1e6 * released:10.1f} us per token: {released / (forward * ratio):.1f} x")


if __name__ == "__main__":
    main()
