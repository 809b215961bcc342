"""Collection in `compat` mode: two passes over a prefix of the corpus, as `released.py` describes them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cratelm.activations.released import NARROW, PER_INTERVAL, QUANTILES, WIDE, ReleasedLayer, corpus_tokens
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
) -> None:
    """Collect `compat` records into a run directory. The bar advances twice over the corpus, once per pass.

    Raises CrateError where activations are negative: the procedure's intervals are defined for ReLU codes.
    """
    settings = {"max_tokens": max_tokens, "seed": seed} | dict(subject.identity) | dict(corpus.identity)
    if already_collected(run, "compat", subject.tap, settings):
        return
    sizes = corpus_tokens(len(corpus.tokens), subject.context, max_tokens)
    if sizes[NARROW] < len(QUANTILES[NARROW]) * PER_INTERVAL:
        raise CrateError(
            f"{sizes[NARROW]} tokens in whole blocks of {subject.context} are too few for the intervals of the "
            "released procedure. Collect over more text"
        )
    layers = {
        (layer, width): ReleasedLayer(neurons, width, tokens, seed=(seed, layer, width), device=device)
        for layer, neurons in subject.layers.items() for width, tokens in sizes.items()
    }  # fmt: skip
    for step in (ReleasedLayer.count, ReleasedLayer.gather):
        _read_blocks(subject, corpus, layers, step, device, bar, batch_rows)
        if step is ReleasedLayer.count:
            for one in layers.values():
                one.choose()
    tensors: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in subject.layers}
    for (layer, width), one in layers.items():
        tensors[layer] |= {f"{width}.all.{name}": array for name, array in one.result().items()}
        if width == WIDE:
            tensors[layer] |= statistics_arrays(one.moments)
    write_layers(run, "compat", subject.tap, tensors, tensors.__getitem__)
    tokens = max(sizes.values())
    documents = corpus.documents[:-1][corpus.documents[:-1] < tokens]
    write_windows(run, "compat", corpus.tokens[:tokens], np.array([[0, tokens]]), documents, np.zeros_like(documents))
    description = {"tokens": sizes[WIDE], "tokens_narrow": sizes[NARROW], "documents": len(documents)}
    write_description(run, "compat", settings | description | {"num_layers": len(subject.layers)}, subject, corpus)


def _read_blocks(
    subject: Subject,
    corpus: Corpus,
    layers: Mapping[tuple[int, int], ReleasedLayer],
    step: Callable[[ReleasedLayer, Tensor, int], None],
    device: torch.device,
    bar: ProgressBar,
    batch_rows: int,
) -> None:
    """One pass over the prefix, each block on its own."""
    total, context = max(one.tokens for one in layers.values()), subject.context
    for first in range(0, total, context * batch_rows):
        blocks = torch.from_numpy(corpus.tokens[first : min(first + context * batch_rows, total)].astype(np.int64))
        codes = subject.forward(blocks.view(-1, context).to(device))
        for (layer, _), one in layers.items():
            activations = codes[layer].flatten(0, 1)[: max(0, one.tokens - first)]
            if bool((activations < 0).any()):
                raise CrateError(
                    f"layer {layer} has negative activations; the released procedure is defined for ReLU codes. "
                    "Use --mode fixed"
                )
            if len(activations):
                step(one, activations, first)
        bar.advance(len(blocks))
