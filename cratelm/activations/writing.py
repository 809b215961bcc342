"""Writing record files (`records.py` reads them)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer
from safetensors.numpy import save_file

from cratelm.activations.records import Mode, layer_file, records_folder
from cratelm.activations.subject import Corpus, Subject
from cratelm.errors import CrateError
from cratelm.rundir import FORMAT_VERSION, atomic_path, differing_fields, origin, read_json, write_json


def already_collected(run: Path, mode: Mode, tap: str, settings: Mapping[str, Any]) -> bool:
    """Whether these very records are there; records of the same mode with other settings are refused."""
    path = records_folder(run, mode) / "records.json"
    if not path.exists():
        return False
    found = read_json(path, made_by=f"cratelm collect {run} --data DIR")
    known = {name: found.get(name) for name in settings}
    if different := differing_fields(known, json.loads(json.dumps(settings))):
        raise CrateError(
            f"{run} holds {mode} records of other settings ({different}). Remove {path.parent} to collect anew"
        )
    return tap in found["taps"]


def write_layers(run: Path, mode: Mode, tap: str, layers: Mapping[int, Mapping[str, np.ndarray]]) -> None:
    """Write one file per layer."""
    for layer, arrays in layers.items():
        _write_tensors(layer_file(run, mode, tap, layer), arrays)


def write_windows(
    run: Path,
    mode: Mode,
    tokens: Integer[np.ndarray, " stream"],
    covered: Int[np.ndarray, "stretches 2"],
    document_position: Int[np.ndarray, " documents"],
    document_split: Int[np.ndarray, " documents"],
) -> None:
    """Write the tokens of the covered [first, last) stretches of the corpus, each once, and the documents."""
    spans = union(covered)
    sizes = spans[:, 1] - spans[:, 0]
    offsets = np.cumsum(sizes) - sizes
    index = np.arange(sizes.sum()) + np.repeat(spans[:, 0] - offsets, sizes)
    arrays = {
        "tokens": tokens[index], "span_position": spans[:, 0].copy(), "span_offset": offsets,
        "document_position": document_position.astype(np.int64), "document_split": document_split.astype(np.int64),
    }  # fmt: skip
    _write_tensors(records_folder(run, mode) / "windows.safetensors", arrays)


def write_description(run: Path, mode: Mode, description: Mapping[str, Any], subject: Subject, corpus: Corpus) -> None:
    """Write `records.json`, the last file of a collection: with it there, the records are whole."""
    folder = records_folder(run, mode)
    taps = sorted({file.parent.relative_to(folder).as_posix() for file in folder.rglob("layer_*.safetensors")})
    identity = dict(subject.identity) | dict(corpus.identity)
    write_json(folder / "records.json", {"mode": mode, "taps": taps, **description, **identity, "origin": origin()})


def union(intervals: Int[np.ndarray, "some 2"]) -> Int[np.ndarray, "fewer 2"]:
    """Half-open intervals that cover the same integers, ascending, none touching another."""
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    starts = np.concatenate([[True], ordered[1:, 0] > reach[:-1]])
    ends = np.concatenate([starts[1:], [True]])
    return np.stack([ordered[starts, 0], reach[ends]], axis=1)


def _write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary:
        # The library writes memory as it lies, so anything transposed or strided must be laid out first.
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            temporary,
            metadata={"format_version": str(FORMAT_VERSION)},
        )
