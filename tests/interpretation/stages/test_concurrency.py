"""The runner: how many at once, what is kept when, what ends the work, and what a break leaves."""

import asyncio
from collections.abc import Mapping

import numpy as np
import pytest

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.stages.concurrency import Patience, Tally, each


class Kept:
    """What was written, and in how many transactions."""

    def __init__(self) -> None:
        self.rows: dict[int, str] = {}
        self.failures: dict[int, str] = {}
        self.writes: list[int] = []
        self.progress = 0

    def keep(self, rows: Mapping[int, str]) -> None:
        assert not self.rows.keys() & rows.keys()
        self.rows |= rows
        self.writes.append(len(rows))

    def fail(self, messages: Mapping[int, str]) -> None:
        assert not self.failures.keys() & messages.keys()
        self.failures |= messages

    def advance(self, count: int) -> None:
        self.progress += count


def work(do: object, count: int = 100, **more: object) -> tuple[Tally, Kept]:
    kept = Kept()
    tally = asyncio.run(
        each(range(count), do, keep=kept.keep, fail=kept.fail, progress=kept.advance, **more)  # type: ignore[arg-type]
    )
    return tally, kept


def test_every_neuron_is_done_once_and_never_more_at_once_than_asked(rng: np.random.Generator) -> None:
    waits, running, most = rng.random(100) / 200, 0, 0

    async def do(neuron: int) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(waits[neuron])
        running -= 1
        if neuron % 5 == 3:
            raise LLMError(f"said {neuron}")
        return str(neuron)

    tally, kept = work(do, in_flight=7)
    assert most == 7
    assert kept.rows == {n: str(n) for n in range(100) if n % 5 != 3}
    assert kept.failures == {n: f"said {n}" for n in range(3, 100, 5)}
    assert (tally.done, tally.failed, kept.progress) == (80, 20, 100)


def test_what_is_ready_while_the_disk_is_slow_is_written_together() -> None:
    import time

    async def do(neuron: int) -> str:
        await asyncio.sleep(0.001)
        return str(neuron)

    kept = Kept()
    writes = kept.keep

    def slow(rows: Mapping[int, str]) -> None:
        time.sleep(0.02)
        writes(rows)

    asyncio.run(each(range(100), do, keep=slow, fail=kept.fail, in_flight=20))
    assert len(kept.rows) == 100
    assert len(kept.writes) <= 12


def test_a_model_that_never_answers_well_is_given_up_and_quoted() -> None:
    asked = []

    async def do(neuron: int) -> str:
        asked.append(neuron)
        await asyncio.sleep(0)
        raise LLMError("I am\n\na teapot" + "!" * 1000)

    kept = Kept()
    with pytest.raises(CrateError, match=r"the first 6 neurons got no usable answer.*I am a teapot!") as caught:
        asyncio.run(each(range(100), do, keep=kept.keep, fail=kept.fail, in_flight=3, patience=Patience(first=6)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450
    assert len(asked) < 12
    assert (kept.rows, kept.failures) == ({}, {})


def test_a_model_that_stops_answering_well_is_given_up_and_its_last_failures_say_nothing_of_neurons() -> None:
    async def do(neuron: int) -> str:
        await asyncio.sleep(0)
        if neuron in (3, 4) or neuron >= 20:
            raise LLMError(f"no {neuron}")
        return "yes"

    kept = Kept()
    with pytest.raises(CrateError, match=r"5 neurons one after the other .*no 24"):
        asyncio.run(
            each(range(100), do, keep=kept.keep, fail=kept.fail, in_flight=1, patience=Patience(first=2, in_a_row=5))
        )
    assert sorted(kept.rows) == [n for n in range(20) if n not in (3, 4)]
    assert sorted(kept.failures) == [3, 4]


def test_a_few_neurons_that_all_fail_are_failures() -> None:
    async def do(neuron: int) -> str:
        raise LLMError(f"no {neuron}")

    tally, kept = work(do, count=4)
    assert (tally.failed, sorted(kept.failures)) == (4, [0, 1, 2, 3])


def test_when_the_model_is_gone_what_is_on_its_way_is_kept() -> None:
    begun = []

    async def do(neuron: int) -> str:
        begun.append(neuron)
        if neuron == 10:
            raise CrateError("the budget is spent")
        await asyncio.sleep(0.01)
        return "paid"

    kept = Kept()
    with pytest.raises(CrateError, match="budget"):
        asyncio.run(each(range(100), do, keep=kept.keep, fail=kept.fail, in_flight=8))
    assert set(kept.rows) == set(begun) - {10}
    assert len(begun) <= 18


def test_a_mistake_in_the_code_is_not_taken_for_a_failure() -> None:
    async def do(neuron: int) -> str:
        await asyncio.sleep(0.001)
        return str({0: "fine"}[neuron])

    with pytest.raises(KeyError):
        work(do)


def test_a_break_keeps_what_is_ready() -> None:
    kept = Kept()

    async def do(neuron: int) -> str:
        await asyncio.sleep(0 if neuron < 5 else 60)
        return "ready"

    async def broken_off() -> None:
        task = asyncio.create_task(each(range(20), do, keep=kept.keep, fail=kept.fail, in_flight=10))
        await asyncio.sleep(0.1)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(broken_off())
    assert sorted(kept.rows) == [0, 1, 2, 3, 4]
