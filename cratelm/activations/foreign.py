"""Models that no run of ours trained: any Hugging Face causal language model, or a bare model directory of ours."""

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

from cratelm.activations.places import attention_widths, decoders, find_places, num_layers, vocabulary_rows
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import find_model, load, weights_hash
from cratelm.rundir import differing_fields, origin, read_json, write_json

_OF_THE_FILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Fields of a config.json that say how it was stored and not what the model computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignModel:
    """A model from elsewhere, its weights in float32."""

    model: nn.Module
    tokenizer: Tokenizer | None
    """None where its directory holds none that `tokenizers` reads."""
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
    """Write the `run.json` of a foreign model, or check that the one there is of this very model."""
    path = run / "run.json"
    description = {"arch": foreign.arch, "model_hash": foreign.model_hash}
    if path.exists():
        found = read_json(path, made_by=f"cratelm collect {foreign.source} --data DIR --out {run}")
        if different := differing_fields({key: found.get(key) for key in description}, description):
            raise CrateError(f"{run} is the run of another model ({different}). Give another --out")
        return
    model = foreign.model
    if isinstance(model, LanguageModel):
        shape, parameters = model.config.as_dict(), model.config.num_parameters
        flops = model.config.flops_per_token()
    else:
        shape, parameters, flops = _describe(model), count_parameters(model), estimate_flops(model)
    write_json(
        path,
        {
            "name": run.resolve().name, **description, "source": foreign.source, "control": None, "of": None,
            "model": shape, "parameters": parameters, "flops_per_token": flops, "training": None, "origin": origin(),
        },
    )  # fmt: skip


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, embeddings of positions left out and a tied head counted once, as the paper counts."""
    tokens = vocabulary_rows(model)
    positions = [
        part.weight.numel() for part in model.modules() if isinstance(part, nn.Embedding) and len(part.weight) != tokens
    ]
    return sum(weight.numel() for weight in model.parameters()) - sum(positions)


def estimate_flops(model: nn.Module) -> int:
    """Floating-point operations of a forward pass per token at full context, estimated: 2 per weight and multiply-add.

        2 (weights of all matrices + vocabulary x width of a tied head) + 4 context x width of the heads, per layer

    Every matrix counts as used by every token, so for a mixture of experts it is an upper bound. A model whose
    attention is not found counts none.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    whole: Any = model
    head = whole.get_output_embeddings()
    tied = head.weight.numel() if head is not None and id(head.weight) in embeddings else 0
    context = int(_text_config(model).get("max_position_embeddings") or 0)
    attention = 0
    with contextlib.suppress(CrateError):
        attention = 4 * context * sum(attention_widths(model))
    return 2 * (sum(weight.numel() for weight in matrices if id(weight) not in embeddings) + tied) + attention


def _describe(model: nn.Module) -> dict[str, Any]:
    config = _text_config(model)
    neurons = None
    with contextlib.suppress(CrateError):
        first = find_places(model, "neurons")
        neurons = [len(rows) for rows in (decoders(model, first) or {}).values()][0]
    return {
        "num_layers": num_layers(model), "d_model": config.get("hidden_size"),
        "num_heads": config.get("num_attention_heads"), "num_neurons": neurons,
        "vocab_size": vocabulary_rows(model), "context_length": config.get("max_position_embeddings"),
    }  # fmt: skip


def _text_config(model: Any) -> dict[str, Any]:
    """Settings under the names that all of `transformers` shares."""
    config = model.config.get_text_config()
    names = ("hidden_size", "num_attention_heads", "max_position_embeddings")
    return {name: getattr(config, name, None) for name in names}


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
                f"{folder} is no causal language model that transformers reads ({reason[:200]}). Name another model"
            ) from None
    if missing := sorted(info["missing_keys"]):
        raise CrateError(
            f"the weights of {folder} lack {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ". Fetch the model again"
        )  # fmt: skip
    return model.eval()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Leave out the loading bar and the report of keys that `transformers` prints: we say what is wrong ourselves."""
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
