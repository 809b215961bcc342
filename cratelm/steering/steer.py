"""Steer neurons while a model runs: the changes of an `Intervention`, applied through taps.

    with steer(model, Intervention(changes=[Change(layer=1, index=85, how="set", value=3.0)])):
        logits = model(tokens)

The model's `forward` does not change. A neuron's output is linear in its activation, so a change moves the layer's
output by exactly (new - old) * direction, without an error term. A latent of a sparse autoencoder moves the
activation in the same way if the autoencoder's error is kept; otherwise the reconstruction replaces the activation.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cratelm.activations.taps import Edit, edit
from cratelm.errors import CrateError
from cratelm.steering.changes import Change, check_indices
from cratelm.steering.intervention import Intervention
from cratelm.steering.place import NeuronPlace, SparseCoder, check_coder, neuron_places
from cratelm.steering.positions import Positions, Text

CodeTensor = Float[Tensor, "*tokens neurons"]
TokenMask = Callable[[Tensor], Bool[Tensor, "*tokens 1"] | None]
"""The tensor of a forward pass -> True at the tokens to change; None means every token."""
TapEdit = tuple[str, Edit]


@contextlib.contextmanager
def steer(model: nn.Module, intervention: Intervention, *, text: Text | None = None) -> Iterator[None]:
    """Apply the intervention to every forward pass inside the block.

    `text` holds the tokens that the passes read, with or without a cache; append each generated token to it. It
    is required unless the positions are everywhere.

    Works on `LanguageModel`s and on Hugging Face models whose neurons `activations.places` finds. Raises `CrateError`
    for a layer, neuron or latent that does not exist. Costs one copy of the code of each changed layer.
    """
    with apply_edits(model, steering_edits(model, intervention, text)):
        yield


@contextlib.contextmanager
def apply_edits(model: nn.Module, edits: Sequence[TapEdit]) -> Iterator[None]:
    """Apply edits that `steering_edits` made. A tap may occur several times."""
    with contextlib.ExitStack() as stack:
        for tap, change in edits:
            stack.enter_context(edit(model, {tap: change}))
        yield


def steering_edits(model: nn.Module, intervention: Intervention, text: Text | None = None) -> list[TapEdit]:
    """Check the intervention against the model and convert it to edits of taps."""
    if text is None and not intervention.positions.everywhere:
        raise CrateError("positions need the text they count in. Use steer(..., text=Text(tokens))")
    mask, edits = _token_mask(text, intervention.positions), list[TapEdit]()
    neurons, latents = (_by_layer(intervention.changes, latent=latent) for latent in (False, True))
    if neurons:
        places = neuron_places(model)
        check_indices([*_flat(neurons)], {layer: place.neurons for layer, place in places.items()})
        for layer, changes in neurons.items():
            edits += _neuron_edits(places[layer], changes, mask, intervention)
    coders = _coders_by_layer(model, intervention.coders)
    check_indices([*_flat(latents)], {layer: len(coder.directions) for layer, coder in coders.items()}, "latents")
    for layer, coder in coders.items():
        if layer in latents or not intervention.keep_error:
            edits.append((coder.tap, _latent_edit(coder, latents.get(layer, []), mask, intervention)))
    return edits


def apply_changes(
    code: CodeTensor, changes: Sequence[Change], mask: Bool[Tensor, "*tokens 1"] | None = None
) -> CodeTensor:
    """A copy of a code with the changes applied, at the tokens of `mask` or at all tokens."""
    result = code.clone()
    for change in changes:
        column = result[..., change.index : change.index + 1]
        new = _new_value(change, column)
        result[..., change.index : change.index + 1] = new if mask is None else torch.where(mask, new, column)
    return result


def _new_value(change: Change, old: Tensor) -> Tensor:
    # As tensors: a number outside the range of the type becomes inf, and `check_finite` then reports it.
    value, most = (torch.tensor(number, dtype=torch.float64).to(old) for number in (change.value, change.most))
    match change.how:
        case "set":
            return value.expand_as(old)
        case "add":
            return old + value
        case "scale":
            return old * value
        case "clamp":
            return old.clamp(value, most)
        case "silence":
            return torch.zeros_like(old)


def _token_mask(text: Text | None, positions: Positions) -> TokenMask:
    def mask(value: Tensor) -> Bool[Tensor, "*tokens 1"] | None:
        if text is None or (positions.everywhere and bool(text.real.all())):
            return None
        # OPT flattens the rows of a batch into one sequence of tokens.
        count = value.shape[1] if value.ndim == 3 else len(value) // len(text.tokens)
        selected = text.select(positions, count).to(value.device)
        return (selected if value.ndim == 3 else selected.flatten())[..., None]

    return mask


def _by_layer(changes: Sequence[Change], *, latent: bool) -> Mapping[int, list[Change]]:
    by_layer: dict[int, list[Change]] = defaultdict(list)
    for change in changes:
        if change.latent == latent:
            by_layer[change.layer].append(change)
    return dict(by_layer)


def _flat(by_layer: Mapping[int, list[Change]]) -> Iterator[Change]:
    return (change for changes in by_layer.values() for change in changes)


def _coders_by_layer(model: nn.Module, coders: Sequence[SparseCoder]) -> dict[int, SparseCoder]:
    by_layer: dict[int, SparseCoder] = {}
    for coder in coders:
        check_coder(model, coder)
        if coder.layer in by_layer:
            raise CrateError(f"each layer takes one sparse autoencoder, got two for layer {coder.layer}")
        by_layer[coder.layer] = coder
    return by_layer


def _neuron_edits(
    place: NeuronPlace, changes: Sequence[Change], mask: TokenMask, intervention: Intervention
) -> list[TapEdit]:
    control = intervention.control
    if control is None:
        return [(place.tap, lambda code: apply_changes(code, changes, mask(code)))]
    if control.kind == "opposite":
        return [(place.tap, lambda code: 2 * code - apply_changes(code, changes, mask(code)))]
    index, random = _random_directions(place.directions, changes, control.seed)
    move: list[Tensor] = []  # carries the move of the running pass from the first tap to the second

    def compute(code: Tensor) -> Tensor:
        move[:] = [(apply_changes(code, changes, mask(code)) - code)[..., index] @ random.to(code)]
        return code

    def add(written: Tensor) -> Tensor:
        return written + move[0].view_as(written)

    return [(place.tap, compute), (place.written, add)]


def _latent_edit(coder: SparseCoder, changes: Sequence[Change], mask: TokenMask, intervention: Intervention) -> Edit:
    keep_error, control = intervention.keep_error, intervention.control

    def replace(x: Tensor) -> Tensor:
        if (width := coder.directions.shape[1]) != x.shape[-1]:
            raise CrateError(
                f"the sparse autoencoder reads a width of {width}, but {coder.tap} of this model has {x.shape[-1]}. "
                "Use one that was trained on this model"
            )
        latents = coder.encode(x)
        new = apply_changes(latents, changes, mask(x))
        if control is not None and control.kind == "opposite":
            new = 2 * latents - new
        if control is not None and control.kind == "random-direction":
            index, random = _random_directions(coder.directions, changes, control.seed)
            move = (new - latents)[..., index] @ random.to(x)
            return (x if keep_error else coder.decode(latents)) + move
        return x + (coder.decode(new) - coder.decode(latents)) if keep_error else coder.decode(new)

    return replace


def _random_directions(
    directions: Float[Tensor, "neurons width"], changes: Sequence[Change], seed: int
) -> tuple[list[int], Float[Tensor, "changed width"]]:
    """The changed neurons, and for each a random direction of the same length; reproducible by seed."""
    index = sorted({change.index for change in changes})
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(index), directions.shape[1], generator=generator)
    lengths = directions[index].float().cpu().norm(dim=1, keepdim=True)
    return index, drawn / drawn.norm(dim=1, keepdim=True) * lengths
