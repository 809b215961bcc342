"""Collection in `compat` mode: two passes over the blocks that are read, as `released.py` describes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cratelm.activations.reading import NARROW, WIDE, Reading, readings
from cratelm.activations.records import ABSENT
from cratelm.activations.released import PER_INTERVAL, QUANTILES, ReleasedLayer
from cratelm.activations.repairs import Repair
from cratelm.activations.results import statistics_arrays
from cratelm.activations.subject import Corpus, Subject
from cratelm.activations.writing import already_collected, write_description, write_layers, write_windows
from cratelm.errors import CrateError
from cratelm.runtime import ProgressBar


def collect_compat(
    subject: Subject,
    corpus: Corpus,
    run: Path,
    *,
    device: torch.device,
    bar: ProgressBar,
    max_tokens: int | None = None,
    seed: int = 0,
    batch_rows: int = 16,
    repairs: frozenset[Repair] = frozenset(),
) -> None:
    """Collect `compat` records into a run directory. The bar advances twice over the corpus, once per pass.

    `repairs` are the flaws of the procedure that are left out (`reading.Repair`); a run holds the records of one set
    of them. Raises CrateError where activations are negative: the procedure's intervals are defined for ReLU codes.
    """
    settings: dict[str, object] = {"max_tokens": max_tokens, "seed": seed, "repairs": sorted(repairs) or None}
    settings |= dict(subject.identity) | dict(corpus.identity)
    if already_collected(run, "compat", subject.tap, settings):
        return
    read = readings(
        corpus.documents, available=len(corpus.tokens), context=subject.context, max_tokens=max_tokens, repairs=repairs
    )
    if read[NARROW].choosable < len(QUANTILES[NARROW]) * PER_INTERVAL:
        raise CrateError(
            f"{read[NARROW].choosable} tokens in whole blocks of {subject.context} are too few for the intervals of "
            "the released procedure. Collect over more text"
        )
    layers = {
        (layer, width): ReleasedLayer(neurons, width, reading, seed=(seed, layer, width), device=device)
        for layer, neurons in subject.layers.items() for width, reading in read.items()
    }  # fmt: skip
    passes = _Passes(subject=subject, corpus=corpus, layers=layers, device=device, bar=bar, batch_rows=batch_rows)
    passes.read(read[WIDE], ReleasedLayer.count)
    for one in layers.values():
        one.choose()
    passes.read(read[WIDE], ReleasedLayer.gather)
    tensors: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in subject.layers}
    for (layer, width), one in layers.items():
        tensors[layer] |= {f"{width}.all.{name}": array for name, array in _in_the_split(one).items()}
        if width == WIDE:
            tensors[layer] |= statistics_arrays(one.moments)
    write_layers(run, "compat", subject.tap, tensors, tensors.__getitem__)
    end = int(read[WIDE].blocks[-1]) + subject.context
    documents = corpus.documents[:-1][corpus.documents[:-1] < end]
    covered = np.stack([read[WIDE].blocks, read[WIDE].blocks + subject.context], axis=1)
    write_windows(run, "compat", corpus.tokens[:end], covered, documents, np.zeros_like(documents))
    description = {
        "tokens": read[WIDE].tokens, "tokens_narrow": read[NARROW].tokens, "documents": read[WIDE].documents_read,
        "num_layers": len(subject.layers),
    }  # fmt: skip
    write_description(run, "compat", settings | description, subject, corpus)


def _in_the_split(layer: ReleasedLayer) -> dict[str, np.ndarray]:
    """A layer's windows, their places among the tokens read as positions in the split."""
    arrays = layer.result()
    for name, place in arrays.items():
        if name.endswith(".position"):
            arrays[name] = np.where(place < 0, ABSENT, layer.reading.position(np.maximum(place, 0)))
    return arrays


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """What both passes over the blocks share."""

    subject: Subject
    corpus: Corpus
    layers: Mapping[tuple[int, int], ReleasedLayer]
    """By layer and width."""
    device: torch.device
    bar: ProgressBar
    batch_rows: int

    def read(self, wide: Reading, step: Callable[[ReleasedLayer, Tensor, int], None]) -> None:
        """One pass, each block on its own. The other widths read some of the blocks of the widest."""
        columns = np.arange(wide.context)
        for start in range(0, len(wide.blocks), self.batch_rows):
            blocks = wide.blocks[start : start + self.batch_rows]
            tokens = torch.from_numpy(self.corpus.tokens[blocks[:, None] + columns].astype(np.int64))
            codes = self.subject.forward(tokens.to(self.device))
            checked = {layer: self._checked(layer, codes[layer]) for layer in self.subject.layers}
            for (layer, _), one in self.layers.items():
                low, high = np.searchsorted(one.reading.blocks, [blocks[0], blocks[-1] + 1])
                rows = np.searchsorted(blocks, one.reading.blocks[low:high])
                if len(rows):
                    own = checked[layer] if len(rows) == len(blocks) else checked[layer][torch.from_numpy(rows)]
                    step(one, own.flatten(0, 1), int(low) * wide.context)
            self.bar.advance(len(blocks) * wide.context)

    def _checked(self, layer: int, activations: Tensor) -> Tensor:
        """Codes that are finite and not negative, and have no negative zero, which would rank as a number below 0."""
        least, most = torch.aminmax(activations)
        if not bool(torch.isfinite(least + most)):
            raise CrateError(
                f"layer {layer} has an activation that is not finite. Check the model: its training may have diverged"
            )
        if bool(least < 0):
            raise CrateError(
                f"layer {layer} has negative activations; the released procedure is defined for ReLU codes. "
                "Use --mode fixed"
            )
        return activations.abs()
