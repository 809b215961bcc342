"""Coding rates: nats needed to encode a set of tokens to a given precision, as a whole or by subspaces.

    R(Z)      = 1/2 logdet( I + d / (N eps^2) Z^T Z )                            Z: N tokens of width d
    R^c(Z; U) = sum_k 1/2 logdet( I + p / (N eps^2) (U_k Z)^T (U_k Z) )          U_k: projection of head k to width p

Sparse rate reduction is max R - R^c - lambda ||Z||_0 (arXiv 2306.01129): MSSA is derived as a step that lowers R^c.
R - R^c needs orthonormal bases instead of U, for both to have the same units. It can be negative if subspaces overlap,
because R^c counts a component once for each subspace that contains it. The smaller of the two Gram matrices is used,
which has the same determinant, in float64 and by Cholesky: float32 is too imprecise for a thousand dimensions.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cratelm.errors import CrateError

Rates = Float[Tensor, " sets"]

EPSILON = 0.1
"""Precision; its square is the 0.01 of the released code for CRATE's figures."""
EPSILON_RANGE = (1e-6, 1e6)
"""Outside of it, rounding loses one of the two terms in the determinant."""


def coding_rate(z: Float[Tensor, "sets tokens width"], *, epsilon: float = EPSILON) -> Rates:
    """R of each set of tokens, in nats."""
    return _half_log_det(z, z.shape[2] / (z.shape[1] * epsilon**2))


def subspace_rate(
    z: Float[Tensor, "sets tokens d_model"], subspaces: Float[Tensor, "heads p d_model"], *, epsilon: float = EPSILON
) -> Rates:
    """R^c of each set, in nats, with the projections as they are."""
    return sum((coding_rate(part, epsilon=epsilon) for part in _projected(z, subspaces)), torch.zeros(()).double())


def normalised_rate(features: Float[Tensor, "sets heads tokens p"], *, epsilon: float = EPSILON) -> Rates:
    """R^c as the released code for CRATE's figures measures it: each token's projection to each head at unit length.

    1/2 logdet( I + p / (N eps^2) V^T V ) summed over heads, so that neither the scale of U nor of the tokens counts.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=3)
    rates = [_half_log_det(head, head.shape[2] / (head.shape[1] * epsilon**2)) for head in unit.unbind(1)]
    return torch.stack(rates).sum(dim=0)


def projections(
    z: Float[Tensor, "sets tokens d_model"], subspaces: Float[Tensor, "heads p d_model"]
) -> Float[Tensor, "sets heads tokens p"]:
    """U_k Z for each head."""
    return torch.stack(_projected(z, subspaces), dim=1)


def orthonormal(subspaces: Float[Tensor, "heads p d_model"]) -> Float[Tensor, "heads p d_model"]:
    """An orthonormal basis of each head's subspace, so that R and R^c have the same units."""
    return torch.linalg.qr(subspaces.double().mT).Q.mT


def sparse_objective(
    reduction: Rates, code: Float[Tensor, "sets tokens neurons"], penalty: Float[Tensor, " #neurons"]
) -> Rates:
    """R - R^c - lambda ||A||_0 of each set, in nats: the paper's form, with the codes of all N tokens of the set.

    R - R^c is a rate per token and ||A||_0 a sum over N tokens, so the second term grows with N. `penalty_per_token`
    is the term to compare layers by: R - R^c - lambda ||A||_0 / N.
    """
    return reduction - penalty_per_token(code, penalty).sum(dim=1).to(reduction)


def penalty_per_token(
    code: Float[Tensor, "*sets tokens neurons"], penalty: Float[Tensor, " #neurons"]
) -> Float[Tensor, "*sets tokens"]:
    """lambda ||a||_0 of each token, in nats; its mean over N tokens is lambda ||A||_0 / N."""
    return ((code != 0) * penalty.double().to(code.device)).sum(dim=-1)


def tokens_needed(width: int, context: int) -> int:
    """Tokens of a set: whole contexts, at least as many tokens as the model is wide.

    The rate of a smaller set depends on the number of tokens more than on their directions, because a set cannot span
    more dimensions than it has tokens.
    """
    return -(-width // context) * context


def check_tokens(available: int, width: int, context: int) -> None:
    """Raise CrateError if the tokens do not fill a set."""
    if available < (needed := tokens_needed(width, context)):
        raise CrateError(
            f"a coding rate of a model of width {width} needs {needed:,} tokens (whole contexts of {context:,}), "
            f"got {available:,}. Give more --tokens, or tokenize more text"
        )


def _projected(z: Tensor, subspaces: Tensor) -> list[Tensor]:
    return [z.double() @ head.double().T for head in subspaces]


def _half_log_det(z: Float[Tensor, "sets tokens width"], weight: float) -> Rates:
    """1/2 logdet(I + weight Z Z^T): the factor L of Cholesky has determinant sqrt(det), and a diagonal to read it."""
    wide = z.double()
    gram = wide @ wide.mT if z.shape[1] < z.shape[2] else wide.mT @ wide
    identity = torch.eye(gram.shape[1], dtype=torch.float64, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(identity + weight * gram)
    if bool(failed.any()) or not bool(factor.isfinite().all()):
        raise CrateError(
            "a coding rate is undefined: activations are not finite, or too large for this precision. "
            "Give a larger --epsilon; if the loss is not finite either, train again"
        )
    return factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
