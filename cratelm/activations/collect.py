"""Collection: one streaming pass over a corpus, then the records of every layer on disk."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_torch_file
from torch import Tensor

from cratelm.activations.collector import Collector
from cratelm.activations.plan import SPLITS, CollectConfig, Plan, make_plan, read_rows
from cratelm.activations.records import records_folder
from cratelm.activations.subject import Corpus, Subject
from cratelm.activations.writing import already_collected, write_description, write_layers, write_windows
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path
from cratelm.runtime import ProgressBar

SAVE_SECONDS = 60
"""A killed collection repeats at most so much."""


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
    settings = asdict(config) | {"max_tokens": max_tokens} | dict(subject.identity) | dict(corpus.identity)
    if already_collected(run, "fixed", subject.tap, settings):
        return
    plan = make_plan(
        corpus.tokens, corpus.documents, context=subject.context, wide=config.wide, narrow=config.narrow,
        warmup=config.warmup, max_tokens=max_tokens, seed=config.seed,
    )  # fmt: skip
    _check_documents(plan, config)
    collector = Collector(config, plan, subject.layers, device=device)
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
    tensors = {layer: collector.layer_arrays(layer) for layer in subject.layers}
    write_layers(run, "fixed", subject.tap, tensors)
    covered = np.concatenate([_covered(arrays) for arrays in tensors.values()])
    write_windows(run, "fixed", corpus.tokens, covered, plan.document_position, plan.document_split)
    description = {
        "tokens": plan.num_tokens, "documents": len(plan.document_position), "num_layers": len(subject.layers),
        "split_documents": {split: int((plan.document_split == i).sum()) for i, split in enumerate(SPLITS)},
        "quantile_rank_error": {str(width): 0.5 / keep**0.5 for width, (_, keep) in collector.sizes.items()},
    }  # fmt: skip
    write_description(run, "fixed", settings | description, subject, corpus)
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


def _covered(arrays: Mapping[str, np.ndarray]) -> Int[np.ndarray, "stretches 2"]:
    """The [first, last) stretches of the corpus that a layer's excerpts cover."""
    stretches = []
    for name in (name.removesuffix(".position") for name in arrays if name.endswith(".position")):
        position, length = arrays[f"{name}.position"], arrays[f"{name}.length"].astype(np.int64)
        stretches.append(np.stack([position, position + length], axis=-1)[position >= 0])
    return np.unique(np.concatenate(stretches), axis=0)


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
