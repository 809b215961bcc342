"""Hugging Face models of a few thousand random weights, one of each family, built from configuration classes."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
GATED = SMALL | {"intermediate_size": 40, "num_key_value_heads": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "n_inner": 40}),
    "gpt_neox": ("GPTNeoX", SMALL | {"intermediate_size": 40}),
    "llama": ("Llama", GATED),
    "mistral": ("Mistral", GATED | {"sliding_window": None}),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", GATED | {"head_dim": 12}),
    "opt": ("OPT", SMALL | {"ffn_dim": 40, "word_embed_proj_dim": 12}),
    "phi": ("Phi", SMALL | {"intermediate_size": 40}),
    "phi3": ("Phi3", GATED | {"pad_token_id": 0}),
}
"""model_type -> (prefix of the class names in `transformers`, settings)."""

NEURONS = {
    "gpt2": "transformer.h.{}.mlp.act", "gpt_neox": "gpt_neox.layers.{}.mlp.act",
    "opt": "model.decoder.layers.{}.activation_fn", "phi": "model.layers.{}.mlp.activation_fn",
}  # fmt: skip
"""Where the plain MLPs make their neurons; the gated ones have no module for the product."""


def build(family: str, rng: np.random.Generator, *, vocab: int = 60, **changes: Any) -> Any:
    """A random model in float32, in evaluation mode; skips where `transformers` is not installed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    prefix, settings = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=vocab, bos_token_id=0, eos_token_id=0, **settings | changes
    )
    torch.manual_seed(int(rng.integers(1 << 31)))
    model = (
        getattr(transformers, f"{prefix}LMHeadModel" if family == "gpt2" else f"{prefix}ForCausalLM")(config)
        .float()
        .eval()
    )
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def save(model: Any, folder: Path, tokenizer: Path | None = None) -> Path:
    """Write the model's directory with a tokenizer.json, and nothing on the terminal."""
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder
