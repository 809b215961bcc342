"""What the weights say about a neuron, for its page: tokens in and out, and neurons before and after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.direction_files import TOKEN_LISTS, LayerDirections, directions_file, read_directions
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.report.browser.catalogue import Layer

SHOWN = 10
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
            ends = {end: self.directions.ranked(name, index, end)[:SHOWN] for end in ("largest", "smallest")}
            lists[name] = {
                end: [[self.strings[one] if name in TOKEN_LISTS else one, number(value)] for one, value in pairs]
                for end, pairs in ends.items()
            }
        heads = {
            name: [number(share) for share in shares] for name, shares in self.directions.head_shares(index).items()
        }
        return {"lists": lists, "heads": heads}


def open_weights(layer: Layer) -> Weights | None:
    """The directions of a layer; None where they were not computed."""
    path = directions_file(layer.run, layer.layer, layer.tap)
    if not path.exists():
        return None
    tokenizer = layer.run / "directions" / "tokenizer.json"
    return Weights(
        directions=read_directions(layer.run, layer.layer, tap=layer.tap),
        strings=_strings(tokenizer, tokenizer.stat().st_mtime_ns) if tokenizer.exists() else (),
    )  # fmt: skip


@lru_cache(maxsize=4)
def _strings(tokenizer: Path, _changed: int) -> tuple[str, ...]:
    return tuple(token_strings(load_tokenizer(tokenizer)))


def number(value: np.floating | float) -> float | None:
    """Six significant digits, which is what a float32 holds; None where there is no number."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
