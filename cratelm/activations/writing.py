"""Writing record files (`records.py` reads them)."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer
from safetensors import safe_open

from cratelm.activations.records import Mode, layer_file, read_windows, records_folder
from cratelm.activations.subject import Corpus, Subject
from cratelm.checksums import write_tensors
from cratelm.errors import CrateError
from cratelm.rundir import differing_fields, origin, read_json, write_json

TAP_SETTINGS = {"layers", "sae_hash"}
"""Settings of one tap; the other settings of a collection hold for all taps of the run."""


def already_collected(run: Path, mode: Mode, tap: str, settings: Mapping[str, Any]) -> bool:
    """Whether exactly these records exist. Raises CrateError if the run has records of this mode with other settings.

    `layers` and `sae_hash` are settings of a tap, not of the whole run: a subset of the recorded layers counts as
    collected, and the latents of an autoencoder that was trained again do not.
    """
    path = records_folder(run, mode) / "records.json"
    if not path.exists():
        return False
    recorded = read_json(path, made_by=f"cratelm collect {run} --data DIR")
    shared = {name: value for name, value in settings.items() if name not in TAP_SETTINGS}
    different = differing_fields({name: recorded.get(name) for name in shared}, json.loads(json.dumps(shared)))
    if not different and tap in recorded["taps"]:
        layers, requested = recorded["taps"][tap]["layers"], list(settings.get("layers", ()))
        different = f"layers {layers} -> {requested}" if set(requested) - set(layers) else ""
    if different:
        raise CrateError(
            f"{run} holds {mode} records of other settings ({different}). Remove {path.parent} to collect again"
        )
    return tap in recorded["taps"] and recorded["taps"][tap].get("sae_hash") == settings.get("sae_hash")


def write_layers(
    run: Path, mode: Mode, tap: str, layers: Iterable[int], arrays_of: Callable[[int], Mapping[str, np.ndarray]]
) -> None:
    """Write one file per layer, made one at a time."""
    for layer in layers:
        write_tensors(layer_file(run, mode, tap, layer), arrays_of(layer))


def write_windows(
    run: Path,
    mode: Mode,
    tokens: Integer[np.ndarray, " stream"],
    covered: Int[np.ndarray, "stretches 2"],
    document_position: Int[np.ndarray, " documents"],
    document_split: Int[np.ndarray, " documents"],
) -> None:
    """Write the tokens of the covered [first, last) stretches of the corpus, each once, and the documents.

    Stretches that other taps of these records cover stay covered.
    """
    if (records_folder(run, mode) / "records.json").exists():
        earlier = read_windows(run, mode)
        ends = np.append(earlier.span_offset[1:], len(earlier.tokens)) - earlier.span_offset + earlier.span_position
        covered = np.concatenate([covered, np.stack([earlier.span_position, ends], axis=1)])
    spans = union(covered)
    sizes = spans[:, 1] - spans[:, 0]
    offsets = np.cumsum(sizes) - sizes
    index = np.arange(sizes.sum()) + np.repeat(spans[:, 0] - offsets, sizes)
    arrays = {
        "tokens": tokens[index], "span_position": spans[:, 0].copy(), "span_offset": offsets,
        "document_position": document_position.astype(np.int64), "document_split": document_split.astype(np.int64),
    }  # fmt: skip
    write_tensors(records_folder(run, mode) / "windows.safetensors", arrays)


def write_description(run: Path, mode: Mode, description: Mapping[str, Any], subject: Subject, corpus: Corpus) -> None:
    """Write `records.json`, the last file of a collection: it marks the records as complete.

    The first tap writes the settings that all taps share; each tap adds its layers and whether it is signed (some
    activation is negative).
    """
    path = records_folder(run, mode) / "records.json"
    earlier = read_json(path, made_by=f"cratelm collect {run} --data DIR") if path.exists() else {}
    shared = {"mode": mode, **description, **subject.identity, **corpus.identity, "origin": origin()} | earlier
    layers = sorted(subject.layers)
    signed = any(least_activation(layer_file(run, mode, subject.tap, layer)) < 0 for layer in layers)
    described = {"layers": layers, "signed": signed}
    described |= {name: value for name, value in subject.identity.items() if name in TAP_SETTINGS - {"layers"}}
    taps = earlier.get("taps", {}) | {subject.tap: described}
    shared |= {"taps": dict(sorted(taps.items())), "signed": any(tap["signed"] for tap in taps.values())}
    write_json(path, {key: value for key, value in shared.items() if key not in TAP_SETTINGS})


def least_activation(path: Path) -> float:
    """The smallest activation of any neuron in a layer's records."""
    with safe_open(path, framework="np") as file:
        return float(file.get_tensor("minimum").min())


def union(intervals: Int[np.ndarray, "some 2"]) -> Int[np.ndarray, "fewer 2"]:
    """The fewest half-open intervals that cover the same integers, ascending."""
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    starts = np.concatenate([[True], ordered[1:, 0] > reach[:-1]])
    ends = np.concatenate([starts[1:], [True]])
    return np.stack([ordered[starts, 0], reach[ends]], axis=1)
