"""Collection in `compat` mode: two passes over the corpus, as `released.py` describes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cratelm.activations.released import NARROW, PER_INTERVAL, QUANTILES, TOKENS, WIDE, ReleasedLayer
from cratelm.activations.results import statistics_arrays
from cratelm.activations.row_beginning import EVERY_ROW
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
    settings: dict[str, object] = {"max_tokens": max_tokens, "seed": seed}
    settings |= dict(subject.identity) | dict(corpus.identity)
    if already_collected(run, "compat", subject.tap, settings):
        return
    tokens = corpus_tokens(len(corpus.tokens), subject.context, max_tokens)
    if tokens[NARROW] < len(QUANTILES[NARROW]) * PER_INTERVAL:
        raise CrateError(
            f"{tokens[NARROW]} tokens in whole blocks of {subject.context} are too few for the intervals of "
            "the released procedure. Collect over more text"
        )
    layers = {
        (layer, width): ReleasedLayer(neurons, width, count, seed=(seed, layer, width), device=device)
        for layer, neurons in subject.layers.items() for width, count in tokens.items()
    }  # fmt: skip

    def read_corpus(step: Callable[[ReleasedLayer, Tensor, int], None]) -> None:
        """One pass, each block on its own. The narrow records read the first of the blocks."""
        rows = batch_rows * subject.context
        for first in range(0, tokens[WIDE], rows):
            read = torch.from_numpy(corpus.tokens[first : min(first + rows, tokens[WIDE])].astype(np.int64))
            codes = subject.forward(read.view(-1, subject.context).to(device))
            checked = {layer: _checked(layer, codes[layer]).flatten(0, 1) for layer in subject.layers}
            for (layer, width), collected in layers.items():
                if first < tokens[width]:
                    step(collected, checked[layer][: tokens[width] - first], first)
            bar.advance(len(read))

    read_corpus(ReleasedLayer.count)
    for collected in layers.values():
        collected.choose()
    read_corpus(ReleasedLayer.gather)
    tensors: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in subject.layers}
    for (layer, width), collected in layers.items():
        tensors[layer] |= {f"{width}.all.{name}": array for name, array in collected.result().items()}
        if width == WIDE:
            tensors[layer] |= statistics_arrays(collected.moments)
    write_layers(run, "compat", subject.tap, tensors, tensors.__getitem__)
    end = tokens[WIDE]
    documents = corpus.documents[:-1][corpus.documents[:-1] < end]
    covered = np.array([[0, end]])
    write_windows(run, "compat", corpus.tokens[:end], covered, documents, np.zeros_like(documents))
    description = {
        "tokens": end, "tokens_narrow": tokens[NARROW], "documents": len(documents), "num_layers": len(subject.layers),
        "row_beginning": {"rows": EVERY_ROW, "tokens": []},
    }  # fmt: skip
    write_description(run, "compat", settings | description, subject, corpus)


def corpus_tokens(available: int, context: int, max_tokens: int | None) -> dict[int, int]:
    """Tokens read for each width: whole blocks, at most as many as the released procedure reads."""
    whole = min(available, max_tokens or available) // context * context
    return {width: min(whole, limit // context * context) for width, limit in TOKENS.items()}


def _checked(layer: int, activations: Tensor) -> Tensor:
    """Check that codes are finite and not negative; a negative zero, which would rank below 0, becomes 0."""
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
