"""Random draws of tokens for every neuron, in bounded memory: sequences, priorities, and candidates of intervals."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DRAWS = 1200
"""Length of a neuron's random sequence of tokens."""
OUTSIDE, EDGE = 254, 255
"""Codes in place of an interval: in no interval; on an edge, where the token's value is an interval's bound."""


def priorities(neuron: Int[Tensor, "*some"], position: Int[Tensor, "*some"], seed: int) -> Float[Tensor, "*some"]:
    """An independent uniform number in [0, 1) for each (neuron, position).

    Steele, Lea & Flood's SplitMix64 finaliser over a linear combination of the pair; int64 products wrap.
    """
    x = (neuron + 1) * 0x632BE59BD9B4E019 + (position + 1) * -0x61C8864680B583EB + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def random_sequences(neurons: int, tokens: int, generator: np.random.Generator) -> Int[np.ndarray, "neurons draws"]:
    """Distinct tokens in random order for each neuron; -1 replaces a repeated draw from a long corpus."""
    if tokens <= 4 * DRAWS:
        return generator.random((neurons, tokens)).argsort(axis=1)[:, :DRAWS]
    drawn = generator.integers(0, tokens, (neurons, DRAWS))
    order = drawn.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    again = np.zeros(drawn.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(again, -1, drawn)


class RowBlocks:
    """Rows of tensors that arrive batch by batch, held in large blocks.

    Small tensors that are kept, between large ones that are freed, would fragment the heap, which grew with the corpus.
    """

    def __init__(self, device: torch.device) -> None:
        # Of 32 MiB on, glibc maps a block on its own, and untouched pages take no memory.
        self.block_bytes = 1 << (25 if device.type == "cpu" else 20)
        self.blocks: list[tuple[Tensor, ...]] = []
        self.used: list[int] = []

    def add(self, *columns: Tensor) -> None:
        """Copy rows, given as columns of equal length."""
        rows = len(columns[0])
        if not self.blocks or self.used[-1] + rows > len(self.blocks[-1][0]):
            row_bytes = max(column.element_size() * math.prod(column.shape[1:]) for column in columns)
            size = max(rows, self.block_bytes // row_bytes + 1)
            self.blocks.append(tuple(column.new_empty(size, *column.shape[1:]) for column in columns))
            self.used.append(0)
        for column, block in zip(columns, self.blocks[-1], strict=True):
            block[self.used[-1] : self.used[-1] + rows] = column
        self.used[-1] += rows

    def columns(self) -> tuple[Tensor, ...]:
        """All rows, in the order in which they were added."""
        filled = [[column[:used] for column in block] for block, used in zip(self.blocks, self.used, strict=True)]
        return tuple(torch.cat(parts) for parts in zip(*filled, strict=True))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn from an interval; those with the smallest priorities are drawn."""

    neuron: Int[Tensor, " some"]
    position: Int[Tensor, " some"]
    priority: Float[Tensor, " some"]
    interval: Int[Tensor, " some"]
    """`EDGE` if an interval ends at the token's value."""
    rare: Bool[Tensor, " some"]
    """True for candidates of the rare intervals, False for candidates of the others."""

    def where(self, keep: Bool[Tensor, " some"]) -> "Candidates":
        """The candidates where `keep` is true."""
        return Candidates(*(column[keep] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        """The fields in their order."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)
