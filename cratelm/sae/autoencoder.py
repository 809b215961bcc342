"""A sparse autoencoder as everything after its training sees it: encode an activation to latents, decode them again.

Read from the files of `sae-lens` with torch alone, so steering, collecting and evaluating do without that package. Its
four forms of an encoder are here; the others that it trains are saved as one of them (BatchTopK and Matryoshka as
JumpReLU).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.places import find_places
from cratelm.activations.taps import near
from cratelm.errors import CrateError

WEIGHTS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
}
"""Architecture -> its tensors. `W_enc` is (d_in, width), `W_dec` (width, d_in), the rest vectors."""


class Autoencoder(nn.Module):
    """A trained sparse autoencoder at one place of a model.

    With x the activation, c = x - b_dec (or x, where the file says so) and W = W_enc:

    | architecture | latents f                                                          |
    |--------------|--------------------------------------------------------------------|
    | standard     | relu(c W + b_enc)                                                  |
    | topk         | relu(c W + b_enc) where it is among the k largest, 0 elsewhere     |
    | jumprelu     | relu(c W + b_enc) where c W + b_enc > threshold, 0 elsewhere       |
    | gated        | relu(c (W exp(r_mag)) + b_mag) where c W + b_gate > 0, 0 elsewhere |

    The reconstruction is f W_dec + b_dec. The weights are float32 and take no gradient.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    b_enc: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    threshold: Tensor

    def __init__(
        self,
        fields: Mapping[str, Any],
        state: Mapping[str, Tensor],
        *,
        name: str,
        tap: str,
        layer: int,
        sae_hash: str,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        """`fields` is what cfg.json says; `state` the tensors beside it, whose names and shapes were checked."""
        super().__init__()
        self.architecture: str = fields["architecture"]
        self.name, self.tap, self.layer, self.sae_hash = name, tap, layer, sae_hash
        self.d_in, self.width = int(fields["d_in"]), int(fields["d_sae"])
        self.description = dict(description or {})
        self._centres = bool(fields.get("apply_b_dec_to_input", True))
        self._k = int(fields.get("k") or self.width)
        self._by_norm = bool(fields.get("rescale_acts_by_decoder_norm", False))
        for key in WEIGHTS[self.architecture]:
            self.register_buffer(key, state[key].float())

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens width"]:
        """The latents of activations; none is negative."""
        centred = x.float() - self.b_dec if self._centres else x.float()
        if self.architecture == "gated":
            magnitude = torch.relu(centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag)
            return magnitude * (centred @ self.W_enc + self.b_gate > 0)
        before = centred @ self.W_enc + self.b_enc
        if self.architecture == "jumprelu":
            return torch.relu(before) * (before > self.threshold)
        if self.architecture == "topk":
            before = before * self.W_dec.norm(dim=-1) if self._by_norm else before
            values, where = before.topk(min(self._k, self.width), dim=-1)
            return torch.zeros_like(before).scatter_(-1, where, values.relu())
        return torch.relu(before)

    def decode(self, latents: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens d_in"]:
        """The activation that latents stand for."""
        if self._by_norm:
            latents = latents / self.W_dec.norm(dim=-1).clamp(min=1e-8)
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_in"]:
        """The reconstruction of activations."""
        return self.decode(self.encode(x))

    def place(self, model: nn.Module) -> str:
        """The path of the module in a model whose activation this reads, as `cratelm.capture` and `edit` take it."""
        places = find_places(model, self.tap)
        if self.layer not in places:
            there = ", ".join(map(str, places))
            raise CrateError(
                f"the autoencoder {self.name} is of layer {self.layer}, the model has no such layer at the tap "
                f"{self.tap} (there are {there}). Name another --sae"
            )
        return places[self.layer]

    def check_width(self, found: int) -> None:
        """Refuse a tap that gives activations of another width than this was made for."""
        if found != self.d_in:
            raise CrateError(
                f"the autoencoder {self.name} reads activations of width {self.d_in}, the tap {self.tap} of the model "
                f"gives {found} in layer {self.layer}. Name another --sae, or the tap it was trained on"
            )

    @property
    def num_parameters(self) -> int:
        """Numbers in its file of weights."""
        return sum(weight.numel() for weight in self.buffers())


def normal_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What cfg.json says, under today's names: files of sae-lens before version 6 have others."""
    found = dict(fields)
    if (found.get("activation_fn") or found.get("activation_fn_str")) == "topk":
        found |= {"architecture": "topk", "k": (found.get("activation_fn_kwargs") or {}).get("k")}
    found.setdefault("architecture", "standard")
    normal = found.get("normalize_activations") or "none"
    found["normalize_activations"] = "expected_average_only_in" if normal is True else normal
    return found


def check_fields(source: str, fields: Mapping[str, Any]) -> None:
    """Refuse what cannot be read here, saying what it is."""
    architecture = fields["architecture"]
    if architecture not in WEIGHTS:
        raise CrateError(
            f"{source} is of the architecture {architecture!r}; readable are {', '.join(WEIGHTS)}. Save it as one of "
            "them with sae-lens"
        )
    if (normal := fields["normalize_activations"]) != "none":
        raise CrateError(
            f"{source} reads activations normalised by {normal}; readable are those that take them as they are. "
            "Fold the scale into its weights with sae-lens (fold_activation_norm_scaling_factor)"
        )
    if architecture == "topk" and not fields.get("k"):
        raise CrateError(f"{source} is a topk autoencoder whose cfg.json names no k. Write it there")


def check_state(source: str, fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes are not those that cfg.json says."""
    d_in, width = int(fields["d_in"]), int(fields["d_sae"])
    shapes = {"W_enc": (d_in, width), "W_dec": (width, d_in), "b_dec": (d_in,)}
    for key in WEIGHTS[fields["architecture"]]:
        wanted = shapes.get(key, (width,))
        found = tuple(state[key].shape) if key in state else None
        if found != wanted:
            said = f"{key} is {found}, expected {wanted}" if found else f"{key} is missing (found {near(key, state)})"
            raise CrateError(f"the weights of {source} do not fit its cfg.json: {said}. Make it again")
