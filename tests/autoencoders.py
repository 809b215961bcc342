"""Made-up autoencoders in the files of sae-lens, for tests that begin where training ends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cratelm.sae.loading import saes_folder

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")


def random_state(architecture: str, d_in: int, width: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Weights of one of the four architectures, drawn so that about half of the latents fire."""

    def draw(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))

    state = {"W_enc": draw(d_in, width), "W_dec": draw(width, d_in), "b_dec": draw(d_in)}
    if architecture == "gated":
        return state | {"b_gate": draw(width), "b_mag": draw(width), "r_mag": draw(width)}
    state["b_enc"] = draw(width)
    return state | ({"threshold": draw(width, low=0.1, high=0.5)} if architecture == "jumprelu" else {})


def write_sae(
    folder: Path, architecture: str, rng: np.random.Generator, *, d_in: int = 6, width: int = 10,
    fields: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """An autoencoder with random weights as sae-lens would have saved it; returns the weights.

    `fields` changes what its cfg.json says.
    """
    state = random_state(architecture, d_in, width, rng)
    folder.mkdir(parents=True)
    save_file(state, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture, "d_in": d_in, "d_sae": width, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
    }  # fmt: skip
    config |= {"k": 3} if architecture == "topk" else {}
    (folder / "cfg.json").write_text(json.dumps(config | dict(fields or {})))
    return state


def write_run_sae(
    run: Path, name: str, architecture: str, rng: np.random.Generator, *, tap: str = "neurons", layer: int = 0,
    d_in: int = 64, width: int = 24, **described: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The same as the autoencoder NAME of a run, with a description of ours."""
    folder = saes_folder(run) / name
    state = write_sae(folder, architecture, rng, d_in=d_in, width=width)
    description = {"format_version": 1, "name": name, "tap": tap, "layer": layer} | described
    (folder / "sae.json").write_text(json.dumps(description))
    return state
