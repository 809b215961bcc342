"""Turn neurons while a model runs: the changes of `changes.py` at the positions of `positions.py`, through taps.

    with steer(model, [Change(layer=1, index=85, how="set", value=3.0)]):
        logits = model(tokens)

The model's `forward` knows nothing of it. What a neuron writes is linear in its activation, so a change moves what its
layer writes by exactly (new - old) * direction and there is no error term; a latent of a sparse autoencoder moves it
likewise, if the autoencoder's error is kept, and otherwise its reconstruction takes the place of the activation.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cratelm.activations.taps import Edit, edit
from cratelm.errors import CrateError
from cratelm.steering.changes import Change, check_indices
from cratelm.steering.place import Place, SparseCoder, check_coder, neuron_places
from cratelm.steering.positions import EVERYWHERE, Positions, Text

Code = Float[Tensor, "*tokens neurons"]
Where = Callable[[Tensor], Bool[Tensor, "*tokens 1"] | None]
"""A pass's tensor -> at which of its tokens codes are changed; None at all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The same changes made into a control: of the same size, in a direction that means something else.

    `opposite` moves each activation as far the other way: old - (new - old). `random-direction` leaves the activation
    and adds (new - old) times a random direction, as long as the neuron's own, to what the layer writes.
    """

    kind: Literal["opposite", "random-direction"]
    seed: int = 0


@contextlib.contextmanager
def steer(
    model: nn.Module,
    changes: Sequence[Change],
    *,
    text: Text | None = None,
    positions: Positions = EVERYWHERE,
    coders: Sequence[SparseCoder] = (),
    keep_error: bool = True,
    control: Control | None = None,
) -> Iterator[None]:
    """Make the changes in every forward pass inside the block.

    `text` is what the passes read: each reads its last so many tokens, as passes with and without a cache do, and
    whoever makes new tokens appends them. It is needed where `positions` are not everywhere. Changes to one neuron are
    made in the order given. `coders` are the sparse autoencoders that changes of latents refer to, by layer; without
    `keep_error` each puts its reconstruction in the place of the activation, at all tokens, changed or not.

    Works on our models and on Hugging Face ones whose neurons `activations.places` finds. A layer, neuron or latent
    that does not exist is a `CrateError` with the valid range. Costs a copy of the code of each changed layer.
    """
    if text is None and not positions.everywhere:
        raise CrateError("positions are counted in a text, and none was given. Use steer(..., text=Text(tokens))")
    edits = _edits(model, changes, _where(text, positions), coders, keep_error, control)
    with contextlib.ExitStack() as stack:
        for tap, change in edits:
            stack.enter_context(edit(model, {tap: change}))
        yield


def check_changes(model: nn.Module, changes: Sequence[Change], coders: Sequence[SparseCoder] = ()) -> None:
    """Refuse changes to what the model or the autoencoders do not have, before anything runs."""
    _edits(model, changes, lambda _: None, coders, True, None)


def changed(code: Code, changes: Sequence[Change], where: Bool[Tensor, "*tokens 1"] | None = None) -> Code:
    """A copy of a code with the changes made, at some tokens or at all."""
    result = code.clone()
    for change in changes:
        column = result[..., change.index : change.index + 1]
        new = _new_value(change, column)
        result[..., change.index : change.index + 1] = new if where is None else torch.where(where, new, column)
    return result


def _new_value(change: Change, old: Tensor) -> Tensor:
    # As tensors: a number beyond the type's range becomes infinite there, and is found in the logits.
    value, most = (torch.tensor(one, dtype=torch.float64).to(old) for one in (change.value, change.most))
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


def _where(text: Text | None, positions: Positions) -> Where:
    def where(value: Tensor) -> Bool[Tensor, "*tokens 1"] | None:
        if text is None or (positions.everywhere and bool(text.real.all())):
            return None
        # OPT lays the tokens of all rows behind each other.
        rows = len(text.tokens)
        count = value.shape[1] if value.ndim == 3 else len(value) // rows
        chosen = text.chosen(positions, count).to(value.device)
        return (chosen if value.ndim == 3 else chosen.flatten())[..., None]

    return where


def _edits(
    model: nn.Module, changes: Sequence[Change], where: Where, coders: Sequence[SparseCoder], keep_error: bool,
    control: Control | None,
) -> list[tuple[str, Edit]]:  # fmt: skip
    found: list[tuple[str, Edit]] = []
    for layer, own in _by_layer(changes, latent=False).items():
        places = neuron_places(model)
        check_indices(own, {number: place.neurons for number, place in places.items()})
        found += _neuron_edits(places[layer], own, where, control)
    by_layer = _coders_by_layer(model, coders)
    latents = _by_layer(changes, latent=True)
    asked = [change for own in latents.values() for change in own]
    check_indices(asked, {layer: len(coder.directions) for layer, coder in by_layer.items()}, "latents")
    for layer, coder in by_layer.items():
        own = latents.get(layer, [])
        if own or not keep_error:
            found.append((coder.tap, _latent_edit(coder, own, where, keep_error, control)))
    return found


def _by_layer(changes: Sequence[Change], *, latent: bool) -> Mapping[int, list[Change]]:
    found: dict[int, list[Change]] = defaultdict(list)
    for change in changes:
        if change.latent == latent:
            found[change.layer].append(change)
    return dict(found)


def _coders_by_layer(model: nn.Module, coders: Sequence[SparseCoder]) -> dict[int, SparseCoder]:
    found: dict[int, SparseCoder] = {}
    for coder in coders:
        check_coder(model, coder)
        if coder.layer in found:
            raise CrateError(f"two sparse autoencoders of layer {coder.layer} were given. Give one for each layer")
        found[coder.layer] = coder
    return found


def _neuron_edits(
    place: Place, changes: Sequence[Change], where: Where, control: Control | None
) -> list[tuple[str, Edit]]:
    if control is None:
        return [(place.tap, lambda code: changed(code, changes, where(code)))]
    if control.kind == "opposite":
        return [(place.tap, lambda code: 2 * code - changed(code, changes, where(code)))]
    index, random = _random_directions(place.directions, changes, control.seed)
    moved: list[Tensor] = []  # what the pass that is under way changes, between its two taps

    def remember(code: Tensor) -> Tensor:
        moved[:] = [(changed(code, changes, where(code)) - code)[..., index] @ random.to(code)]
        return code

    def add(written: Tensor) -> Tensor:
        return written + moved[0].view_as(written)

    return [(place.tap, remember), (place.written, add)]


def _latent_edit(
    coder: SparseCoder, changes: Sequence[Change], where: Where, keep_error: bool, control: Control | None
) -> Edit:
    def replace(x: Tensor) -> Tensor:
        if (width := coder.directions.shape[1]) != x.shape[-1]:
            raise CrateError(
                f"the sparse autoencoder codes a width of {width}, {coder.tap} of this model gives {x.shape[-1]}. "
                "Use one that was trained on this model"
            )
        latents = coder.encode(x)
        new = changed(latents, changes, where(x))
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
    """The changed neurons, and for each a random direction as long as its own; the same seed gives the same."""
    index = sorted({change.index for change in changes})
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(index), directions.shape[1], generator=generator)
    lengths = directions[index].float().cpu().norm(dim=1, keepdim=True)
    return index, drawn / drawn.norm(dim=1, keepdim=True) * lengths
