"""At which tokens of a text a neuron is changed, whether a pass reads all of it or the newest token alone."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from cratelm.errors import CrateError

Part = Literal["all", "prompt", "generated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """Tokens at which codes are changed. All conditions must hold; by default there are none.

    The code at a token decides what comes after it: changing the prompt's last token changes the first new one.
    """

    part: Part = "all"
    """`prompt`: the tokens that were given; `generated`: those the model made."""
    spans: tuple[tuple[int, int], ...] = ()
    """First and last position of stretches, both included; empty for everywhere. Negative ones count from the end of
    the prompt, -1 is its last token."""
    after: int | None = None
    """Token id; only tokens that come after its first occurrence."""

    @property
    def everywhere(self) -> bool:
        """Whether no condition was given."""
        return self == Positions()


EVERYWHERE = Positions()


def parse_positions(text: str, *, after: int | None = None) -> Positions:
    """Read `all`, `prompt`, `generated`, or positions such as `0,5..7,-1` (-1: the last token of the prompt)."""
    if text in ("all", "prompt", "generated"):
        return Positions(part=text, after=after)  # type: ignore[arg-type]
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:\.\.\s*(-?\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not match or ((first < 0) == (last < 0) and first > last):
            raise CrateError(
                f"the positions {text!r} are not understood. Write all, prompt, generated, or such as 0,5..7,-1"
            )
        spans.append((first, last))
    return Positions(spans=tuple(spans), after=after)


class Text:
    """The tokens that the passes of a model read, as they grow. A pass reads the last so many of them."""

    def __init__(self, prompt: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None) -> None:
        self.tokens, self.prompt_length = prompt, prompt.shape[1]
        self.real = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask

    def append(self, new: Int[Tensor, " batch"]) -> None:
        """One more token of each row."""
        self.tokens = torch.cat([self.tokens, new[:, None].to(self.tokens.device)], dim=1)
        self.real = F.pad(self.real, (0, 1), value=True)

    def chosen(self, positions: Positions, count: int) -> Bool[Tensor, "batch count"]:
        """Which of the last `count` tokens the positions mean; padding is never meant."""
        length = self.tokens.shape[1]
        assert count <= length, f"a pass of {count} tokens over a text of {length}"
        column = torch.arange(length, device=self.tokens.device)
        found = self.real.clone()
        if positions.part == "prompt":
            found &= column < self.prompt_length
        elif positions.part == "generated":
            found &= column >= self.prompt_length
        if positions.spans:
            found &= self._in_spans(positions.spans, column)
        if positions.after is not None:
            hit = (self.tokens == positions.after) & self.real
            found &= hit.cumsum(1) - hit.long() > 0
        return found[:, length - count :]

    def _in_spans(self, spans: tuple[tuple[int, int], ...], column: Int[Tensor, " seq"]) -> Bool[Tensor, "batch seq"]:
        position = self.real.cumsum(1) - 1
        size = self.real[:, : self.prompt_length].sum(1, keepdim=True)
        inside = torch.zeros_like(self.real)
        for first, last in spans:
            low, high = (size + one if one < 0 else torch.full_like(size, one) for one in (first, last))
            inside |= (position >= low) & (position <= high)
        return inside & (column >= 0)
