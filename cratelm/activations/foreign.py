"""Models without a training run: any Hugging Face model, or a model directory of cratelm without a run."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn

from cratelm.activations.causal_model import causal_model
from cratelm.data.special_tokens import SpecialTokens, special_tokens
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.gguf_files import quantization
from cratelm.model.weight_files import read_fields
from cratelm.model.weights import digest, find_model, load, weights_hash
from cratelm.rundir import check_regular, differing_fields, origin, read_json, write_json
from cratelm.runtime import quiet_transformers

_STORAGE_FIELDS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Fields of a config.json that describe storage and do not affect the numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignModel:
    """A model without a training run, with its weights in float32."""

    model: nn.Module
    tokenizer: Tokenizer | None
    """None if its directory has no tokenizer that the `tokenizers` library reads."""
    source: str
    """Its directory, or its name on the hub."""
    arch: str
    """`model_type` of its config.json."""
    model_hash: str
    """SHA-256 of configuration and weights."""
    quantization: str | None = None
    """Quantisation of the GGUF file that the weights come from, such as `Q4_K_M`; None for other files."""
    special: SpecialTokens | None = None
    """The tokens that begin and end texts, by the tokenizer and the files next to it; None without a tokenizer."""


def load_foreign(source: str | Path) -> ForeignModel:
    """Load a model directory, a GGUF file or a name on the hub: CRATE with this package, others with `transformers`."""
    folder = find_model(source)
    for file in folder.glob("*.*"):
        if not file.is_dir():
            check_regular(file)
    fields = read_fields(folder / "config.json")
    arch, name = str(fields.get("model_type")), str(Path(source).resolve()) if Path(source).exists() else str(source)
    model: nn.Module
    if arch == "crate":
        model, tokenizer = load(folder)
        special = None if tokenizer is None else special_tokens(tokenizer, folder, post_processor=False)
        return ForeignModel(
            model=model, tokenizer=tokenizer, source=name, arch=arch, model_hash=weights_hash(model), special=special
        )
    model, tokenizer = _load_with_transformers(folder), _find_tokenizer(folder)
    settings = {key: value for key, value in fields.items() if key not in _STORAGE_FIELDS}
    model_hash = digest(settings, model.state_dict())
    special = None if tokenizer is None else special_tokens(tokenizer, folder)
    return ForeignModel(
        model=model, tokenizer=tokenizer, source=name, arch=arch, model_hash=model_hash, special=special,
        quantization=quantization(folder),
    )  # fmt: skip


def write_foreign_run(run: Path, foreign: ForeignModel, begin: tuple[int, ...] | None = None) -> None:
    """Write the `run.json` of a foreign model. Raises CrateError if the run belongs to another model.

    `begin` are the tokens that --begin-token put in the place of the model's own beginning of a row.
    """
    path = run / "run.json"
    description: dict[str, Any] = {"arch": foreign.arch, "model_hash": foreign.model_hash}
    if begin is not None:
        description["begin_of_text"] = list(begin)
    if path.exists():
        described = read_json(path, made_by=f"cratelm collect {foreign.source} --data DIR --out {run}")
        if different := differing_fields({key: described.get(key) for key in description}, description):
            raise CrateError(f"{run} is the run of another model ({different}). Give another --out")
        return
    model = causal_model(foreign.model)
    write_json(
        path,
        {
            "name": run.resolve().name, **description, "source": foreign.source,
            **({"quantization": foreign.quantization} if foreign.quantization else {}), "control": None, "of": None,
            "model": model.shape(), "parameters": model.num_parameters, "flops_per_token": model.flops_per_token,
            "training": None, "origin": origin(),
        },
    )  # fmt: skip


def _find_tokenizer(folder: Path) -> Tokenizer | None:
    pairs = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
    has_tokenizer = any(all((folder / name).is_file() for name in names) for names in pairs)
    return load_tokenizer(folder) if has_tokenizer else None


def _load_with_transformers(folder: Path) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise CrateError(f"{folder} is a Hugging Face model, which needs an extra: pip install 'cratelm[hf]'") from None
    with quiet_transformers():
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False,
            )  # fmt: skip
        except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CrateError(
                f"{folder} is not a causal language model that transformers reads ({reason[:200]}). Give another model"
            ) from None
    if missing := sorted(info["missing_keys"]):
        raise CrateError(
            f"the weights of {folder} lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ". Fetch the model again"
        )  # fmt: skip
    return model.eval()
