"""The released models, written down naively from their description: explicit masks, five products per ISTA block.

Checkpoints have the released names and shapes; the functions compute logits and codes from them and share no code with
the package.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

ETA = PENALTY = 0.1
State = dict[str, Tensor]


def crate_state(
    rng: np.random.Generator, *, layers: int, width: int, vocab: int, context: int, complete: bool = False
) -> State:  # fmt: skip
    """Random weights of a released CRATE, with the 4x dictionary or the complete one."""
    state = _shell(rng, width, vocab, context)
    for layer in range(layers):
        block = f"transformer.h.{layer}."
        state |= _norm(rng, f"{block}prenorm_1", width) | _norm(rng, f"{block}prenorm_2", width)
        state[f"{block}attn.c_attn.weight"] = _matrix(rng, width, width)
        state[f"{block}attn.c_proj.weight"] = _matrix(rng, width, width)
        state[f"{block}attn.c_proj.bias"] = _vector(rng, width)
        state[f"{block}ista.weight"] = _matrix(rng, width if complete else 4 * width, width)
    return state if complete else state | _norm(rng, "transformer.ln_f", width)


def gpt_state(
    rng: np.random.Generator, *, layers: int, width: int, vocab: int, context: int, bias: bool
) -> State:  # fmt: skip
    """Random weights of a released GPT."""
    state = _shell(rng, width, vocab, context)
    for layer in range(layers):
        block = f"transformer.h.{layer}."
        shapes = {
            "attn.c_attn": (3 * width, width), "attn.c_proj": (width, width),
            "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width),
        }  # fmt: skip
        for name, shape in shapes.items():
            state[f"{block}{name}.weight"] = _matrix(rng, *shape)
            if bias:
                state[f"{block}{name}.bias"] = _vector(rng, shape[0])
        state |= _norm(rng, f"{block}ln_1", width, bias) | _norm(rng, f"{block}ln_2", width, bias)
    return state | _norm(rng, "transformer.ln_f", width, bias)


def checkpoint(state: State, *, heads: int, bias: bool = False, **more: Any) -> dict[str, Any]:
    """What `torch.save` is given: optimizer state as AdamW has it, and a tensor for the best loss."""
    vocab, width = state["transformer.wte.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.h."))
    moments = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(width), "exp_avg_sq": torch.zeros(width)}
    group = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "fused": None, "params": [0]}
    return {
        "model": state, "optimizer": {"state": {0: moments}, "param_groups": [group]},
        "model_args": {
            "n_layer": layers, "n_head": heads, "n_embd": width, "bias": bias, "vocab_size": vocab, "dropout": 0.0,
            "block_size": len(state["transformer.wpe.weight"]),
        },
        "iter_num": 600000, "best_val_loss": torch.tensor(2.27), "config": {"dataset": "pile", "batch_size": 12},
        **more,
    }  # fmt: skip


def crate(state: State, tokens: Tensor, heads: int) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the codes of every layer."""
    x, codes, layer = _embed(state, tokens), [], 0
    while f"transformer.h.{layer}.ista.weight" in state:
        block = f"transformer.h.{layer}."
        w = _layer_norm(x, state, f"{block}prenorm_1") @ state[f"{block}attn.c_attn.weight"].T
        y = _attend(w, w, w, heads) @ state[f"{block}attn.c_proj.weight"].T + state[f"{block}attn.c_proj.bias"]
        z = _layer_norm(x + y, state, f"{block}prenorm_2")
        weight = state[f"{block}ista.weight"]
        if "transformer.ln_f.weight" in state:
            first = torch.relu(ETA * (z @ weight.T) - ETA * PENALTY)
            gradient = z @ weight.T - (first @ weight) @ weight.T  # D^T x - D^T D a, with D^T x computed anew
            code = torch.relu(first + ETA * gradient - ETA * PENALTY)
            x = code @ weight
        else:  # one step from the input itself, D = weight; the code is the output
            gradient = z @ weight - (z @ weight.T) @ weight
            x = code = torch.relu(z + ETA * gradient - ETA * PENALTY)
        codes.append(code)
        layer += 1
    if "transformer.ln_f.weight" in state:
        x = _layer_norm(x, state, "transformer.ln_f")
    return x @ state["transformer.wte.weight"].T, codes


def gpt(state: State, tokens: Tensor, heads: int, *, gelu: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the hidden activations of every layer."""
    x, codes, layer = _embed(state, tokens), [], 0
    while f"transformer.h.{layer}.mlp.c_fc.weight" in state:
        block = f"transformer.h.{layer}."
        q, k, v = _linear(_layer_norm(x, state, f"{block}ln_1"), state, f"{block}attn.c_attn").chunk(3, dim=-1)
        x = x + _linear(_attend(q, k, v, heads), state, f"{block}attn.c_proj")
        up = _linear(_layer_norm(x, state, f"{block}ln_2"), state, f"{block}mlp.c_fc")
        hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) if gelu else up.relu()
        x = x + _linear(hidden, state, f"{block}mlp.c_proj")
        codes.append(hidden)
        layer += 1
    return _layer_norm(x, state, "transformer.ln_f") @ state["transformer.wte.weight"].T, codes


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    length, width = q.shape[1], q.shape[2] // heads
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        future = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        mixed.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v[..., part])
    return torch.cat(mixed, dim=-1)


def _embed(state: State, tokens: Tensor) -> Tensor:
    return state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][torch.arange(tokens.shape[1])]


def _linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))


def _layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * state[f"{name}.weight"] + state.get(f"{name}.bias", torch.zeros(()))


def _shell(rng: np.random.Generator, width: int, vocab: int, context: int) -> State:
    table = _matrix(rng, vocab, width)
    return {
        "transformer.wte.weight": table, "transformer.wpe.weight": _matrix(rng, context, width),
        "lm_head.weight": table,
    }  # fmt: skip


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(rng.normal(0, 0.4 / math.sqrt(columns / 8), (rows, columns)).astype(np.float32))


def _vector(rng: np.random.Generator, size: int) -> Tensor:
    return torch.from_numpy(rng.normal(0, 0.3, size).astype(np.float32))


def _norm(rng: np.random.Generator, name: str, width: int, bias: bool = True) -> State:
    state = {f"{name}.weight": 1 + _vector(rng, width)}
    return state | {f"{name}.bias": _vector(rng, width)} if bias else state
