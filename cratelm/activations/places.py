"""Find a model's neurons, heads and residual stream in the structure of its modules.

Works on `LanguageModel`s and on any Hugging Face causal language model whose layers are a list of blocks, each with an
attention and a two-matrix or gated MLP: GPT-2, GPT-NeoX (Pythia), Llama, Mistral, Qwen, OPT, Phi, Gemma and similar.
The neurons are the inputs of the MLP's last map: `act(W1 x)`, or `act(gate) * up` of a gated MLP. The rows of that
map are their decoder directions.
"""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.post_norms import through_post_norms
from cratelm.activations.taps import INPUT, find_tap, near
from cratelm.errors import CrateError

LAYER = "{layer}"
"""Placeholder for the layer number in a tap."""

NOT_AN_MLP = ("att", "per_layer", "laurel")
"""Parts of names of modules that lead out of the stream and back without being the MLP: attention, Gemma's gates of
per-layer embeddings and low-rank residuals. So do modules with a convolution (Mamba, LFM2)."""

HEAD_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "output")
"""Names of the map after the attention's heads."""


def find_places(model: nn.Module, tap: str) -> dict[int, str]:
    """Layer -> module path, for `neurons`, `heads`, `residual`, or a path in which {layer} stands for the number.

    A path without {layer} is one place; its layer is the first number in it, or 0.
    """
    if tap == "neurons":
        taps = getattr(model, "neuron_taps", None)
        return dict(enumerate(taps)) if taps else {layer: f"{path}{INPUT}" for layer, path in _neuron_maps(model)}
    if tap == "heads":
        return {layer: f"{path}{INPUT}" for layer, path in _head_maps(model)}
    if tap == "residual":
        return {layer: path for layer, path, _ in _blocks(model)}
    return _match(model, tap)


def tap_folder(tap: str, *, negative: bool = False) -> str:
    """The folder of a tap's records: {layer} becomes L, `:input` becomes `-input`; times -1, it ends in `-negative`."""
    name = tap.replace(LAYER, "L").replace(INPUT, "-input")
    return f"{name}-negative" if negative else name


def decoders(model: nn.Module, places: Mapping[int, str]) -> dict[int, Float[Tensor, "neurons d_model"]] | None:
    """Decoder directions of each layer's neurons, as they are added to the residual stream; None if a place has none.

    As `map_directions`, times the gain of a norm between the map and the stream (`post_norms`).
    """
    known = map_directions(model, places)
    behind_maps = {layer: place.removesuffix(INPUT) for layer, place in places.items() if place.endswith(INPUT)}
    if known is None or len(behind_maps) < len(places):
        return known
    written = through_post_norms(model, {path: known[layer] for layer, path in behind_maps.items()})
    return {layer: written[path] for layer, path in behind_maps.items()}


def map_directions(model: nn.Module, places: Mapping[int, str]) -> dict[int, Float[Tensor, "neurons d_model"]] | None:
    """What each neuron of a layer adds to the output of its map per unit of activation; None if a place has none.

    The neurons that a linear map reads are decoded by its rows; CRATE's code by the atoms.
    """
    directions = {layer: _direction(model, tap) for layer, tap in places.items()}
    known = {layer: direction for layer, direction in directions.items() if direction is not None}
    return known if len(known) == len(directions) else None


def _direction(model: nn.Module, tap: str) -> Float[Tensor, "neurons d_model"] | None:
    if tap.endswith(INPUT):
        last: Any = find_tap(model, tap)
    else:  # the tap of a `LanguageModel`'s code is a module without weights, inside the block that decodes them
        block: Any = model.get_submodule(tap.rpartition(".")[0]) if tap.endswith(".neurons") else None
        if hasattr(block, "atoms"):
            return block.directions.detach()
        last = getattr(block, "down", None)
    shape = map_shape(last)
    return map_matrix(last) if shape is not None and shape[1] == _width(model) else None


def vocabulary_rows(model: nn.Module) -> int:
    """Number of token ids that have an embedding."""
    return len(_embedding(model).weight)


def attention_widths(model: nn.Module) -> list[int]:
    """Width of the concatenated heads of each layer that has an attention."""
    shapes = [map_shape(find_tap(model, path)) for _, path in _head_maps(model)]
    return [shape[0] for shape in shapes if shape is not None]


def num_layers(model: nn.Module) -> int:
    """Number of blocks."""
    return sum(1 for _ in _blocks(model))


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embedding


def _width(model: Any) -> int:
    """Width of the residual stream; in some models the embedding has another width."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or text.d_model)


def _blocks(model: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    """Number, path and module of each layer: the module list with the most weights."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    if not lists:
        raise CrateError(f"{type(model).__name__} has no list of layers. Give a module: --tap PATH")
    name = max(lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()))
    yield from ((layer, f"{name}.{layer}", block) for layer, block in enumerate(lists[name]))


def _neuron_maps(model: nn.Module) -> Iterator[tuple[int, str]]:
    width = _width(model)
    for layer, path, block in _blocks(model):
        maps = list(_down_maps(block, width))
        if len(maps) != 1 or _has_experts(block):
            inside = ", ".join(name for name, part in block.named_modules() if name and not list(part.children()))
            raise CrateError(
                f"layer {layer} of {type(model).__name__} is not an attention with one MLP, so its neurons are not "
                f"recognised. Give a module: --tap '{path[: path.rindex('.')]}.{LAYER}.MODULE' (modules: {inside})"
            )
        yield layer, f"{path}.{maps[0]}"


def _down_maps(block: nn.Module, width: int) -> Iterator[str]:
    """The last map of each MLP: from the width that another map (or a gate) leads to, back to the residual stream."""
    for name, parent in block.named_modules():
        if any(part in name.lower() for part in NOT_AN_MLP) or any(map(_is_convolution, parent.children())):
            continue
        maps = {
            child: shape for child, part in parent.named_children()
            if not child.startswith(NOT_AN_MLP) and (shape := map_shape(part))
        }  # fmt: skip
        downs = [
            child for child, (neurons, out) in maps.items()
            if out == width and any(
                other != child and wide in ((width, neurons), (width, 2 * neurons)) for other, wide in maps.items()
            )
        ]  # fmt: skip
        if downs:
            yield f"{name}.{downs[-1]}".lstrip(".")


def _has_experts(block: nn.Module) -> bool:
    """Whether a block has weights of more than two dimensions that are not those of a convolution."""
    parts = (part for part in block.modules() if not _is_convolution(part))
    return any(weight.ndim > 2 for part in parts for weight in part.parameters(recurse=False))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _head_maps(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The map after the heads of each layer with an attention: the last one inside it, of those named as an output."""
    width, some = _width(model), False
    for layer, path, block in _blocks(model):
        maps = [
            name for name, part in block.named_modules()
            if ("att" in name.lower() or name.startswith("mssa."))
            and (shape := map_shape(part)) is not None and shape[1] == width
        ]  # fmt: skip
        outputs = [name for name in maps if name.rpartition(".")[2] in HEAD_OUTPUTS]
        if maps:
            some = True
            yield layer, f"{path}.{(outputs or maps)[-1]}"
    if not some:
        raise CrateError(f"no layer of {type(model).__name__} has an attention with a known name. Use --tap")


def map_shape(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear map, None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear map in `transformers`, with the transposed matrix
        return tuple(module.weight.shape)
    return None


def map_matrix(module: Any) -> Float[Tensor, "in out"]:
    """The weights of a linear map, its inputs as rows."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, nn.Linear) else weight


def _match(model: nn.Module, tap: str) -> dict[int, str]:
    if LAYER not in tap:
        find_tap(model, tap)
        number = re.search(r"(?<=\.)\d+(?=\.|:|$)", tap)
        return {int(number[0]) if number else 0: tap}
    path, suffix = tap.removesuffix(INPUT), INPUT if tap.endswith(INPUT) else ""
    before, _, after = path.partition(LAYER)
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    names = [name for name, part in model.named_modules() if not isinstance(part, nn.ModuleList)]
    places = {int(match[1]): match[0] + suffix for name in names if (match := pattern.fullmatch(name))}
    if not places:
        raise CrateError(f"the model has no modules {path!r}. Similar: {near(path, _patterns(names))}")
    return dict(sorted(places.items()))


def _patterns(names: Sequence[str]) -> list[str]:
    """Module paths with {layer} in place of their first number, without duplicates."""
    numbered = (re.sub(r"(?<=\.)\d+(?=\.|$)", LAYER, name, count=1) for name in names if name)
    return list(dict.fromkeys(numbered))


class _Stopped(Exception):
    """Ends a forward pass once the last wanted layer has run."""


@contextlib.contextmanager
def stopping_after(model: nn.Module, places: Collection[str]) -> Iterator[None]:
    """Inside the block, end each forward pass after the last layer that contains one of the places.

    The pass is complete if a place lies outside the layers.
    """
    blocks: list[str] = []
    with contextlib.suppress(CrateError):
        blocks = [path for _, path, _ in _blocks(model)]
    last = max((_layer_of(place, blocks) for place in places), default=len(blocks))
    if last >= len(blocks) - 1:  # only the final norm would be saved
        yield
        return

    def stop(*_: object) -> None:
        raise _Stopped

    hook = model.get_submodule(blocks[last]).register_forward_hook(stop)
    try:
        with contextlib.suppress(_Stopped):
            yield
    finally:
        hook.remove()


def _layer_of(place: str, blocks: list[str]) -> int:
    """Index of the block that holds a place; the number of blocks if the place is in none."""
    path = place.removesuffix(INPUT)
    return next((i for i, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")), len(blocks))
