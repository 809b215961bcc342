"""The loss of a model when an activation is replaced; for our models and Hugging Face models."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.taps import edit

Replacement = Callable[[Tensor], Tensor]
"""An activation of shape (batch, seq, features) to its replacement."""


@torch.no_grad()
def spliced_losses(
    model: nn.Module, tokens: Int[Tensor, "batch longer"], edits: Mapping[str, Replacement] | None = None
) -> Float[Tensor, "batch seq"]:
    """Cross-entropy in nats of each token after the first of a row, with activations replaced at these taps.

    The loss at index t is that of token t + 1.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with edit(model, dict(edits or {})):
        return causal_model(model).token_losses(inputs, targets).float()
