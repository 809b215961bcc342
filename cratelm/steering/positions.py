"""The tokens at which neurons change, the same for a pass over the whole text and for a pass over its last token."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from cratelm.errors import CrateError

PositionPart = Literal["all", "prompt", "generated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """Tokens at which activations change: those that meet all conditions. The default is every token.

    The activations at a token predict the next token, so a change at the prompt's last token affects the first new one.
    """

    part: PositionPart = "all"
    """`prompt` or `generated` tokens only."""
    spans: tuple[tuple[int, int], ...] = ()
    """Ranges of positions, ends included; empty means every position. Negative positions count from the end of the
    prompt: -1 is its last token."""
    after: int | None = None
    """Token id: only tokens after its first occurrence."""

    @property
    def everywhere(self) -> bool:
        """Whether every token is meant."""
        return self == Positions()


EVERYWHERE = Positions()


def parse_positions(text: str, *, after: int | None = None) -> Positions:
    """Parse `all`, `prompt`, `generated`, or positions such as `0,5..7,-1` (-1: the last token of the prompt)."""
    if text in ("all", "prompt", "generated"):
        return Positions(part=text, after=after)  # type: ignore[arg-type]
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*(?:\.\.\s*(-?\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not match or ((first < 0) == (last < 0) and first > last):
            raise CrateError(f"positions must be all, prompt, generated or a list such as 0,5..7,-1, got {text!r}")
        spans.append((first, last))
    return Positions(spans=tuple(spans), after=after)


class Text:
    """The tokens that a model reads, in passes that each read the last N of them; generation appends tokens."""

    def __init__(self, prompt: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None) -> None:
        self.tokens, self.prompt_length = prompt, prompt.shape[1]
        self.real = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask

    def append(self, new: Int[Tensor, " batch"]) -> None:
        """Append one token to each row."""
        self.tokens = torch.cat([self.tokens, new[:, None].to(self.tokens.device)], dim=1)
        self.real = F.pad(self.real, (0, 1), value=True)

    def select(self, positions: Positions, count: int) -> Bool[Tensor, "batch count"]:
        """Mask of the last `count` tokens: True at the positions, False at padding."""
        length = self.tokens.shape[1]
        assert count <= length, f"a pass of {count} tokens over a text of {length}"
        column = torch.arange(length, device=self.tokens.device)
        selected = self.real.clone()
        if positions.part == "prompt":
            selected &= column < self.prompt_length
        elif positions.part == "generated":
            selected &= column >= self.prompt_length
        if positions.spans:
            selected &= self._in_spans(positions.spans, column)
        if positions.after is not None:
            hit = (self.tokens == positions.after) & self.real
            selected &= hit.cumsum(1) - hit.long() > 0
        return selected[:, length - count :]

    def _in_spans(self, spans: tuple[tuple[int, int], ...], column: Int[Tensor, " seq"]) -> Bool[Tensor, "batch seq"]:
        position = self.real.cumsum(1) - 1
        size = self.real[:, : self.prompt_length].sum(1, keepdim=True)
        inside = torch.zeros_like(self.real)
        for first, last in spans:
            low, high = (size + end if end < 0 else torch.full_like(size, end) for end in (first, last))
            inside |= (position >= low) & (position <= high)
        return inside & (column >= 0)
