"""Models without a training run: any Hugging Face causal language model, or a bare model directory of ours."""

import contextlib
import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

from cratelm.activations.causal_model import causal_model
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.model.weights import find_model, load, weights_hash
from cratelm.rundir import differing_fields, origin, read_json, write_json

_OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Fields of a config.json that describe storage and do not affect the numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignModel:
    """A model from outside a run, its weights in float32."""

    model: nn.Module
    tokenizer: Tokenizer | None
    """None if its directory holds no tokenizer that `tokenizers` reads."""
    source: str
    """Its directory, or its name on the hub."""
    arch: str
    """`model_type` of its config.json."""
    model_hash: str
    """SHA-256 of configuration and weights."""


def load_foreign(source: str | Path) -> ForeignModel:
    """Load a model directory or a name on the hub. CRATE is ours; everything else goes through `transformers`."""
    folder = find_model(source)
    fields = _read_config(folder / "config.json")
    arch, name = str(fields.get("model_type")), str(Path(source).resolve()) if Path(source).exists() else str(source)
    model: nn.Module
    if arch == "crate":
        model, tokenizer = load(folder)
        return ForeignModel(
            model=model, tokenizer=tokenizer, source=name, arch=arch, model_hash=weights_hash(model)
        )  # fmt: skip
    model, tokenizer = _load_with_transformers(folder), _find_tokenizer(folder)
    deciding = {key: value for key, value in fields.items() if key not in _OF_THE_FILE}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return ForeignModel(model=model, tokenizer=tokenizer, source=name, arch=arch, model_hash=digest.hexdigest())


def write_foreign_run(run: Path, foreign: ForeignModel) -> None:
    """Write the `run.json` of a foreign model. Raises CrateError if the run belongs to another model."""
    path = run / "run.json"
    description = {"arch": foreign.arch, "model_hash": foreign.model_hash}
    if path.exists():
        found = read_json(path, made_by=f"cratelm collect {foreign.source} --data DIR --out {run}")
        if different := differing_fields({key: found.get(key) for key in description}, description):
            raise CrateError(f"{run} is the run of another model ({different}). Give another --out")
        return
    model = causal_model(foreign.model)
    write_json(
        path,
        {
            "name": run.resolve().name, **description, "source": foreign.source, "control": None, "of": None,
            "model": model.shape(), "parameters": model.num_parameters, "flops_per_token": model.flops_per_token,
            "training": None, "origin": origin(),
        },
    )  # fmt: skip


def _read_config(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CrateError(f"{path} is not readable ({error}). Fetch the model again") from None
    if not isinstance(fields, dict):
        raise CrateError(f"{path} holds no JSON object. Fetch the model again")
    return fields


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    pairs = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    there = any(all((folder / name).is_file() for name in names) for names in pairs)
    return load_tokenizer(folder) if there else None


def _load_with_transformers(folder: Path) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise CrateError(f"{folder} is a Hugging Face model, which needs an extra: pip install 'cratelm[hf]'") from None
    with _quiet(transformers):
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CrateError(
                f"{folder} is not a causal language model that transformers reads ({reason[:200]}). Name another model"
            ) from None
    if missing := sorted(info["missing_keys"]):
        raise CrateError(
            f"the weights of {folder} lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ". Fetch the model again"
        )  # fmt: skip
    return model.eval()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the loading bar and key report of `transformers`; CrateError reports what is wrong."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
