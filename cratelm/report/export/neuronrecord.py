"""Records as OpenAI's `NeuronRecord` JSON, which the official tools for automated interpretability read.

    DIR/<layer>/<neuron>.json    one neuron: id, moments, top, random and quantile excerpts
    DIR/export.json              what was exported and how; the official tools do not read it

The official tools take every fourth top excerpt, from 0 on, to explain from (train) and every fourth from 2 on to
score on (valid), and every third random one from 1 on to score on. Excerpts for explaining and for scoring are
interleaved so that these slices stay what they are here: documents for explaining in the one, for scoring in the other
(`docs/formats.md`).
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
    records_tokenizer,
)
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path, origin, write_json
from cratelm.runtime import ProgressBar, progress_bar

Split = Literal["explain", "score", "both"]


def export_neuron_records(
    run: Path, out: Path, layers: Sequence[int], *, mode: Mode = "fixed", tap: str = "neurons",
    split: Split = "both", width: int | None = None,
) -> None:  # fmt: skip
    """Write the records of some layers, each layer's folder whole or not at all.

    `split` says which half of `fixed` records: `both` interleaves them, `explain` and `score` write one as it is.
    `width` is the tokens of an excerpt; the widest recorded if left out.
    """
    if mode == "compat" and split != "both":
        raise CrateError("compat records are one list, not split into explain and score. Leave --split out")
    collection = read_collection(run, mode=mode)
    strings = token_strings(load_tokenizer(records_tokenizer(run, mode)))
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
    """The width asked for, or the widest there is."""
    found = sorted({one for one, _, _ in records.sets})
    if width is not None and width not in found:
        raise CrateError(f"there are no excerpts of {width} tokens. Use --width {' or '.join(map(str, found))}")
    return found[-1] if width is None else width


def neuron_records(
    records: LayerRecords, strings: Sequence[str], split: Split, width: int, per_interval: int
) -> Iterator[dict[str, Any]]:
    """The object of each neuron of a layer, in order."""
    halves = ("all",) if records.mode == "compat" else ("explain", "score") if split == "both" else (split,)
    sets = {
        (half, kind): records.excerpts(width, half, kind)
        for half in halves for kind in ("top", "random", "quantile") if (width, half, kind) in records.sets
    }  # fmt: skip
    for index in range(records.num_neurons):
        found = {key: _activation_records(excerpts, index, strings) for key, excerpts in sets.items()}
        top, random = ([list(filter(None, found[half, kind])) for half in halves] for kind in ("top", "random"))
        quantiles = [_intervals(found[half, "quantile"], per_interval) for half in halves if (half, "quantile") in sets]
        yield {
            "dataclass_name": "NeuronRecord",
            "neuron_id": {"dataclass_name": "NeuronId", "layer_index": records.layer, "neuron_index": index},
            "random_sample": _merged(random, RANDOM_HALVES),
            "random_sample_by_quantile": [sum(parts, []) for parts in zip(*quantiles, strict=True)] or None,
            # The recorded excerpts do not say where one interval ends and the next begins.
            "quantile_boundaries": None,
            **{name: _number(records.statistics.get(name), index) for name in MOMENTS},
            "most_positive_activation_records": _merged(top, TOP_HALVES),
        }


def _merged(halves: Sequence[list[dict[str, Any]]], pattern: Sequence[Half]) -> list[dict[str, Any]]:
    return halves[0] if len(halves) == 1 else interleave(halves[0], halves[1], pattern)


def _activation_records(excerpts: Excerpts, index: int, strings: Sequence[str]) -> list[dict[str, Any] | None]:
    """All excerpts of one neuron, None for one that does not exist."""
    own = excerpts.rows(slice(index, index + 1))
    there = own.of(0)
    return [_activation_record(next(there), strings) if present else None for present in own.present[0]]


def _activation_record(excerpt: Excerpt, strings: Sequence[str]) -> dict[str, Any]:
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": [strings[token] for token in excerpt.tokens.tolist()],
        "activations": shortest(excerpt.activations),
    }


def _intervals(records: Sequence[dict[str, Any] | None], size: int) -> list[list[dict[str, Any]]]:
    parts = (records[first : first + size] for first in range(0, len(records), size))
    return [[one for one in part if one is not None] for part in parts]


def shortest(values: Float[np.ndarray, " values"]) -> list[float]:
    """The numbers with as few digits as bring back the same float32."""
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
    """Refuse to replace a folder that holds anything but an earlier export."""
    strange = [path.name for path in folder.glob("*") if not (path.suffix == ".json" and path.stem.isdecimal())]
    if strange:
        raise CrateError(f"{folder} holds {sorted(strange)[0]}, which no export wrote. Give another --out")
