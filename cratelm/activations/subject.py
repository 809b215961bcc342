"""What collection observes: a model as a function from tokens to codes, and the corpus it reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer
from torch import Tensor

Forward = Callable[[Int[Tensor, "batch seq"]], Mapping[int, Float[Tensor, "batch seq neurons"]]]
"""Token ids to the code of each layer."""


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
    decoders: Mapping[int, Float[Tensor, "neurons d_model"]] | None = None
    """The direction each neuron writes in, per layer; None where a tap has none."""
