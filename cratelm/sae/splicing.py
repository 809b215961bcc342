"""The loss of a model, ours or a Hugging Face one, with something else put in the place of an activation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.taps import edit
from cratelm.model.language_model import LanguageModel
from cratelm.model.loss import rows_at_once

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
        if isinstance(model, LanguageModel):
            return model.token_losses(inputs, targets).view(targets.shape).float()
        whole: Any = model
        logits = whole(inputs).logits
    rows = rows_at_once(logits.shape[-1], logits.device)
    pieces = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(piece.float(), target, reduction="none") for piece, target in pieces]
    return torch.cat(losses).view(targets.shape)
