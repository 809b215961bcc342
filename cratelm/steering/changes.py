"""Changes of neurons: set, add, scale, clamp or silence, parsed from `1/85=set:2x`. Does not import torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cratelm.errors import CrateError

How = Literal["set", "add", "scale", "clamp", "silence"]
SAE = "sae:"
"""Prefix of the name of a latent of a sparse autoencoder."""
CHANGE_EXAMPLES = "1/85=set:2x, 1/85=add:0.5, 1/85=scale:0, 1/85=clamp:0..1 or 1/85=silence"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedNeuron:
    """A neuron, or a latent of a sparse autoencoder, and how it changes."""

    layer: int
    """Zero-based."""
    index: int
    """Zero-based, within the layer."""
    how: How
    latent: bool = False
    """Whether `index` names a latent of the layer's sparse autoencoder."""

    @property
    def name(self) -> str:
        """`1/85`, or `sae:1/85` for a latent."""
        return f"{SAE if self.latent else ''}{self.layer}/{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Change(ChangedNeuron):
    """A change of the activation of one neuron, or of one latent of a sparse autoencoder.

    | how     | new activation               | identity at             |
    |---------|------------------------------|-------------------------|
    | set     | value                        |                         |
    | add     | activation + value           | value 0                 |
    | scale   | activation * value           | value 1                 |
    | clamp   | min(max(activation, value), most) | infinite bounds |
    | silence | 0                            |                         |
    """

    value: float | int = 0.0
    """In activation units; a factor for `scale`, the lower bound for `clamp`."""
    most: float | int = math.inf
    """The upper bound for `clamp`, in activation units."""

    def __str__(self) -> str:
        match self.how:
            case "silence":
                return f"{self.name}=silence"
            case "clamp":
                low, high = ("" if math.isinf(bound) else f"{bound:.4g}" for bound in (self.value, self.most))
                return f"{self.name}=clamp:{low}..{high}"
            case _:
                return f"{self.name}={self.how}:{self.value:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Strength:
    """A strength as the user wrote it: in activation units, or in multiples of the neuron's maximum."""

    number: float | int
    of_maximum: bool = False

    def __str__(self) -> str:
        return f"{self.number:g}{'x' if self.of_maximum else ''}"

    def resolve(self, maximum: float | int | None) -> float | int:
        """The strength in activation units."""
        if not self.of_maximum:
            return self.number
        assert maximum is not None, "a relative strength needs the maximum of its neuron"
        return self.number * maximum


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeRequest(ChangedNeuron):
    """A change as the user wrote it, with strengths that may be relative."""

    strengths: tuple[Strength, ...]
    """Two bounds for `clamp`, none for `silence` or if a sweep sets it, otherwise one."""

    @property
    def needs_maximum(self) -> bool:
        """Whether a strength is relative to the neuron's maximum."""
        return any(strength.of_maximum for strength in self.strengths)

    def resolve(self, maximum: float | int | None = None) -> Change:
        """The change in activation units; `maximum` is the neuron's, required for relative strengths."""
        numbers = [strength.resolve(maximum) for strength in self.strengths]
        value, most = numbers if self.how == "clamp" else (*(numbers or [0.0]), math.inf)
        return Change(
            layer=self.layer, index=self.index, how=self.how, value=value, most=most, latent=self.latent
        )  # fmt: skip


def parse_strength(text: str) -> Strength:
    """Parse `0.5` (activation units) or `2x` (multiples of the neuron's maximum)."""
    number, of_maximum = (text[:-1], True) if text.endswith("x") else (text, False)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise CrateError(f"a strength must be a number such as 0.5, or 2x for twice the neuron's maximum, got {text!r}")
    return Strength(number=value, of_maximum=of_maximum)


def parse_request(text: str, *, swept: bool = False) -> ChangeRequest:
    """Parse `LAYER/NEURON=HOW:STRENGTH`, or `sae:LAYER/LATENT=...` for a latent of a sparse autoencoder.

    A neuron alone is set to its maximum. `swept` requests have no strength: the sweep sets it.
    """
    match = re.fullmatch(r"\s*(sae:)?(\d+)/(\d+)\s*(?:=\s*([a-z]+)\s*(?::\s*(\S+))?)?\s*", text)
    if match is None:
        raise CrateError(f"a change must be LAYER/NEURON=HOW:STRENGTH, such as {CHANGE_EXAMPLES}, got {text!r}")
    latent, layer, index, how, strength = match.groups()
    how = how or "set"
    if how not in get_args(How):
        raise CrateError(f"HOW must be one of {', '.join(get_args(How))}, got {how!r} in {text!r}")
    if swept:
        if strength is not None or how in ("clamp", "silence"):
            raise CrateError(f"a sweep needs {layer}/{index}=set, =add or =scale without a strength, got {text!r}")
        strengths: tuple[Strength, ...] = ()
    else:
        strengths = _strengths(text, how, strength if match[4] else "1x")
    return ChangeRequest(
        layer=int(layer), index=int(index), how=how, strengths=strengths, latent=latent is not None  # type: ignore[arg-type]
    )  # fmt: skip


def _strengths(text: str, how: str, strength: str | None) -> tuple[Strength, ...]:
    if how == "silence":
        if strength is not None:
            raise CrateError(f"silence takes no strength, got {text!r}. Write {text.rpartition(':')[0]}")
        return ()
    if strength is None:
        raise CrateError(f"{how} needs a strength, got {text!r}. Examples: {CHANGE_EXAMPLES}")
    if how == "clamp":
        return _bounds(text, strength)
    parsed = parse_strength(strength)
    if how == "scale" and parsed.of_maximum:
        raise CrateError(f"scale takes a factor, got the relative strength {text!r}. Write scale:{parsed.number:g}")
    return (parsed,)


def _bounds(text: str, strength: str) -> tuple[Strength, Strength]:
    low, between, high = strength.partition("..")
    if not between or not (low or high):
        raise CrateError(f"clamp needs a range such as 0..1, 0.. or ..2x, got {text!r}")
    lower = parse_strength(low) if low else Strength(number=-math.inf)
    upper = parse_strength(high) if high else Strength(number=math.inf)
    if lower.of_maximum == upper.of_maximum and lower.number > upper.number:
        raise CrateError(f"the range of clamp must start at the smaller number, got {text!r}")
    return lower, upper


def swept(request: ChangeRequest, strength: Strength) -> ChangeRequest:
    """The request with a strength of the sweep."""
    if request.how == "scale" and strength.of_maximum:
        raise CrateError(f"a sweep of scale takes factors such as 0,0.5,1,2, got {strength} for {request.name}")
    return replace(request, strengths=(strength,))


def parse_strengths(text: str) -> tuple[Strength, ...]:
    """`0x,1x,2x` -> distinct strengths, ascending."""
    strengths = dict.fromkeys(parse_strength(part.strip()) for part in text.split(",") if part.strip())
    if len(strengths) < 2:
        raise CrateError(f"a sweep needs at least 2 strengths, such as 0x,1x,2x,4x, got {text!r}")
    if len({strength.of_maximum for strength in strengths}) > 1:
        raise CrateError(f"the strengths of a sweep must all be relative (2x) or all absolute, got {text!r}")
    return tuple(sorted(strengths, key=lambda strength: strength.number))


def check_indices(requests: Sequence[ChangedNeuron], sizes: Mapping[int, int], what: str = "neurons") -> None:
    """Raise `CrateError` for a layer or index that does not exist; `sizes` is layer -> number of neurons or latents."""
    for request in requests:
        layer, size = request.layer, sizes.get(request.layer)
        if size is None:
            layers = ", ".join(map(str, sorted(sizes))) or "none"
            raise CrateError(f"{request.name}: layer must be one with {what} ({layers}), got {layer}")
        if request.index >= size:
            raise CrateError(f"{request.name}: layer {layer} has {what} 0 to {size - 1}, got {request.index}")
