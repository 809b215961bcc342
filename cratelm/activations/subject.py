"""The input of a collection: a model as a function from tokens to codes, and the corpus it reads."""

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
    """The tokens to read."""

    tokens: Integer[np.ndarray, " stream"]
    documents: Int[np.ndarray, " bounds"]
    """Where each document starts, and where the last ends."""
    end_of_text: int
    identity: Mapping[str, Any]
    """Fields of `records.json` about the corpus: split, hashes of data and tokenizer."""
    begin_of_text: tuple[int, ...] | None = None
    """The token that was named for the beginning of rows when tokenizing; None: the model's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The observed model."""

    forward: Forward
    layers: Mapping[int, int]
    """Neurons of each layer."""
    context: int
    """Longest sequence, in tokens, without the beginning of a row."""
    tap: str
    """Name of the tap in the run directory: `neurons` for a model's own."""
    identity: Mapping[str, Any]
    """Fields of `records.json` about the model: hash of the weights, precision."""
    decoders: Mapping[int, Float[Tensor, "neurons d_model"]] | None = None
    """Decoder directions per layer; None for a tap without them."""
    row_beginning: tuple[int, ...] | None = None
    """Tokens that `forward` puts before every row and leaves out of the codes, so that no statistic, excerpt or table
    holds them. None: `forward` adds nothing, and a row at the start of a document includes the end-of-text token that
    leads the document."""
