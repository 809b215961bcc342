"""Models that answer at `/responses` only: requests and answers are converted, and the place is found once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakes.llm_server import Answer, Body, Server, completion, refusal

from cratelm.errors import CrateError
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.transport import Retry
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.llm import Declined, LLMError, Message, Reply, Sampling
from cratelm.interpretation.store.answer_cache import Cached, unsupported_note
from cratelm.interpretation.store.database import Store

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

TURNS = [Message("system", "Be brief."), Message("user", "Why?")]
NOT_CHAT = [
    refusal("This model is only supported in v1/responses and not in v1/chat/completions.", 404),
    refusal("This is not a chat model and thus not supported in the v1/chat/completions endpoint.", 404),
    refusal("The chatCompletion operation does not work with the specified model, small.", 400),
    refusal("Not Found", 404), refusal("Method Not Allowed", 405), Answer(b"<html>no such page</html>", status=404),
]  # fmt: skip


def response(*output: Body, status: str = "completed", **fields: Any) -> Answer:
    """An answer of `/responses`."""
    usage = {"input_tokens": 11, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 5}}
    return Answer({
        "id": "resp_1", "object": "response", "status": status, "error": None, "incomplete_details": None,
        "output": list(output), "usage": usage, **fields,
    })  # fmt: skip


def text(*texts: str, kind: str = "output_text") -> Body:
    name = "refusal" if kind == "refusal" else "text"
    return {"type": "message", "role": "assistant", "content": [{"type": kind, name: one} for one in texts]}


def thought(*texts: str) -> Body:
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": one} for one in texts]}


def ask(answer: Answer, store: Store, *, chat: Answer = NOT_CHAT[0], times: int = 1, **sampling: Any) -> list[Reply]:
    """Chats with a server that answers at `/responses` only. The requests are in `ASKED`."""

    async def main(url: str) -> list[Reply]:
        usage = Usage()
        endpoint = Endpoint(url, "small", retry=Retry(first=0.001, longest=0.002), usage=usage,
                            extra={"reasoning_effort": "low"})  # fmt: skip
        llm = Cached(Metered(endpoint, usage, pause=0.001), store, usage)
        asked = Sampling(**({"max_tokens": 5, "seed": 3} | sampling))
        try:
            return [await llm.chat([*TURNS[:-1], Message("user", f"Why {n}?")], asked) for n in range(times)]
        finally:
            await endpoint.close()

    with Server(lambda path, _: answer if path == "/v1/responses" else chat) as server:
        try:
            return asyncio.run(main(server.url))
        finally:
            ASKED[:] = server.asked


ASKED: list[tuple[str, Body]] = []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path)


@pytest.mark.parametrize("chat", NOT_CHAT)
def test_a_model_without_chat_completions_answers_at_responses(chat: Answer, store: Store) -> None:
    schema = {"type": "object"}
    replies = ask(response(thought("Hm."), text("rain", " and storms")), store, chat=chat, times=3, schema=schema)
    assert [(reply.text, reply.prompt_tokens, reply.new_tokens) for reply in replies] == [
        ("rain and storms", 11, 4)
    ] * 3
    assert [path for path, _ in ASKED] == ["/v1/chat/completions", *["/v1/responses"] * 3]
    body = ASKED[-1][1]
    assert body["input"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why 2?"}]
    assert (body["max_output_tokens"], body["reasoning"], body["store"]) == (16, {"effort": "low"}, False)
    assert body["text"]["format"] == {"type": "json_schema", "name": "answer", "strict": True, "schema": schema}
    assert not {"messages", "max_tokens", "seed", "response_format"} & set(body)


def test_the_place_is_recorded_for_later_processes(store: Store) -> None:
    ask(response(text("rain")), store)
    identity = '["small", {}, {"reasoning_effort": "low"}]'
    assert store.noted(unsupported_note(identity)) == '["chat/completions"]'


def test_an_answer_cut_within_its_reasoning_is_requested_with_a_larger_limit(store: Store) -> None:
    cut = response(thought(), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    with pytest.raises(LLMError, match="only reasoning and no answer, cut by the limit of 4101 tokens"):
        ask(cut, store)
    assert [body["max_output_tokens"] for path, body in ASKED if path == "/v1/responses"] == [16, 4101]


@pytest.mark.parametrize(("answer", "message"), [
    (response(text("I cannot", kind="refusal")), "the model refused: I cannot"),
    (response(status="incomplete", incomplete_details={"reason": "content_filter"}), "answered nothing"),
    (response(), "answered nothing"),
])  # fmt: skip
def test_a_refusal_is_a_counted_failure(answer: Answer, message: str, store: Store) -> None:
    with pytest.raises(Declined, match=message):
        ask(answer, store)


@pytest.mark.parametrize("answer", [
    response(status="failed", error={"code": "server_error", "message": "overloaded"}),
    Answer({"output": None}), Answer({"output": ["text"]}), Answer({"output": "rain"}), refusal("broken", 500),
])  # fmt: skip
def test_a_failed_response_is_never_stored(answer: Answer, store: Store) -> None:
    with pytest.raises(CrateError):
        ask(answer, store)
    with store.transaction() as connection:
        stored = connection.execute("SELECT prompt_tokens FROM calls WHERE reply != ?", [lost()]).fetchall()
    assert stored == []


def lost() -> bytes:
    import zlib

    return zlib.compress(b"{}")


def test_an_unknown_model_is_not_asked_for_at_responses(store: Store) -> None:
    with pytest.raises(LLMError, match="the model does not exist"):
        ask(response(text("rain")), store, chat=refusal("the model does not exist", 404))
    assert [path for path, _ in ASKED] == ["/v1/chat/completions"]


def test_without_responses_the_first_refusal_stands(store: Store) -> None:
    with pytest.raises(LLMError, match="no such place"):
        ask(refusal("unknown url", 404), store, chat=refusal("no such place", 404))


def test_an_ordinary_model_is_never_asked_at_responses(store: Store) -> None:
    assert ask(response(text("no")), store, chat=Answer(completion("yes")))[0].text == "yes"
    assert [path for path, _ in ASKED] == ["/v1/chat/completions"]
