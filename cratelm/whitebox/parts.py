"""The parts of a model's wiring: the directions that neurons read and write, and the norms around them.

A model is seen as layers around a residual stream. Neuron i of a layer reads the stream z (after the attention) as
r_i . norm(z), and a code a_i adds a_i w_i to the stream that the next layer gets. In CRATE r_i = w_i, the atom d_i of
the tied dictionary; in GPT-2 they are a row of W1 and a column of W2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.post_norms import norm_gain

Rows = Float[Tensor, "rows d_model"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Norm:
    """A LayerNorm or RMSNorm at a fixed scale: norm(x) = gain * (x - mean(x)) / scale + bias, or without the mean."""

    module: nn.Module
    gain: Float[Tensor, " d_model"]
    centres: bool

    def along(self, directions: Rows) -> Rows:
        """The change of the norm's output per direction added to its input, times the scale of the input."""
        return (directions - directions.mean(dim=-1, keepdim=True) if self.centres else directions) * self.gain

    def before(self, reading: Rows) -> Rows:
        """The transpose of `along`: directions in the norm's input that correspond to directions in its output."""
        scaled = reading * self.gain
        return scaled - scaled.mean(dim=-1, keepdim=True) if self.centres else scaled


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerWiring:
    """One layer."""

    read: Float[Tensor, "neurons d_model"]
    """r_i: of a gated MLP the gate's rows."""
    read_bias: Float[Tensor, " neurons"] | None
    write: Float[Tensor, "neurons d_model"]
    """w_i."""
    norm: Norm
    """The norm before the neurons."""
    attention_norm: Norm | None
    """The norm before the attention; None if it was not recognised."""
    subspaces: Mapping[str, Float[Tensor, "heads p d_model"]] = field(default_factory=dict)
    """The heads' projections: `shared` for MSSA's U, else `query`, `key`, `value`; empty if not recognised."""
    output: Float[Tensor, "heads d_model p"] | None = None
    """Per head, the map from its values to the residual stream."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Wiring:
    """A whole model."""

    layers: tuple[LayerWiring, ...]
    embedding: Float[Tensor, "vocab d_model"] | None
    """None if embeddings have another width than the residual stream."""
    head: Float[Tensor, "vocab d_model"] | None
    final_norm: Norm | None


def seen_norm(module: nn.Module, like: Tensor) -> Norm:
    """The gain of a norm, and whether it subtracts the mean."""
    gain, centres = norm_gain(module, like)
    return Norm(module=module, gain=gain, centres=centres)
