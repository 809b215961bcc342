"""The effect of steering on the next token, as numbers for figures and pages. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True, eq=False)
class Effect:
    """Probabilities of the next token without and with an intervention, averaged over texts."""

    before: Float[np.ndarray, " vocab"]
    """Mean probability of each token, in [0, 1]."""
    after: Float[np.ndarray, " vocab"]
    """The same with the intervention."""
    spread: Float[np.ndarray, " vocab"]
    """Standard error of `after - before` over texts; zeros for one text."""
    divergence: float
    """Mean Kullback-Leibler divergence of `after` from `before`, in nats; 0 if nothing changes."""
    texts: int
    """Number of texts."""

    @cached_property
    def change(self) -> Float[np.ndarray, " vocab"]:
        """after - before."""
        return self.after - self.before

    @property
    def moved(self) -> float:
        """Probability that moved to other tokens: half the sum of |after - before|, in [0, 1]."""
        return float(np.abs(self.change).sum() / 2)

    def largest(self, count: int, *, decreases: bool = False) -> Int[np.ndarray, " tokens"]:
        """Ids of the tokens whose probability rises (or falls) most, the largest change first."""
        order = np.argsort(self.change if decreases else -self.change, kind="stable")[:count]
        changed = self.change[order] < 0 if decreases else self.change[order] > 0
        return order[changed]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Steered:
    """The effect of an intervention and of its controls on the same texts."""

    changes: tuple[str, ...]
    """As a user writes them, in activation units."""
    effect: Effect
    controls: tuple[tuple[str, Effect], ...]
    """(name, effect) of each control."""
    reconstruction: Effect | None = None
    """Effect of dropping the autoencoders' errors, without changes; None if they are kept."""

    def rows(self, count: int) -> list[dict[str, Any]]:
        """One row for the intervention and one for each control.

        `on_tokens` is the summed change of probability of the `count` tokens that the intervention raises most.
        """
        tokens = self.effect.largest(count)
        extra = () if self.reconstruction is None else (("reconstruction alone", self.reconstruction),)
        return [
            {
                "name": name, "divergence": effect.divergence, "moved": effect.moved,
                "on_tokens": float(effect.change[tokens].sum()),
            }
            for name, effect in (("steered", self.effect), *self.controls, *extra)
        ]  # fmt: skip

    def as_dict(self, strings: Sequence[str], count: int) -> dict[str, Any]:
        """As JSON values; `strings` is the text of each token id."""
        return {
            "changes": list(self.changes), "texts": self.effect.texts,
            "increases": token_rows(self.effect, self.effect.largest(count), strings),
            "decreases": token_rows(self.effect, self.effect.largest(count, decreases=True), strings),
            "rows": self.rows(count),
        }  # fmt: skip


def token_rows(
    effect: Effect, tokens: Int[np.ndarray, " tokens"], strings: Sequence[str]
) -> list[dict[str, Any]]:  # fmt: skip
    """The given tokens as JSON values: id, text, probability before and after, standard error of the change."""
    return [
        {
            "token": int(token), "text": token_text(int(token), strings),
            "before": float(effect.before[token]), "after": float(effect.after[token]),
            "standard_error": float(effect.spread[token]) if effect.texts > 1 else None,
        }
        for token in tokens
    ]  # fmt: skip


def token_text(token: int, strings: Sequence[str]) -> str:
    """Text of a token; `#17` for an id that the tokenizer does not have."""
    return strings[token] if token < len(strings) else f"#{token}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SweepPoint:
    """One strength of a sweep."""

    strength: str
    """As the user wrote it: `2x`."""
    value: float
    """The number without the x."""
    effect: Effect
    text: str
    """The continuation."""
    nats_per_token: float
    """Loss of the continuation under the unchanged model."""
