"""The cache of answers: asked once whatever happens, the same answer ever after, on disk before anybody has it."""

import asyncio
import hashlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Budget, Metered, Price, Usage
from cratelm.interpretation.llm import InProcess, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.simulator import structured_schema
from cratelm.interpretation.store import answer_cache as calls
from cratelm.interpretation.store.answer_cache import Cached, spent
from cratelm.interpretation.store.database import Store

SHORT = Sampling(max_tokens=5)


class Counted(InProcess):
    """A model that answers every prompt differently, and counts the prompts."""

    name, context = "counted", None

    def __init__(self, identity: str = "counted 1") -> None:
        self.identity, self.asked, self.wait = identity, Counter[str](), 0.002
        self.rng = np.random.default_rng()

    def count(self, text: str) -> int:
        return len(text)

    async def chat(self, messages: Sequence[Message], _sampling: Sampling) -> Reply:
        text = messages[-1].text
        self.asked[text] += 1
        await asyncio.sleep(self.wait)
        if "fail" in text:
            raise LLMError(f"no: {text}")
        made = f"{text}! {self.rng.random()} é\ud800".encode("utf-8", "replace").decode()
        return Reply(text=made, finish="stop", prompt_tokens=len(text), new_tokens=3)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        for prompt in prompts:
            self.asked[prompt.rest] += 1
        await asyncio.sleep(self.wait)
        if any("fail" in prompt.rest for prompt in prompts):
            raise LLMError("no prompt logprobs")
        return [
            PromptLogprobs(
                tokens=tuple(prompt.rest), logprobs=np.append(np.nan, self.rng.normal(size=len(prompt.rest) - 1)),
                candidates={1: {"é": self.rng.normal(), "10": -np.inf}}, prompt_tokens=top,
            )
            for prompt in prompts
        ]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path)


def say(llm: Cached | Metered, text: str, **changes: object) -> Reply:
    return asyncio.run(llm.chat([Message("user", text)], replace(SHORT, **changes)))  # type: ignore[arg-type]


def test_an_answer_comes_back_the_same_from_another_process(store: Store) -> None:
    llm = Counted()
    first, usage = say(Cached(llm, store), "Hello"), Usage()
    assert say(Cached(llm, store, usage), "Hello") == first
    assert (llm.asked, usage.cached, spent(store)) == (Counter(["Hello"]), 1, (5, 3))


def test_cached_prompt_logprobs_come_back_the_same(store: Store) -> None:
    llm, prompts = Counted(), [Prompt(prefix="a", rest="boat é"), Prompt(prefix="a", rest="other", at=(1,))]
    first = asyncio.run(Cached(llm, store).prompt_logprobs(prompts))
    again = asyncio.run(Cached(llm, store).prompt_logprobs([*reversed(prompts), prompts[0]]))
    for one, other in ((first[0], again[1]), (first[1], again[0]), (first[0], again[2])):
        assert (one.tokens, one.candidates, one.prompt_tokens) == (other.tokens, other.candidates, other.prompt_tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert set(llm.asked.values()) == {1}


def test_only_numbers_are_cached_of_prompt_logprobs_read_for_numbers(store: Store) -> None:
    llm, prompt = Counted(), Prompt(prefix="a", rest="boat", at=(1,), numbers=True)
    for _ in range(2):
        [found] = asyncio.run(Cached(llm, store).prompt_logprobs([prompt]))
        assert "".join(found.tokens) == "boat"
        assert found.candidates == {1: {"10": -np.inf}}, "the first time as afterwards"
        assert len(found.logprobs) == 4
        assert np.isnan(found.logprobs).all()
    assert llm.asked["boat"] == 1
    asyncio.run(Cached(llm, store).prompt_logprobs([replace(prompt, numbers=False)]))
    assert llm.asked["boat"] == 2


def test_whatever_differs_is_asked_again(store: Store) -> None:
    llm = Counted()
    for changes in ({}, {"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_tokens": 6}, {"schema": {"a": 1}}):
        say(Cached(llm, store), "Hello", **changes)
    say(Cached(Counted("counted 2"), store), "Hello")
    asyncio.run(Cached(llm, store).chat([Message("system", "Hello")], SHORT))
    assert llm.asked["Hello"] == 7
    prompt = Prompt(prefix="a", rest="boat")
    for asked, top in ((prompt, 15), (prompt, 5), (replace(prompt, prefix="b"), 15), (replace(prompt, at=(1,)), 15)):
        asyncio.run(Cached(llm, store).prompt_logprobs([asked], top=top))
    assert llm.asked["boat"] == 4


def test_an_answer_cached_under_the_schema_of_earlier_versions_is_a_cache_hit() -> None:
    row = {
        "type": "object", "required": ["token", "activation"], "additionalProperties": False,
        "properties": {"token": {"type": "string"}, "activation": {"type": "integer", "minimum": 0, "maximum": 10}},
    }  # fmt: skip
    rows = {"type": "array", "items": row, "minItems": 2, "maxItems": 2}
    earlier = {
        "type": "object", "required": ["activations"], "additionalProperties": False,
        "properties": {"activations": rows},
    }  # fmt: skip
    asked = ["chat", "counted 1", {"turns": [], **asdict(replace(SHORT, schema=earlier))}]
    key = calls.chat_hash("counted 1", [], replace(SHORT, schema=structured_schema(["a", "b"])))
    assert key == hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:40]
    assert key != calls.chat_hash("counted 1", [], replace(SHORT, schema=structured_schema(["a", "b", "c"])))


def test_what_many_ask_at_once_is_asked_once(store: Store, rng: np.random.Generator) -> None:
    llm, usage = Counted(), Usage()
    cached = Cached(llm, store, usage)

    async def one(number: int) -> tuple[str, float]:
        await asyncio.sleep(rng.random() / 50)
        reply = await cached.chat([Message("user", f"chat {number % 5}")], SHORT)
        prompts = [Prompt(prefix="", rest=f"echo {(number + i) % 7}") for i in range(3)]
        echoes = await cached.prompt_logprobs([*prompts, prompts[0]])
        return reply.text, float(echoes[0].logprobs[1])

    async def many() -> list[tuple[str, float]]:
        return await asyncio.gather(*(one(number) for number in range(140)))

    found = asyncio.run(many())
    assert set(llm.asked.values()) == {1}
    assert len(llm.asked) == 12
    assert len({text for text, _ in found}) == 5
    assert len({value for _, value in found}) == 7
    assert usage.cached == 140 * 5 - 12


def test_a_failure_is_not_kept_and_does_not_take_others_with_it(store: Store) -> None:
    llm = Counted()
    cached = Cached(llm, store)
    for _ in range(2):
        with pytest.raises(LLMError, match="no: fail"):
            say(cached, "fail")
    with pytest.raises(LLMError, match="no prompt logprobs"):
        asyncio.run(cached.prompt_logprobs([Prompt(prefix="", rest=rest) for rest in ("one", "fail", "two")]))
    asyncio.run(cached.prompt_logprobs([Prompt(prefix="", rest=rest) for rest in ("one", "two")]))
    assert llm.asked == Counter({"fail": 3, "one": 1, "two": 1})


def test_an_answer_is_on_disk_before_anybody_has_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that come while some are written go together."""
    batches, held = [], threading.Event()
    write = calls.add_calls

    def slow(store: Store, rows: Sequence[calls.CallRow]) -> None:
        batches.append(len(rows))
        held.wait(0.05)
        write(store, rows)

    monkeypatch.setattr(calls, "add_calls", slow)
    cached = Cached(Counted(), store)

    async def one(number: int) -> None:
        reply = await cached.chat([Message("user", str(number))], SHORT)
        with sqlite3.connect(store.path) as connection:
            assert connection.execute("SELECT count(*) FROM calls").fetchone()[0] >= 1
        connection.close()
        again = await cached.chat([Message("user", str(number))], SHORT)
        assert again == reply

    async def many() -> None:
        await asyncio.gather(*(one(number) for number in range(50)))

    asyncio.run(many())
    assert sum(batches) == 50
    assert len(batches) <= 4


def test_a_disk_that_is_full_ends_the_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Store, __: object) -> None:
        raise CrateError("no space left")

    monkeypatch.setattr(calls, "add_calls", full)
    with pytest.raises(CrateError, match="no space left"):
        say(Cached(Counted(), store), "Hello")


def test_who_gives_up_leaves_the_answer_for_others(store: Store) -> None:
    llm = Counted()
    llm.wait = 0.05
    cached = Cached(llm, store)

    async def broken_off() -> Reply:
        first = asyncio.create_task(cached.chat([Message("user", "Hello")], SHORT))
        await asyncio.sleep(0.02)
        first.cancel()
        return await cached.chat([Message("user", "Hello")], SHORT)

    asyncio.run(broken_off())
    assert llm.asked["Hello"] == 1


def test_a_part_has_the_answers_of_the_run_too(store: Store) -> None:
    llm = Counted()
    first = say(Cached(llm, store), "Hello")
    part = Store.create(store.run, 3)
    assert say(Cached(llm, part), "Hello") == first
    say(Cached(llm, part), "Good-bye")
    assert (spent(store), spent(part)) == ((5, 3), (8, 3))


def test_a_budget_ends_the_work_before_it_is_overdrawn(store: Store) -> None:
    llm, usage = Counted(), Usage()
    metered = Metered(llm, usage, Budget(tokens=200))
    cached = Cached(metered, store, usage)

    async def many() -> list[Reply | BaseException]:
        every = (cached.chat([Message("user", f"question {n:3}")], SHORT) for n in range(30))
        return await asyncio.gather(*every, return_exceptions=True)

    answers = asyncio.run(many())
    paid = [one for one in answers if isinstance(one, Reply)]
    refused = [one for one in answers if isinstance(one, CrateError)]
    assert len(paid) + len(refused) == 30
    assert usage.calls == len(paid) == 12  # 15 tokens each, up to 33 set aside: 12 end at 180
    assert usage.prompt_tokens + usage.new_tokens <= 200
    assert not isinstance(refused[0], LLMError)
    assert "the budget is spent" in str(refused[0])
    assert "tokens of 200" in str(refused[0])
    again = {one.text for one in asyncio.run(many()) if isinstance(one, Reply)}
    assert {one.text for one in paid} <= again
    assert usage.prompt_tokens + usage.new_tokens <= 200
    assert set(llm.asked.values()) == {1}


def test_a_budget_in_money_counts_what_was_spent_before() -> None:
    price = Price(prompt=1e6, new=2e6, currency="EUR")  # 1 for a token read, 2 for one written
    assert price.of(5, 3) == 11
    metered = Metered(Counted(), Usage(), Budget(money=60.0, price=price), spent_before=(20, 0))
    say(metered, "Hello")
    with pytest.raises(CrateError, match=r"31\.00 EUR of 60\.00 \(left: 29\.00\)"):
        say(metered, "Hello")
    assert (metered.name, metered.identity, metered.context, metered.count("abc")) == ("counted", "counted 1", None, 3)


def test_what_was_asked_in_one_line() -> None:
    assert Usage().line() == "0 calls, 0 tok"
    assert Usage(calls=2, cached=3, retries=4, prompt_tokens=1200, new_tokens=34).line() == (
        "2 calls, 3 cached, 4 retries, 1.23k tok"
    )


def test_answers_that_wait_to_be_written_are_no_more_than_are_in_flight(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow a commit is: what a kill would lose is the calls in flight."""
    llm, write = Counted(), calls.add_calls
    llm.wait = 0.0
    behind: list[int] = []
    batches: list[int] = []

    def slow(to: Store, rows: Sequence[calls.CallRow]) -> None:
        held = threading.Event()
        held.wait(0.02)
        with to.transaction() as connection:
            (kept,) = connection.execute("SELECT count(*) FROM calls").fetchone()
        behind.append(llm.asked.total() - kept)
        batches.append(len(rows))
        write(to, rows)

    monkeypatch.setattr(calls, "add_calls", slow)

    async def many() -> None:
        cached = Cached(llm, store, in_flight=8)
        await asyncio.gather(*(cached.chat([Message("user", str(number))], SHORT) for number in range(100)))

    asyncio.run(many())
    assert sum(batches) == 100
    assert max(behind) <= 8
    assert max(batches) > 1
