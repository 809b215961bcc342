"""Switches of `compat` mode: each repairs one flaw of the released procedure and leaves the others as they are."""

from typing import Literal, get_args

Repair = Literal[
    "one-top-per-document", "clip-windows", "skip-first-tokens", "random-place", "no-filling", "positive-intervals",
    "distinct-random", "spread-blocks",
]  # fmt: skip
"""The effect of each (`docs/compat.md`):

one-top-per-document    of each document only the strongest token can be among the top ones
clip-windows            windows end where the sampled token's document or block ends
skip-first-tokens       the first 4 tokens of a block are never chosen; windows still show them
random-place            the sampled token stands anywhere in its window, not always in the middle
no-filling              top lists of rare neurons stay short, instead of being filled with tokens of activation 0
positive-intervals      intervals are of the ranks among the neuron's own positive tokens
distinct-random         random tokens are all different, and none is among the top ones
spread-blocks           the blocks read lie evenly over the split, instead of at its beginning
"""
REPAIRS: tuple[Repair, ...] = get_args(Repair)
