"""A trained sparse autoencoder: encode activations to latents and decode them.

It reads the files of sae-lens with torch alone, so steering, collecting and evaluating do not need that package. All
four inference forms of sae-lens are here; other kinds are saved as one of them (BatchTopK and Matryoshka as JumpReLU).
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

    With x the activation, c = x - b_dec (or x, if apply_b_dec_to_input is false) and W = W_enc:

    | architecture | latents f                                                          |
    |--------------|--------------------------------------------------------------------|
    | standard     | relu(c W + b_enc)                                                  |
    | topk         | relu(c W + b_enc) for the k largest, 0 elsewhere                   |
    | jumprelu     | relu(c W + b_enc) where c W + b_enc > threshold, 0 elsewhere       |
    | gated        | relu(c (W exp(r_mag)) + b_mag) where c W + b_gate > 0, 0 elsewhere |

    The reconstruction is f W_dec + b_dec. The weights are float32 buffers, without gradients.
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
        """`fields` is the content of cfg.json; `state` has the tensors, with checked names and shapes."""
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
        """The latents of activations, all at least 0."""
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
        """The reconstruction from latents."""
        if self._by_norm:
            latents = latents / self.W_dec.norm(dim=-1).clamp(min=1e-8)
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_in"]:
        """The reconstruction of activations."""
        return self.decode(self.encode(x))

    def place(self, model: nn.Module) -> str:
        """The path of the module in a model whose activation is encoded, for `cratelm.capture` and `cratelm.edit`."""
        places = find_places(model, self.tap)
        if self.layer not in places:
            raise CrateError(
                f"the autoencoder {self.name} must be at a layer of the model ({', '.join(map(str, places))}), got "
                f"{self.layer} (tap {self.tap}). Hint: use another --sae"
            )
        return places[self.layer]

    def check_width(self, width: int) -> None:
        """Refuse activations of another width."""
        if width != self.d_in:
            raise CrateError(
                f"the autoencoder {self.name} must have the width {width} (tap {self.tap}, layer {self.layer}), "
                f"got {self.d_in}. Hint: use another --sae, or the tap that it was trained on"
            )

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.buffers())


def normal_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of cfg.json under the names of sae-lens 6; earlier versions have others."""
    names = dict(fields)
    if (names.get("activation_fn") or names.get("activation_fn_str")) == "topk":
        names |= {"architecture": "topk", "k": (names.get("activation_fn_kwargs") or {}).get("k")}
    names.setdefault("architecture", "standard")
    normal = names.get("normalize_activations") or "none"
    names["normalize_activations"] = "expected_average_only_in" if normal is True else normal
    return names


def check_fields(source: str, fields: Mapping[str, Any]) -> None:
    """Refuse architectures and settings that are not supported."""
    architecture = fields["architecture"]
    if architecture not in WEIGHTS:
        raise CrateError(
            f"the architecture of {source} must be one of {', '.join(WEIGHTS)}, got {architecture!r}. Hint: save it as "
            "one of them with sae-lens"
        )
    if (normal := fields["normalize_activations"]) != "none":
        raise CrateError(
            f"normalize_activations of {source} must be none, got {normal}. Hint: fold the scale into the weights with "
            "sae-lens (fold_activation_norm_scaling_factor)"
        )
    if architecture == "topk" and not fields.get("k"):
        raise CrateError(f"cfg.json of the topk autoencoder {source} must have k, got none. Hint: add it")


def check_state(source: str, fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes do not match cfg.json."""
    d_in, width = int(fields["d_in"]), int(fields["d_sae"])
    shapes = {"W_enc": (d_in, width), "W_dec": (width, d_in), "b_dec": (d_in,)}
    for key in WEIGHTS[fields["architecture"]]:
        expected = shapes.get(key, (width,))
        shape = tuple(state[key].shape) if key in state else None
        if shape != expected:
            reason = f"got {shape}" if shape else f"it is missing (present: {near(key, state)})"
            raise CrateError(f"{key} of {source} must have the shape {expected} of its cfg.json, {reason}")
