"""A `Subject` for the collector, from any causal language model."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.places import tap_folder
from cratelm.activations.row_beginning import setting_of
from cratelm.activations.subject import Subject
from cratelm.activations.taps import capture
from cratelm.errors import CrateError

Sign = Literal["positive", "negative"]


def observe(
    model: nn.Module,
    *,
    model_hash: str,
    tap: str = "neurons",
    sign: Sign = "positive",
    layers: Sequence[int] = (),
    context: int | None = None,
    bf16: bool = False,
    row_beginning: tuple[int, ...] | None = None,
) -> Subject:
    """A function from token ids to the activations at a tap (see `places.find_places`) of some or all layers.

    `row_beginning` are the tokens that the model reads before every row (`Subject.row_beginning`).
    `sign="negative"` returns the activations times -1, under a separate tap name. A forward pass of a few tokens
    determines the number of features. Raises CrateError for a tap whose shape is not (batch, seq, features) and for a
    model that sees later tokens.
    """
    causal = causal_model(model)
    places = _chosen(causal.places(tap), layers)
    device, begin = causal.device, torch.tensor(row_beginning or (), dtype=torch.int64)

    def forward(text: Int[Tensor, "batch seq"]) -> dict[int, Tensor]:
        tokens = with_beginning(text, begin)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
        with torch.inference_mode(), autocast, capture(causal.module, places.values()) as codes:
            causal.read(tokens, places.values())
        if missing := [place for place in places.values() if place not in codes]:
            raise CrateError(f"{missing[0]} does not run in the model's forward pass. Give another --tap")
        rows = {layer: _by_row(codes[place], tokens)[:, len(begin) :].float() for layer, place in places.items()}
        return _signed(rows, sign)

    length = causal.row_length(context) - len(begin)
    sizes = _probe(forward, tap, causal.vocabulary_rows, min(6, length), device)
    identity = {"model_hash": model_hash, "precision": "bfloat16" if bf16 else "float32"}
    directions = causal.directions(places)
    return Subject(
        forward=forward, layers=sizes, context=length, tap=tap_folder(tap, negative=sign == "negative"),
        identity=identity | {"context": length + len(begin), "layers": sorted(sizes)} | setting_of(row_beginning),
        row_beginning=row_beginning, decoders=None if directions is None else _signed(directions, sign),
    )  # fmt: skip


def with_beginning(tokens: Int[Tensor, "batch seq"], begin: Sequence[int] | Tensor) -> Int[Tensor, "batch longer"]:
    """The rows with the same tokens before each."""
    first = torch.as_tensor(begin, dtype=tokens.dtype, device=tokens.device)
    return torch.cat([first.expand(len(tokens), -1), tokens], dim=1)


def _by_row(code: Tensor, tokens: Int[Tensor, "batch seq"]) -> Tensor:
    """Shape (batch, seq, features) also for a model (OPT) that concatenates all rows."""
    return code.unflatten(0, tokens.shape) if code.ndim == 2 and len(code) == tokens.numel() else code


def _signed(values: dict[int, Tensor], sign: Sign) -> dict[int, Tensor]:
    return values if sign == "positive" else {layer: -value for layer, value in values.items()}


def _chosen(places: dict[int, str], layers: Sequence[int]) -> dict[int, str]:
    if unknown := sorted(set(layers) - places.keys()):
        available = ", ".join(map(str, places))
        raise CrateError(f"--layer must be a layer with this tap ({available}), got {unknown[0]}")
    return {layer: place for layer, place in places.items() if not layers or layer in layers}


def _probe(
    forward: Callable[[Int[Tensor, "batch seq"]], dict[int, Tensor]],
    tap: str,
    vocabulary: int,
    length: int,
    device: torch.device,
) -> dict[int, int]:
    """Number of features of each layer at a tap, from two rows that differ only in their last token."""
    tokens = (torch.arange(length, device=device) % vocabulary).repeat(2, 1)
    tokens[1, -1] = (tokens[1, -1] + 1) % vocabulary
    codes = forward(tokens)
    for layer, code in codes.items():
        if code.ndim != 3 or code.shape[:2] != tokens.shape:
            raise CrateError(
                f"the tap {tap} must have shape (batch, seq, features), got {tuple(code.shape)} in layer {layer} for "
                f"{tuple(tokens.shape)} tokens. Give another --tap"
            )
        if not torch.allclose(code[0, :-1], code[1, :-1], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise CrateError(
                f"layer {layer} sees later tokens, so this is not a causal language model. Give a causal one"
            )
    return {layer: code.shape[2] for layer, code in codes.items()}
