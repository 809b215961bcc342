"""Import sae-lens, only when an autoencoder is trained, and make untrained autoencoders of each kind with it.

The package is large and changes often; its dependencies (transformer-lens, Weights & Biases) have broken its import
before. Only this module, `training.py` and `paper.py` import it.
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
from cratelm.sae.config import SaeConfig

INSTALL = "pip install 'cratelm[sae]'"


def import_sae_lens() -> ModuleType:
    """The package; a failed import becomes one line with the reason."""
    with quiet():
        try:
            return importlib.import_module("sae_lens")
        except ModuleNotFoundError as error:
            if error.name == "sae_lens":
                raise CrateError(f"training an autoencoder needs sae-lens. Hint: {INSTALL}") from None
            failure: Exception = error
        except Exception as error:  # a broken version or dependency raises exceptions of any kind
            failure = error
    try:
        version = metadata.version("sae-lens")
    except metadata.PackageNotFoundError:
        version = "(unknown version)"
    reason = " ".join(str(failure).split())[:120]
    raise CrateError(
        f"sae-lens {version} is installed but cannot be imported ({type(failure).__name__}: {reason}). "
        f"Hint: install a supported version with {INSTALL}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of sae-lens and its dependencies inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def untrained(config: SaeConfig, d_in: int, steps: int, *, device: torch.device) -> Any:
    """A training class of sae-lens with fresh weights, the same ones for the same seed."""
    import_sae_lens()
    width = config.width(d_in)
    settings = {"d_in": d_in, "d_sae": width, "dtype": "float32", "device": str(device)}
    settings |= config.entry.settings(config, width, steps)
    with quiet(), torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        torch.manual_seed(config.seed)
        training_class, config_class = config.entry.classes()
        return training_class(config_class(**settings))
