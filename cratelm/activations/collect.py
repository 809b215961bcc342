"""Collection in `fixed` mode: one streaming pass over a corpus, then the records of every layer on disk.

Under torchrun each process reads its share of the batches. The first process merges the results, so the records are the
same as those of a single process.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cratelm.activations.collector import Collector
from cratelm.activations.plan import SPLITS, CollectConfig, Plan, make_plan, read_rows
from cratelm.activations.records import records_folder
from cratelm.activations.results import layer_arrays
from cratelm.activations.row_beginning import EVERY_DOCUMENT
from cratelm.activations.subject import Corpus, Subject
from cratelm.activations.writing import already_collected, write_description, write_layers, write_windows
from cratelm.distributed import ALONE, World
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path
from cratelm.runtime import ProgressBar

SAVE_SECONDS = 60
"""Seconds between saves: the most work that a killed collection repeats."""
CHECK_EVERY = 64
"""Batches between checks that all activations are finite; each check waits for the device."""


def collect(
    config: CollectConfig,
    subject: Subject,
    corpus: Corpus,
    run: Path,
    *,
    device: torch.device,
    bar: ProgressBar,
    max_tokens: int | None = None,
    world: World = ALONE,
) -> None:
    """Collect the `fixed` records of all layers into a run directory, or resume where a killed call stopped.

    Raises CrateError if a half has fewer documents than a neuron's top excerpts need, or if an activation is not
    finite.
    """
    settings = asdict(config) | {"max_tokens": max_tokens} | dict(subject.identity) | dict(corpus.identity)
    if already_collected(run, "fixed", subject.tap, settings):
        return
    plan = plan_of(config, subject, corpus, max_tokens)
    check_documents(plan, config)
    reading = CorpusReading(config, subject, corpus, plan, world, device, run, settings)
    reading.read(bar)
    collector = reading.gathered()
    if world.leads:
        _write(collector, subject, corpus, plan, settings, run)
    world.wait()
    reading.partial(world.rank).unlink(missing_ok=True)


def plan_of(config: CollectConfig, subject: Subject, corpus: Corpus, max_tokens: int | None = None) -> Plan:
    """The rows of a corpus for a subject: its beginning of a row counts as tokens of warm-up."""
    begin = subject.row_beginning
    return make_plan(
        corpus.tokens, corpus.documents, context=subject.context, wide=config.wide, narrow=config.narrow,
        warmup=max(0, config.warmup - len(begin or ())), max_tokens=max_tokens, seed=config.seed,
        lead=1 if begin is None else 0,
    )  # fmt: skip


@dataclass
class CorpusReading:
    """The forward passes over this process's batches, with saved state to resume from."""

    config: CollectConfig
    subject: Subject
    corpus: Corpus
    plan: Plan
    world: World
    device: torch.device
    run: Path
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.collector = Collector(self.config, self.plan, self.subject.layers, device=self.device)
        text = json.dumps(dict(self.settings) | {"processes": self.world.size}, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def partial(self, rank: int) -> Path:
        """Path of a process's saved state."""
        return records_folder(self.run, "fixed") / f".{self.subject.tap}.partial-{rank}.safetensors"

    def read(self, bar: ProgressBar) -> None:
        """Read every `world.size`-th batch, resuming where a killed process stopped."""
        size = self.config.batch_rows
        batches = range(self.world.rank, -(-len(self.plan.row_length) // size), self.world.size)
        finished = self._load(self.collector, self.world.rank)
        done = finished or 0
        if finished is None:
            self.collector.start(self.codes(slice(0, min(size, len(self.plan.row_length)))))
        saved = time.monotonic()
        for index, batch in enumerate(batches):
            rows = slice(batch * size, min((batch + 1) * size, len(self.plan.row_length)))
            if index >= done:
                self.collector.update(self.codes(rows), rows)
                if self.device.type == "cpu" or index % CHECK_EVERY == 0:
                    self.collector.check()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(index + 1)
                    saved = time.monotonic()
            bar.advance(int((self.plan.row_length[rows] - self.plan.warmup).sum()))
        self.collector.check()
        if self.world.size > 1:
            self._save(len(batches))

    def gathered(self) -> Collector:
        """The merged results of all processes, on the first of them."""
        self.world.wait()
        for rank in range(1, self.world.size):
            if self.world.leads:
                other = Collector(self.config, self.plan, self.subject.layers, device=self.device)
                finished = self._load(other, rank)
                assert finished is not None, "each process saves before it waits"
                self.collector.merge(other)
        return self.collector

    def codes(self, rows: slice) -> Mapping[int, torch.Tensor]:
        """Activations of each layer for a batch of rows: (rows, length, neurons)."""
        length = int(self.plan.row_length[rows.start])
        tokens = read_rows(self.corpus.tokens, self.plan.row_position[rows], length, self.corpus.end_of_text)
        return self.subject.forward(torch.from_numpy(tokens).to(self.device, non_blocking=True))

    def _save(self, done: int) -> None:
        state = {name: value.contiguous() for name, value in self.collector.state().items()}
        with atomic_path(self.partial(self.world.rank)) as temporary:
            save_file(state, temporary, metadata={"settings": self.fingerprint, "done": str(done)})

    def _load(self, collector: Collector, rank: int) -> int | None:
        """Load a process's saved state and return its number of finished batches; None without a matching state."""
        path = self.partial(rank)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("settings") != self.fingerprint:
                    return None
                collector.load_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, KeyError):
            return None
        return int(metadata["done"])


def check_documents(plan: Plan, config: CollectConfig) -> None:
    """Raise CrateError, before any pass, if a corpus has too few documents for a neuron's top excerpts."""
    needed = max(config.top_wide, config.top_narrow)
    readable = np.unique(plan.row_document)
    for index, split in enumerate(SPLITS):
        count = int((plan.document_split[readable] == index).sum())
        if count < needed:
            raise CrateError(
                f"the half for {'explaining' if split == 'explain' else 'scoring'} must have at least {needed} "
                f"documents, one for each top excerpt of a neuron, got {count}. Collect from more documents: "
                "a larger --held-out when tokenizing, or --split train"
            )


def _write(
    collector: Collector, subject: Subject, corpus: Corpus, plan: Plan, settings: Mapping[str, Any], run: Path
) -> None:
    covered = []

    def arrays_of(layer: int) -> dict[str, np.ndarray]:
        arrays = layer_arrays(collector, layer, subject.decoders)
        covered.append(_covered(arrays))
        return arrays

    write_layers(run, "fixed", subject.tap, subject.layers, arrays_of)
    stretches = np.concatenate(covered)
    write_windows(run, "fixed", corpus.tokens, stretches, plan.document_position, plan.document_split)
    description = {
        "tokens": plan.num_tokens, "documents": len(plan.document_position), "num_layers": len(subject.layers),
        "split_documents": {split: int((plan.document_split == i).sum()) for i, split in enumerate(SPLITS)},
        "quantile_rank_error": {str(width): 0.5 / keep**0.5 for width, (_, keep) in collector.sizes.items()},
        "cofiring_tokens": collector.layout.cofiring_tokens,
        "row_beginning": {"rows": EVERY_DOCUMENT, "tokens": [corpus.end_of_text]},
    }  # fmt: skip
    write_description(run, "fixed", dict(settings) | description, subject, corpus)


def _covered(arrays: Mapping[str, np.ndarray]) -> Int[np.ndarray, "stretches 2"]:
    """The [first, last) stretches of the corpus that a layer's excerpts cover."""
    stretches = []
    for name in (name.removesuffix(".position") for name in arrays if name.endswith(".position")):
        position, length = arrays[f"{name}.position"], arrays[f"{name}.length"].astype(np.int64)
        stretches.append(np.stack([position, position + length], axis=-1)[position >= 0])
    return np.unique(np.concatenate(stretches), axis=0)
