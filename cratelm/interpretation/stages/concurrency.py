"""Asking a language model about many neurons: so many at once, each kept as it is ready, failures counted.

A neuron is done or failed on its own. What ends the work as a whole is that the model cannot be asked (a `CrateError`
that is no `LLMError`) or that it never gives a usable answer; what is done by then is kept, and so is what is on its
way, which is paid for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.store.growing_sets import GrowingSet, Row
from cratelm.runtime import ProgressBar

T = TypeVar("T")
SAID = 300
"""Characters of an answer that an error quotes; the table `failures` has it whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """When a language model is given up: after failures only, of so many neurons."""

    first: int = 10
    """At the beginning, before any neuron succeeded."""
    in_a_row: int = 25
    """Later on. At a failure rate of one half this happens by chance once in 30 million neurons."""


@dataclass(slots=True)
class Tally:
    """How many neurons came to what."""

    done: int = 0
    failed: int = 0


async def fill(
    growing: GrowingSet, do: Callable[[int], Awaitable[Row]], *, neurons: Iterable[int] | None = None,
    bar: ProgressBar | None = None, note: Callable[[], str] = str, in_flight: int = 32,
    patience: Patience | None = None,
) -> Tally:  # fmt: skip
    """Make the rows that a set has not got yet, and say that it is whole if it then is.

    `do` makes the row of one neuron and raises `LLMError` where the model gives no usable answer. `neurons` is this
    process's share, all if left out. `note` is what the bar shows at its end; it moves on by 1 for each neuron.
    Raises `CrateError` where the model cannot be asked at all, or nothing it says is usable.
    """
    share = set(growing.neurons.tolist() if neurons is None else neurons)
    missing = [neuron for neuron in growing.missing() if neuron in share]

    def kept(count: int) -> None:
        if bar:
            bar.advance(count, note=note())

    tally = await each(
        missing, do, keep=growing.add, fail=growing.add_failures, kept=kept, in_flight=in_flight, patience=patience
    )
    growing.finish()
    return tally


async def each(
    neurons: Sequence[int], do: Callable[[int], Awaitable[T]], *, keep: Callable[[Mapping[int, T]], None],
    fail: Callable[[Mapping[int, str]], None], kept: Callable[[int], None] = lambda _: None, in_flight: int = 32,
    patience: Patience | None = None,
) -> Tally:  # fmt: skip
    """Do something for each neuron, `in_flight` at once.

    `keep` and `fail` write, in a thread: whatever became ready while they wrote is the next thing to be written, in one
    transaction, so that a slow disk makes larger batches and not slower work. Failures wait for the next success: if
    none comes before patience is lost, they say nothing about those neurons and are not written.
    """
    patience = patience or Patience()
    tally, waiting = Tally(), iter(neurons)
    streak: dict[int, str] = {}
    pending: set[asyncio.Task[tuple[int, T | LLMError]]] = set()
    ended: CrateError | None = None
    lost = False

    def begin() -> None:
        while ended is None and len(pending) < in_flight and (neuron := next(waiting, None)) is not None:
            pending.add(asyncio.create_task(_attempt(neuron, do)))

    try:
        begin()
        while pending:
            ready, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            found, failures, broken = _sorted(ready)
            ended, streak = ended or broken, streak | failures
            if not found and ended is None and len(streak) >= (patience.in_a_row if tally.done else patience.first):
                ended, lost = _lost(streak, tally), True
            begin()
            if found:
                tally.done, tally.failed = tally.done + len(found), tally.failed + len(streak)
                await _written(keep, found)
                await _written(fail, streak)
                streak = {}
            kept(len(found) + len(failures))
        if not lost:
            tally.failed += len(streak)
            await _written(fail, streak)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        found, _, _ = _sorted(task for task in pending if not task.cancelled())
        if found:
            keep(found)
    if ended is not None:
        raise ended
    return tally


async def _attempt(neuron: int, do: Callable[[int], Awaitable[T]]) -> tuple[int, T | LLMError]:
    try:
        return neuron, await do(neuron)
    except LLMError as error:
        return neuron, error


def _sorted(
    tasks: Iterable[asyncio.Task[tuple[int, T | LLMError]]],
) -> tuple[dict[int, T], dict[int, str], CrateError | None]:
    """Results and failures of finished tasks, and what ended the work, if anything did."""
    found: dict[int, T] = {}
    failures: dict[int, str] = {}
    ended: CrateError | None = None
    for task in tasks:
        error = task.exception()
        if isinstance(error, CrateError):
            ended = ended or error
        elif error is not None:
            raise error
        else:
            neuron, result = task.result()
            if isinstance(result, LLMError):
                failures[neuron] = str(result)
            else:
                found[neuron] = result
    return found, failures, ended


async def _written(write: Callable[[Mapping[int, T]], None], rows: Mapping[int, T]) -> None:
    """Write in a thread, to the end even where this is cancelled meanwhile."""
    if rows:
        await asyncio.shield(asyncio.to_thread(write, rows))


def _lost(streak: Mapping[int, str], tally: Tally) -> CrateError:
    count, last = len(streak), list(streak.values())[-1]
    said = " ".join(last.split())
    said = said if len(said) <= SAID else said[:SAID] + " ..."
    which = f"{count} neurons one after the other" if tally.done else f"the first {count} neurons"
    return CrateError(f"stopped: {which} got no usable answer. The last one: {said}. Try another model")
