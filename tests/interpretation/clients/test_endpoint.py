"""Servers that fail in every way there is: what is asked again, after what wait, what ends the work, what is said."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from fakes.llm_server import Answer, Body, Server, completion, refusal

from cratelm.errors import CrateError
from cratelm.interpretation.clients.address import find_key
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import probe
from cratelm.interpretation.clients.transport import Retry, retry_after
from cratelm.interpretation.clients.usage import Metered
from cratelm.interpretation.llm import LLMError, Message, Prompt, Reply, Sampling

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

T = TypeVar("T")
SECRET = "sk-very-secret-0123456789"
QUICK = Retry(first=0.01, longest=0.02)
FINE = Answer(completion("fine"))


def run(what: Callable[[Endpoint], Coroutine[Any, Any, T]], url: str, model: str = "small", **changes: Any) -> T:
    """Do something with an endpoint, in a separate event loop."""

    async def main() -> T:
        endpoint = Endpoint(url, model, **{"retry": QUICK} | changes)
        try:
            return await what(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(main())


async def say(endpoint: Endpoint, text: str = "Hello?", **sampling: Any) -> Reply:
    metered = Metered(endpoint, endpoint.transport.usage, pause=0.01)
    return await metered.chat([Message("user", text)], Sampling(max_tokens=5, **sampling))


def faults(*answers: Answer) -> Callable[[str, Body], Answer]:
    """The answers in their order, then the last one for ever."""
    left = list(answers)
    return lambda _path, _body: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    "fault",
    [
        refusal("busy", 429), refusal("oops", 500), refusal("later", 503), refusal("slow", 408), refusal("clash", 409),
        Answer(b'{"choices": [{"mess'), Answer(b"<html>bad gateway</html>", headers={"Content-Type": "text/html"}),
        Answer([1, 2]), Answer({"choices": []}), Answer({"choices": [{"message": None}]}),
        Answer(completion("x"), cut=True),
    ],
    ids=["429", "500", "503", "408", "409", "cut JSON", "no JSON", "list", "no choice", "no message", "cut"],
)  # fmt: skip
def test_what_passes_is_asked_again(fault: Answer) -> None:
    with Server(faults(fault, fault, FINE)) as server:
        usage = Endpoint(server.url, "small").transport.usage
        assert run(say, server.url, usage=usage).text == "fine"
        assert (usage.requests, usage.retries) == (3, 2)
        assert list(server.counts().values()) == [3]


def test_a_slow_answer_is_asked_for_again() -> None:
    with Server(faults(Answer(completion("late"), wait=1.0), FINE)) as server:
        assert run(say, server.url, timeout=0.2).text == "fine"


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "1"}, {"retry-after-ms": "900"}, {"Retry-After": None}],
    ids=["seconds", "milliseconds", "date"],
)
def test_the_wait_a_server_asks_for_is_kept_by_all(headers: dict[str, str | None]) -> None:
    asked: list[tuple[float, str]] = []

    def answer(_path: str, body: Body) -> Answer:
        asked.append((time.time(), body["messages"][0]["content"]))
        if len(asked) == 1:
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
            return refusal("busy", 429, **{name: value or date for name, value in headers.items()})
        return FINE

    async def both(endpoint: Endpoint) -> None:
        async def second() -> None:
            await asyncio.sleep(0.3)
            await say(endpoint, "second")

        await asyncio.gather(say(endpoint, "first"), second())

    with Server(answer) as server:
        run(both, server.url)
    (refused, _), *others = asked
    assert sorted(text for _, text in others) == ["first", "second"]
    assert min(when for when, _ in others) - refused > 0.85


def test_a_wait_that_is_too_long_ends_the_work() -> None:
    with Server(faults(refusal("busy", 429, **{"Retry-After": "7200"}))) as server:
        with pytest.raises(CrateError, match="asks to wait 7200 seconds") as caught:
            run(say, server.url)
        assert not isinstance(caught.value, LLMError)
        assert len(server.asked) == 1


def test_retry_after_in_every_form() -> None:
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after": "0.5", "retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "soon"}) == retry_after({}) == 0
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < retry_after({"retry-after": date}) <= 30
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


def test_waits_double_up_to_a_limit_and_vary() -> None:
    transport = Endpoint("http://localhost:1/v1", "small", retry=Retry(first=1.0, longest=5.0)).transport

    def wait(attempt: int, headers: dict[str, str]) -> float:
        error = SimpleNamespace(headers=headers)
        return transport._wait(
            SimpleNamespace(attempt_number=attempt, outcome=SimpleNamespace(exception=lambda: error))
        )

    for attempt, longest in ((1, 1), (2, 2), (3, 4), (4, 5), (9, 5)):
        waits = {wait(attempt, {}) for _ in range(20)}
        assert len(waits) > 1
        assert longest / 2 <= min(waits) <= max(waits) <= longest
    assert wait(1, {"retry-after": "20"}) == 20


def test_a_fault_that_never_ends_is_given_up_after_a_number_of_attempts() -> None:
    with Server(faults(refusal("out of memory", 500))) as server:
        with pytest.raises(LLMError, match=r"failed 4 times \(HTTP 500\): out of memory"):
            run(say, server.url, retry=Retry(attempts=4, first=0.01))
        assert len(server.asked) == 4
    with Server(faults(Answer(b"{"))) as server:
        with pytest.raises(LLMError, match="could not parse the server's answer in 3 attempts: not JSON"):
            run(say, server.url)
        assert len(server.asked) == 3
    with Server(faults(refusal("slow down", 429))) as server:
        with pytest.raises(CrateError, match="rate limit") as caught:
            run(say, server.url)
        assert not isinstance(caught.value, LLMError)


def test_a_request_that_hangs_fails_alone_while_the_server_answers() -> None:
    with Server(faults(Answer(b"{}", wait=5.0))) as server, pytest.raises(LLMError, match="no answer within 0.1 s"):
        run(say, server.url, timeout=0.1, retry=Retry(attempts=2, first=0.01))


def test_a_server_that_dies_ends_the_work() -> None:
    with Server(faults(FINE)) as server:
        url = server.url
    with pytest.raises(CrateError, match=f"no server can be reached at {url}") as caught:
        run(say, url, retry=Retry(attempts=2, first=0.01))
    assert not isinstance(caught.value, LLMError)


def test_a_refusal_is_not_repeated_and_quoted() -> None:
    with Server(faults(refusal("This model's maximum context length is 12 tokens", 400))) as server:
        with pytest.raises(LLMError, match=r"HTTP 400.*maximum context length is 12 tokens"):
            run(say, server.url)
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("message", "said"),
    [({"content": None, "refusal": "I will not."}, "refused: I will not"), ({"content": None}, "answered nothing")],
)
def test_an_answer_that_is_none(message: Body, said: str) -> None:
    body = completion("")
    body["choices"][0]["message"] = message
    with Server(faults(Answer(body))) as server, pytest.raises(LLMError, match=said):
        run(say, server.url)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_not_echoed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    with Server(faults(refusal(f"Incorrect API key provided: {SECRET}", status))) as server:
        with pytest.raises(CrateError, match=f"refuses the key in MY_KEY .HTTP {status}") as caught:
            run(say, server.url, key_from="MY_KEY")
        assert server.keys == [f"Bearer {SECRET}"]
    assert_hidden(caught.value)


def test_no_error_holds_the_key_whatever_the_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for fault in (refusal(f"bad {SECRET}", 400), refusal(f"bad {SECRET}", 500), Answer(f"bad {SECRET}".encode())):
        with Server(faults(fault)) as server, pytest.raises(CrateError) as caught:
            run(say, server.url, retry=Retry(attempts=2, first=0.01))
        assert_hidden(caught.value)
    assert SECRET not in repr(Endpoint("https://example.org/v1", "small").transport)


def assert_hidden(error: BaseException | None) -> None:
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_the_key_is_sent_only_over_a_private_connection_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for url, key in (("https://api.example.org", SECRET), ("http://127.0.0.1:8000", SECRET), ("http://node7:8000", "")):
        assert find_key(f"{url}/v1", "") == ("OPENAI_API_KEY", key)
    assert find_key("http://node7:8000/v1", "OPENAI_API_KEY") == ("OPENAI_API_KEY", SECRET)
    with pytest.raises(CrateError, match="environment variable NO_SUCH_KEY is empty"):
        find_key("https://api.example.org/v1", "NO_SUCH_KEY")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "https://me:pass@host/v1", "http://h/v1?key=x"])
def test_a_url_that_cannot_be_one_is_refused(url: str) -> None:
    with pytest.raises(CrateError, match="is not a server URL|holds a secret or a query") as caught:
        Endpoint(url, "small")
    assert "pass" not in str(caught.value)


def test_an_unknown_model_is_answered_with_those_that_are_served() -> None:
    answer = faults(refusal("The model `big` does not exist.", 404))
    with (
        Server(answer, served=[{"id": "small"}, {"id": "medium"}]) as server,
        pytest.raises(CrateError, match=r"does not serve big \(it serves: medium, small\)") as caught,
    ):
        run(probe, server.url, "big")
    assert not isinstance(caught.value, LLMError)


def test_something_else_at_that_url() -> None:
    with Server(faults(FINE)) as server:
        server.served = []
        page = Answer(b"<html>hello</html>")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fakes.llm_server.Answer", lambda _body: page)
            with pytest.raises(CrateError, match="does not speak OpenAI's protocol"):
                run(probe, server.url)


def test_what_a_server_does_not_know_is_left_out() -> None:
    """In turn: a chat template without a system's turn, no schemas, OpenAI's newer name for the longest answer."""

    def answer(_path: str, body: Body) -> Answer:
        if body["messages"][0]["role"] == "system":
            return refusal("Conversation roles must alternate user/assistant/user/assistant/...", 400)
        if "response_format" in body:
            return refusal("response_format is not supported", 422)
        if "max_tokens" in body:
            return refusal("Unsupported parameter: use 'max_completion_tokens' instead", 400)
        return Answer(completion(body["messages"][0]["content"]))

    async def twice(endpoint: Endpoint) -> list[str]:
        turns = [Message("system", "Be brief."), Message("user", "Why?")]
        return [(await endpoint.chat(turns, Sampling(max_tokens=5, schema={"type": "object"}))).text for _ in range(2)]

    with Server(answer) as server:
        assert run(twice, server.url) == ["Be brief.\n\nWhy?"] * 2
        assert len(server.asked) == 5

    async def at_once(endpoint: Endpoint) -> list[str]:
        turns = [Message("system", "Be brief."), Message("user", "Why?")]
        sampling = Sampling(max_tokens=5, schema={"type": "object"})
        return [one.text for one in await asyncio.gather(*(endpoint.chat(turns, sampling) for _ in range(8)))]

    with Server(answer) as server:  # each is refused before any has learnt anything
        assert run(at_once, server.url) == ["Be brief.\n\nWhy?"] * 8


def test_what_is_sent_and_what_comes_back() -> None:
    body = completion("ja", finish="length", prompt_tokens=7, new_tokens=5)
    with Server(faults(Answer(body))) as server:
        schema = {"type": "object"}
        reply = run(lambda one: say(one, temperature=0.5, top_p=0.9, seed=3, schema=schema), server.url)
        assert reply == Reply(text="ja", finish="length", prompt_tokens=7, new_tokens=5)
        assert server.asked == [
            (
                "/v1/chat/completions",
                {
                    "model": "small", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 5,
                    "temperature": 0.5, "top_p": 0.9, "seed": 3,
                    "response_format": {
                        "type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}
                    },
                },
            )
        ]  # fmt: skip
        assert server.keys == ["Bearer none"]


def test_never_more_in_flight_than_asked() -> None:
    running: list[int] = [0, 0]

    def answer(_path: str, _body: Body) -> Answer:
        running[0] += 1
        running[1] = max(running)
        time.sleep(0.02)
        running[0] -= 1
        return FINE

    async def many(endpoint: Endpoint) -> None:
        await asyncio.gather(*(say(endpoint, str(number)) for number in range(24)))

    with Server(answer) as server:
        run(many, server.url, in_flight=4)
        assert set(server.counts().values()) == {1}
        assert len(server.asked) == 24
    assert 2 <= running[1] <= 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_logprobs": [None, -1.0]}, "with 2 log-probabilities"),
        ({"tokens": ["x", "y", "z", "w"]}, "do not spell the prompt"),
        ({"top_logprobs": [None, {"b": -0.1, "x": -0.1}, {"c": -1.0}, {}]}, "add up to 1.81"),
        ({"token_logprobs": [None, -1.0, 2.0, -1.0]}, "a log-probability of 2"),
    ],
    ids=["lengths", "tokens", "sum", "positive"],
)
def test_probabilities_that_cannot_be_are_refused(changes: Body, said: str) -> None:
    right: Body = {
        "tokens": ["a", "b", "c", "d"], "token_logprobs": [None, -1.0, -1.0, -1.0],
        "top_logprobs": [None, {"b": -1.0}, {"c": -1.0}, {"d": -1.0}], "text_offset": [0, 1, 2, 3],
    }  # fmt: skip

    def answer(_path: str, body: Body) -> Answer:
        told = right | (changes if len(server.asked) > 2 else {})
        choice = {"text": "abcd", "finish_reason": "length", "logprobs": told if body.get("echo") else None}
        return Answer({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})

    async def twice(endpoint: Endpoint) -> None:
        (echo,) = await endpoint.prompt_logprobs([Prompt(prefix="a", rest="bc")])
        assert (echo.tokens, echo.logprobs.tolist(), echo.prompt_tokens) == (("b", "c"), [-1.0, -1.0], 3)
        assert echo.candidates == {0: {"b": -1.0}, 1: {"c": -1.0}}
        await endpoint.prompt_logprobs([Prompt(prefix="a", rest="bc")])

    with Server(answer) as server, pytest.raises(LLMError, match=said):
        run(twice, server.url)
