"""A sparse autoencoder of a run, or of a folder, as steering takes it."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cratelm.steering.place import SparseCoder
    from cratelm.workflows.opening import OpenModel

ROWS_AT_ONCE = 256


def open_coder(chosen: "OpenModel", name: Path) -> tuple["SparseCoder", str]:
    """The autoencoder, and the tap of its latents' records in the run."""
    import torch

    from cratelm.sae.loading import check_trained_on, load_sae
    from cratelm.steering.place import Coder

    device = next(chosen.model.parameters()).device
    sae = load_sae(chosen.run or Path("."), name, device=device)
    check_trained_on(sae, chosen.model_hash, chosen.run or Path(chosen.name))
    nothing = sae.decode(torch.zeros(1, sae.width, device=device))
    rows = []  # by what decoding does, so that it holds for decoders that scale their latents too
    for first in range(0, sae.width, ROWS_AT_ONCE):
        one = torch.zeros(min(ROWS_AT_ONCE, sae.width - first), sae.width, device=device)
        one[torch.arange(len(one)), first + torch.arange(len(one))] = 1
        rows.append(sae.decode(one) - nothing)
    coder = Coder(
        tap=sae.place(chosen.model), layer=sae.layer, directions=torch.cat(rows), encoder=sae.encode,
        decoder=sae.decode,
    )  # fmt: skip
    return coder, f"sae-{sae.name}"
