"""Run an asynchronous function for many neurons: several at once, each result stored when it is ready.

A neuron succeeds or fails (`LLMError`) by itself. The work as a whole ends when the model cannot be reached (any other
`CrateError`) or never gives a usable answer. Results so far are stored, and so are calls in flight, which are paid for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError, Postponed, Queued

ResultT = TypeVar("ResultT")
QUOTED = 300
"""Characters of an answer that an error quotes; the table `failures` has all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How many consecutive failures end the work."""

    first: int = 10
    """Before the first success."""
    in_a_row: int = 25
    """Later. At a failure rate of one half this happens by chance once in 30 million neurons."""


@dataclass(slots=True)
class Tally:
    """Counts of neurons."""

    done: int = 0
    failed: int = 0


async def each(
    neurons: Sequence[int], do: Callable[[int], Awaitable[ResultT]], *, keep: Callable[[Mapping[int, ResultT]], None],
    fail: Callable[[Mapping[int, str]], None], progress: Callable[[int], None] = lambda _: None, in_flight: int = 32,
    patience: Patience | None = None,
) -> Tally:  # fmt: skip
    """Run `do` for each neuron, `in_flight` at once.

    `keep` and `fail` write in a thread. Results that become ready meanwhile are the next batch, so a slow disk makes
    larger batches and not slower work. Failures are written after the next success: if the work ends before, they are
    due to the model and not to those neurons. Neurons whose call is `Postponed` are not written: an error names them
    after the others, and the next run asks about them again. A call that waits in a batch (`Queued`) is not an error:
    its neuron is left to the next run. `progress` gets the number of finished neurons.
    """
    patience = patience or Patience()
    tally, remaining = Tally(), iter(neurons)
    streak, postponed = dict[int, str](), dict[int, str]()
    pending: dict[asyncio.Task[ResultT], int] = {}
    results, failures = dict[int, ResultT](), dict[int, str]()
    ended: CrateError | None = None
    lost = False
    try:
        while True:
            while ended is None and len(pending) < in_flight and (neuron := next(remaining, None)) is not None:
                pending[asyncio.ensure_future(do(neuron))] = neuron
            if results:  # written while the next neurons are in progress
                tally.done, tally.failed = tally.done + len(results), tally.failed + len(streak)
                await _written(keep, results)
                await _written(fail, _without(streak, postponed))
                streak = {}
            progress(len(results) + len(failures))
            if not pending:
                break
            ready, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            results, failures, broken = _sorted({task: pending.pop(task) for task in ready}, postponed)
            ended, streak = ended or broken, streak | failures
            if not results and ended is None and len(streak) >= (patience.in_a_row if tally.done else patience.first):
                ended, lost = _lost(streak, tally), True
        if not lost:
            tally.failed += len(streak)
            await _written(fail, _without(streak, postponed))
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        results, _, _ = _sorted({task: neuron for task, neuron in pending.items() if not task.cancelled()}, postponed)
        if results:
            keep(results)
    if ended is None and postponed:
        ended = CrateError(
            f"{len(postponed)} neurons got no answer: {next(iter(postponed.values()))}. The others are stored. "
            "Run the same command again to ask about these"
        )
    if ended is not None:
        raise ended
    return tally


def _sorted(
    tasks: Mapping["asyncio.Future[ResultT]", int], postponed: dict[int, str]
) -> tuple[dict[int, ResultT], dict[int, str], CrateError | None]:
    """Results and failures of finished tasks by neuron, and the error that ends the work, if there is one.

    Failures that are `Postponed` are added to `postponed` too.
    """
    results: dict[int, ResultT] = {}
    failures: dict[int, str] = {}
    ended: CrateError | None = None
    errors = [task.exception() for task in tasks]  # all are retrieved before one is raised
    for (task, neuron), error in zip(tasks.items(), errors, strict=True):
        if isinstance(error, Queued):
            continue
        if isinstance(error, LLMError | Postponed):
            failures[neuron] = str(error)
            if isinstance(error, Postponed):
                postponed[neuron] = str(error)
        elif isinstance(error, CrateError):
            ended = ended or error
        elif error is not None:
            raise error
        else:
            results[neuron] = task.result()
    return results, failures, ended


def _without(failures: Mapping[int, str], postponed: Mapping[int, str]) -> dict[int, str]:
    return {neuron: text for neuron, text in failures.items() if neuron not in postponed}


async def _written(write: Callable[[Mapping[int, ResultT]], None], rows: Mapping[int, ResultT]) -> None:
    """Write in a thread; a cancellation does not interrupt the writing."""
    if rows:
        await asyncio.shield(asyncio.to_thread(write, rows))


def _lost(streak: Mapping[int, str], tally: Tally) -> CrateError:
    count, last = len(streak), " ".join(list(streak.values())[-1].split())
    quoted = last if len(last) <= QUOTED else last[:QUOTED] + " ..."
    which = f"{count} neurons one after the other" if tally.done else f"the first {count} neurons"
    return CrateError(f"stopped: {which} got no usable answer. The last one: {quoted}. Try another model")
