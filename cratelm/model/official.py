"""Checkpoints of the released code (`torch.save`, one `.pt` file) to `LanguageModel`s and back.

The file holds a dictionary with the weights under `model` and the sizes under `model_args`; nanoGPT's GPT-2 checkpoints
have the same layout. Nothing in it says which activation a GPT-2 has: the released baseline has ReLU, nanoGPT's GELU.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cratelm.errors import CrateError
from cratelm.model.config import Architecture, ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weight_files import plain_name, read_pickled
from cratelm.model.weights import GPT2_BLOCK, build
from cratelm.rundir import atomic_path

_SHELL = {"embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"}
_BLOCK: dict[Architecture, dict[str, str]] = {
    "crate": {
        "norm_1": "prenorm_1", "mssa.subspaces": "attn.c_attn", "mssa.output": "attn.c_proj", "norm_2": "prenorm_2",
    },
    "gpt2": GPT2_BLOCK,
}  # fmt: skip
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_FIELDS = ("num_layers", "d_model", "num_heads", "vocab_size", "context_length")
"""The fields of a `ModelConfig` that every released model has; the others are the paper's."""
_COMPLETE: dict[str, Any] = {"dictionary": "complete", "expansion": 1, "ista_steps": 1}
"""The model of the released `crate.py`. It stores D where the other stores D^T: one atom a column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Training metadata of a checkpoint."""

    iter_num: int | None = None
    """Optimizer steps taken."""
    best_val_loss: float | None = None
    """Lowest validation loss so far, in nats per token."""


def read_official(
    path: Path, *, activation: Literal["relu", "gelu"] = "relu"
) -> tuple[LanguageModel, Provenance]:  # fmt: skip
    """The model of a released checkpoint: CRATE with a 4x or a complete dictionary, GPT-2 with or without biases.

    Only tensors and plain values are read, no optimizer state. Raises CrateError for a file that holds code, for a
    damaged file, and for a weight that is not a table of finite numbers.
    """
    checkpoint = read_pickled(path)
    if not isinstance(checkpoint.get("model"), Mapping) or not isinstance(checkpoint.get("model_args"), Mapping):
        keys = ", ".join(map(str, list(checkpoint)[:4])) or "nothing"
        raise CrateError(f"{path} is not a released checkpoint: it has no model and model_args (found: {keys})")
    state = _cleaned(checkpoint["model"], path)
    config = _config(state, checkpoint["model_args"], activation, path)
    head = state.pop(_HEAD, None)
    if head is not None and not torch.equal(head.float(), state[_EMBEDDING].float()):
        raise CrateError(f"{path} holds two different copies of the tied head, {_HEAD} and {_EMBEDDING}")
    with torch.device("meta"):
        names = {official_name(name, config.arch): name for name in LanguageModel(config).state_dict()}
    ours = {names.get(name, name): tensor for name, tensor in _oriented(state, config).items()}
    model = build(config, ours, source=str(path), named=lambda name: official_name(name, config.arch))
    return model, _provenance(checkpoint, path)


def write_official(model: LanguageModel, path: Path, provenance: Provenance | None = None) -> None:
    """Write a checkpoint as the released code reads it, without optimizer state; other models are refused."""
    config, provenance = model.config, provenance or Provenance()
    if config != _released(config):
        known = _released(config).as_dict()
        other = ", ".join(f"{name} {value!r}" for name, value in config.as_dict().items() if known.get(name) != value)
        raise CrateError(f"the released format cannot express this model ({other}). Use: cratelm export --format hf")
    ours = {official_name(name, config.arch): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state = _oriented(ours, config)
    state[_HEAD] = state[_EMBEDDING]  # one storage under two names
    arguments = {
        "n_layer": config.num_layers, "n_head": config.num_heads, "n_embd": config.d_model,
        "block_size": config.context_length, "bias": config.bias, "vocab_size": config.vocab_size, "dropout": 0.0,
    }  # fmt: skip
    with atomic_path(path) as temporary:
        torch.save(
            {
                "model": state, "optimizer": None, "model_args": arguments, "iter_num": provenance.iter_num or 0,
                "best_val_loss": provenance.best_val_loss, "config": {},
            },
            temporary,
        )  # fmt: skip


def official_name(name: str, arch: Architecture) -> str:
    """`blocks.3.mssa.output.bias` -> `transformer.h.3.attn.c_proj.bias`; other names stay as they are."""
    module, _, kind = name.rpartition(".")
    if module in _SHELL:
        return f"{_SHELL[module]}.{kind}"
    match name.split(".", 2):
        case ["blocks", layer, "ista.atoms"]:
            return f"transformer.h.{layer}.ista.weight"
        case ["blocks", layer, inner] if (known := inner.removesuffix(f".{kind}")) in _BLOCK[arch]:
            return f"transformer.h.{layer}.{_BLOCK[arch][known]}.{kind}"
    return name


def _cleaned(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights under their plain names: no prefix of `torch.compile` or DDP, no buffers of causal masks."""
    cleaned = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise CrateError(f"{path} has a weight under {name!r}, where a released checkpoint has names")
        if not isinstance(tensor, Tensor):
            raise CrateError(
                f"{path} has a {type(tensor).__name__} under {name}, where a released checkpoint has weights"
            )
        plain = plain_name(name)
        if not plain.endswith((".attn.bias", ".attn.masked_bias", ".attn.mask")):
            if fault := _fault(tensor):
                raise CrateError(f"the weight {name} of {path} {fault}. Fetch or write the file again")
            cleaned[plain] = tensor
    for name in (_EMBEDDING, "transformer.wpe.weight"):
        if name not in cleaned or cleaned[name].dim() != 2 or not cleaned[name].numel():
            raise CrateError(f"{path} is not a released checkpoint: it has no table {name}")
    return cleaned


def _fault(tensor: Tensor) -> str | None:
    """Why a tensor cannot be a weight."""
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return "is sparse" if tensor.device.type != "meta" else "has a shape but no numbers (a meta tensor)"
    if not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
    bad = int((~tensor.float().isfinite()).sum())
    return f"has {bad} numbers that are infinite or NaN" if bad else None


def _config(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], activation: Literal["relu", "gelu"], path: Path
) -> ModelConfig:
    """The configuration by the shapes; `model_args` must agree with it and gives the number of heads."""
    layers = {int(match[1]) for name in state if (match := re.match(r"transformer\.h\.(\d+)\.", name))}
    vocab_size, width = state[_EMBEDDING].shape
    context = len(state["transformer.wpe.weight"])
    from_shapes = {"n_layer": len(layers), "n_embd": width, "block_size": context, "vocab_size": vocab_size}
    for name in ("n_head", *from_shapes):
        if not isinstance(arguments.get(name), int | None):
            raise CrateError(f"{name} in model_args of {path} must be a number, got a {type(arguments[name]).__name__}")
    wrong = [
        f"{name} {arguments[name]}, weights {from_shapes[name]}"
        for name in from_shapes
        if arguments.get(name, from_shapes[name]) != from_shapes[name]
    ]
    if wrong:
        raise CrateError(f"the shapes in {path} do not fit its model_args ({'; '.join(wrong)})")
    heads = arguments.get("n_head")
    if not isinstance(heads, int):
        raise CrateError(f"{path} does not say how many heads the model has (n_head in model_args)")
    shell: dict[str, Any] = {
        "num_layers": len(layers), "d_model": width, "num_heads": heads, "vocab_size": vocab_size,
        "context_length": context,
    }  # fmt: skip
    for name in ("transformer.h.0.ista.weight", "transformer.h.0.mlp.c_fc.weight"):
        if name in state and state[name].dim() != 2:
            raise CrateError(f"{path} is not a released checkpoint: {name} has shape {tuple(state[name].shape)}")
    ista, mlp = state.get("transformer.h.0.ista.weight"), state.get("transformer.h.0.mlp.c_fc.weight")
    if ista is not None:
        if "transformer.ln_f.weight" not in state:
            return _complete_dictionary(len(ista), shell, path)
        return ModelConfig(arch="crate", expansion=_expansion(len(ista), width, "ista.weight", path), **shell)
    if mlp is not None:
        expansion = _expansion(len(mlp), width, "mlp.c_fc.weight", path)
        bias = "transformer.ln_f.bias" in state
        return ModelConfig(arch="gpt2", activation=activation, bias=bias, expansion=expansion, **shell)
    raise CrateError(
        f"{path} is neither a CRATE nor a GPT-2: its first layer has no ista.weight and no mlp.c_fc.weight"
    )


def _expansion(rows: int, width: int, name: str, path: Path) -> int:
    if rows % width:
        raise CrateError(f"the {name} of {path} has {rows} rows, which is not a multiple of the width {width}")
    return rows // width


def _complete_dictionary(rows: int, shell: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration of the released `crate.py`: one step from the input with a square dictionary, no last norm."""
    if rows != shell["d_model"]:
        raise CrateError(
            f"{path} has no ln_f, as the complete dictionary has none, but {rows} atoms at width {shell['d_model']}"
        )
    return ModelConfig(arch="crate", **_COMPLETE, **shell)


def _is_complete(config: ModelConfig) -> bool:
    return config.dictionary == "complete"


def _oriented(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert between the released orientation of the dictionary and that of a `LanguageModel`, either way."""
    turned = _is_complete(config)
    return {name: x.T.contiguous() if turned and name.endswith("ista.weight") else x for name, x in state.items()}


def _released(config: ModelConfig) -> ModelConfig:
    """The released model nearest to a configuration: its sizes, and everything else as in the paper."""
    shell = {name: getattr(config, name) for name in _FIELDS}
    if _is_complete(config):
        return ModelConfig(arch="crate", **_COMPLETE, **shell)
    if config.arch == "crate":
        return ModelConfig(arch="crate", **shell)
    plain = ModelConfig(arch="gpt2", **shell)
    return replace(plain, bias=config.bias, activation=config.activation)


def _provenance(checkpoint: Mapping[str, Any], path: Path) -> Provenance:
    """Steps and best loss; a loss that was never measured may be infinite there."""
    steps, loss = (_number(checkpoint, name, path) for name in ("iter_num", "best_val_loss"))
    if steps is not None and not math.isfinite(steps):
        raise CrateError(f"iter_num of {path} must be a number of steps, got {steps}")
    return Provenance(
        iter_num=None if steps is None else int(steps),
        best_val_loss=float(loss) if loss is not None and math.isfinite(loss) else None,
    )


def _number(checkpoint: Mapping[str, Any], name: str, path: Path) -> int | float | None:
    value = checkpoint.get(name)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
            raise CrateError(f"{name} of {path} must be a single number, got a tensor of shape {tuple(value.shape)}")
        value = value.item()
    return value if isinstance(value, int | float) else None
