"""Collection: one streaming pass over a corpus, then the records of every layer on disk."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from torch import Tensor

from cratelm.activations.collector import Collector
from cratelm.activations.plan import SPLITS, CollectConfig, Plan, make_plan, read_rows
from cratelm.activations.records import layer_file, records_folder
from cratelm.errors import CrateError
from cratelm.rundir import FORMAT_VERSION, atomic_path, origin, write_json
from cratelm.runtime import ProgressBar

Forward = Callable[[Int[Tensor, "batch seq"]], Mapping[int, Float[Tensor, "batch seq neurons"]]]
"""Token ids to the code of each layer."""

SAVE_SECONDS = 60
"""A killed collection repeats at most so much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The tokens that are read."""

    tokens: Integer[np.ndarray, " stream"]
    documents: Int[np.ndarray, " bounds"]
    """Where each document starts, and where the last ends."""
    end_of_text: int
    identity: Mapping[str, Any]
    """What `records.json` says of it: split, hashes of data and tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The model that is observed."""

    forward: Forward
    layers: Mapping[int, int]
    """Neurons of each layer."""
    context: int
    """Longest sequence it reads, in tokens."""
    tap: str
    """Name of the tap in the run directory: `neurons` for a model's own."""
    identity: Mapping[str, Any]
    """What `records.json` says of it: hash of the weights, precision."""


def collect(
    config: CollectConfig,
    subject: Subject,
    corpus: Corpus,
    run: Path,
    *,
    device: torch.device,
    bar: ProgressBar,
    max_tokens: int | None = None,
) -> None:
    """Collect the `fixed` records of all layers of a model into a run directory, or go on where a killed call stopped.

    Raises CrateError where a half has fewer documents than the top excerpts asked for, and where an activation is not
    finite.
    """
    plan = make_plan(
        corpus.tokens, corpus.documents, context=subject.context, wide=config.wide, narrow=config.narrow,
        warmup=config.warmup, max_tokens=max_tokens, seed=config.seed,
    )  # fmt: skip
    _check_documents(plan, config)
    collector = Collector(config, plan, subject.layers, device=device)
    settings = asdict(config) | dict(subject.identity) | dict(corpus.identity) | {"max_tokens": max_tokens}
    folder = records_folder(run, "fixed")
    partial = folder / f".{subject.tap}.partial.safetensors"
    first = _load_partial(partial, settings, collector, device)
    bar.advance(_tokens_in(plan, slice(0, first)))
    _pass(
        config,
        subject,
        corpus,
        plan,
        collector,
        first,
        bar,
        lambda row: _save_partial(partial, settings, collector, row),
    )
    intervals = _write_layers(collector, subject, run)
    _write_windows(folder / "windows.safetensors", corpus, plan, intervals)
    description = {
        "mode": "fixed", "split_documents": {s: int((plan.document_split == i).sum()) for i, s in enumerate(SPLITS)},
        "tokens": plan.num_tokens, "documents": len(plan.document_position), "num_layers": len(subject.layers),
        "quantile_rank_error": {str(width): 0.5 / keep**0.5 for width, (_, keep) in collector.sizes.items()},
    }  # fmt: skip
    write_json(folder / "records.json", description | settings | {"taps": _taps(folder), "origin": origin()})
    partial.unlink(missing_ok=True)


def _pass(
    config: CollectConfig,
    subject: Subject,
    corpus: Corpus,
    plan: Plan,
    collector: Collector,
    first: int,
    bar: ProgressBar,
    save: Callable[[int], None],
) -> None:
    """Forward passes over the plan's rows from `first` on."""
    saved = time.monotonic()
    for start in range(first, len(plan.row_length), config.batch_rows):
        rows = slice(start, min(start + config.batch_rows, len(plan.row_length)))
        length = int(plan.row_length[start])
        tokens = torch.from_numpy(read_rows(corpus.tokens, plan.row_position[rows], length, corpus.end_of_text))
        codes = subject.forward(tokens.to(collector.device, non_blocking=True))
        collector.update(codes, rows)
        _check_finite(collector, codes, plan, rows)
        bar.advance(_tokens_in(plan, rows))
        if time.monotonic() - saved > SAVE_SECONDS:
            save(rows.stop)
            saved = time.monotonic()


def _check_documents(plan: Plan, config: CollectConfig) -> None:
    needed = max(config.top_wide, config.top_narrow)
    readable = np.unique(plan.row_document)
    for index, split in enumerate(SPLITS):
        found = int((plan.document_split[readable] == index).sum())
        if found < needed:
            raise CrateError(
                f"{found} documents fall to the half for {'explaining' if split == 'explain' else 'scoring'}, but a "
                f"neuron's {needed} top excerpts come from as many documents. Collect over more documents: a larger "
                "--held-out when tokenizing, or --split train"
            )


def _check_finite(collector: Collector, codes: Mapping[int, Tensor], plan: Plan, rows: slice) -> None:
    for layer, moments in collector.moments.items():
        if not bool(torch.isfinite(moments.state["mean"]).all()):
            bad = ~torch.isfinite(codes[layer]).all(dim=2).all(dim=1)
            row = rows.start + int(bad.nonzero()[0]) if bad.any() else rows.start
            raise CrateError(
                f"layer {layer} has an activation that is not finite, in document {plan.row_document[row]} of the "
                "collected split. Check the model: its training may have diverged"
            )


def _tokens_in(plan: Plan, rows: slice) -> int:
    return int((plan.row_length[rows] - plan.warmup).sum())


def _write_layers(collector: Collector, subject: Subject, run: Path) -> list[np.ndarray]:
    """Write one file per layer; return the [first, last) stretches of the corpus that their excerpts cover."""
    intervals = []
    for layer in subject.layers:
        arrays = collector.layer_arrays(layer)
        with atomic_path(layer_file(run, "fixed", subject.tap, layer)) as temporary:
            save_file(arrays, temporary, metadata={"format_version": str(FORMAT_VERSION)})
        for name in (name.removesuffix(".position") for name in arrays if name.endswith(".position")):
            position, length = arrays[f"{name}.position"], arrays[f"{name}.length"].astype(np.int64)
            covered = np.stack([position, position + length], axis=-1)[position >= 0]
            intervals.append(np.unique(covered, axis=0))
    return intervals


def _write_windows(path: Path, corpus: Corpus, plan: Plan, intervals: list[np.ndarray]) -> None:
    """Write the tokens under all excerpts, each stretch of them once."""
    spans = union(np.concatenate(intervals))
    sizes = spans[:, 1] - spans[:, 0]
    offsets = np.cumsum(sizes) - sizes
    index = np.arange(sizes.sum()) + np.repeat(spans[:, 0] - offsets, sizes)
    arrays = {
        "tokens": corpus.tokens[index], "span_position": spans[:, 0].copy(), "span_offset": offsets,
        "document_position": plan.document_position, "document_split": plan.document_split,
    }  # fmt: skip
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"format_version": str(FORMAT_VERSION)})


def union(intervals: Int[np.ndarray, "some 2"]) -> Int[np.ndarray, "fewer 2"]:
    """Half-open intervals that cover the same integers, ascending, none touching another."""
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    starts = np.concatenate([[True], ordered[1:, 0] > reach[:-1]])
    ends = np.concatenate([starts[1:], [True]])
    return np.stack([ordered[starts, 0], reach[ends]], axis=1)


def _taps(folder: Path) -> list[str]:
    return sorted({file.parent.relative_to(folder).as_posix() for file in folder.rglob("layer_*.safetensors")})


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _save_partial(path: Path, settings: Mapping[str, Any], collector: Collector, next_row: int) -> None:
    metadata = {"settings": _fingerprint(settings), "next_row": str(next_row)}
    state = {name: value.contiguous() for name, value in collector.state().items()}
    with atomic_path(path) as temporary:
        save_torch_file(state, temporary, metadata=metadata)


def _load_partial(path: Path, settings: Mapping[str, Any], collector: Collector, device: torch.device) -> int:
    """Take up what a killed call left, if it was the same collection; return the first row still to read."""
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("settings") != _fingerprint(settings):
                return 0
            collector.load_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError):
        return 0
    return int(metadata["next_row"])
