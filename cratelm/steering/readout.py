"""The readout of a model: its last layer's neurons, the final norm and the head, written as a linear map.

    logit[t] = W[t] . (g * (x - mean(x)) / sigma(x) + b) + c[t],     x = rest + sum_i a_i d_i

with sigma^2 the variance of x plus epsilon. An RMSNorm does not subtract the mean and divides by the root mean square;
CRATE with a complete dictionary has no norm. At a given sigma every term is linear: logits are exact sums over neurons.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.places import find_places
from cratelm.activations.taps import capture, edit
from cratelm.errors import CrateError
from cratelm.steering.generate import all_logits
from cratelm.steering.place import NeuronPlace, neuron_places

NormKind = Literal["layer", "rms", "none"]
READOUT_TOLERANCE = 1e-3
"""Largest deviation of a Hugging Face model from the formula above, relative to the largest value."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Readout:
    """The last layer, the final norm and the head of a model."""

    place: NeuronPlace
    """The last layer's neurons."""
    block: str
    """Tap of the last layer's output x, the input of the final norm."""
    kind: NormKind
    """LayerNorm, RMSNorm, or none."""
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    epsilon: float
    head: Float[Tensor, "vocab d_model"]
    head_bias: Float[Tensor, " vocab"] | None

    def double(self) -> "Readout":
        """A copy in float64."""
        wide = {name: getattr(self, name).double() for name in ("gain", "bias", "head")}
        bias = None if self.head_bias is None else self.head_bias.double()
        place = replace(self.place, directions=self.place.directions.double())
        return replace(self, **wide, head_bias=bias, place=place)

    def centred(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """x - mean(x) for a LayerNorm, x for the others: linear in x."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def sigma(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """The divisor of the norm."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        return (self.centred(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def reading(self, weights: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Rows of the head as directions in x: v with weights . (g * centred(x)) = v . x, before division by sigma."""
        return self.centred(weights * self.gain)

    def logits(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Logits by the formula."""
        normalised = self.gain * self.centred(x) / self.sigma(x) + self.bias
        logits = normalised @ self.head.T
        return logits if self.head_bias is None else logits + self.head_bias


def find_readout(model: nn.Module) -> Readout:
    """The readout of a `LanguageModel`, or of a Hugging Face model whose structure is known.

    A Hugging Face model is compared with the formula on a few tokens. Raises `CrateError` if it computes anything else,
    such as a norm after its MLP or scaled logits.
    """
    causal = causal_model(model)
    places = neuron_places(causal.module)
    place = places[max(places)]
    if causal.has_known_parts:
        return _known_readout(causal.module, place)
    with torch.no_grad():
        return _foreign_readout(causal.module, place)


def _known_readout(model: Any, place: NeuronPlace) -> Readout:
    head, norm = model.embedding.weight.detach(), model.norm
    zeros = torch.zeros_like(head[0])
    gain, bias, epsilon = torch.ones_like(zeros), zeros, 0.0
    kind: NormKind = "none"
    if isinstance(norm, nn.LayerNorm):
        gain, bias = norm.weight.detach(), zeros if norm.bias is None else norm.bias.detach()
        kind, epsilon = "layer", norm.eps
    return Readout(
        place=place, block=f"blocks.{place.layer}", kind=kind, gain=gain, bias=bias, epsilon=epsilon, head=head,
        head_bias=None,
    )  # fmt: skip


def _foreign_readout(model: Any, place: NeuronPlace) -> Readout:
    """The head, and the norm between the last block and the head, identified by its input and output."""
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    block = find_places(model, "residual")[place.layer]
    device = next(model.parameters()).device
    tokens = torch.arange(1, 6, device=device)[None] % head.weight.shape[0]
    with capture(model, [block, f"{names[head]}:input"]) as seen:
        logits = all_logits(model, tokens)
    x, read = seen[block], seen[f"{names[head]}:input"]
    bias = getattr(head, "bias", None)
    for candidate in _candidates(model, x.shape[-1]) if read.shape == x.shape else []:
        readout = Readout(
            place=place, block=block, head=head.weight.detach(), head_bias=None if bias is None else bias.detach(),
            **candidate,
        )  # fmt: skip
        if _close(readout.gain * readout.centred(x) / readout.sigma(x) + readout.bias, read):
            break
    else:
        raise CrateError(
            f"the norm between the last layer of {type(model).__name__} and its head must be a LayerNorm or RMSNorm: "
            "only then are the logits sums over neurons"
        )
    if not _close(readout.logits(x), logits):
        raise CrateError(f"{type(model).__name__} changes its logits after the head, so they are not sums over neurons")
    _check_direct(model, readout, tokens, x)
    return readout


def _candidates(model: nn.Module, width: int) -> list[dict[str, Any]]:
    """Norms outside the layers, as fields of a `Readout`. An RMSNorm may store its gain minus 1 (Gemma)."""
    candidates: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or tuple(weight.shape) != (width,) or any(part.isdigit() for part in name.split(".")):
            continue
        weight, bias = weight.detach(), getattr(module, "bias", None)
        bias = torch.zeros_like(weight) if bias is None else bias.detach()
        epsilon = next((float(getattr(module, key)) for key in ("eps", "variance_epsilon") if hasattr(module, key)), 0)
        kinds: tuple[tuple[NormKind, Tensor], ...] = (("layer", weight), ("rms", weight), ("rms", weight + 1))
        candidates += [{"kind": kind, "gain": gain, "bias": bias, "epsilon": epsilon} for kind, gain in kinds]
    return candidates


def _check_direct(model: nn.Module, readout: Readout, tokens: Int[Tensor, "1 seq"], x: Tensor) -> None:
    """Check that the neurons' output reaches the norm unchanged: a step added to the output is added to x."""
    step = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device).view(1, 1, -1)
    with edit(model, {readout.place.written: lambda y: y + step.view(*[1] * (y.ndim - 1), -1)}):
        with capture(model, [readout.block]) as seen:
            all_logits(model, tokens)
        moved = seen[readout.block]
    if not _close(moved, x + step):
        raise CrateError(
            f"the last layer of {type(model).__name__} passes the neurons' output through another map, "
            "so its logits are not sums over neurons"
        )


def _close(x: Tensor, reference: Tensor) -> bool:
    return x.shape == reference.shape and bool((x - reference).abs().max() <= READOUT_TOLERANCE * reference.abs().max())
