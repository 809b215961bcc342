"""How long what a plan asks will take: a model is let simulate once alone and several at once, at full size."""

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.simulators.self_test import puzzles
from cratelm.interpretation.stages.estimate import Asked, CountingLLM
from cratelm.interpretation.store.database import Store
from cratelm.runtime import duration, human

WIDTH = 64
"""Tokens of an excerpt that is tried: as many as the longest of the protocols have."""
BURST = 8
"""Excerpts that are tried at once; fewer where fewer may be in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a model answered."""

    alone: float
    """Seconds for one call by itself."""
    together: float
    """Seconds for several at once, reading the answers included."""
    calls: int
    """How many these were."""
    tokens: int
    """Tokens that were read for them, what they share once."""
    here: bool
    """Whether the model runs in this process, so that what it reads counts and not how many wait."""

    def seconds(self, asked: Asked, in_flight: int) -> float:
        """How long all of this takes: never less than a call by itself.

        Of calls that a server answers at once each takes as long as one alone, but for what more of them take longer.
        """
        if self.here:
            return (asked.computed + asked.written) * self.together / self.tokens
        each = max(self.together - self.alone, 0.0) / max(self.calls - 1, 1)
        at_once = max(min(in_flight, asked.calls), 1)
        return max(asked.calls * max(each, self.alone / at_once), self.alone)

    def line(self, asked: Asked, in_flight: int) -> str:
        """What it says of the time that all of the plan takes."""
        took = f"time: about {duration(self.seconds(asked, in_flight))}, "
        if self.here:
            return f"{took}at {human(self.tokens / self.together)} tokens a second"
        return f"{took}as one call took {self.alone:.2g} s now and {self.calls} at once {self.together:.2g} s"


async def tried(simulator: Any, store: Store, in_flight: int) -> Pace | str:
    """Let the model simulate neurons that everybody knows, and see how long that takes; or why it could not.

    A server's count of what it read makes the plan's estimates of tokens those of its tokenizer.
    """
    puzzle, remote = puzzles()[0], simulator.llm.remote
    words = [token for one in puzzles() for token in one.tokens]
    excerpts = [list(islice(cycle(words), 7 * i, 7 * i + WIDTH)) for i in range(1 + min(BURST, in_flight))]
    if simulator.name.method == "token-by-token":  # a call for each token
        excerpts = [excerpts[0][:1], excerpts[1][:BURST]]
    alone, together = excerpts[:1], excerpts[1:]

    async def seconds(several: Sequence[Sequence[str]]) -> float:
        started = time.perf_counter()
        await replace(simulator, counts=Counter()).simulate(puzzle.explanation, several)
        return max(time.perf_counter() - started, 1e-6)

    try:
        took = [await seconds(alone), await seconds(together)]
    except LLMError as error:
        return f"time: unknown, because a simulation that was tried failed: {error}"
    counting = CountingLLM(simulator.llm, store)
    with contextlib.suppress(LLMError):  # of an answer that says nothing
        await replace(simulator, llm=counting, counts=Counter()).simulate(puzzle.explanation, together)
    return Pace(
        alone=took[0], together=took[1], calls=max(counting.asked.calls, 1), tokens=max(counting.asked.computed, 1),
        here=not remote,
    )  # fmt: skip
