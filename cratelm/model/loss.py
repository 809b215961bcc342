"""Cross-entropy of the head, a few rows at a time: the logits of all tokens, N x V of them, never exist together."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}
"""How many logits exist at a time, by kind of device. Fewer rows at a time make the products slower: each chunk adds to
a gradient of the size of the embedding."""


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits are computed together."""
    return max(1, LOGITS_AT_ONCE.get(device.type, 2**25) // vocab_size)


def mean_loss(
    features: Float[Tensor, "tokens d_model"],
    head: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " tokens"],
    *,
    rows: int | None = None,
) -> Float[Tensor, ""]:
    """Mean over tokens of -log softmax(features head^T)[target], in nats; `rows` tokens at a time.

    The gradient of a chunk is computed along with its loss, from the same logits, so nothing is computed twice and the
    tensors saved for the backward pass have the size of `features` and `head`. Once differentiable; the backward pass
    can run once. Under autocast the products run in its type; the softmax and the sums stay in float32.
    """
    rows = rows or rows_at_once(len(head), features.device)
    if not torch.is_grad_enabled():
        return token_losses(features, head, targets, rows=rows).mean()
    return _MeanLoss.apply(features, head, targets, rows, _product_type(features))


def token_losses(
    features: Float[Tensor, "tokens d_model"],
    head: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " tokens"],
    *,
    rows: int | None = None,
) -> Float[Tensor, " tokens"]:
    """Each token's cross-entropy, in nats. A backward pass computes the logits again, a chunk at a time."""
    rows = rows or rows_at_once(len(head), features.device)
    pieces = zip(features.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_chunk_losses, piece, head, target, use_reentrant=False) for piece, target in pieces])


def _chunk_losses(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(features, head)
    return F.cross_entropy(logits.to(_at_least_float32(logits)), targets, reduction="none")


class _MeanLoss(torch.autograd.Function):
    """`mean_loss` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, head: Tensor, targets: Tensor, rows: int, product_type: torch.dtype
    ) -> Tensor:
        narrow, wide = head.to(product_type), _at_least_float32(features)
        total = torch.zeros((), dtype=wide, device=features.device)
        d_features = torch.empty_like(features)
        d_head = torch.zeros_like(head, dtype=wide)
        for piece, target, d_piece in zip(
            features.split(rows), targets.split(rows), d_features.split(rows), strict=True
        ):
            x = piece.to(product_type)
            logits = torch.mm(x, narrow.T).to(wide)
            total += _softmax_minus_target(logits, target).sum()
            gradient = logits.mul_(1 / len(features)).to(product_type)
            d_piece.copy_(torch.mm(gradient, narrow))
            if product_type == wide:
                torch.addmm(d_head, gradient.T, x, out=d_head)
            else:
                d_head.add_(torch.mm(gradient.T, x))
        ctx.save_for_backward(d_features, d_head)
        return total / len(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients in place; autograd therefore refuses a second backward pass."""
        d_features, d_head = ctx.saved_tensors
        return d_features.mul_(gradient), d_head.mul_(gradient), None, None, None


def _softmax_minus_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits into the gradient of their summed cross-entropy, in place; return the losses."""
    of_target = targets[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    losses = -logits.gather(1, of_target).squeeze(1)
    total = logits.exp_().sum(1, keepdim=True)
    logits.div_(total).scatter_add_(1, of_target, torch.full_like(of_target, -1, dtype=logits.dtype))
    return losses + total.log().squeeze(1)


def _product_type(features: Tensor) -> torch.dtype:
    kind = features.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
