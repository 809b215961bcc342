"""List and load the autoencoders of a run.

RUN/saes/NAME/cfg.json, sae_weights.safetensors     the format of sae-lens
RUN/saes/NAME/sae.json                              ours: tap, layer, settings, hashes of data and model, origin
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cratelm.checksums import sha256_of, verify
from cratelm.errors import CrateError
from cratelm.rundir import check_regular, read_json
from cratelm.sae.autoencoder import Autoencoder, check_fields, check_state, normal_fields

CONFIG, WEIGHTS_FILE, DESCRIPTION_FILE = "cfg.json", "sae_weights.safetensors", "sae.json"

HOOKS = (
    (r"blocks\.(\d+)\.mlp\.hook_post", "neurons"),
    (r"blocks\.(\d+)\.attn\.hook_z", "heads"),
    (r"blocks\.(\d+)\.hook_resid_post", "residual"),
)
"""Hook names of TransformerLens -> taps. `hook_resid_pre` is the residual tap of the previous layer."""


def saes_folder(run: Path) -> Path:
    """The folder of a run's autoencoders."""
    return run / "saes"


def sae_names(run: Path) -> list[str]:
    """The names of a run's complete autoencoders."""
    return sorted(path.parent.name for path in saes_folder(run).glob(f"*/{CONFIG}"))


def load_sae(
    run: str | Path, name: str | Path, *, tap: str | None = None, layer: int | None = None,
    device: torch.device | str = "cpu",
) -> Autoencoder:  # fmt: skip
    """Load the autoencoder `name` of a run, or a folder in the format of sae-lens.

    `tap` and `layer` are needed for a folder whose files do not name them.
    """
    folder = find_sae(Path(run), name)
    source = str(folder)
    verify(folder / CONFIG)
    verify(folder / WEIGHTS_FILE)
    try:
        fields = normal_fields(read_json(folder / CONFIG, hint="Hint: train the autoencoder again"))
        state, digest = _read_weights(folder / WEIGHTS_FILE)
        check_fields(source, fields)
        check_state(source, fields, state)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CrateError(f"{folder / CONFIG} has a missing or invalid field: {error}") from None
    description = _described(folder)
    place = (description.get("tap"), description.get("layer")) if description else _place_of_hook(fields)
    tap, layer = tap or place[0], layer if layer is not None else place[1]
    if tap is None or layer is None:
        raise CrateError(
            f"{folder} must name its tap and layer, got {_hook_name(fields) or 'no hook_name in cfg.json'}. "
            "Hint: --tap neurons|heads|residual|PATH --layer N"
        )
    return Autoencoder(
        fields, state, name=folder.name, tap=tap, layer=layer, sae_hash=digest, description=description
    ).to(device)  # fmt: skip


def check_trained_on(sae: Autoencoder, model_hash: str, run: Path) -> None:
    """Refuse an autoencoder that `cratelm sae train` trained on another model."""
    trained_on = sae.description.get("settings", {}).get("model_hash")
    if trained_on not in (None, model_hash):
        raise CrateError(
            f"the autoencoder {sae.name} must be trained on the model of {run} ({model_hash[:12]}), got "
            f"{trained_on[:12]}. Hint: train it again with another --name"
        )


def find_sae(run: Path, name: str | Path) -> Path:
    """The folder of an autoencoder, from its name in the run or from its path."""
    inside = saes_folder(run) / name
    for folder in (inside, Path(name)):
        if (folder / CONFIG).is_file():
            return folder
    names = ", ".join(sae_names(run))
    hint = f"use one of them ({names})" if names else f"cratelm sae train {run} --data DIR --layer N"
    raise CrateError(f"--sae must be an autoencoder of {run} or a folder, got {name}. Hint: {hint}")


def _read_weights(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """The tensors, and the SHA-256 of the file."""
    try:
        return load_file(check_regular(path)), sha256_of(path)
    except FileNotFoundError:
        raise CrateError(f"{path.parent} must have the file {path.name}. Hint: train the autoencoder again") from None
    except (SafetensorError, OSError) as error:
        raise CrateError(f"{path} is damaged ({error}). Hint: train the autoencoder again") from None


def _described(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    return read_json(path, made_by="cratelm sae train") if path.exists() else {}


def _hook_name(fields: Mapping[str, Any]) -> str | None:
    """The hook name in cfg.json."""
    metadata = fields.get("metadata")
    hook = metadata.get("hook_name") if isinstance(metadata, Mapping) else None
    return hook or fields.get("hook_name") or fields.get("hook_point")


def _place_of_hook(fields: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Tap and layer of a TransformerLens hook; a module path of a Hugging Face model is a tap already."""
    hook = _hook_name(fields) or ""
    for pattern, tap in HOOKS:
        if match := re.fullmatch(pattern, hook):
            return tap, int(match[1])
    if (match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook)) and int(match[1]) > 0:
        return "residual", int(match[1]) - 1
    if match := re.search(r"(?<=\.)\d+(?=\.|$)", hook):
        return (None, None) if "hook_" in hook else (hook, int(match[0]))
    return None, None
