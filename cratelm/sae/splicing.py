"""The loss of a model when an activation is replaced; for `LanguageModel`s and Hugging Face models."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.observe import with_beginning
from cratelm.activations.taps import edit

Replacement = Callable[[Tensor], Tensor]
"""An activation of shape (batch, seq, features) to its replacement."""


@torch.no_grad()
def spliced_losses(
    model: nn.Module, tokens: Int[Tensor, "batch longer"], edits: Mapping[str, Replacement] | None = None,
    begin: Sequence[int] = (),
) -> Float[Tensor, "batch seq"]:  # fmt: skip
    """Cross-entropy in nats of each token after the first of a row, with activations replaced at these taps.

    The loss at index t is that of token t + 1. The model reads `begin` before every row; activations there stay.
    """
    whole = with_beginning(tokens, begin)
    changes = {tap: _after(len(begin), len(tokens), change) for tap, change in (edits or {}).items()}
    with edit(model, changes):
        return causal_model(model).token_losses(whole[:, :-1], whole[:, 1:])[:, len(begin) :].float()


def _after(begin: int, rows: int, change: Replacement) -> Replacement:
    """The replacement of all activations of a row but the first `begin`."""
    if not begin:
        return change

    def of_text(x: Tensor) -> Tensor:
        by_row = x.unflatten(0, (rows, -1)) if x.ndim == 2 else x
        new = change(by_row[:, begin:])
        return torch.cat([by_row[:, :begin], new.to(by_row)], dim=1).view_as(x)

    return of_text
