"""Requests to the models of `cratelm serve`: validated JSON in, JSON out. Does not import torch.

Requests come from a web page, so every field is validated: `read_*` converts a JSON object to a request or raises
`CrateError`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from cratelm.errors import CrateError
from cratelm.steering.changes import Change, How, Strength

LEAST_TEMPERATURE = 0.01
"""Smallest temperature above 0: logits divided by less can overflow float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Largest request and most requests at a time; the server refuses what exceeds them."""

    text_characters: int = 4000
    """Longest text."""
    text_tokens: int = 512
    """Longest text in tokens; the model's context if that is shorter."""
    new_tokens: int = 200
    """Longest continuation."""
    changes: int = 12
    """Most neurons steered at once."""
    strongest: int = 20
    """Most neurons listed per token."""
    in_flight: int = 4
    """Requests to models, running or waiting, at a time; further ones are answered with 429 and `Retry-After`."""
    requests: int = 64
    """Requests of any kind at a time."""
    body_bytes: int = 65_536
    """Largest request."""
    body_seconds: float = 10.0
    """Longest time in which a request may arrive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SteeredNeuron:
    """A neuron and its change; the strength may be relative to its largest recorded activation."""

    layer: int
    index: int
    how: How
    strength: Strength

    def resolve(self, maximum: float | int | None) -> Change:
        """The change in activation units."""
        return Change(layer=self.layer, index=self.index, how=self.how, value=self.strength.resolve(maximum))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """Activations on a text: the strongest neurons of every layer, or one neuron at every token."""

    model: str
    text: str
    strongest: int = 5
    layer: int | None = None
    """Required with `neuron`."""
    neuron: int | None = None
    """Return the activations of this neuron only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SteerRequest:
    """Continue a text with steered neurons and without."""

    model: str
    text: str
    changes: tuple[SteeredNeuron, ...]
    tokens: int = 60
    temperature: float = 0.0
    seed: int = 0


@runtime_checkable
class Live(Protocol):
    """The models behind `cratelm serve`. Called from threads, one call per request."""

    def contexts(self) -> Mapping[str, int]:
        """Slug of each model -> its longest text in tokens."""
        ...

    def activations(self, request: TextRequest) -> dict[str, Any]:
        """`tokens`, and the strongest neurons of each layer per token, or the activations of the requested neuron."""
        ...

    def effect(self, request: SteerRequest) -> dict[str, Any]:
        """The effect of the changes on the probabilities of the next token."""
        ...

    def continuations(self, request: SteerRequest) -> Iterator[dict[str, Any]]:
        """The texts with and without the changes, streamed token by token."""
        ...


def read_text_request(value: Mapping[str, Any], limits: Limits) -> TextRequest:
    """Parse a JSON object."""
    neuron, layer = _optional_index(value, "neuron"), _optional_index(value, "layer")
    if neuron is not None and layer is None:
        raise CrateError("a request with neuron must have layer too")
    return TextRequest(
        model=_string(value, "model", 200), text=_text(value, limits), layer=layer, neuron=neuron,
        strongest=_whole(value, "strongest", 5, 1, limits.strongest),
    )  # fmt: skip


def read_steer_request(value: Mapping[str, Any], limits: Limits) -> SteerRequest:
    """Parse a JSON object."""
    changes = value.get("changes", [])
    if not isinstance(changes, list):
        raise CrateError("changes must be a list")
    if len(changes) > limits.changes:
        raise CrateError(f"changes must have at most {limits.changes} entries, got {len(changes)}")
    temperature = _number(value, "temperature", 0.0, 0.0, 5.0)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise CrateError(f"temperature must be 0 or at least {LEAST_TEMPERATURE:g}, got {temperature:g}")
    return SteerRequest(
        model=_string(value, "model", 200), text=_text(value, limits), changes=tuple(map(_steered, changes)),
        tokens=_whole(value, "tokens", 60, 1, limits.new_tokens), seed=_whole(value, "seed", 0, 0, 2**31 - 1),
        temperature=temperature,
    )  # fmt: skip


def _steered(value: Any) -> SteeredNeuron:
    if not isinstance(value, dict):
        raise CrateError("a change must be an object with layer, neuron, how and strength")
    how = value.get("how", "set")
    if how not in ("set", "add", "scale", "silence"):
        raise CrateError(f"how must be set, add, scale or silence, got {str(how)[:40]!r}")
    of_maximum = value.get("of_maximum", False)
    if not isinstance(of_maximum, bool) or (of_maximum and how == "scale"):
        raise CrateError("of_maximum must be true or false, and false with how=scale")
    return SteeredNeuron(
        layer=_whole(value, "layer", None, 0, 10_000), index=_whole(value, "neuron", None, 0, 10_000_000), how=how,
        strength=Strength(number=_number(value, "strength", 0.0, -1e6, 1e6), of_maximum=of_maximum),
    )  # fmt: skip


def _string(value: Mapping[str, Any], name: str, longest: int) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise CrateError(f"{name} must be a text that is not empty")
    if len(text) > longest:
        raise CrateError(f"{name} must have at most {longest} characters, got {len(text)}")
    return text


def _text(value: Mapping[str, Any], limits: Limits) -> str:
    # JSON can hold half of a surrogate pair, which no tokenizer accepts.
    return _string(value, "text", limits.text_characters).encode("utf-8", "replace").decode("utf-8")


def _optional_index(value: Mapping[str, Any], name: str) -> int | None:
    return None if value.get(name) is None else _whole(value, name, None, 0, 10_000_000)


def _whole(value: Mapping[str, Any], name: str, default: int | None, least: int, most: int) -> int:
    number = value.get(name, default)
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
        raise CrateError(f"{name} must be a whole number from {least} to {most}, got {str(number)[:40]}")
    return number


def _number(value: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    number = value.get(name, default)
    if not isinstance(number, int | float) or isinstance(number, bool) or not least <= number <= most:
        raise CrateError(f"{name} must be a number from {least:g} to {most:g}, got {str(number)[:40]}")
    return float(number)
