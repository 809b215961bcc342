"""The latents of an autoencoder as neurons that `cratelm collect` records under a separate tap."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from cratelm.activations.subject import Subject
from cratelm.sae.autoencoder import Autoencoder


def observe_latents(subject: Subject, sae: Autoencoder) -> Subject:
    """A subject whose neurons are the latents of an autoencoder on one layer of another subject.

    A latent's direction in the residual stream is its decoder row; if the autoencoder decodes to neurons, that row
    times the directions of the neurons. Raises CrateError if the width is not the autoencoder's.
    """
    layer = sae.layer
    sae.check_width(subject.layers[layer])

    def forward(tokens: Int[Tensor, "batch seq"]) -> Mapping[int, Tensor]:
        return {layer: sae.encode(subject.forward(tokens)[layer])}

    rows = sae.W_dec.detach()
    through = None if subject.decoders is None else subject.decoders[layer]
    directions = rows if through is None else rows @ through.to(rows)
    return replace(
        subject, forward=forward, layers={layer: sae.width}, tap=f"sae-{sae.name}", decoders={layer: directions},
        identity=dict(subject.identity) | {"layers": [layer], "sae_hash": sae.sae_hash},
    )  # fmt: skip
