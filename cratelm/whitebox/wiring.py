"""The wiring of a model: the weights that each neuron reads and writes with."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.whitebox.foreign_wiring import foreign_wiring
from cratelm.whitebox.parts import LayerWiring, Wiring, seen_norm


def wiring(model: nn.Module) -> Wiring:
    """The wiring of a `LanguageModel` or of a Hugging Face causal language model."""
    causal = causal_model(model)
    with torch.no_grad():
        if not causal.has_known_parts:
            return foreign_wiring(model)
        known: Any = causal.module
        table = known.embedding.weight.detach()
        return Wiring(
            layers=tuple(_own_layer(block) for block in known.blocks), embedding=table, head=table,
            final_norm=seen_norm(known.norm, table),
        )  # fmt: skip


def _own_layer(block: Any) -> LayerWiring:
    attention = block.mssa if hasattr(block, "mssa") else block.attention
    heads = attention.attend.num_heads
    output = attention.output.weight.detach()
    read, read_bias, write = _neurons(block)
    return LayerWiring(
        read=read, read_bias=read_bias, write=write, norm=seen_norm(block.norm_2, read),
        attention_norm=seen_norm(block.norm_1, read), subspaces=own_subspaces(attention),
        output=output.unflatten(1, (heads, -1)).permute(1, 0, 2),
    )  # fmt: skip


def own_subspaces(attention: Any) -> dict[str, Float[Tensor, "heads p d_model"]]:
    """The heads' projections of a `LanguageModel`'s attention; MSSA has one projection that serves as all three."""
    heads = attention.attend.num_heads
    if hasattr(attention, "subspaces"):
        return {"shared": attention.subspaces.weight.detach().unflatten(0, (heads, -1))}
    parts = attention.query_key_value.weight.detach().chunk(3)
    return {name: part.unflatten(0, (heads, -1)) for name, part in zip(("query", "key", "value"), parts, strict=True)}


def _neurons(block: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """The directions r that the neurons read, their biases, and the directions w that they write."""
    if hasattr(block, "ista"):
        return block.ista.atoms.detach(), None, block.ista.directions.detach()
    bias = block.mlp.up.bias
    return block.mlp.up.weight.detach(), None if bias is None else bias.detach(), block.mlp.down.weight.detach().T
