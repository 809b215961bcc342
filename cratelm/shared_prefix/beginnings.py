"""Beginnings of texts as a model keeps them: their keys and values, and a cache that reads them without a copy each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A beginning with its keys and values: those of its own tokens, and the first `taken` tokens of another's."""

    tokens: Tokens
    parent: "Prefix | None"
    taken: int
    keys: tuple[Float[Tensor, "heads own dim"], ...]
    """Per layer."""
    values: tuple[Float[Tensor, "heads own value_dim"], ...]

    @property
    def size(self) -> int:
        """Bytes of the own keys and values."""
        return sum(one.nbytes for one in (*self.keys, *self.values))

    def whole(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens in one layer."""
        if self.parent is None:
            return self.keys[layer], self.values[layer]
        keys, values = self.parent.whole(layer)
        joined = ((keys, self.keys[layer]), (values, self.values[layer]))
        first, second = (torch.cat([old[:, : self.taken], own], dim=1) for old, own in joined)
        return first, second


class SharedLayer(DynamicLayer):
    """One layer's keys and values: beginnings that are only read, and what each row has read since.

    The two are joined for one attention and not kept: a batch holds no copy of its beginnings but of one layer's.
    """

    def __init__(self, prefixes: Sequence[Prefix | None], layer: int) -> None:
        super().__init__()
        self.prefixes, self.layer = list(prefixes), layer
        self.past = max((len(one.tokens) for one in prefixes if one), default=0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values; return all, of beginnings too."""
        super().update(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if not self.past:
            return self.keys, self.values
        first = self.prefixes[0]
        if first and len(first.tokens) == self.past and all(one is first for one in self.prefixes):
            past = [one[None].expand(len(self.prefixes), -1, -1, -1) for one in first.whole(self.layer)]
        else:
            past = self._filled_up(key_states, value_states)
        keys, values = (torch.cat([old, own], dim=2) for old, own in zip(past, (self.keys, self.values), strict=True))
        return keys, values

    def _filled_up(self, key_states: Tensor, value_states: Tensor) -> list[Tensor]:
        """The beginnings of all rows, with zeros before the shorter ones."""
        past = [new.new_zeros(len(self.prefixes), new.shape[1], self.past, new.shape[3])
                for new in (key_states, value_states)]  # fmt: skip
        wholes: dict[int, tuple[Tensor, Tensor]] = {}
        for row, prefix in enumerate(self.prefixes):
            if prefix is not None:
                if id(prefix) not in wholes:
                    wholes[id(prefix)] = prefix.whole(self.layer)
                for filled, whole in zip(past, wholes[id(prefix)], strict=True):
                    filled[row, :, self.past - len(prefix.tokens) :] = whole
        return past

    def get_seq_length(self) -> int:
        """Columns read so far."""
        return self.past + super().get_seq_length()

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows alone."""
        self.batch_select_indices(rows)
        self.prefixes = [self.prefixes[int(row)] for row in rows]


def length_of(prefix: Prefix | None) -> int:
    """Tokens of a beginning; none has none."""
    return len(prefix.tokens) if prefix else 0


def cut(prefix: Prefix | None, length: int) -> Prefix | None:
    """The first tokens of a beginning as a beginning."""
    if prefix is None or length == len(prefix.tokens):
        return prefix
    if length <= prefix.taken:
        return cut(prefix.parent, length)
    own = length - prefix.taken
    return Prefix(
        tokens=prefix.tokens[:length], parent=prefix.parent, taken=prefix.taken,
        keys=tuple(one[:, :own] for one in prefix.keys), values=tuple(one[:, :own] for one in prefix.values),
    )  # fmt: skip


def alike(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    differs = np.not_equal(a[:size], b[:size])
    return int(differs.argmax()) if differs.any() else size
