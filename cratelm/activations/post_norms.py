"""Norms after a linear map: Gemma and OLMo-2 normalise what an MLP or attention writes before the stream gets it.

A neuron then adds gain * direction / scale to the residual stream, with the scale of the token. Its decoder direction
is gain * direction: the same up to a factor that all neurons of the layer share at a token.
"""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def through_post_norms(
    model: Any, directions: dict[str, Float[Tensor, "neurons d_model"]]
) -> dict[str, Float[Tensor, "neurons d_model"]]:
    """Directions in the output of some linear maps, by the path of the map, as the residual stream gets them."""
    norms = post_norms(model, directions)
    return {
        path: rows if path not in norms else _along(norms[path], rows)
        for path, rows in directions.items()
    }  # fmt: skip


@torch.no_grad()
def post_norms(model: Any, paths: Collection[str]) -> dict[str, nn.Module]:
    """Path of a linear map -> the norm that reads its output and nothing else, found in a pass of a few tokens."""
    outputs: dict[str, Tensor] = {}
    norms: dict[str, nn.Module] = {}

    def keep(path: str) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(path, output.detach())

    def compare(norm: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        for path, output in outputs.items():
            if inputs and inputs[0].shape == output.shape and torch.equal(inputs[0], output):
                norms.setdefault(path, norm)

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    handles += [part.register_forward_hook(compare) for part in model.modules() if _is_norm(part)]
    try:
        model(torch.arange(1, 5, device=next(model.parameters()).device)[None])
    finally:
        for handle in handles:
            handle.remove()
    return norms


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _along(norm: nn.Module, rows: Float[Tensor, "neurons d_model"]) -> Float[Tensor, "neurons d_model"]:
    gain, centres = norm_gain(norm, rows)
    return (rows - rows.mean(dim=-1, keepdim=True) if centres else rows) * gain


def norm_gain(module: nn.Module, like: Tensor) -> tuple[Float[Tensor, " d_model"], bool]:
    """The gain of a norm, and whether it subtracts the mean; of an unknown kind, measured on some vectors."""
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        return module.weight.detach(), True
    signs = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    signs[-1] = 0 if len(signs) % 2 else -1  # as many +1 as -1
    signs = signs / signs.square().mean().sqrt()
    plus, minus, shifted = module(signs), module(-signs), module(signs + 3)
    gain = torch.where(signs == 0, torch.nan, (plus - minus) / (2 * signs))
    if signs[-1] == 0:
        gain[-1] = ((module(signs.roll(1)) - module(-signs.roll(1))) / (2 * signs.roll(1)))[-1]
    return gain, bool(torch.allclose(shifted, plus, rtol=1e-3, atol=1e-4))
