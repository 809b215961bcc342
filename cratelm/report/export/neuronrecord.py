"""Records as OpenAI's `NeuronRecord` JSON, which the official tools for automated interpretability read.

    DIR/<layer>/<neuron>.json    one neuron: id, moments, top, random and quantile excerpts
    DIR/export.json              the settings of the export; the official tools do not read it

The official tools explain from every fourth top excerpt from 0 on (train), and score on every fourth from 2 on (valid)
and on every third random excerpt from 1 on. Excerpts for explaining and for scoring are interleaved so that these
slices do not mix the two (`docs/formats.md`).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from cratelm.activations.interchange import MOMENTS, PER_INTERVAL, RANDOM_HALVES, TOP_HALVES, Half, interleave
from cratelm.activations.records import (
    Excerpt,
    Excerpts,
    LayerRecords,
    Mode,
    read_collection,
    read_records,
    records_strings,
)
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path, origin, write_json
from cratelm.runtime import ProgressBar, progress_bar

_Split = Literal["explain", "score", "both"]


def export_neuron_records(
    run: Path, out: Path, layers: Sequence[int], *, mode: Mode = "fixed", tap: str = "neurons",
    split: _Split = "both", width: int | None = None,
) -> None:  # fmt: skip
    """Write the records of some layers; each layer's folder is complete or missing.

    `split`: the halves of `fixed` records to write; `both` interleaves them. `width`: tokens per excerpt; None for the
    widest.
    """
    if mode == "compat" and split != "both":
        raise CrateError("--split must be left out with compat records, which have no halves")
    collection = read_collection(run, mode=mode)
    strings = records_strings(run, mode)
    first = read_records(run, layers[0], mode=mode, tap=tap)
    wide = choose_width(first, width)
    per_interval = int(collection.get("per_quantile", PER_INTERVAL[mode]))
    with progress_bar("export", total=len(layers) * first.num_neurons, unit="neurons") as bar:
        for layer in layers:
            records = read_records(run, layer, mode=mode, tap=tap)
            _write_layer(out / str(layer), neuron_records(records, strings, split, wide, per_interval), bar)
    write_json(out / "export.json", {
        "format": "NeuronRecord", "run": run.name, "mode": mode, "tap": tap, "layers": list(layers), "split": split,
        "width": wide, "moments": "variance unbiased, skewness and kurtosis standardised (3 for a normal)",
        "model_hash": collection.get("model_hash"), "origin": origin(),
    })  # fmt: skip


def choose_width(records: LayerRecords, width: int | None) -> int:
    """The given width if it was recorded; the widest for None."""
    widths = sorted({width for width, _, _ in records.sets})
    if width is not None and width not in widths:
        raise CrateError(f"there are no excerpts of {width} tokens. Use --width {' or '.join(map(str, widths))}")
    return widths[-1] if width is None else width


def neuron_records(
    records: LayerRecords, strings: Sequence[str], split: _Split, width: int, per_interval: int
) -> Iterator[dict[str, Any]]:
    """The object of each neuron of a layer, in order."""
    halves = ("all",) if records.mode == "compat" else ("explain", "score") if split == "both" else (split,)
    sets = {
        (half, kind): records.excerpts(width, half, kind)
        for half in halves for kind in ("top", "random", "quantile") if (width, half, kind) in records.sets
    }  # fmt: skip
    for index in range(records.num_neurons):
        converted = {key: _activation_records(excerpts, index, strings) for key, excerpts in sets.items()}
        top, random = ([list(filter(None, converted[half, kind])) for half in halves] for kind in ("top", "random"))
        quantiles = [
            _intervals(converted[half, "quantile"], per_interval) for half in halves if (half, "quantile") in sets
        ]
        yield {
            "dataclass_name": "NeuronRecord",
            "neuron_id": {"dataclass_name": "NeuronId", "layer_index": records.layer, "neuron_index": index},
            "random_sample": _merged(random, RANDOM_HALVES),
            "random_sample_by_quantile": [sum(parts, []) for parts in zip(*quantiles, strict=True)] or None,
            # The records do not have the boundaries of the intervals.
            "quantile_boundaries": None,
            **{name: _number(records.statistics.get(name), index) for name in MOMENTS},
            "most_positive_activation_records": _merged(top, TOP_HALVES),
        }


def _merged(halves: Sequence[list[dict[str, Any]]], pattern: Sequence[Half]) -> list[dict[str, Any]]:
    return halves[0] if len(halves) == 1 else interleave(halves[0], halves[1], pattern)


def _activation_records(excerpts: Excerpts, index: int, strings: Sequence[str]) -> list[dict[str, Any] | None]:
    """All excerpts of one neuron; None for a missing excerpt."""
    neuron = excerpts.rows(slice(index, index + 1))
    present = neuron.of(0)
    return [_activation_record(next(present), strings) if exists else None for exists in neuron.present[0]]


def _activation_record(excerpt: Excerpt, strings: Sequence[str]) -> dict[str, Any]:
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": [strings[token] for token in excerpt.tokens.tolist()],
        "activations": shortest(excerpt.activations),
    }


def _intervals(records: Sequence[dict[str, Any] | None], size: int) -> list[list[dict[str, Any]]]:
    parts = (records[first : first + size] for first in range(0, len(records), size))
    return [[record for record in part if record is not None] for part in parts]


def shortest(values: Float[np.ndarray, " values"]) -> list[float]:
    """The numbers with the fewest digits that give the same float32."""
    return [float(str(value)) if value else 0.0 for value in values.astype(np.float32)]


def _number(values: np.ndarray | None, index: int) -> float | None:
    if values is None or not math.isfinite(values[index]):
        return None
    return shortest(values[index : index + 1])[0]


def _write_layer(folder: Path, objects: Iterator[Mapping[str, Any]], bar: ProgressBar) -> None:
    check_replaceable(folder)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for index, content in enumerate(objects):
            text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            (temporary / f"{index}.json").write_text(text, encoding="utf-8")
            bar.advance(1, note=folder.name)


def check_replaceable(folder: Path) -> None:
    """Raise `CrateError` for a folder with other files than those of an export."""
    others = sorted(path.name for path in folder.glob("*") if not (path.suffix == ".json" and path.stem.isdecimal()))
    if others:
        raise CrateError(f"{folder} has {others[0]}, which is not part of an export. Give another --out")
