"""A neuron's weights, for its page: input and output tokens, and neurons before and after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.direction_files import TOKEN_LISTS, LayerDirections, directions_file, read_directions
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.errors import CrateError
from cratelm.report.browser.catalogue import Layer

_SHOWN = 10
"""Entries of each end of a list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The directions of one layer and the text of their tokens."""

    directions: LayerDirections
    strings: Sequence[str]

    def of(self, index: int) -> dict[str, Any]:
        """Both ends of every list of a neuron, and the share of each head."""
        lists: dict[str, Any] = {}
        for name in self.directions.lists:
            ends = {end: self.directions.ranked(name, index, end)[:_SHOWN] for end in ("largest", "smallest")}
            lists[name] = {
                end: [[self.strings[id_] if name in TOKEN_LISTS else id_, number(value)] for id_, value in pairs]
                for end, pairs in ends.items()
            }
        heads = {
            name: [number(share) for share in shares] for name, shares in self.directions.head_shares(index).items()
        }
        return {"lists": lists, "heads": heads}


def open_weights(layer: Layer) -> Weights | None:
    """The directions of a layer; None if they were not computed. CrateError if their tokenizer is missing."""
    path = directions_file(layer.run, layer.layer, layer.tap)
    if not path.exists():
        return None
    tokenizer = layer.run / "directions" / "tokenizer.json"
    directions = read_directions(layer.run, layer.layer, tap=layer.tap)
    if not tokenizer.exists() and any(name in TOKEN_LISTS for name in directions.lists):
        raise CrateError(f"{tokenizer} is not there. Remove {tokenizer.parent} and run: cratelm directions {layer.run}")
    return Weights(
        directions=directions,
        strings=_strings(tokenizer, tokenizer.stat().st_mtime_ns) if tokenizer.exists() else (),
    )  # fmt: skip


@lru_cache(maxsize=4)
def _strings(tokenizer: Path, _changed: int) -> tuple[str, ...]:
    return tuple(token_strings(load_tokenizer(tokenizer)))


def number(value: np.floating | float) -> float | None:
    """The number with six significant digits, about the precision of float32; None for NaN and infinity."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
