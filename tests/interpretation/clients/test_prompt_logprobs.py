"""How a server returns prompt logprobs is found with one request, however many callers wait for it."""

import asyncio
from typing import Any

import pytest
from fakes.llm_server import Answer, Body, Server, refusal
from interpretation.clients.test_endpoint import faults, run

from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.llm import LLMError, Prompt

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")


def test_a_limit_of_candidates_is_found_once_by_many_at_once() -> None:
    """OpenAI allows five: who comes while one finds that out asks for as many."""

    def answer(_path: str, body: Body) -> Answer:
        if body.get("logprobs", 0) > 5:
            return refusal("logprobs: at most 5", 400)
        text = body["prompt"]
        told = {
            "tokens": [*text, "x"], "token_logprobs": [None, *[-1.0] * len(text)],
            "top_logprobs": [None, *[{letter: -1.0} for letter in text[1:]], {"x": -1.0}], "text_offset": [],
        }  # fmt: skip
        choice = {"text": text + "x", "finish_reason": "length", "logprobs": told if body.get("echo") else None}
        return Answer({"choices": [choice], "usage": {"prompt_tokens": len(text), "completion_tokens": 1}})

    async def many(endpoint: Endpoint) -> list[Any]:
        prompts = [Prompt(prefix="a", rest=f"b{number}") for number in range(100)]
        return await asyncio.gather(*(endpoint.prompt_logprobs([prompt]) for prompt in prompts), return_exceptions=True)

    async def known(endpoint: Endpoint) -> None:
        endpoint.set_logprobs_format("openai", 5)
        await endpoint.prompt_logprobs([Prompt(prefix="a", rest="b")])

    with Server(answer) as server:
        found = run(many, server.url)
        assert [one for one in found if isinstance(one, BaseException)] == []
        refused = [body for _, body in server.asked if body.get("logprobs", 0) > 5]
        assert (len(refused), len(server.asked)) == (1, 100 + 2)
        run(known, server.url)
        assert len(server.asked) == 100 + 3


def test_a_server_that_stops_giving_probabilities_is_a_failure_in_a_line() -> None:
    async def known(endpoint: Endpoint) -> None:
        endpoint.set_logprobs_format("openai", 0)
        await endpoint.prompt_logprobs([Prompt(prefix="a", rest="b")])

    silent = {"choices": [{"text": "x", "finish_reason": "length", "logprobs": None}], "usage": {}}
    with (
        Server(faults(Answer(silent))) as server,
        pytest.raises(LLMError, match="does not return them any more"),
    ):
        run(known, server.url)
