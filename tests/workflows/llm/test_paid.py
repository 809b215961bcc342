"""What is paid for is counted, kept, within the budget: refusals, empty answers and those that cannot be read."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.llm_server import Answer, Body, Server, completion

from cratelm.errors import CrateError
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.transport import Retry
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.llm import LLM, Declined, LLMError, Message, Sampling
from cratelm.interpretation.stages.concurrency import each
from cratelm.interpretation.store.answer_cache import Cached, chat_hash, is_cached, spent
from cratelm.interpretation.store.database import Store
from cratelm.workflows.llm.opening import LLMs, cached, metered
from cratelm.workflows.llm.run import failure_kind
from cratelm.workflows.options.language_model import Spending

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

PAID = {"prompt_tokens": 3000, "completion_tokens": 50}
BILLED = sum(PAID.values())
LONG = "word " * 600


def declined(**message: Any) -> Answer:
    body = completion("")
    body["choices"][0]["message"] = {"role": "assistant", "content": None, **message}
    return Answer(body | {"usage": PAID})


BAD = {
    "refused": declined(refusal="No."), "empty": declined(),
    "no choice": Answer({"choices": [], "usage": PAID}), "no JSON": Answer(b'{"choices": ['),
}  # fmt: skip


class Billing:
    """Every second question gets a bad answer; every answer is billed."""

    def __init__(self, bad: Answer) -> None:
        self.bad, self.answers = bad, 0

    def __call__(self, _path: str, body: Body) -> Answer:
        self.answers += 1
        text = body["messages"][0]["content"]
        return self.bad if int(text.split()[0]) % 2 else Answer(completion("fine") | {"usage": PAID})

    @property
    def billed(self) -> int:
        return BILLED * self.answers


async def ask(url: str, store: Store, spending: Spending, *, questions: int = 40) -> tuple[list[Any], Usage]:
    usage = Usage()
    retry = Retry(first=0.001, longest=0.002)
    endpoint = Endpoint(url, "small", usage=usage, retry=retry, in_flight=8, counter=lambda text: 3 * len(text) // 3)
    llm = cached(endpoint, store, usage, spending, spent(store))
    turns = [[Message("user", f"{number} {LONG}")] for number in range(questions)]
    every = (llm.chat(one, Sampling(max_tokens=50)) for one in turns)
    result = await asyncio.gather(*every, return_exceptions=True)
    await endpoint.close()
    return result, usage


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_budget_holds_whatever_the_answers_are(bad: Answer, tmp_path: Path) -> None:
    store, answer, spending = Store.create(tmp_path), Billing(bad), Spending(budget_tokens=90_000, in_flight=8)
    with Server(answer) as server:
        result, usage = asyncio.run(ask(server.url, store, spending))
        assert 60_000 <= answer.billed <= 90_000
        assert any(type(one) is CrateError and "the budget is spent" in str(one) for one in result)
        assert usage.calls == answer.answers
        assert usage.unusable > 0
        assert sum(spent(store)) == usage.prompt_tokens + usage.new_tokens >= answer.billed
        before = answer.answers
        asyncio.run(ask(server.url, store, spending))
        assert BILLED * answer.answers <= 90_000, f"{answer.answers - before} answers more"


@pytest.mark.parametrize("name", ["refused", "empty"])
def test_what_a_model_declines_is_kept_and_not_asked_again(name: str, tmp_path: Path) -> None:
    store, answer = Store.create(tmp_path), Billing(BAD[name])
    with Server(answer) as server:
        first, usage = asyncio.run(ask(server.url, store, Spending(), questions=6))
        again, more = asyncio.run(ask(server.url, store, Spending(), questions=6))
    assert [str(one) for one in again] == [str(one) for one in first]
    assert [isinstance(one, Declined) for one in again] == [False, True] * 3
    assert (answer.answers, usage.calls, usage.unusable, more.calls, more.cached) == (6, 6, 3, 0, 6)
    assert "3 unusable" in usage.line()


def test_what_cannot_be_read_is_asked_again_by_the_next_process(tmp_path: Path) -> None:
    """It may have been a page of a proxy: counted, but no answer to the question."""
    store, answer = Store.create(tmp_path), Billing(BAD["no choice"])
    with Server(answer) as server:
        first, usage = asyncio.run(ask(server.url, store, Spending(), questions=2))
        assert isinstance(first[1], LLMError)
        assert "could not parse the server's answer in 3 attempts" in str(first[1])
        assert (usage.calls, usage.unusable, sum(spent(store))) == (4, 3, 4 * BILLED)
        asyncio.run(ask(server.url, store, Spending(), questions=2))
        assert answer.answers == 4 + 3


def test_what_the_probe_asks_is_counted(tmp_path: Path) -> None:
    store, usage = Store.create(tmp_path), Usage()

    async def probed(url: str) -> None:
        endpoint = Endpoint(url, "small", usage=usage)
        cast = LLMs(None, endpoint, None)

        def meter(llm: LLM) -> Any:
            return metered(llm, usage, Spending())

        await cast.ask_what_it_can(endpoint, store, "structured", meter)
        await endpoint.close()

    with Server(lambda *_: Answer(completion("Hello"))) as server:
        asyncio.run(probed(server.url))
        assert usage.calls == len(server.asked) > 2
    assert sum(spent(store)) == usage.prompt_tokens + usage.new_tokens > 0


def test_kinds_of_failures_are_whole_words(rng: np.random.Generator) -> None:
    with pytest.raises(Declined) as caught:
        Endpoint("http://localhost:1/v1", "small")._parse_chat(int(rng.integers(1, 99)), _body(BAD["empty"]))
    assert failure_kind(str(caught.value)) == "the model answered nothing"


def _body(answer: Answer) -> Body:
    import json

    return json.loads(answer.content)


def test_every_paid_answer_is_stored_when_a_budget_ends_the_work(tmp_path: Path, rng: np.random.Generator) -> None:
    """50 runs with random delays: neurons with several calls each, of which the first that is refused ends the work."""
    paid: list[str] = []

    def answer(_path: str, body: Body) -> Answer:
        paid.append(body["messages"][0]["content"])
        wait = float(delays[len(paid) % len(delays)])
        return Answer(completion("fine", prompt_tokens=20, new_tokens=5), wait=wait)

    async def one_run(url: str, store: Store) -> None:
        usage = Usage()
        endpoint = Endpoint(url, "small", usage=usage, in_flight=4, counter=len)
        llm = cached(endpoint, store, usage, Spending(budget_tokens=budget, in_flight=4))
        assert isinstance(llm, Cached)

        async def ask_four(neuron: int) -> str:
            turns = [[Message("user", f"{neuron} {number}")] for number in range(4)]
            await asyncio.gather(*(llm.chat(turn, Sampling(max_tokens=10)) for turn in turns))
            return "done"

        try:
            await each(range(9), ask_four, keep=lambda _: None, fail=lambda _: None, in_flight=3)
        finally:
            await llm.settle()
            await endpoint.close()

    with Server(answer) as server:
        for number in range(50):
            paid.clear()
            delays, budget = rng.uniform(0, 0.01, size=7), int(rng.integers(100, 500))
            store = Store.create(tmp_path / str(number))
            with pytest.raises(CrateError, match="the budget is spent"):
                asyncio.run(one_run(server.url, store))
            hashes = {text: chat_hash("small", [Message("user", text)], Sampling(max_tokens=10)) for text in paid}
            assert all(is_cached(store, key) for key in hashes.values())
            assert sum(spent(store)) == 25 * len(paid) <= budget


def test_calls_that_wait_when_the_work_ends_are_not_made(tmp_path: Path) -> None:
    store = Store.create(tmp_path)

    async def stopped(url: str) -> None:
        endpoint = Endpoint(url, "small", in_flight=2, counter=len)
        llm = cached(endpoint, store, Usage(), Spending(in_flight=2))
        assert isinstance(llm, Cached)
        calls = [asyncio.ensure_future(llm.chat([Message("user", str(n))], Sampling(max_tokens=5))) for n in range(20)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await llm.settle()
        await asyncio.gather(*calls, return_exceptions=True)
        await endpoint.close()

    with Server(lambda *_: Answer(completion("fine", prompt_tokens=20, new_tokens=5), wait=0.05)) as server:
        asyncio.run(stopped(server.url))
        assert len(server.asked) <= 4
        assert sum(spent(store)) == 25 * len(server.asked)
