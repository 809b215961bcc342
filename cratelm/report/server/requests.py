"""What a live browser asks of a model: requests that were checked, answers that are JSON. No torch is loaded here.

The requests come from a web page, so every field is doubted: `read_*` turns a JSON object into a request or raises
`CrateError` with what was wrong.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from cratelm.errors import CrateError
from cratelm.steering.changes import Change, How, Strength

LEAST_TEMPERATURE = 0.01
"""Logits divided by less can be larger than any float32; 0 takes the likeliest token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much one request may ask, and how many may be under way. Beyond them the server refuses."""

    text_characters: int = 4000
    """Longest text."""
    text_tokens: int = 512
    """Longest text in the model's tokens; shorter where the model's context is."""
    new_tokens: int = 200
    """Longest continuation."""
    changes: int = 12
    """Most neurons turned at once."""
    strongest: int = 20
    """Most neurons listed at a token."""
    in_flight: int = 4
    """Requests to models that run or wait at a time; one more is answered with 429 and when to come again."""
    requests: int = 64
    """Requests of any kind under way at a time."""
    body_bytes: int = 65_536
    """Largest request."""
    body_seconds: float = 10.0
    """Longest time that a request may take to arrive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnedNeuron:
    """A neuron and what is done to it, its strength perhaps in multiples of its largest recorded activation."""

    layer: int
    index: int
    how: How
    strength: Strength

    def resolve(self, maximum: float | int | None) -> Change:
        """The change in the model's own units."""
        return Change(layer=self.layer, index=self.index, how=self.how, value=self.strength.resolve(maximum))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """Look at a text: every layer's strongest neurons, or one neuron along it."""

    model: str
    text: str
    strongest: int = 5
    layer: int | None = None
    """With `neuron`: whose activation on each token is asked for."""
    neuron: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SteerRequest:
    """Continue a text with neurons turned and without."""

    model: str
    text: str
    changes: tuple[TurnedNeuron, ...]
    tokens: int = 60
    temperature: float = 0.0
    seed: int = 0


@runtime_checkable
class Live(Protocol):
    """The models behind a live browser. Called from threads; each call is one request."""

    def contexts(self) -> Mapping[str, int]:
        """The models there are, by slug, and the longest text each reads, in tokens."""
        ...

    def look(self, request: TextRequest) -> dict[str, Any]:
        """`tokens`, and of each layer the strongest neurons at each token, or the one asked for along the text."""
        ...

    def effect(self, request: SteerRequest) -> dict[str, Any]:
        """What the changes do to the next token's probabilities."""
        ...

    def continuations(self, request: SteerRequest) -> Iterator[dict[str, Any]]:
        """The texts with and without the changes, token by token as they are made."""
        ...


def read_text_request(value: Mapping[str, Any], limits: Limits) -> TextRequest:
    """The request in a JSON object."""
    neuron, layer = _optional_index(value, "neuron"), _optional_index(value, "layer")
    if neuron is not None and layer is None:
        raise CrateError("a neuron needs its layer. Give both")
    return TextRequest(
        model=_string(value, "model", 200), text=_text(value, limits), layer=layer, neuron=neuron,
        strongest=_whole(value, "strongest", 5, 1, limits.strongest),
    )  # fmt: skip


def read_steer_request(value: Mapping[str, Any], limits: Limits) -> SteerRequest:
    """The request in a JSON object."""
    changes = value.get("changes", [])
    if not isinstance(changes, list):
        raise CrateError("changes is no list of neurons to turn")
    if len(changes) > limits.changes:
        raise CrateError(f"{len(changes)} neurons are to be turned, at most {limits.changes} can be at once")
    temperature = _number(value, "temperature", 0.0, 0.0, 5.0)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise CrateError(f"temperature is {temperature:g}: give 0 or at least {LEAST_TEMPERATURE:g}")
    return SteerRequest(
        model=_string(value, "model", 200), text=_text(value, limits), changes=tuple(map(_turned, changes)),
        tokens=_whole(value, "tokens", 60, 1, limits.new_tokens), seed=_whole(value, "seed", 0, 0, 2**31 - 1),
        temperature=temperature,
    )  # fmt: skip


def _turned(value: Any) -> TurnedNeuron:
    if not isinstance(value, dict):
        raise CrateError("a change is no object with layer, neuron, how and strength")
    how = value.get("how", "set")
    if how not in ("set", "add", "scale", "silence"):
        raise CrateError(f"a neuron can be set, add, scale or silence, not {str(how)[:40]!r}")
    of_maximum = value.get("of_maximum", False)
    if not isinstance(of_maximum, bool) or (of_maximum and how == "scale"):
        raise CrateError("of_maximum is true or false, and false where a neuron is scaled")
    return TurnedNeuron(
        layer=_whole(value, "layer", None, 0, 10_000), index=_whole(value, "neuron", None, 0, 10_000_000), how=how,
        strength=Strength(number=_number(value, "strength", 0.0, -1e6, 1e6), of_maximum=of_maximum),
    )  # fmt: skip


def _string(value: Mapping[str, Any], name: str, longest: int) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise CrateError(f"{name} is missing, or no text")
    if len(found) > longest:
        raise CrateError(f"{name} has {len(found)} characters, at most {longest} are read")
    return found


def _text(value: Mapping[str, Any], limits: Limits) -> str:
    text = _string(value, "text", limits.text_characters)
    # Half of a surrogate pair is JSON but no text: no tokenizer takes it.
    return text.encode("utf-8", "replace").decode("utf-8")


def _optional_index(value: Mapping[str, Any], name: str) -> int | None:
    return None if value.get(name) is None else _whole(value, name, None, 0, 10_000_000)


def _whole(value: Mapping[str, Any], name: str, default: int | None, least: int, most: int) -> int:
    found = value.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
        raise CrateError(f"{name} is {str(found)[:40]}, a whole number from {least} to {most} is needed")
    return found


def _number(value: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    found = value.get(name, default)
    if not isinstance(found, int | float) or isinstance(found, bool) or found != found:
        raise CrateError(f"{name} is {str(found)[:40]}, a number is needed")
    if not least <= found <= most:  # also of an integer that no float can hold
        raise CrateError(f"{name} is {str(found)[:40]}, a number from {least:g} to {most:g} is needed")
    return float(found)
