"""What a collection in `fixed` mode will take on this machine, from a trial of some seconds that writes nothing."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cratelm.activations.collect import CorpusReading, plan_of
from cratelm.activations.collector import Collector
from cratelm.activations.plan import SPLITS, CollectConfig
from cratelm.activations.results import layer_arrays
from cratelm.activations.subject import Corpus, Subject
from cratelm.distributed import ALONE
from cratelm.errors import CrateError
from cratelm.runtime import duration, human

TRIAL_TOKENS = 65_536
"""Tokens of the first documents that the trial reads again and again."""

TRIAL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectionForecast:
    """Speed, disk space and memory of a collection, measured by a trial."""

    tokens_per_second: float
    records_bytes: int
    """Size of the records of all layers, uncompressed; the texts of the excerpts come on top."""
    peak_memory_bytes: int
    """Largest memory of this process so far, the model included."""

    def line(self, tokens: int) -> str:
        """The cost of reading that many tokens, in words."""
        return (
            f"{human(self.tokens_per_second)} tokens/s on this machine: {human(tokens)} tokens take about "
            f"{duration(tokens / self.tokens_per_second)}, records of {human(self.records_bytes)}B, "
            f"memory {human(self.peak_memory_bytes)}B"
        )


def forecast_collection(
    config: CollectConfig, subject: Subject, corpus: Corpus, *, device: torch.device
) -> CollectionForecast:
    """Read the first batches for some seconds. Raises CrateError if no document is long enough for a row."""
    plan = plan_of(config, subject, corpus, TRIAL_TOKENS)
    if not len(plan.row_length):
        raise CrateError(f"some document must have more than {config.warmup} tokens, got none. Give longer texts")
    reading = CorpusReading(config, subject, corpus, plan, ALONE, device, Path(), {})
    rows, size = len(plan.row_length), config.batch_rows
    batches = [slice(at, min(at + size, rows)) for at in range(0, rows, size)]
    reading.collector.start(reading.codes(batches[0]))  # also warms up
    read, started = 0, time.monotonic()
    while not read or time.monotonic() - started < TRIAL_SECONDS:
        reading.collector = Collector(config, plan, subject.layers, device=device)
        for batch in batches:
            reading.collector.update(reading.codes(batch), batch)
            reading.collector.check()
            read += int((plan.row_length[batch] - plan.warmup).sum())
            if time.monotonic() - started >= TRIAL_SECONDS:
                break
    rate = read / (time.monotonic() - started)
    arrays = [layer_arrays(reading.collector, layer, subject.decoders) for layer in subject.layers]
    unit = 1 if sys.platform == "darwin" else 1024
    return CollectionForecast(
        tokens_per_second=rate, records_bytes=sum(array.nbytes for layer in arrays for array in layer.values()),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )  # fmt: skip


def fewest_tokens(config: CollectConfig, subject: Subject, corpus: Corpus) -> int:
    """Tokens of the fewest first documents of which each half has enough; of all documents if they are too few."""
    needed = max(config.top_wide, config.top_narrow)
    plan = plan_of(config, subject, corpus)
    readable = np.unique(plan.row_document)
    halves = [readable[plan.document_split[readable] == index] for index in range(len(SPLITS))]
    last = max((half[min(needed, len(half)) - 1] for half in halves if len(half)), default=-1)
    return int(corpus.documents[last + 1])
