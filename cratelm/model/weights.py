"""Model directories: `config.json`, `model.safetensors`, `tokenizer.json`, as Hugging Face lays them out.

GPT-2 is written under the names, shapes and zero biases that `GPT2LMHeadModel` expects, so any tool opens it. CRATE,
and a GPT-2 that differs from the stock one, have a separate `model_type`, `crate`, and this package's names;
transformers opens them with the classes of `cratelm.huggingface`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from cratelm.checksums import verify, write_checksums
from cratelm.errors import CrateError
from cratelm.gguf_files import is_gguf, model_directory
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weight_files import put_back, read_fields, read_state
from cratelm.rundir import FORMAT_VERSION, atomic_path, check_format_version, check_regular

_END_OF_TEXT = "<|endoftext|>"

_GPT2_SHELL = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
GPT2_BLOCK = {
    "norm_1": "ln_1", "attention.query_key_value": "attn.c_attn", "attention.output": "attn.c_proj",
    "norm_2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_GPT2_ACTIVATION = {"relu": "relu", "gelu": "gelu_new"}
_GPT2_FIXED = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
"""Options of a GPT-2 directory that have one value here."""

AUTO_MAP = {
    "AutoConfig": "modeling_crate.CrateConfig", "AutoModel": "modeling_crate.CrateModel",
    "AutoModelForCausalLM": "modeling_crate.CrateForCausalLM",
}  # fmt: skip
STUB = '''"""Opens this directory with `trust_remote_code=True` in other tools, where cratelm is installed."""

from cratelm.huggingface import CrateConfig, CrateForCausalLM, CrateModel

__all__ = ["CrateConfig", "CrateForCausalLM", "CrateModel"]
'''
"""The file `modeling_crate.py` of a directory of type `crate`, which its `auto_map` names."""


def save_model(
    model: LanguageModel, folder: Path, tokenizer: Tokenizer | None = None, *, begin: int | None = None,
    end: int | None = None,
) -> None:  # fmt: skip
    """Write a model directory, atomically; an existing one is replaced.

    `begin` is the id of a token that stands before every text, if the model has one; `end` the id of the token that
    ends a document, by default that of `<|endoftext|>`.
    """
    stock = is_stock_gpt2(model.config)
    to_config, to_state = (_gpt2_config, _to_gpt2) if stock else (_crate_config, _to_crate)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        state = {name: tensor.contiguous() for name, tensor in to_state(model.state_dict()).items()}
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None and end is None:
            end = tokenizer.token_to_id(_END_OF_TEXT)
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
        config = to_config(model.config) | ids | ({} if begin is None else {"bos_token_id": begin})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if not stock:
            (temporary / "modeling_crate.py").write_text(STUB)
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
            names = ("bos_token", "eos_token", "unk_token", "pad_token") if end is not None else ()
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.context_length,
                "padding_side": "left", **dict.fromkeys(names, end is not None and tokenizer.id_to_token(end)),
            }  # fmt: skip
            if begin is not None:
                settings |= {"bos_token": tokenizer.id_to_token(begin), "add_bos_token": True}
            (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        write_checksums(temporary)


def load_model(folder: Path) -> LanguageModel:
    """Read a model directory; weights stay in float32 on the CPU, in evaluation mode."""
    path = folder / "config.json"
    verify(path)
    fields, state = read_fields(path), read_state(folder)
    try:
        config, state = _fit(path, fields, state)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CrateError(f"{path} lacks or misspells a field ({error}). {put_back(path)}") from None
    head = state.pop("lm_head.weight", None)
    if head is not None and "embedding.weight" in state and not torch.equal(head, state["embedding.weight"]):
        raise CrateError(f"the head of {folder} is not its embedding; only models with a tied head can be read")
    return build(config, state, source=str(folder))


def _fit(path: Path, fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights under the names of `LanguageModel`."""
    match fields.get("model_type"):
        case "crate":
            check_format_version(path, fields.get("format_version", FORMAT_VERSION))
            known = {name: fields[name] for name in fields if name in ModelConfig.__dataclass_fields__}
            return _configuration(path, {"arch": "crate"} | known), {
                name.removeprefix("model."): tensor for name, tensor in state.items()
            }
        case "gpt2":
            state = _from_gpt2(state)
            # Other tools need zero biases where a `LanguageModel` has none. `bias` in its config.json is not enough:
            # they copy it when they train the model further.
            biases = {name for name, tensor in state.items() if name.endswith(".bias")}
            bias = bool(fields.get("bias")) or any(bool(state[name].any()) for name in biases)
            state = {name: tensor for name, tensor in state.items() if bias or name not in biases}
            return _read_gpt2_config(path, fields, bias=bias), state
        case kind:
            raise CrateError(f"{path} describes a {kind!r} model; this command reads crate and gpt2")


def build(
    config: ModelConfig, state: Mapping[str, Tensor], *, source: str, named: Callable[[str], str] = str
) -> LanguageModel:  # fmt: skip
    """A model with these weights; names or shapes that do not fit are reported in one line.

    `named` maps the name of a weight in a `LanguageModel` to its name in `source`.
    """
    if config.num_layers > len(state):
        raise CrateError(
            f"the weights of {source} do not fit its configuration: {len(state)} tensors, {config.num_layers} layers"
        )
    try:
        with torch.device("meta"):
            model = LanguageModel(config)
    except RuntimeError as error:  # sizes beyond what a tensor can have
        reason = str(error).splitlines()[0]
        raise CrateError(f"the weights of {source} do not fit its configuration: {reason}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in sorted(wanted | shapes) if wanted.get(name) != shapes.get(name)]
    if wrong:
        name, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CrateError(
            f"the weights of {source} do not fit its configuration: {named(name)} is {shapes.get(name, 'missing')}, "
            f"expected {wanted.get(name, 'nothing of that name')}{more}"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval()


def load(source: str | Path) -> tuple[LanguageModel, Tokenizer | None]:
    """A model and its tokenizer from a model directory, a run directory, or a Hugging Face GPT-2 name.

    The tokenizer is None where the directory holds none. A hub name needs the extra `hf`.
    """
    folder = find_model(source)
    path = folder / "tokenizer.json"
    return load_model(folder), _read_tokenizer(path) if path.exists() else None


def _read_tokenizer(path: Path) -> Tokenizer:
    verify(path)
    try:
        tokenizer = Tokenizer.from_file(str(check_regular(path)))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    except Exception as error:  # the library raises a bare Exception for every fault of the content
        if type(error) is not Exception:
            raise
        raise CrateError(
            f"{path} is not a readable tokenizer ({error}). Put back the one the model came with"
        ) from None


def find_model(source: str | Path) -> Path:
    """The model directory meant by a path to one, by a run directory, by a GGUF file, or by a hub name."""
    folder = Path(source)
    if is_gguf(source) and not folder.is_dir():
        return model_directory(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").exists():
            return candidate
    if folder.is_dir():
        raise CrateError(
            f"no model in {folder} (no config.json there or in model/). Run: cratelm train --data DIR --out {folder}"
        )
    if folder.exists():
        raise CrateError(
            f"{folder} is a file, not the folder of a run or of a model. If it is a checkpoint, "
            f"run: cratelm import {folder} --out RUN"
        )
    is_path = str(source).count("/") > 1 or str(source).startswith((".", "/", "~"))
    if is_path or ("/" in str(source) and folder.parent.is_dir()):
        raise CrateError(f"{source} does not exist. Run: cratelm train --data DIR --out {source}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CrateError(
            f"{source} is not a local folder, and hub names need an extra. Run: pip install 'cratelm[hf]'"
        ) from None
    try:
        fetched = Path(snapshot_download(str(source), allow_patterns=["*.json", "tokenizer.model", "*.safetensors"]))
        if not any(fetched.glob("*.safetensors")):
            fetched = Path(
                snapshot_download(str(source), allow_patterns=["*.json", "tokenizer.model", "pytorch_model*.bin"])
            )
        return fetched
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CrateError(
            f"{source} is neither a local folder nor reachable on the hub ({reason}). "
            "Check the name and the connection, or make a model: cratelm train --data DIR --out RUN"
        ) from None


def weights_hash(model: LanguageModel) -> str:
    """SHA-256 of the configuration and every weight: the identity of a model, whatever file it came from."""
    return digest(model.config.as_dict(), model.state_dict())


def digest(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """SHA-256 of settings and weights, in the order of their names."""
    sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def is_stock_gpt2(config: ModelConfig) -> bool:
    """Whether `GPT2LMHeadModel` computes the same: a GPT-2 with every variant at its default."""
    if config.arch != "gpt2":
        return False
    return config == ModelConfig(arch="gpt2", **{name: getattr(config, name) for name in _STOCK})


_STOCK = (
    "num_layers", "d_model", "num_heads", "vocab_size", "context_length", "expansion", "activation", "bias",
)  # fmt: skip
"""The fields of a `ModelConfig` that a stock GPT-2 has."""


def _crate_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "crate", "architectures": ["CrateForCausalLM"], "auto_map": AUTO_MAP,
        "format_version": FORMAT_VERSION, **config.as_dict(),
    }  # fmt: skip


def _configuration(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except CrateError as error:
        raise CrateError(f"{path}: {error}. {put_back(path)}") from None


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": config.num_layers,
        "n_embd": config.d_model, "n_head": config.num_heads, "n_inner": config.num_neurons,
        "n_positions": config.context_length, "n_ctx": config.context_length, "vocab_size": config.vocab_size,
        "activation_function": _GPT2_ACTIVATION[config.activation], "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "bias": config.bias, **_GPT2_FIXED,
    }  # fmt: skip


def _read_gpt2_config(path: Path, fields: Mapping[str, Any], *, bias: bool) -> ModelConfig:
    activations = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
    activation = fields.get("activation_function", "gelu_new")
    if activation not in activations:
        raise CrateError(f"activation_function of {path} must be {' or '.join(activations)}, got {activation!r}")
    for name, value in _GPT2_FIXED.items():
        if fields.get(name, value) != value:
            raise CrateError(f"{name} of {path} must be {value!r}, got {fields[name]!r}")
    width = fields["n_embd"]
    inner = fields.get("n_inner") or 4 * width
    if inner % width:
        raise CrateError(f"n_inner of {path} must be a multiple of n_embd {width}, got {inner}")
    return _configuration(path, {
        "arch": "gpt2", "num_layers": fields["n_layer"], "d_model": width, "num_heads": fields["n_head"],
        "vocab_size": fields["vocab_size"], "context_length": fields.get("n_positions", 1024),
        "expansion": inner // width, "activation": activations[activation], "bias": bias,
    })  # fmt: skip


def _to_crate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of weights as `CrateForCausalLM` has them, which holds the `LanguageModel` as its `model`."""
    return {f"model.{name}": tensor for name, tensor in state.items()}


def _to_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under `GPT2LMHeadModel`'s names, in its (in, out) layout, with zero biases where there are none."""
    renamed = {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        other = _gpt2_module(module)
        linear = other.endswith(("c_attn", "c_proj", "c_fc"))
        renamed[f"{other}.{kind}"] = tensor.T if linear and kind == "weight" else tensor
        has_bias = f"{module}.bias" in state or other.endswith(("wte", "wpe"))
        if kind == "weight" and not has_bias:
            renamed[f"{other}.bias"] = torch.zeros(tensor.shape[0])
    return renamed


def _gpt2_module(module: str) -> str:
    if module in _GPT2_SHELL:
        return f"transformer.{_GPT2_SHELL[module]}"
    _, layer, inner = module.split(".", 2)
    return f"transformer.h.{layer}.{GPT2_BLOCK[inner]}"


def _from_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `GPT2LMHeadModel` under the names and in the layout of a `LanguageModel`, without mask buffers."""
    shell = {theirs: ours for ours, theirs in _GPT2_SHELL.items()}
    block = {theirs: ours for ours, theirs in GPT2_BLOCK.items()}
    renamed = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        module, _, kind = name.rpartition(".")
        if module in shell:
            renamed[f"{shell[module]}.{kind}"] = tensor
            continue
        match module.split(".", 2):
            case ["h", layer, inner] if inner in block:
                pass
            case _:
                renamed[full_name] = tensor  # the head, or an unknown name that `build` reports
                continue
        linear = inner.endswith(("c_attn", "c_proj", "c_fc"))
        renamed[f"blocks.{layer}.{block[inner]}.{kind}"] = tensor.T if linear and kind == "weight" else tensor
    return {name: tensor.contiguous() for name, tensor in renamed.items()}
