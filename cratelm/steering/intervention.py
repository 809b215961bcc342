"""The intervention: which neurons change while a model runs, at which tokens, and by what kind of change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cratelm.steering.changes import Change
from cratelm.steering.place import SparseCoder
from cratelm.steering.positions import EVERYWHERE, Positions


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A control for an intervention: a change of the same size in a direction that should mean nothing.

    `opposite` moves each activation by the same amount in the other direction: old - (new - old). `random-direction`
    leaves the activation as it is and adds (new - old) times a random direction to the layer's output; the random
    direction is as long as the neuron's decoder direction.
    """

    kind: Literal["opposite", "random-direction"]
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervention:
    """Every change made to a model while it runs. The default changes nothing."""

    changes: Sequence[Change] = ()
    """Applied in this order, so a later change to a neuron sees the result of an earlier one."""
    positions: Positions = EVERYWHERE
    """Tokens at which the changes apply."""
    coders: Sequence[SparseCoder] = ()
    """The sparse autoencoders whose latents are changed, at most one per layer."""
    keep_error: bool = True
    """Keep the autoencoders' errors. If False, each reconstruction replaces the activation at every token."""
    control: Control | None = None
    """Apply this control in place of the changes."""

    @property
    def baseline(self) -> "Intervention":
        """The intervention to compare with: no change, and the reconstruction if the errors are dropped."""
        return NO_INTERVENTION if self.keep_error else replace(self, changes=(), control=None)

    def __str__(self) -> str:
        return ", ".join(map(str, self.changes)) or "no change"


NO_INTERVENTION = Intervention()
