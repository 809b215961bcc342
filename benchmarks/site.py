"""The neuron browser on a large made-up run: time, memory and size of the folder, and how fast its pages are there.

    python benchmarks/site.py --out DIR [--layers 12] [--neurons 3072] [--rows 5]

The run has a CRATE's shape and neurons that are active on a third of the tokens, each value a different one, as the
demo's are; histograms and neighbours are made up too. It stays in DIR, so that a second call measures the folder again.
The pages are opened in Chromium from disk, each in a fresh tab, and timed from the navigation to the end of the page's
own work; the next neuron is timed from the key to the page. Medians, and the slowest.
"""

import argparse
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from cratelm.activations.records import layer_file
from cratelm.commands import interpret
from cratelm.report.browser.site import write_site
from cratelm.rundir import read_json, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from fixtures import synthetic
from fixtures.browsing import chromium


def make_run(path: Path, layers: int, neurons: int) -> None:
    """One layer of the synthetic run at a time: the same records for each, in another order of the neurons."""
    rng = np.random.default_rng(0)
    synthetic.plant = plant
    synthetic.make_run(path, rng, name="crate-b", layers=1, neurons=neurons, vocab=4096, documents=160)
    own = layer_file(path, "fixed", "neurons", 0)
    arrays = load_file(own)
    arrays["histogram"] = rng.poisson(
        np.concatenate([np.full(4, 3e4), np.full(28, 300.0), np.full(32, 0.01)]), (neurons, 64)
    ).astype(np.int32)
    for name, values in (("similar", "cosine"), ("cofiring", "jaccard")):
        arrays[f"{name}_neuron"] = rng.integers(0, neurons, (neurons, 20)).astype(np.int32)
        arrays[f"{name}_{values}"] = np.sort(rng.random((neurons, 20)), axis=1)[:, ::-1].astype(np.float32)
    for layer in range(layers):
        order = rng.permutation(neurons)
        shuffled = {name: np.ascontiguousarray(values[order]) for name, values in arrays.items()}
        save_file(shuffled, layer_file(path, "fixed", "neurons", layer), metadata={"format_version": "1"})
    description = read_json(path / "run.json")
    write_json(path / "run.json", description | {"model": description["model"] | {"num_layers": layers}})


def plant(
    rng: np.random.Generator, tokens: np.ndarray, _starts: np.ndarray, neurons: int, *, trained: bool = True
) -> np.ndarray:
    """Each neuron likes a twentieth of the vocabulary, and murmurs on a third of all tokens."""
    assert trained
    activations = np.maximum(rng.normal(-0.5, 1.0, (neurons, len(tokens))), 0).astype(np.float32) * 0.2
    for row in activations:
        strength = np.where(rng.random(tokens.max() + 1) < 0.05, rng.uniform(1, 4, tokens.max() + 1), 0)
        row += strength[tokens].astype(np.float32) * rng.uniform(0.8, 1.2, len(tokens)).astype(np.float32)
    activations[: neurons // 50] = 0
    return activations


def pages(folder: Path, neurons: int, layers: int, rows: int) -> None:
    """Time the pages in a browser."""
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = {}
    with chromium() as browser:
        for _ in range(rows):
            layer = int(rng.integers(layers))
            index = int(rng.integers(neurons // 50, neurons - 20))
            for name, address in (
                ("overview", "#/"), ("layer", f"#/crate-b/layer/{layer}"),
                ("neuron", f"#/crate-b/layer/{layer}/neuron/{index}"),
                ("search", "#/search?q=re"), ("compare", "#/compare"),
            ):  # fmt: skip
                page = browser.new_context().new_page()
                page.goto(f"file://{folder}/index.html{address}", wait_until="commit")
                page.wait_for_selector("main[data-shown]")
                found.setdefault(name, []).append(
                    page.evaluate("performance.getEntriesByName('cratelm-shown').at(-1).startTime")
                )
                if name == "neuron":
                    before = page.evaluate("performance.now()")
                    page.keyboard.press("j")
                    page.wait_for_function("() => document.querySelector('main').dataset.shown === '2'")
                    after = page.evaluate("performance.getEntriesByName('cratelm-shown').at(-1).startTime")
                    found.setdefault("next neuron", []).append(after - before)
                page.context.close()
    for name, times in found.items():
        print(f"{name:12} {statistics.median(times):6.0f} ms   slowest {max(times):6.0f} ms")


def main() -> None:
    """Make the run where it is not there, write the folder, open its pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--neurons", type=int, default=3072)
    parser.add_argument("--rows", type=int, default=5, help="times each page is opened")
    options = parser.parse_args()
    run, folder = options.out / "crate-b", options.out / "site"
    if not (run / "run.json").exists():
        make_run(run, options.layers, options.neurons)
        interpret.run(interpret.Options(runs=(run,)))
    shutil.rmtree(folder, ignore_errors=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, processor = time.perf_counter(), time.process_time()
    write_site([run], folder)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    files = [path for path in folder.rglob("*") if path.is_file()]
    size, count = sum(path.stat().st_size for path in files), options.layers * options.neurons
    print(
        f"{count:,} neurons: {clock:.0f} s ({processor:.0f} s of one processor), {1e3 * processor / count:.2f} ms each"
    )
    print(f"{len(files):,} files, {size / 1e6:.0f} MB, {size / 1e3 / count:.1f} KB a neuron")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"largest memory {largest / 1024:.0f} MB, before {memory / 1024:.0f} MB")
    clock, processor = time.perf_counter(), time.process_time()
    write_site([run], folder)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(f"again, nothing changed: {clock:.0f} s ({processor:.0f} s of one processor)")
    pages(folder.resolve(), options.neurons, options.layers, options.rows)


if __name__ == "__main__":
    main()
