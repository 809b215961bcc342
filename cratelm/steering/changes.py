"""What is done to a neuron: set, add, scale, clamp or silence, read from `1/85=set:2x`. No torch is loaded here."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cratelm.errors import CrateError

How = Literal["set", "add", "scale", "clamp", "silence"]
SAE = "sae:"
"""Stands before the layer of a latent of a sparse autoencoder."""
EXAMPLES = "1/85=set:2x, 1/85=add:0.5, 1/85=scale:0, 1/85=clamp:0..1 or 1/85=silence"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What is done to one neuron, or to one latent of a sparse autoencoder, at a token.

    | how     | new activation               | identity at             |
    |---------|------------------------------|-------------------------|
    | set     | value                        |                         |
    | add     | activation + value           | value 0                 |
    | scale   | activation * value           | value 1                 |
    | clamp   | min(max(activation, value), most) | no bound within reach |
    | silence | 0                            |                         |
    """

    layer: int
    """Zero-based."""
    index: int
    """Zero-based, in that layer's code."""
    how: How
    value: float | int = 0.0
    """In the model's own units; a factor for `scale`, the least for `clamp`."""
    most: float | int = math.inf
    """The most for `clamp`, in the model's own units."""
    latent: bool = False
    """Whether it is a latent of the sparse autoencoder of that layer, not a neuron."""

    @property
    def name(self) -> str:
        """`1/85`, or `sae:1/85` for a latent."""
        return f"{SAE if self.latent else ''}{self.layer}/{self.index}"

    def __str__(self) -> str:
        match self.how:
            case "silence":
                return f"{self.name}=silence"
            case "clamp":
                low, high = ("" if math.isinf(one) else f"{one:.4g}" for one in (self.value, self.most))
                return f"{self.name}=clamp:{low}..{high}"
            case _:
                return f"{self.name}={self.how}:{self.value:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Strength:
    """A number as it was asked for: in the model's own units, or in multiples of the neuron's own maximum."""

    number: float | int
    of_maximum: bool = False

    def __str__(self) -> str:
        return f"{self.number:g}{'x' if self.of_maximum else ''}"

    def resolve(self, maximum: float | int | None) -> float | int:
        """The number in the model's own units."""
        if not self.of_maximum:
            return self.number
        assert maximum is not None, "a strength in multiples needs the maximum of its neuron"
        return self.number * maximum


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A change as it was asked for, before its strengths are in the model's own units."""

    layer: int
    index: int
    how: How
    strengths: tuple[Strength, ...]
    """None for `silence`, least and most for `clamp`, one for all others; empty too where a sweep gives it."""
    latent: bool = False

    @property
    def needs_maximum(self) -> bool:
        """Whether a strength is in multiples of the neuron's maximum."""
        return any(one.of_maximum and math.isfinite(one.number) for one in self.strengths)

    @property
    def name(self) -> str:
        """`1/85`, or `sae:1/85` for a latent."""
        return f"{SAE if self.latent else ''}{self.layer}/{self.index}"

    def resolve(self, maximum: float | int | None = None) -> Change:
        """The change in the model's own units; `maximum` is the neuron's, needed where strengths are multiples."""
        numbers = [one.resolve(maximum) if math.isfinite(one.number) else one.number for one in self.strengths]
        value, most = (*numbers, 0.0, math.inf)[:2] if len(numbers) < 2 else numbers
        if self.how != "clamp":
            most = math.inf
        return Change(
            layer=self.layer, index=self.index, how=self.how, value=value, most=most, latent=self.latent
        )  # fmt: skip


def parse_strength(text: str) -> Strength:
    """`0.5` in the model's own units, `2x` in multiples of the neuron's own maximum."""
    number, of_maximum = (text[:-1], True) if text.endswith("x") else (text, False)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CrateError(f"the strength {text!r} is no number. Write 0.5 (the model's units) or 2x (neuron's maximum)")
    return Strength(number=value, of_maximum=of_maximum)


def parse_request(text: str, *, swept: bool = False) -> Request:
    """Read `LAYER/NEURON=HOW:STRENGTH`; a neuron alone is set to its own maximum, or, when `swept`, to each strength.

    `sae:LAYER/LATENT` is a latent of a sparse autoencoder.
    """
    match = re.fullmatch(r"\s*(sae:)?(\d+)/(\d+)\s*(?:=\s*([a-z]+)\s*(?::\s*(\S+))?)?\s*", text)
    if match is None:
        raise CrateError(f"{text!r} names no neuron to change. Write LAYER/NEURON=HOW:STRENGTH, as in {EXAMPLES}")
    latent, layer, index, how, strength = match.groups()
    how = how or "set"
    if how not in get_args(How):
        raise CrateError(f"{text!r} asks for {how!r}, possible are {', '.join(get_args(How))}. Write as in {EXAMPLES}")
    if swept:
        if strength is not None or how in ("clamp", "silence"):
            raise CrateError(f"{text!r} cannot be swept. Write {layer}/{index}=set, =add or =scale without a strength")
        strengths: tuple[Strength, ...] = ()
    else:
        strengths = _strengths(text, how, strength if match[4] else "1x")
    return Request(
        layer=int(layer), index=int(index), how=how, strengths=strengths, latent=latent is not None  # type: ignore[arg-type]
    )  # fmt: skip


def _strengths(text: str, how: str, strength: str | None) -> tuple[Strength, ...]:
    if how == "silence":
        if strength is not None:
            raise CrateError(f"{text!r} gives silence a strength. Write {text.rpartition(':')[0]}")
        return ()
    if strength is None:
        raise CrateError(f"{text!r} gives no strength. Write as in {EXAMPLES}")
    if how == "clamp":
        low, between, high = strength.partition("..")
        if not between or not (low or high):
            raise CrateError(f"{text!r} gives no range. Write clamp:0..1, clamp:0.. or clamp:..2x")
        bounds = (
            parse_strength(low) if low else Strength(number=-math.inf),
            parse_strength(high) if high else Strength(number=math.inf),
        )
        if bounds[0].of_maximum == bounds[1].of_maximum and bounds[0].number > bounds[1].number:
            raise CrateError(f"{text!r} clamps to a range that ends below its start. Write the smaller number first")
        return bounds
    found = parse_strength(strength)
    if how == "scale" and found.of_maximum:
        raise CrateError(f"{text!r}: scale takes a factor, not a multiple of the maximum. Write scale:{found.number:g}")
    return (found,)


def swept(request: Request, strength: Strength) -> Request:
    """The same request at one strength of a sweep."""
    if request.how == "scale" and strength.of_maximum:
        raise CrateError(f"the sweep of {request.name} takes factors, not {strength}. Write numbers, as in 0,0.5,1,2")
    return Request(
        layer=request.layer, index=request.index, how=request.how, strengths=(strength,), latent=request.latent
    )  # fmt: skip


def parse_strengths(text: str) -> tuple[Strength, ...]:
    """`0x,1x,2x` -> strengths, each once, ascending."""
    found = dict.fromkeys(parse_strength(part.strip()) for part in text.split(",") if part.strip())
    if len(found) < 2:
        raise CrateError(f"a sweep over {text!r} has less than two strengths. Write numbers, as in 0x,1x,2x,4x")
    if len({one.of_maximum for one in found}) > 1:
        raise CrateError(f"a sweep over {text!r} mixes multiples and the model's own units. Write all with x or none")
    return tuple(sorted(found, key=lambda one: one.number))


def check_indices(requests: Sequence[Request | Change], neurons: dict[int, int], what: str = "neurons") -> None:
    """Refuse a layer or an index that is not there; `neurons` is layer -> how many."""
    for one in requests:
        if one.layer not in neurons:
            there = ", ".join(map(str, sorted(neurons))) or "none"
            raise CrateError(f"{one.name}: there is no layer {one.layer} with {what} (found: {there}). Use one of them")
        if one.index >= neurons[one.layer]:
            raise CrateError(
                f"{one.name}: layer {one.layer} has {what} 0 to {neurons[one.layer] - 1}, not {one.index}. Use another"
            )
