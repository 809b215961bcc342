"""sae-lens, imported when an autoencoder is trained and not before; and an untrained autoencoder of each kind from it.

The package is large and moves fast: it brings transformer-lens and Weights & Biases along, and each has broken its
import before. Nothing else of cratelm touches it.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from cratelm.errors import CrateError
from cratelm.sae.config import PENALTY_WARMUP, Kind, SaeConfig

INSTALL = "pip install 'cratelm[sae]'"
LEVELS = (8, 4, 2, 1)
"""Matryoshka: the first 1/8, 1/4, 1/2 and all of the latents each reconstruct the activation."""


def import_sae_lens() -> ModuleType:
    """The package, or one line that says why there is none."""
    with quiet():
        try:
            return importlib.import_module("sae_lens")
        except ModuleNotFoundError as error:
            if error.name == "sae_lens":
                raise CrateError(f"an autoencoder is trained by sae-lens, which is an extra: {INSTALL}") from None
            failure: Exception = error
        except Exception as error:  # a broken version, or what it brings along, raises whatever it likes
            failure = error
    try:
        version = metadata.version("sae-lens")
    except metadata.PackageNotFoundError:
        version = "of an unknown version"
    reason = " ".join(str(failure).split())[:120]
    raise CrateError(
        f"sae-lens {version} is installed but cannot be imported ({type(failure).__name__}: {reason}). "
        f"Install a version that cratelm knows: {INSTALL}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the warnings of its own dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


NAMES: dict[Kind, str] = {
    "standard": "Standard", "gated": "Gated", "jumprelu": "JumpReLU", "topk": "TopK", "batchtopk": "BatchTopK",
    "matryoshka": "MatryoshkaBatchTopK", "paper": "Paper",
}  # fmt: skip
"""Our kinds as sae-lens names its classes; the last is ours, named alike."""


def untrained(config: SaeConfig, d_in: int, steps: int, *, device: torch.device) -> Any:
    """A training class of sae-lens with fresh weights; the same seed gives the same ones."""
    home = import_sae_lens()
    if config.kind == "paper":
        with quiet():
            home = importlib.import_module("cratelm.sae.paper")
    name = f"{NAMES[config.kind]}TrainingSAE"
    settings = {"d_in": d_in, "d_sae": config.width(d_in), "dtype": "float32", "device": str(device)}
    settings |= _settings(config, config.width(d_in), steps)
    with quiet(), torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        torch.manual_seed(config.seed)
        return getattr(home, name)(getattr(home, f"{name}Config")(**settings))


def _settings(config: SaeConfig, width: int, steps: int) -> dict[str, Any]:
    """What the kinds differ in. All but the paper's see activations scaled to a mean norm of sqrt(d_in)."""
    warmup = int(PENALTY_WARMUP * steps)
    scaled: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}
    match config.kind:
        case "standard" | "gated":
            return scaled | {"l1_coefficient": config.penalty, "l1_warm_up_steps": warmup}
        case "paper":
            return {"l1_coefficient": config.penalty, "decoder_init_norm": None}
        case "jumprelu":
            return scaled | {
                "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(config.k), "l0_coefficient": 0.1,
                "l0_warm_up_steps": warmup, "apply_b_dec_to_input": False, "pre_act_loss_coefficient": 3e-6,
                "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 2.0, "jumprelu_ste_to_input": True,
            }  # fmt: skip
    settings = scaled | {"k": config.k}
    if config.kind != "topk":  # an average from 0 on: in a short training it has to hurry to leave it
        settings |= {"topk_threshold_lr": min(1.0, max(0.01, 10 / steps))}
    if config.kind == "matryoshka":
        settings |= {"matryoshka_widths": sorted({max(1, width // level) for level in LEVELS})}
    return settings
