"""Open sparse autoencoders for steering: by name in a run, or from a folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cratelm.errors import CrateError
from cratelm.sae.loading import check_trained_on, load_sae
from cratelm.steering.place import SparseCoder
from cratelm.workflows.opening import OpenModel

LATENTS_AT_ONCE = 256


def open_coder(opened: OpenModel, name: Path) -> tuple[SparseCoder, str]:
    """The autoencoder, and the tap of its latents' records in the run."""

    device = next(opened.model.parameters()).device
    sae = load_sae(opened.run or Path("."), name, device=device)
    check_trained_on(sae, opened.model_hash, opened.run or Path(opened.name))
    # Directions from decoded unit latents, so that they hold for decoders that scale their latents too.
    offset = sae.decode(torch.zeros(1, sae.width, device=device))
    directions = []
    for first in range(0, sae.width, LATENTS_AT_ONCE):
        latents = torch.zeros(min(LATENTS_AT_ONCE, sae.width - first), sae.width, device=device)
        latents[torch.arange(len(latents)), first + torch.arange(len(latents))] = 1
        directions.append(sae.decode(latents) - offset)
    coder = SparseCoder(
        tap=sae.place(opened.model), layer=sae.layer, directions=torch.cat(directions), encode=sae.encode,
        decode=sae.decode,
    )  # fmt: skip
    return coder, f"sae-{sae.name}"


def open_coders(opened: OpenModel, names: Sequence[Path]) -> tuple[list[SparseCoder], dict[int, str]]:
    """The autoencoders, at most one per layer, and the tap of their latents' records by layer."""
    coders, taps = [], dict[int, str]()
    for name in names:
        coder, tap = open_coder(opened, name)
        if coder.layer in taps:
            raise CrateError(f"each layer takes one --sae, got two for layer {coder.layer}")
        coders.append(coder)
        taps[coder.layer] = tap
    return coders, taps
