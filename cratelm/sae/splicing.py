"""The loss of a model, ours or a Hugging Face one, with something else put in the place of an activation."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.taps import edit

Change = Callable[[Tensor], Tensor]
"""An activation, (batch, seq, features), to what takes its place."""


@torch.no_grad()
def spliced_losses(
    model: nn.Module, tokens: Int[Tensor, "batch longer"], edits: Mapping[str, Change] | None = None
) -> Float[Tensor, "batch seq"]:
    """Cross-entropy in nats of every token but the first of each row, with these edits at these taps.

    The loss at index t is of token t + 1, which the activations up to t predict.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with edit(model, dict(edits or {})):
        return causal_model(model).token_losses(inputs, targets).float()
