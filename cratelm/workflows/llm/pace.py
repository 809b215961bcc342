"""Estimate the time of a plan: time some simulations of full size, one alone and several at once."""

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
"""Tokens of a timed excerpt: the longest of the protocols."""
BURST = 8
"""Excerpts that are timed at once; fewer if fewer may be in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a model answered."""

    alone: float
    """Seconds for one call."""
    together: float
    """Seconds for several at once."""
    calls: int
    """Number of these calls."""
    tokens: int
    """Tokens read for these calls, a shared prefix counted once."""
    here: bool
    """Whether the model runs in this process: then the time depends on tokens, not on calls in flight."""

    def seconds(self, asked: Asked, in_flight: int) -> float:
        """Estimate the time for these calls; at least that of one call."""
        if self.here:
            return (asked.computed + asked.written) * self.together / self.tokens
        each = max(self.together - self.alone, 0.0) / max(self.calls - 1, 1)
        at_once = max(min(in_flight, asked.calls), 1)
        return max(asked.calls * max(each, self.alone / at_once), self.alone)

    def line(self, asked: Asked, in_flight: int) -> str:
        """The line of the plan about the time of all calls."""
        estimate = f"time: about {duration(self.seconds(asked, in_flight))}, "
        if self.here:
            return f"{estimate}at {human(self.tokens / self.together)} tokens a second"
        return f"{estimate}as one call took {self.alone:.2g} s now and {self.calls} at once {self.together:.2g} s"


async def time_trial(simulator: Any, store: Store, in_flight: int, asked: Asked) -> str:
    """Time simulations of the self-test's neurons; returns the line of the plan, empty if nothing is to be asked.

    A server's token counts also calibrate the plan's estimates.
    """
    puzzle = puzzles()[0]
    words = [token for puzzle in puzzles() for token in puzzle.tokens]
    excerpts = [list(islice(cycle(words), 7 * i, 7 * i + WIDTH)) for i in range(1 + min(BURST, in_flight))]
    if simulator.name.method == "token-by-token":  # one call per token
        excerpts = [excerpts[0][:1], excerpts[1][:BURST]]

    async def seconds(several: Sequence[Sequence[str]]) -> float:
        started = time.perf_counter()
        await replace(simulator, counts=Counter()).simulate(puzzle.explanation, several)
        return max(time.perf_counter() - started, 1e-6)

    try:
        alone, together = await seconds(excerpts[:1]), await seconds(excerpts[1:])
    except LLMError as error:
        return f"time: unknown, because a simulation that was tried failed: {error}"
    counting = CountingLLM(simulator.llm, store)
    with contextlib.suppress(LLMError):  # the counting model gives an empty answer
        await replace(simulator, llm=counting, counts=Counter()).simulate(puzzle.explanation, excerpts[1:])
    pace = Pace(
        alone=alone, together=together, calls=max(counting.asked.calls, 1), tokens=max(counting.asked.computed, 1),
        here=not simulator.llm.remote,
    )  # fmt: skip
    return pace.line(asked, in_flight) if asked.calls else ""
