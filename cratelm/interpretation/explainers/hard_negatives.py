"""Hard negatives: text on which a neuron is silent, although the neurons nearest to it fire on the same tokens.

The nearest neurons are those of the records' tables: by decoder direction, and by the tokens they fire on together. The
windows are of the neuron's own excerpts of the explaining half, so it is known that it is silent on every token; they
are ranked by how strongly the nearest neurons fire on their tokens. After the contrastive explainer of delphi.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cratelm.activations.records import Excerpt, LayerRecords
from cratelm.errors import CrateError
from cratelm.interpretation.scorers.windows import silent_windows

SHOWN = 8
"""Most windows in a prompt."""
WIDTH = 12
"""Tokens of a window."""
NEAREST = 10
"""Neurons that are taken from each table."""
TABLES = ("similar_neuron", "cofiring_neuron")


def hard_negatives(records: LayerRecords, neuron: int, *, count: int = SHOWN, width: int = WIDTH) -> list[Excerpt]:
    """Windows on which the neuron is silent, hardest first (`hardness`), at most one of each document.

    A window without a token on which a neighbour fires is left out.
    """
    neighbours = [token_strengths(records, other) for other in nearest(records, neuron)]
    ranked = sorted(
        ((hardness(window, neighbours), window) for window in silent_windows(records[neuron], width)),
        key=lambda pair: (-pair[0], pair[1].position),
    )
    chosen: dict[int, Excerpt] = {}
    for share, window in ranked:
        if share > 0 and len(chosen) < count:
            chosen.setdefault(window.document, window)
    return list(chosen.values())


def nearest(records: LayerRecords, neuron: int) -> list[int]:
    """The neighbours of a neuron by direction, then by firing. Raises `CrateError` if the records have neither."""
    tables = [records.tables[name] for name in TABLES if name in records.tables]
    if not tables:
        raise CrateError(
            f"--hard-negatives needs records with the nearest neurons, got none for layer {records.layer}. "
            "Hint: remove the records and run: cratelm collect RUN --data DIR"
        )
    near = (index for table in tables for index in table[neuron][:NEAREST].tolist())
    return list(dict.fromkeys(index for index in near if index >= 0))


def hardness(window: Excerpt, neighbours: Sequence[Mapping[int, float]]) -> float:
    """Mean over the neighbours of the strength of the token of the window on which each fires most."""
    tokens = window.tokens.tolist()
    return float(np.mean([max(strength.get(token, 0.0) for token in tokens) for strength in neighbours] or [0.0]))


def token_strengths(records: LayerRecords, neuron: int) -> Mapping[int, float]:
    """Token id -> mean activation of a neuron on it in the explaining half, as a share of the largest mean.

    One silent occurrence is added to those of each token, so that a token that occurs once does not come first.
    """
    values = defaultdict[int, list[float]](list)
    for excerpt in _explaining(records, neuron):
        for token, value in zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True):
            values[token].append(max(value, 0.0))
    means = {token: sum(numbers) / (len(numbers) + 1) for token, numbers in values.items() if any(numbers)}
    largest = max(means.values(), default=1.0)
    return {token: mean / largest for token, mean in means.items()}


def _explaining(records: LayerRecords, neuron: int) -> Iterator[Excerpt]:
    """The longest excerpts of the explaining half of a neuron."""
    record = records[neuron]
    widths = [width for width, split, _ in record.excerpts if split == "explain"]
    for (width, split, _), excerpts in record.excerpts.items():
        if split == "explain" and width == max(widths):
            yield from excerpts
