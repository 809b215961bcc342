"""The way out of a model: its last layer's neurons, the final norm and the head, as the linear map that they are.

    logit[t] = W[t] . (g * (x - mean(x)) / sigma(x) + b) + c[t],     x = rest + sum_i a_i d_i

with sigma^2 the variance of x plus epsilon; an RMSNorm takes no mean away and divides by the root mean square; CRATE
with a complete dictionary has no norm. For a given sigma every term is linear, so logits are exact sums over neurons.
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
from cratelm.steering.place import Place, neuron_places

Kind = Literal["layer", "rms", "none"]
TOLERANCE = 1e-3
"""How far, relative to the largest value, a foreign model may be from the formula above before it is refused."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exit:
    """The last layer, the final norm and the head of a model."""

    place: Place
    """The last layer's neurons."""
    block: str
    """The tap of the last layer's output x, which the final norm reads."""
    kind: Kind
    """LayerNorm, RMSNorm, or none."""
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    epsilon: float
    head: Float[Tensor, "vocab d_model"]
    head_bias: Float[Tensor, " vocab"] | None

    def double(self) -> "Exit":
        """The same in float64."""
        wide = {name: getattr(self, name).double() for name in ("gain", "bias", "head")}
        bias = None if self.head_bias is None else self.head_bias.double()
        place = replace(self.place, directions=self.place.directions.double())
        return replace(self, **wide, head_bias=bias, place=place)

    def centred(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """x - mean(x) for a LayerNorm, x for the others: linear in x."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def sigma(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
        """What the norm divides by."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        return (self.centred(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def reading(self, weights: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Rows of the head as directions in x: v with weights . (g * centred(x)) = v . x, before the division."""
        return self.centred(weights * self.gain)

    def logits(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """The whole way, by the formula."""
        normalised = self.gain * self.centred(x) / self.sigma(x) + self.bias
        logits = normalised @ self.head.T
        return logits if self.head_bias is None else logits + self.head_bias


def find_exit(model: nn.Module) -> Exit:
    """The exit of one of our models, or of a Hugging Face one whose structure is known.

    A foreign model is measured against the formula on a few tokens; one that does something else (a norm behind its
    MLP, scaled logits) is refused.
    """
    causal = causal_model(model)
    places = neuron_places(causal.module)
    place = places[max(places)]
    if causal.has_known_parts:
        return _own_exit(causal.module, place)
    with torch.no_grad():
        return _foreign_exit(causal.module, place)


def _own_exit(model: Any, place: Place) -> Exit:
    head, norm = model.embedding.weight.detach(), model.norm
    plain, zeros = torch.ones_like(head[0]), torch.zeros_like(head[0])
    if isinstance(norm, nn.LayerNorm):
        gain, bias = norm.weight.detach(), zeros if norm.bias is None else norm.bias.detach()
        return Exit(
            place=place, block=f"blocks.{place.layer}", kind="layer", gain=gain, bias=bias, epsilon=norm.eps,
            head=head, head_bias=None,
        )  # fmt: skip
    return Exit(
        place=place, block=f"blocks.{place.layer}", kind="none", gain=plain, bias=zeros, epsilon=0.0, head=head,
        head_bias=None,
    )  # fmt: skip


def _foreign_exit(model: Any, place: Place) -> Exit:
    """The head, and the norm that lies between the last block and it, known by what it reads and gives."""
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
        found = Exit(
            place=place, block=block, head=head.weight.detach(), head_bias=None if bias is None else bias.detach(),
            **candidate,
        )  # fmt: skip
        if _close(found.gain * found.centred(x) / found.sigma(x) + found.bias, read):
            break
    else:
        raise CrateError(
            f"the norm between the last layer of {type(model).__name__} and its head is none that is known here "
            "(LayerNorm, RMSNorm), so its logits are no sum over neurons"
        )
    if not _close(found.logits(x), logits):
        raise CrateError(f"{type(model).__name__} changes its logits after the head, so they are no sum over neurons")
    _check_direct(model, found, tokens, x)
    return found


def _candidates(model: nn.Module, width: int) -> list[dict[str, Any]]:
    """Norms outside the layers, as the fields of an `Exit`; an RMSNorm's gain may be stored less one (Gemma)."""
    found: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or tuple(weight.shape) != (width,) or any(part.isdigit() for part in name.split(".")):
            continue
        weight, bias = weight.detach(), getattr(module, "bias", None)
        bias = torch.zeros_like(weight) if bias is None else bias.detach()
        epsilon = next((float(getattr(module, key)) for key in ("eps", "variance_epsilon") if hasattr(module, key)), 0)
        kinds: tuple[tuple[Kind, Tensor], ...] = (("layer", weight), ("rms", weight), ("rms", weight + 1))
        found += [{"kind": kind, "gain": gain, "bias": bias, "epsilon": epsilon} for kind, gain in kinds]
    return found


def _check_direct(model: nn.Module, found: Exit, tokens: Int[Tensor, "1 seq"], x: Tensor) -> None:
    """What the neurons write must reach the norm as it is: something added there is added to x."""
    step = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device).view(1, 1, -1)
    with edit(model, {found.place.written: lambda y: y + step.view(*[1] * (y.ndim - 1), -1)}):
        with capture(model, [found.block]) as seen:
            all_logits(model, tokens)
        moved = seen[found.block]
    if not _close(moved, x + step):
        raise CrateError(
            f"the last layer of {type(model).__name__} passes what its neurons write through another map, "
            "so its logits are no sum over neurons"
        )


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
