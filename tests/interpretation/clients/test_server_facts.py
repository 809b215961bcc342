"""What servers list: prices, slots, and the hints with which providers cache the beginning of prompts."""

import asyncio
import threading
from typing import Any

import pytest
from fakes.llm_server import Answer, Body, Server, completion, refusal

from cratelm.errors import CrateError
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.server_facts import cache_hint, price_in
from cratelm.interpretation.clients.transport import Retry
from cratelm.interpretation.llm import Message, Reply, Sampling
from cratelm.workflows.llm.opening import LLMs, priced
from cratelm.workflows.options.language_model import Spending

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

TURNS = [
    Message("system", "Rules. " * 700),
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
]
QUICK = Retry(first=0.001, longest=0.002)


class LlamaServer(Server):
    """A server with llama.cpp's `/props` and `/slots`, which counts requests in flight."""

    def __init__(self, props: Body | None, slots: int = 0, **entry: Any) -> None:
        self.props, self.slots, self.most, self.now = props, slots, 0, 0
        self.counting = threading.Lock()
        served = [{"id": "small", "owned_by": "llamacpp", "meta": {"n_ctx_train": 32768}} | entry]
        super().__init__(self.answer, served=served)

    def get(self, path: str) -> Answer:
        if path == "/props" and self.props is not None:
            return Answer(self.props)
        if path == "/slots" and self.slots:
            return Answer([{"id": slot, "n_ctx": 4096} for slot in range(self.slots)])
        return super().get(path)

    def answer(self, _path: str, _body: Body) -> Answer:
        with self.counting:
            self.now += 1
            self.most = max(self.most, self.now)
        self.stopped.wait(0.02)
        with self.counting:
            self.now -= 1
        return Answer(completion("yes"))


async def ask_many(endpoint: Endpoint, number: int) -> None:
    await endpoint.connect()
    await asyncio.gather(*(endpoint.chat(TURNS, Sampling(max_tokens=5 + i)) for i in range(number)))
    await endpoint.close()


@pytest.mark.parametrize(("props", "slots", "most", "context"), [
    ({"total_slots": 2, "default_generation_settings": {"n_ctx": 8192}}, 0, 2, 8192),
    ({"total_slots": "3"}, 0, 3, 32768), ({}, 2, 2, 4096), (None, 4, 4, 4096), (None, 0, 8, 32768),
    ({"total_slots": 0}, 0, 8, 32768), ({"total_slots": None, "default_generation_settings": 7}, 0, 8, 32768),
])  # fmt: skip
def test_no_more_requests_are_in_flight_than_the_server_has_slots(
    props: Body | None, slots: int, most: int, context: int
) -> None:
    with LlamaServer(props, slots) as server:
        endpoint = Endpoint(server.url, "small", in_flight=8, retry=QUICK)
        asyncio.run(ask_many(endpoint, 12))
        assert server.most <= most
        assert endpoint.transport.in_flight == most
        assert endpoint.context == context


NO_PRICE: list[Body] = [
    {}, {"pricing": None}, {"pricing": []}, {"pricing": {"prompt": "-1", "completion": "-1"}},
    {"pricing": {"prompt": "free", "completion": "0"}}, {"pricing": {"prompt": 1}}, {"metadata": "x"},
    {"pricing": {"prompt": "nan", "completion": "inf"}}, {"pricing": {"input": True, "output": True}},
]  # fmt: skip
PRICED: list[tuple[Body, tuple[float, float] | None]] = [
    ({"pricing": {"prompt": "0.00000015", "completion": "0.0000006", "image": "0"}}, (0.15, 0.6)),
    ({"pricing": {"hourly": 0, "input": 0.3, "output": 0.9}}, (0.3, 0.9)),
    ({"pricing": {"input": "0.0000025", "output": "0.00001"}}, (2.5, 10)),
    ({"metadata": {"pricing": {"input_tokens": 0.13, "output_tokens": 0.4}}}, (0.13, 0.4)),
    ({"pricing": {"prompt": "0", "completion": "0"}}, (0, 0)),
    *((entry, None) for entry in NO_PRICE),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "price"), PRICED)
def test_prices_are_read_as_servers_list_them(entry: Body, price: tuple[float, float] | None) -> None:
    assert price_in(entry) == (price if price is None else pytest.approx(price))


def test_listed_prices_are_used_unless_prices_are_given() -> None:
    def opened(**entry: Any) -> LLMs:
        with LlamaServer(None, **entry) as server:
            endpoint = Endpoint(server.url, "small", retry=QUICK)
            asyncio.run(ask_many(endpoint, 0))
        return LLMs(endpoint, endpoint, None)

    listed = opened(pricing={"prompt": "0.000001", "completion": "0.000004"})
    found = priced(Spending(budget_price=1.0), listed)
    assert (found.price_in, found.price_out) == pytest.approx((1, 4))
    assert priced(Spending(price_in=7.0), listed) == Spending(price_in=7.0)
    assert priced(Spending(), opened()) == Spending()
    with pytest.raises(CrateError, match="--price-in and --price-out"):
        priced(Spending(budget_price=1.0), opened())


def test_a_cache_hint_is_sent_only_to_providers_that_know_it() -> None:
    hints = [cache_hint(url, model) for url, model in [
        ("https://api.openai.com/v1", "gpt-5-mini"), ("https://eu.api.openai.com/v1", "o3"),
        ("https://openrouter.ai/api/v1", "anthropic/claude-sonnet-4"), ("https://openrouter.ai/api/v1", "qwen/qwen3"),
        ("http://localhost:8000/v1", "small"), ("https://notopenai.com/v1", "small"),
    ]]  # fmt: skip
    assert hints == ["prompt_cache_key", "prompt_cache_key", "cache_control", "", "", ""]


def hinted(hint: Any, *, refuses: str = "", turns: list[Message] = TURNS) -> tuple[list[Body], Endpoint]:
    """The requests for three chats with a hint."""

    def answer(_path: str, body: Body) -> Answer:
        known = refuses and (refuses in body or refuses in str(body["messages"]))
        return refusal(f"Unknown field {refuses}", 400) if known else Answer(completion("yes"))

    async def main(url: str) -> Endpoint:
        endpoint = Endpoint(url, "small", retry=QUICK)
        endpoint._hint = hint
        replies: list[Reply] = [await endpoint.chat(turns, Sampling(max_tokens=n)) for n in (5, 6, 7)]
        await endpoint.close()
        assert [reply.text for reply in replies] == ["yes"] * 3
        return endpoint

    with Server(answer) as server:
        endpoint = asyncio.run(main(server.url))
        return [body for _, body in server.asked], endpoint


def test_the_shared_beginning_of_prompts_carries_the_hint() -> None:
    bodies, _ = hinted("prompt_cache_key")
    assert len({body["prompt_cache_key"] for body in bodies}) == 1
    bodies, _ = hinted("cache_control")
    marked = [[turn["role"] for turn in body["messages"] if isinstance(turn["content"], list)] for body in bodies]
    assert marked == [["assistant"]] * 3
    assert bodies[0]["messages"][-2]["content"] == [
        {"type": "text", "text": "1", "cache_control": {"type": "ephemeral"}}
    ]
    short, _ = hinted("cache_control", turns=TURNS[1:])
    assert all(isinstance(turn["content"], str) for turn in short[0]["messages"])
    alone, _ = hinted("prompt_cache_key", turns=TURNS[-1:])
    assert "prompt_cache_key" not in alone[0]


@pytest.mark.parametrize("hint", ["prompt_cache_key", "cache_control"])
def test_a_refused_hint_is_dropped_once(hint: str) -> None:
    bodies, endpoint = hinted(hint, refuses=hint)
    assert len(bodies) == 4
    assert endpoint.unsupported == {hint}


def test_tokens_that_the_server_took_from_its_cache_are_counted() -> None:
    reported: list[Body] = [
        {"prompt_tokens_details": {"cached_tokens": 6}}, {"prompt_cache_hit_tokens": 3},
        {"prompt_tokens_details": None}, {"prompt_tokens_details": {"cached_tokens": -9}},
    ]  # fmt: skip
    usages = iter(reported)

    def answer(_path: str, _body: Body) -> Answer:
        body = completion("yes")
        return Answer(body | {"usage": body["usage"] | next(usages)})

    async def main(url: str) -> int:
        endpoint = Endpoint(url, "small", retry=QUICK)
        for number in range(4):
            await endpoint.chat(TURNS, Sampling(max_tokens=5 + number))
        await endpoint.close()
        return endpoint.transport.usage.prompt_cached

    with Server(answer) as server:
        assert asyncio.run(main(server.url)) == 9
