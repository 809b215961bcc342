"""The wiring of a Hugging Face causal language model, found in its modules and in a forward pass of a few tokens.

A norm belongs to the linear map whose input equals the norm's output. This identifies the norms before the attention,
the MLP and the head without relying on names.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cratelm.activations.places import decoders, find_places, map_matrix, map_shape
from cratelm.activations.taps import INPUT
from cratelm.errors import CrateError
from cratelm.whitebox.parts import LayerWiring, Norm, Wiring, seen_norm


def foreign_wiring(model: Any) -> Wiring:
    """The wiring; unrecognised parts are None or empty. Raises CrateError without a norm before the neurons."""
    places = find_places(model, "neurons")
    writes = decoders(model, places)
    assert writes is not None, "the map behind the neurons leads to the stream"
    watched = _Watched(model)
    layers = []
    for layer, place in places.items():
        down = place.removesuffix(INPUT)
        reading = _reading_map(model.get_submodule(down.rpartition(".")[0]), down, len(writes[layer]))
        norm = watched.norm_before(reading)
        if norm is None and watched.norm_after(model.get_submodule(down)) is not None:
            # OLMo-2: the MLP reads the stream itself, and a norm follows the MLP.
            norm = Norm(module=nn.Identity(), gain=torch.ones_like(writes[layer][0]), centres=False)
        if norm is None:
            raise CrateError(f"layer {layer} of {type(model).__name__} has no recognised norm right before its MLP")
        read, bias = _rows(reading), getattr(reading, "bias", None)
        block = model.get_submodule(re.match(r".*?\.\d+(?=\.)", down)[0])  # type: ignore[index]
        layers.append(_attended(model, block, watched, {
            "read": read[: len(writes[layer])], "write": writes[layer], "norm": norm,
            "read_bias": None if bias is None else bias.detach()[: len(writes[layer])],
        }))  # fmt: skip
    width = layers[0].write.shape[1]
    embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings()
    return Wiring(
        layers=tuple(layers), embedding=embedding if embedding.shape[1] == width else None,
        head=head.weight.detach() if head is not None and head.weight.shape[1] == width else None,
        final_norm=watched.norm_before(head) if head is not None else None,
    )  # fmt: skip


class _Watched:
    """Inputs and outputs of norms and of linear maps in one forward pass of a few tokens."""

    def __init__(self, model: Any) -> None:
        self.given: list[tuple[nn.Module, Tensor]] = []
        self.read: dict[nn.Module, Tensor] = {}
        self.written: dict[nn.Module, Tensor] = {}
        self.normalised: list[tuple[nn.Module, Tensor]] = []
        hooks = [part.register_forward_hook(self._see) for part in model.modules()]
        try:
            model(torch.arange(1, 5, device=next(model.parameters()).device)[None])
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        weight = getattr(module, "weight", None)
        if map_shape(module) is not None and inputs:
            self.read[module] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            self.written[module] = output.detach().reshape(-1, output.shape[-1])
        elif isinstance(weight, Tensor) and weight.ndim == 1 and isinstance(output, Tensor):
            self.given.append((module, output.detach().reshape(-1, output.shape[-1])))
            self.normalised.append((module, inputs[0].detach().reshape(-1, inputs[0].shape[-1])))

    def norm_before(self, module: nn.Module) -> Norm | None:
        """The norm whose output the map reads; None if it reads another."""
        read = self.read.get(module)
        for norm, output in self.given:
            if read is not None and output.shape == read.shape and torch.equal(output, read):
                return seen_norm(norm, output)
        return None

    def norm_after(self, module: nn.Module) -> Norm | None:
        """The norm that reads what the map wrote, before the stream gets it; None if there is none."""
        written = self.written.get(module)
        for norm, read in self.normalised:
            if written is not None and read.shape == written.shape and torch.equal(read, written):
                return seen_norm(norm, read)
        return None


def _reading_map(parent: nn.Module, down: str, neurons: int) -> nn.Module:
    """The linear map into the neurons; in a gated MLP the gate, which may share one matrix with `up`."""
    maps = {
        name: part for name, part in parent.named_children()
        if name != down.rpartition(".")[2] and (shape := map_shape(part)) and shape[1] in (neurons, 2 * neurons)
    }  # fmt: skip
    gates = [part for name, part in maps.items() if "gate" in name]
    return (gates or list(maps.values()))[0]


def _attended(model: Any, block: nn.Module, watched: _Watched, neurons: dict[str, Any]) -> LayerWiring:
    """A layer, with its heads if their linear maps are recognised."""
    heads, width = int(model.config.get_text_config().num_attention_heads), neurons["write"].shape[1]
    maps = {name: part for name, part in block.named_modules() if "att" in name.lower() and map_shape(part)}
    first = next((part for part in maps.values() if watched.norm_before(part) is not None), None)
    behind = [part for part in maps.values() if watched.norm_before(part) is None]  # what reads the heads
    size = ((map_shape(behind[0]) if len(behind) == 1 else None) or (width, width))[0] // heads
    parts, output = _subspaces(maps, heads, size), None
    if len(behind) == 1 and map_shape(behind[0]) == (heads * size, width):
        written, after = map_matrix(behind[0]), watched.norm_after(behind[0])
        output = (written if after is None else after.along(written)).T.unflatten(1, (heads, size)).permute(1, 0, 2)
    norm = None if first is None else watched.norm_before(first)
    return LayerWiring(**neurons, attention_norm=norm, subspaces=parts if norm else {}, output=output)


def _subspaces(maps: dict[str, nn.Module], heads: int, size: int) -> dict[str, Tensor]:
    """query, key, value per head, from three maps or from one that holds them one after the other, or head by head."""
    named = {name.rpartition(".")[2]: part for name, part in maps.items()}
    if {"q_proj", "k_proj", "v_proj"} <= named.keys():
        split: Iterable[Tensor] = [_rows(named[name]) for name in ("q_proj", "k_proj", "v_proj")]
    elif "c_attn" in named:
        split = _rows(named["c_attn"]).chunk(3)
    elif "query_key_value" in named and len(_rows(named["query_key_value"])) == 3 * heads * size:
        by_head = _rows(named["query_key_value"]).unflatten(0, (heads, 3, size))
        return {name: by_head[:, i] for i, name in enumerate(("query", "key", "value"))}
    elif "qkv_proj" in named:
        whole = _rows(named["qkv_proj"])
        others = (len(whole) - heads * size) // 2
        split = whole.split([heads * size, others, others])
    else:
        return {}
    return {name: part.unflatten(0, (-1, size)) for name, part in zip(("query", "key", "value"), split, strict=True)}


def _rows(module: Any) -> Tensor:
    """The weights as (out, in)."""
    return map_matrix(module).T
