"""What turning neurons did to the next token, as numbers. No torch is loaded here: figures and pages read these."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True, eq=False)
class Effect:
    """Probabilities of the next token without and with the changes, averaged over texts."""

    before: Float[np.ndarray, " vocab"]
    """Mean probability of each token, in [0, 1]."""
    after: Float[np.ndarray, " vocab"]
    """The same with the changes."""
    spread: Float[np.ndarray, " vocab"]
    """Standard error of `after - before` over texts; zeros for one text."""
    divergence: float
    """Mean Kullback-Leibler divergence of `after` from `before`, in nats: 0 where nothing changes."""
    texts: int
    """How many texts."""

    @cached_property
    def change(self) -> Float[np.ndarray, " vocab"]:
        """after - before."""
        return self.after - self.before

    @property
    def moved(self) -> float:
        """The probability that went to other tokens: half the sum of |after - before|, in [0, 1]."""
        return float(np.abs(self.change).sum() / 2)

    def largest(self, count: int, *, decreases: bool = False) -> Int[np.ndarray, " tokens"]:
        """Ids of the tokens whose probability rises (or falls) most, the largest change first."""
        order = np.argsort(self.change if decreases else -self.change, kind="stable")[:count]
        rises = self.change[order] < 0 if decreases else self.change[order] > 0
        return order[rises]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Steered:
    """One set of changes, what it did, and what its controls did at the same texts."""

    changes: tuple[str, ...]
    """As a user writes them, in the model's own units."""
    effect: Effect
    controls: tuple[tuple[str, Effect], ...]
    """Name of the control, and the same measurement with it in place of the changes."""
    reconstruction: Effect | None = None
    """What dropping the autoencoders' errors does by itself to the model as it is; None where they are kept."""

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The changes and their controls as rows: what moved, and what of it reached the changes' own tokens.

        `on_tokens` is the summed change of probability of the `count` tokens that the changes raise most.
        """
        tokens = self.effect.largest(count)
        alone = () if self.reconstruction is None else (("reconstruction alone", self.reconstruction),)
        return [
            {
                "name": name, "divergence": one.divergence, "moved": one.moved,
                "on_tokens": float(one.change[tokens].sum()),
            }
            for name, one in (("steered", self.effect), *self.controls, *alone)
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
    """Some tokens of an effect as JSON values: id, text, probability before and after, standard error of the change."""
    return [
        {
            "token": int(token), "text": strings[token] if token < len(strings) else f"#{token}",
            "before": float(effect.before[token]), "after": float(effect.after[token]),
            "standard_error": float(effect.spread[token]) if effect.texts > 1 else None,
        }
        for token in tokens
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SweepPoint:
    """One strength of a sweep."""

    strength: str
    """As it was asked for: `2x`."""
    value: float
    """Its number, without the x."""
    effect: Effect
    text: str
    """The continuation."""
    nats_per_token: float
    """What the unchanged model pays for the new text: how odd it finds it."""
