"""The paper's three protocols: which excerpts of a neuron explain it, and on which its explanation is tested.

A protocol is data. In `fixed` mode it draws from documents kept for explaining and from others kept for scoring; in
`compat` mode it takes the released interleaved ranks of one list. Both give the same counts of excerpts and tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from cratelm.activations.records import Excerpts, Kind, LayerRecords, Mode, join
from cratelm.errors import CrateError

PROTOCOLS: tuple[str, ...] = ("top-and-random", "random-only", "anthropic")
"""Names of the protocols, in the paper's order."""

Part = Literal["explain", "score"]

INTERVALS = 11
"""Quantile intervals of the anthropic protocol."""
QUANTILES_RECORDED: dict[Mode, int] = {"fixed": 2, "compat": 20}
"""Excerpts recorded in each quantile interval."""
OUT_OF_CONTEXT = 3
"""Tokens that are left of an excerpt out of its context."""
COMPAT_FIRST = 3
"""Where a `compat` excerpt of 8 tokens is cut for that: the sampled token, at 4, comes to stand in the middle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Some excerpts of one recorded set."""

    width: int
    """Tokens of the recorded excerpts."""
    kind: Kind
    picks: tuple[int, ...]
    """Indices in the recorded set: ranks of top excerpts, interval x (excerpts in each) + item of quantile ones."""
    crop: int | None = None
    """Tokens to keep of each excerpt (out of context), None for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How one kind of score is made: what the explainer sees and what the simulation is compared on."""

    name: str
    mode: Mode
    explain: tuple[Draw, ...]
    score: tuple[Draw, ...]

    def top_needed(self, part: Part) -> tuple[int, int]:
        """Width, and top excerpts a neuron must have for this part (0 where none are drawn)."""
        draws = self.explain if part == "explain" else self.score
        needed = max((max(one.picks) + 1 for one in draws if one.kind == "top"), default=0)
        return draws[0].width, needed


def protocol(name: str, mode: Mode = "fixed") -> Protocol:
    """The protocol of this name in this mode."""
    if name not in PROTOCOLS:
        raise CrateError(f"there is no protocol {name!r}. Use one of: {', '.join(PROTOCOLS)}")
    if name == "anthropic":
        return _anthropic(mode)
    explained, scored = (range(5), range(5)) if mode == "fixed" else (range(0, 10, 2), range(1, 10, 2))
    random = Draw(width=64, kind="random", picks=tuple(explained))
    top = Draw(width=64, kind="top", picks=tuple(scored))
    return Protocol(
        name=name, mode=mode, explain=(Draw(width=64, kind="top", picks=tuple(explained)),),
        score=(random, top) if name == "top-and-random" else (random,),
    )  # fmt: skip


def _anthropic(mode: Mode) -> Protocol:
    """Short excerpts of every strength: 42 to explain; 47 with 326 tokens to score, the last 10 out of context.

    In `compat` mode scoring goes on where explaining stopped; in `fixed` mode each has its own documents.
    """
    top, quantile, random = (15, 2, 5) if mode == "compat" else (0, 0, 0)
    return Protocol(
        name="anthropic", mode=mode,
        explain=(
            Draw(width=8, kind="top", picks=tuple(range(15))),
            Draw(width=8, kind="quantile", picks=_each_interval(mode, first=0)),
            Draw(width=8, kind="random", picks=tuple(range(5))),
        ),
        score=(
            Draw(width=8, kind="top", picks=tuple(range(top, top + 10))),
            Draw(width=8, kind="quantile", picks=_each_interval(mode, first=quantile)),
            Draw(width=8, kind="random", picks=tuple(range(random, random + 5))),
            Draw(width=8, kind="top", picks=tuple(range(top + 10, top + 20)), crop=OUT_OF_CONTEXT),
        ),
    )  # fmt: skip


def _each_interval(mode: Mode, *, first: int) -> tuple[int, ...]:
    """Two items of each quantile interval."""
    recorded = QUANTILES_RECORDED[mode]
    return tuple(interval * recorded + item for interval in range(INTERVALS) for item in (first, first + 1))


def draw(records: LayerRecords, draws: Sequence[Draw], part: Part) -> Excerpts:
    """The excerpts that a protocol draws for explaining or scoring, of all neurons of a layer, in the draws' order."""
    split = part if records.mode == "fixed" else "all"
    parts = []
    for one in draws:
        excerpts = records.excerpts(one.width, split, one.kind).take(one.picks)
        parts.append(excerpts if one.crop is None else excerpts.crop(_first_kept(records, one, excerpts), one.crop))
    return join(parts)


def _first_kept(records: LayerRecords, one: Draw, excerpts: Excerpts) -> Int[np.ndarray, "neurons excerpts"]:
    """Where to cut excerpts out of their context: around the strongest token, or in `compat` mode the sampled one."""
    assert one.crop is not None
    if records.mode == "compat":
        return np.full(excerpts.position.shape, COMPAT_FIRST)
    middle = np.where(excerpts.valid, excerpts.activations, -np.inf).argmax(axis=2)
    return np.clip(middle - one.crop // 2, 0, np.maximum(excerpts.valid.sum(axis=2) - one.crop, 0))
