"""What each flaw of the released procedure does to the scores: one collection per repair, scored by lookup.

    python benchmarks/compat_flaws.py runs/crate-2l --data tokens [--tokens 200k] [--out DIR] [--device cuda]

Collects the run's model in `compat` mode as released, with another seed (what the draws alone change), with each repair
by itself and with all of them, and prints points by protocol: the mean over layers, and how much it differs from the
released one, with 95 % intervals. The runs are temporary; with --out they stay, and a stopped benchmark goes on.
"""

import argparse
import contextlib
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cratelm.activations.repairs import REPAIRS, Repair
from cratelm.commands import collect
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.scoring.correlation import LayerScores, aggregate
from cratelm.interpretation.scoring.statistics import interval, shown_layers
from cratelm.interpretation.store.database import Store
from cratelm.runtime import console
from cratelm.workflows.llm.run import interpret_by_lookup
from cratelm.workflows.options.selection import Selection, chosen_layers

RELEASED = "as released"
VARIANTS: dict[str, tuple[int, tuple[Repair, ...]]] = {
    RELEASED: (0, ()), "another seed": (1, ()), **{one: (0, (one,)) for one in REPAIRS}, "all repairs": (0, REPAIRS),
}  # fmt: skip
"""Row of the table -> seed and repairs."""
RESAMPLES = 2000


def scored(source: Path, run: Path, options: argparse.Namespace, seed: int, repairs: tuple[Repair, ...]) -> None:
    """Collect and interpret the model of one run in another."""
    if not (run / "model").exists():
        shutil.copytree(source / "model", run / "model.partial", dirs_exist_ok=True)
        (run / "model.partial").rename(run / "model")
    collect.run(
        collect.Options(
            runs=(run,), data=options.data, mode="compat", repair=repairs, seed=seed, tokens=options.tokens,
            device=options.device,
        )
    )  # fmt: skip
    interpret_by_lookup(Selection(runs=(run,), mode="compat"))


def read_scores(run: Path, protocol: str) -> list[LayerScores]:
    """The scores of all layers."""
    layers = chosen_layers(run, Selection(runs=(run,), mode="compat"))
    store = Store.open(run)
    return [store.read_scores(layer, protocol, mode="compat") for layer in layers]


def difference(before: Sequence[LayerScores], after: Sequence[LayerScores]) -> tuple[float, float, float]:
    """How many points the mean over layers changes, and its interval: both sides of the same resampled neurons.

    A neuron with a score on one side only counts on that side, as in the means themselves.
    """
    rng, shown = np.random.default_rng(0), shown_layers(len(before))
    observed, samples = [], []
    for one, other in zip(before[:shown], after[:shown], strict=True):
        neurons = len(one.neuron)
        drawn = rng.multinomial(neurons, np.full(neurons, 1 / neurons), RESAMPLES).astype(np.float64)
        times = np.concatenate([np.ones((1, neurons)), drawn])
        means = [
            times @ np.nan_to_num(side.correlation) / (times @ ~np.isnan(side.correlation)) for side in (one, other)
        ]
        change = 100 * (means[1] - means[0])
        observed.append(change[0])
        samples.append(change[1:])
    return float(np.mean(observed)), *interval(np.mean(samples, axis=0))


def lines(runs: dict[str, Path]) -> Iterator[str]:
    """The table, a row for each protocol and repair."""
    within = "95 % interval"
    yield f"{'protocol':<15}{'repair':<22}{'points':>7}{within:>16}{'difference':>12}{within:>16}{'scored':>12}"
    for protocol in PROTOCOLS:
        released = read_scores(runs[RELEASED], protocol)
        for name, run in runs.items():
            scores = read_scores(run, protocol)
            model = aggregate(scores, protocol=protocol)
            shown = model.layers[: shown_layers(len(model.layers))]
            count = f"{sum(layer.scored for layer in shown)}/{sum(layer.total for layer in shown)}"
            points = "-" if model.mean is None else f"{model.mean:z.2f}"
            within = "-" if model.low is None else f"[{model.low:z.1f}, {model.high:z.1f}]"
            change, low, high = difference(released, scores)
            changed = ("", "") if name == RELEASED else (f"{change:+z.2f}", f"[{low:z.2f}, {high:z.2f}]")
            yield (
                f"{protocol if name == RELEASED else '':<15}{name:<22}{points:>7}{within:>16}{changed[0]:>12}"
                f"{changed[1]:>16}{count:>12}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    temporary = contextlib.nullcontext(options.out) if options.out else tempfile.TemporaryDirectory()
    with temporary as folder:
        runs = {name: Path(folder) / name.replace(" ", "-") for name in VARIANTS}
        for number, (name, (seed, repairs)) in enumerate(VARIANTS.items()):
            console.print(f"{number + 1} of {len(VARIANTS)}: {name}")
            scored(options.run, runs[name], options, seed, repairs)
        print(f"{options.run.name}, {options.tokens} tokens, {platform.system()} {platform.machine()}\n")
        for line in lines(runs):
            print(line)


if __name__ == "__main__":
    main()
