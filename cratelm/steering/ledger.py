"""The exact ledger of the last layer: every neuron's contribution to a token's logit, summing to the logit.

At one position, with the token's own sigma,

    contribution of neuron i = a_i W[t] . (g * (d_i - mean(d_i))) / sigma

and beside the neurons: the residual stream that goes round them (GPT-2, the residual variant of CRATE; CRATE itself has
none), the biases. `t` may be the difference of two tokens: then everything is, and shared terms cancel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.taps import capture, find_tap
from cratelm.errors import CrateError
from cratelm.steering.exit import Exit, find_exit
from cratelm.steering.place import Place

NEURONS, RESIDUAL, MAP_BIAS, NORM_BIAS, HEAD_BIAS = (
    "neurons", "residual stream", "bias of the neurons' map", "bias of the final norm", "bias of the head",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ledger:
    """A logit, or the difference of two, as a sum."""

    layer: int
    """Zero-based; the model's last."""
    position: int
    """Of the token after which the logit is read, zero-based."""
    token: int
    versus: int | None
    """The token whose logit is taken away, if any."""
    logit: float
    """What the model itself says."""
    activations: Float[np.ndarray, " neurons"]
    contributions: Float[np.ndarray, " neurons"]
    """In logits, one for each neuron."""
    terms: Mapping[str, float]
    """Everything that is no neuron, by name, in logits."""
    sigma: float
    """What the final norm divided by at this position."""

    @property
    def total(self) -> float:
        """The sum of all neurons and terms."""
        return float(self.contributions.sum() + sum(self.terms.values()))

    @property
    def remainder(self) -> float:
        """logit - total: rounding, about 1e-5 in float32."""
        return self.logit - self.total

    def largest(self, count: int) -> tuple[Int[np.ndarray, " top"], Int[np.ndarray, " top"]]:
        """Neurons with the most positive and with the most negative contributions, strongest first."""
        order = np.argsort(self.contributions, kind="stable")
        positive, negative = order[::-1][:count], order[:count]
        return positive[self.contributions[positive] > 0], negative[self.contributions[negative] < 0]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; neurons whose activation is 0 contribute nothing and are left out."""
        active = np.flatnonzero(self.activations)
        order = active[np.argsort(-np.abs(self.contributions[active]), kind="stable")]
        return {
            "layer": self.layer, "position": self.position, "token": self.token, "versus": self.versus,
            "logit": self.logit, "total": self.total, "remainder": self.remainder, "sigma": self.sigma,
            "terms": {NEURONS: float(self.contributions.sum()), **self.terms},
            "neurons": [
                {"neuron": int(i), "activation": float(activation), "contribution": float(contribution)}
                for i, activation, contribution in zip(
                    order, self.activations[order], self.contributions[order], strict=True
                )
            ],
        }  # fmt: skip


@torch.inference_mode()
def ledger(
    model: nn.Module,
    tokens: Int[Tensor, "1 seq"],
    *,
    token: int | None = None,
    versus: int | None = None,
    position: int = -1,
    exit: Exit | None = None,
) -> Ledger:
    """The ledger of the logit of `token` after `position` of a text (negative: from its end).

    Without a `token`, the one the model finds most probable. With `versus` the ledger is of logit[token] -
    logit[versus]. `exit` may be given where many are made of one model. The sums are made in float64 from what the
    model computed in its own precision; `remainder` is the difference to the model's own logit.
    """
    causal = causal_model(model)
    model, found = causal.module, find_exit(model) if exit is None else exit
    place = found.place
    around = causal.streams_around(place.layer)
    with capture(model, [place.tap, place.written, found.block, *(around or {}).values()]) as seen:
        logits = causal.logits(tokens)
    count = tokens.shape[1]
    if not -count <= position < count:
        raise CrateError(f"position {position} is not in the text: it has {count} tokens, 0 to {count - 1}")
    position %= count
    row = logits[0, position].double()
    if not bool(row.isfinite().all()):
        raise CrateError("the logits of this text are not finite, so there is no ledger. Use another text or model")
    token = int(row.argmax()) if token is None else token
    for one in (token, versus):
        if one is not None and not 0 <= one < len(row):
            raise CrateError(f"token {one} is not in the vocabulary: it has 0 to {len(row) - 1}. Name another")
    wide = found.double()
    here = {tap: _at(value, position, count).double() for tap, value in seen.items()}
    x, code = here[found.block], here[place.tap]
    weights = wide.head[token] - (0 if versus is None else wide.head[versus])
    reading, sigma = wide.reading(weights), wide.sigma(x)
    if around is None:  # `find_exit` checked that the neurons are added to the rest of the stream
        vectors = {RESIDUAL: x - here[place.written]}
    else:
        vectors = {f"{RESIDUAL}: {name}": here[tap] for name, tap in around.items()}
    vectors[MAP_BIAS] = _map_bias(model, place).to(x)
    terms = {name: float(vector @ reading / sigma) for name, vector in vectors.items()}
    terms[NORM_BIAS] = float(weights @ wide.bias)
    if wide.head_bias is not None:
        terms[HEAD_BIAS] = float(wide.head_bias[token] - (0 if versus is None else wide.head_bias[versus]))
    contributions = code * (wide.place.directions @ reading) / sigma
    return Ledger(
        layer=place.layer, position=position, token=token, versus=versus,
        logit=float(row[token] - (0 if versus is None else row[versus])), activations=code.cpu().numpy(),
        contributions=contributions.cpu().numpy(), terms={key: value for key, value in terms.items() if value},
        sigma=float(sigma),
    )  # fmt: skip


def _map_bias(model: nn.Module, place: Place) -> Float[Tensor, " d_model"]:
    """What the map behind the neurons adds beside them."""
    module = find_tap(model, place.written)
    bias = getattr(getattr(module, "down", module), "bias", None)
    return torch.zeros_like(place.directions[0]) if bias is None else bias.detach()


def _at(value: Tensor, position: int, count: int) -> Tensor:
    """The vector of one token of the only row; OPT lays the tokens of all rows behind each other."""
    return (value if value.ndim == 2 else value[0])[position - count]
