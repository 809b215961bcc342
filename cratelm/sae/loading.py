"""The autoencoders of a run on disk: which there are, and reading one by its name or by a path.

RUN/saes/NAME/cfg.json, sae_weights.safetensors     what sae-lens writes and reads
RUN/saes/NAME/sae.json                              ours: tap, layer, settings, hashes of data and model, origin
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cratelm.errors import CrateError
from cratelm.rundir import read_json
from cratelm.sae.autoencoder import Autoencoder, check_fields, check_state, normal_fields

CONFIG, WEIGHTS_FILE, DESCRIPTION = "cfg.json", "sae_weights.safetensors", "sae.json"

HOOKS = (
    (r"blocks\.(\d+)\.mlp\.hook_post", "neurons"),
    (r"blocks\.(\d+)\.attn\.hook_z", "heads"),
    (r"blocks\.(\d+)\.hook_resid_post", "residual"),
)
"""Names of places in TransformerLens, and ours for the same activation. `hook_resid_pre` is the layer before."""


def saes_folder(run: Path) -> Path:
    """Where a run keeps its autoencoders."""
    return run / "saes"


def sae_names(run: Path) -> list[str]:
    """The autoencoders of a run that are whole, by name."""
    return sorted(path.parent.name for path in saes_folder(run).glob(f"*/{CONFIG}"))


def load_sae(
    run: str | Path, name: str | Path, *, tap: str | None = None, layer: int | None = None,
    device: torch.device | str = "cpu",
) -> Autoencoder:  # fmt: skip
    """The autoencoder NAME of a run, or one that sae-lens wrote elsewhere, by the path of its folder.

    `tap` and `layer` say where in the model a foreign one belongs, if its own description does not.
    """
    folder = find_sae(Path(run), name)
    source = str(folder)
    try:
        fields = normal_fields(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        state, digest = _read_weights(folder / WEIGHTS_FILE)
        check_fields(source, fields)
        check_state(source, fields, state)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise CrateError(f"{folder / CONFIG} is not readable ({error}). Make the autoencoder again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CrateError(f"{folder / CONFIG} lacks or misspells a field ({error}). Make it again") from None
    description = _described(folder)
    told = (description.get("tap"), description.get("layer")) if description else _placed(fields)
    tap, layer = tap or told[0], layer if layer is not None else told[1]
    if tap is None or layer is None:
        raise CrateError(
            f"{folder} does not say which activations it is of ({_hook_name(fields) or 'no hook_name in cfg.json'}). "
            "Name them: --tap neurons|heads|residual|PATH --layer N"
        )
    return Autoencoder(
        fields, state, name=folder.name, tap=tap, layer=layer, sae_hash=digest, description=description
    ).to(device)  # fmt: skip


def check_trained_on(sae: Autoencoder, model_hash: str, run: Path) -> None:
    """Refuse an autoencoder of ours that was trained on another model than a run holds now."""
    trained_on = sae.description.get("settings", {}).get("model_hash")
    if trained_on not in (None, model_hash):
        raise CrateError(
            f"the autoencoder {sae.name} was trained on another model ({trained_on[:12]}) than {run} holds "
            f"({model_hash[:12]}). Train it anew under another --name, or remove it"
        )


def find_sae(run: Path, name: str | Path) -> Path:
    """The folder of an autoencoder: a name in the run, or a path to a folder of sae-lens'."""
    inside = saes_folder(run) / name
    for folder in (inside, Path(name)):
        if (folder / CONFIG).is_file():
            return folder
    there = ", ".join(sae_names(run)) or "none"
    how = "Train one with" if there == "none" else "Use one of them, or train it with"
    raise CrateError(f"{run} has no autoencoder {name} (there are {there}). {how}: cratelm sae train {run} --data DIR")


def _read_weights(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """The tensors, and the SHA-256 of the file."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return load_file(path), digest
    except FileNotFoundError:
        raise CrateError(f"{path.parent} has a {CONFIG} but no {path.name}. Make the autoencoder again") from None
    except (SafetensorError, OSError) as error:
        raise CrateError(f"{path} is damaged ({error}). Make the autoencoder again") from None


def _described(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    return read_json(path, made_by="cratelm sae train") if path.exists() else {}


def _hook_name(fields: Mapping[str, Any]) -> str | None:
    """Where sae-lens says that an autoencoder belongs."""
    metadata = fields.get("metadata")
    inside = metadata.get("hook_name") if isinstance(metadata, Mapping) else None
    return inside or fields.get("hook_name") or fields.get("hook_point")


def _placed(fields: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Tap and layer of a hook of TransformerLens; a path in a Hugging Face model is a tap by itself."""
    hook = _hook_name(fields) or ""
    for pattern, tap in HOOKS:
        if match := re.fullmatch(pattern, hook):
            return tap, int(match[1])
    if (match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook)) and int(match[1]) > 0:
        return "residual", int(match[1]) - 1
    if match := re.search(r"(?<=\.)\d+(?=\.|$)", hook):
        return (None, None) if "hook_" in hook else (hook, int(match[0]))
    return None, None
