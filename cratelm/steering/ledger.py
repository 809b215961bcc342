"""The exact ledger of the last layer: every neuron's contribution to a token's logit, summing to the logit.

At one position, with the token's own sigma,

    contribution of neuron i = a_i W[t] . (g * (d_i - mean(d_i))) / sigma

plus named terms: the residual stream that bypasses the neurons (GPT-2 and the residual variant of CRATE, but not plain
CRATE) and the biases. `t` may be the difference of two tokens; then shared terms cancel.
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
from cratelm.steering.place import NeuronPlace
from cratelm.steering.readout import Readout, find_readout

NEURONS, RESIDUAL, MAP_BIAS, NORM_BIAS, HEAD_BIAS = (
    "neurons", "residual stream", "bias of the neurons' map", "bias of the final norm", "bias of the head",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ledger:
    """A logit, or the difference of two logits, as a sum of contributions."""

    layer: int
    """Zero-based; the model's last."""
    position: int
    """Of the token after which the logit is read, zero-based."""
    token: int
    versus: int | None
    """The token whose logit is subtracted, if any."""
    logit: float
    """As the model computes it."""
    activations: Float[np.ndarray, " neurons"]
    contributions: Float[np.ndarray, " neurons"]
    """In logits, one per neuron."""
    terms: Mapping[str, float]
    """Contributions other than neurons, by name, in logits."""
    sigma: float
    """The divisor of the final norm at this position."""

    @property
    def total(self) -> float:
        """The sum of all neurons and terms."""
        return float(self.contributions.sum() + sum(self.terms.values()))

    @property
    def remainder(self) -> float:
        """logit - total: rounding, about 1e-5 in float32."""
        return self.logit - self.total

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, without the neurons whose activation is 0: they contribute nothing."""
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
    readout: Readout | None = None,
) -> Ledger:
    """The ledger of the logit of `token` after `position` of a text (negative: from its end).

    `token` defaults to the most probable token. With `versus` the ledger is of logit[token] - logit[versus]. Pass
    `readout` to reuse it over many ledgers of one model. The sums are in float64, from activations in the model's own
    precision.
    """
    causal = causal_model(model)
    readout = find_readout(model) if readout is None else readout
    place = readout.place
    bypass = causal.streams_around(place.layer)
    with capture(causal.module, [place.tap, place.written, readout.block, *(bypass or {}).values()]) as seen:
        logits = causal.logits(tokens)
    count = tokens.shape[1]
    if not -count <= position < count:
        raise CrateError(f"position must be {-count} to {count - 1} in a text of {count} tokens, got {position}")
    position %= count
    row = logits[0, position].double()
    if not bool(row.isfinite().all()):
        raise CrateError("the logits of this text are not finite, so they have no ledger. Use another text or model")
    token = int(row.argmax()) if token is None else token
    for name, wanted in (("token", token), ("versus", versus)):
        if wanted is not None and not 0 <= wanted < len(row):
            raise CrateError(f"{name} must be a token id from 0 to {len(row) - 1}, got {wanted}")
    wide = readout.double()
    here = {tap: _at(value, position, count).double() for tap, value in seen.items()}
    x, code = here[readout.block], here[place.tap]
    weights = wide.head[token] - (0 if versus is None else wide.head[versus])
    reading, sigma = wide.reading(weights), wide.sigma(x)
    if bypass is None:  # `find_readout` has checked that the neurons' output is added to the rest of the stream
        vectors = {RESIDUAL: x - here[place.written]}
    else:
        vectors = {f"{RESIDUAL}: {name}": here[tap] for name, tap in bypass.items()}
    vectors[MAP_BIAS] = _map_bias(causal.module, place).to(x)
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


def _map_bias(model: nn.Module, place: NeuronPlace) -> Float[Tensor, " d_model"]:
    """Bias of the linear map that reads the neurons."""
    module = find_tap(model, place.written)
    bias = getattr(getattr(module, "down", module), "bias", None)
    return torch.zeros_like(place.directions[0]) if bias is None else bias.detach()


def _at(value: Tensor, position: int, count: int) -> Tensor:
    """The vector at one token of a batch of one row. OPT flattens batch and tokens."""
    return (value if value.ndim == 2 else value[0])[position - count]
