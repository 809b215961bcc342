"""Model directories: `config.json`, `model.safetensors`, `tokenizer.json`, as Hugging Face lays them out.

GPT-2 is written under the names, shapes and zero biases that `GPT2LMHeadModel` expects, so any tool opens it. CRATE has
its own `model_type` and our names.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.rundir import FORMAT_VERSION, atomic_path, check_format_version

END_OF_TEXT = "<|endoftext|>"

_GPT2_SHELL = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
_GPT2_BLOCK = {
    "norm_1": "ln_1", "attention.query_key_value": "attn.c_attn", "attention.output": "attn.c_proj",
    "norm_2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_GPT2_ACTIVATION = {"relu": "relu", "gelu": "gelu_new"}
_GPT2_FIXED = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True, "add_cross_attention": False,
}  # fmt: skip
"""Settings of `GPT2LMHeadModel` that change what it computes, at the one value we compute with."""


def save_model(model: LanguageModel, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model directory, atomically; an existing one is replaced."""
    to_config, to_state = (_crate_config, _same) if model.config.arch == "crate" else (_gpt2_config, _to_gpt2)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        state = {name: tensor.contiguous() for name, tensor in to_state(model.state_dict()).items()}
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        end = None if tokenizer is None else tokenizer.token_to_id(END_OF_TEXT)
        config = to_config(model.config) | {"bos_token_id": end, "eos_token_id": end}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(str(temporary / "tokenizer.json"))
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT,
                "unk_token": END_OF_TEXT, "model_max_length": model.config.context_length,
            }  # fmt: skip
            (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_model(folder: Path) -> LanguageModel:
    """Read a model directory; weights stay in float32 on the CPU, in evaluation mode."""
    config = read_model_config(folder)
    try:
        state = load_file(folder / "model.safetensors")
    except FileNotFoundError:
        raise CrateError(f"{folder} has a config.json but no model.safetensors. Run: cratelm train --help") from None
    except (SafetensorError, OSError) as error:
        raise CrateError(f"{folder / 'model.safetensors'} is damaged ({error}). Make it again") from None
    if config.arch == "gpt2":
        state = _from_gpt2(state)
        if not config.bias:
            state = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
    return build(config, state, source=str(folder))


def build(config: ModelConfig, state: Mapping[str, Tensor], *, source: str) -> LanguageModel:
    """A model with these weights; names or shapes that do not fit are reported in one line."""
    with torch.device("meta"):
        model = LanguageModel(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if wrong:
        name, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CrateError(
            f"the weights of {source} do not fit its configuration: {name} is {found.get(name, 'missing')}, "
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
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for every fault of the content
        if type(error) is not Exception:
            raise
        raise CrateError(
            f"{path} is not a readable tokenizer ({error}). Put back the one the model came with"
        ) from None


def find_model(source: str | Path) -> Path:
    """The model directory meant by a path to one, by a run directory, or by a hub name."""
    folder = Path(source)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").exists():
            return candidate
    if folder.exists():
        raise CrateError(f"no model in {folder} (no config.json there or in model/). Run: cratelm train --out {folder}")
    is_path = str(source).count("/") > 1 or str(source).startswith((".", "/", "~"))
    if is_path or ("/" in str(source) and folder.parent.is_dir()):
        raise CrateError(f"{source} is not there. Run: cratelm train --out {source}")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise CrateError(
            f"{source} is not a folder here, and hub names need an extra: pip install 'cratelm[hf]'"
        ) from None
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CrateError(f"{source} is neither a folder here nor reachable on the hub ({reason})") from None


def weights_hash(model: LanguageModel) -> str:
    """SHA-256 of the configuration and every weight: the identity of a model, whatever file it came from."""
    digest = hashlib.sha256(json.dumps(model.config.as_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def copy_tokenizer(model_folder: Path, to: Path) -> None:
    """Put the model's tokenizer beside files that hold its token ids."""
    with atomic_path(to) as temporary:
        shutil.copyfile(model_folder / "tokenizer.json", temporary)


def read_model_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a CRATE or GPT-2 model directory."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields.get("model_type")
        if kind == "crate":
            check_format_version(path, fields.get("format_version", FORMAT_VERSION))
            names = ModelConfig.__dataclass_fields__.keys() - {"arch"}
            return ModelConfig(arch="crate", **{name: fields[name] for name in fields if name in names})
        if kind == "gpt2":
            return _read_gpt2_config(path, fields)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CrateError(f"{path} is not readable ({error})") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise CrateError(f"{path} lacks or misspells a field ({error})") from None
    raise CrateError(f"{path} describes a {kind!r} model; this command reads crate and gpt2")


def _crate_config(config: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in config.as_dict().items() if name != "arch"}
    return {"model_type": "crate", "architectures": ["CrateForCausalLM"], "format_version": FORMAT_VERSION, **fields}


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": config.num_layers,
        "n_embd": config.d_model, "n_head": config.num_heads, "n_inner": config.num_neurons,
        "n_positions": config.context_length, "n_ctx": config.context_length, "vocab_size": config.vocab_size,
        "activation_function": _GPT2_ACTIVATION[config.activation], "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True, "bias": config.bias,
    }  # fmt: skip


def _read_gpt2_config(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    activations = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
    activation = fields.get("activation_function", "gelu_new")
    if activation not in activations:
        raise CrateError(f"{path} has activation_function {activation!r}, readable are {', '.join(activations)}")
    for name, usual in _GPT2_FIXED.items():
        if fields.get(name, usual) != usual:
            raise CrateError(f"{path} has {name} {fields[name]!r}; our GPT-2 computes only with {usual!r}")
    width = fields["n_embd"]
    inner = fields.get("n_inner") or 4 * width
    return ModelConfig(
        arch="gpt2", num_layers=fields["n_layer"], d_model=width, num_heads=fields["n_head"],
        vocab_size=fields["vocab_size"], context_length=fields.get("n_positions", 1024), expansion=inner // width,
        activation=activations[activation],  # type: ignore[arg-type]
        bias=bool(fields.get("bias")) or _has_biases(path.parent / "model.safetensors"),
    )  # fmt: skip


def _has_biases(path: Path) -> bool:
    """Whether any bias is not zero; `GPT2LMHeadModel` always has biases, so zero ones stand where we have none.

    `bias` in our config.json cannot say it alone: other tools copy it when they train the model further.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".bias") and not name.endswith(".attn.bias")]  # noqa: SIM118
            return any(bool(file.get_tensor(name).any()) for name in names)
    except (SafetensorError, OSError):
        return True  # `load_model` says what is wrong with the file


def _same(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)


def _to_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to `GPT2LMHeadModel`'s, its (in, out) layout of linear maps, and zero biases where we have none."""
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
    return f"transformer.h.{layer}.{_GPT2_BLOCK[inner]}"


def _from_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`GPT2LMHeadModel`'s names and layout to ours; mask buffers and the tied head are left out."""
    shell = {theirs: ours for ours, theirs in _GPT2_SHELL.items()}
    block = {theirs: ours for ours, theirs in _GPT2_BLOCK.items()}
    renamed = {}
    for full_name, tensor in state.items():
        name = full_name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        module, _, kind = name.rpartition(".")
        place, _, inner = module.removeprefix("h.").partition(".")
        if module in shell:
            renamed[f"{shell[module]}.{kind}"] = tensor
        elif module.startswith("h.") and inner in block:
            linear = inner.endswith(("c_attn", "c_proj", "c_fc"))
            renamed[f"blocks.{place}.{block[inner]}.{kind}"] = tensor.T if linear and kind == "weight" else tensor
        else:
            renamed[full_name] = tensor  # an unknown name: `build` reports it
    return {name: tensor.contiguous() for name, tensor in renamed.items()}
