"""Quirks of real providers: reasoning, refused parameters, errors in bodies, odd usage, hostile text."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fakes.llm_server import Answer, Body, Server, completion
from fakes.quirks import ANSWER, ONLY_REASONED, REASONED, Quirk, chat, error, failed_choice, first, refusing

from cratelm.errors import CrateError
from cratelm.interpretation.clients import transport
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.server_facts import tokens_in
from cratelm.interpretation.clients.transport import Retry
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.explainers.answers import explanation_of
from cratelm.interpretation.llm import LLMError, Message, Postponed, Reply, Sampling
from cratelm.interpretation.reasoning import without_reasoning
from cratelm.interpretation.scorers.classification import _read
from cratelm.interpretation.simulators.structured import structured_activations
from cratelm.interpretation.store.answer_cache import Cached, spent, unsupported_note
from cratelm.interpretation.store.database import Store
from cratelm.runtime import printable

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

T = TypeVar("T")
TURNS = [Message("system", "Be brief."), Message("user", "Why?")]
JSON = json.dumps({"activations": [{"token": "a", "activation": 3}, {"token": " b", "activation": 0}]})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path)


def served(quirk: Quirk, ask: Callable[[Cached], Coroutine[Any, Any, T]], store: Store, **changes: Any) -> T:
    """Ask a server with this quirk through cache and meter."""
    number = [0]

    def answer(_path: str, body: Body) -> Answer:
        number[0] += 1
        return quirk(body, number[0])

    async def main(url: str) -> T:
        usage = changes.pop("usage", Usage())
        endpoint = Endpoint(url, "small", retry=Retry(first=0.001, longest=0.002), usage=usage, **changes)
        try:
            return await ask(Cached(Metered(endpoint, usage, pause=0.001), store, usage))
        finally:
            await endpoint.close()

    with Server(answer) as server:
        try:
            return asyncio.run(main(server.url))
        finally:
            BODIES[:] = [body for _, body in server.asked]


BODIES: list[Body] = []
"""The requests of the last server."""


async def say(llm: Cached, **sampling: Any) -> Reply:
    return await llm.chat(TURNS, Sampling(**({"max_tokens": 5} | sampling)))


@pytest.mark.parametrize("text", REASONED.values(), ids=REASONED)
def test_reasoning_is_removed_for_explainer_simulator_and_scorers(text: str) -> None:
    assert without_reasoning(text) == ANSWER
    assert explanation_of(Reply(text=text, finish="stop", prompt_tokens=1, new_tokens=1)) == ANSWER
    assert structured_activations(text.replace(ANSWER, JSON), ["a", " b"]).tolist() == [3, 0]
    assert _read(text.replace(ANSWER, '{"answers": [0, 1]}'), "detection", 2) == [0, 1]


@pytest.mark.parametrize("text", ONLY_REASONED.values(), ids=ONLY_REASONED)
def test_an_answer_that_is_only_reasoning_is_a_failure_that_says_so(text: str, store: Store) -> None:
    with pytest.raises(LLMError, match="only reasoning and no answer"):
        served(lambda *_: chat(text), say, store)


def test_words_for_reasoning_are_not_removed_from_an_answer() -> None:
    texts = [
        'the tag "<think>" in code', "analysis of data", "thoughts and [reasons]", "closing tags `</think>`",
        "the token <|im_end|> and </s>", 'the tag "<answer>" in XML', "plans and answers: dates", "HTML <b>tags</b>",
        "thinking, thoughts", "words after <output", "the token <|eot_id|>",
    ]  # fmt: skip
    for text in texts:
        assert without_reasoning(text) == text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_answer_cut_within_its_reasoning_is_requested_once_with_a_larger_limit(
    field: str, content: str | None, store: Store
) -> None:
    def cut(body: Body, _number: int) -> Answer:
        enough = body["max_tokens"] > 1000
        return chat(ANSWER) if enough else chat(content, finish="length", new_tokens=5, **{field: "Hm."})

    assert served(cut, say, store).text == ANSWER
    assert [body["max_tokens"] for body in BODIES] == [5, 4101]
    assert served(cut, say, store).text == ANSWER
    assert not BODIES, "both answers are cached"
    with pytest.raises(
        LLMError, match="only reasoning and no answer, cut by the limit of 4102 tokens.*--max-answer-tok"
    ):
        served(
            lambda *_: chat(content, finish="length", **dict[str, Any]({field: "Hm."})),
            lambda llm: say(llm, max_tokens=6),
            store,
        )
    assert len(BODIES) == 2


def test_content_in_blocks_is_joined_without_its_reasoning(store: Store) -> None:
    blocks = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "rain and"}, " storms"]
    assert served(lambda *_: chat(blocks), say, store).text == ANSWER
    with pytest.raises(LLMError, match="could not parse"):
        served(lambda *_: chat(7), lambda llm: say(llm, max_tokens=6), store)


PARAMETERS = [("temperature", {}), ("seed", {"seed": 3}), ("top_p", {"top_p": 0.9}), ("max_tokens", {}),
              ("response_format", {"schema": {"type": "object"}})]  # fmt: skip


@pytest.mark.parametrize(("name", "sampling"), PARAMETERS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_parameter_is_dropped_once_and_recorded(
    name: str, sampling: dict[str, Any], named: bool, status: int, store: Store
) -> None:
    message = f"Unsupported parameter: '{name}'" if named else "Bad request"

    async def twice(llm: Cached) -> list[str]:
        replies = [await say(llm, **sampling | {"max_tokens": 5 + number}) for number in range(3)]
        await llm.settle()
        return [reply.text for reply in replies]

    assert served(refusing(name, message, status), twice, store) == [ANSWER] * 3
    assert sum(name in body for body in BODIES) <= (1 if named else 5)
    assert [name in body for body in BODIES[-2:]] == [False, False]
    recorded = json.loads(store.noted(unsupported_note("small")) or "[]")
    assert [text.split()[0] for text in recorded] == [name]


@pytest.mark.parametrize(
    ("name", "message", "option"),
    [
        ("reasoning_effort", "Unrecognized request argument supplied: reasoning_effort", "--reasoning-effort"),
        ("chat_template_kwargs", "property 'chat_template_kwargs' is unsupported", "--chat-template-kwargs"),
        ("min_p_value", "Unknown field min_p_value", "--extra-body"),
    ],
)
def test_a_field_that_the_user_gave_is_not_dropped_but_its_refusal_names_the_option(
    name: str, message: str, option: str, store: Store
) -> None:
    for shown in (message, "Bad request"):
        with pytest.raises(CrateError) as refused:
            served(refusing(name, shown), say, store, extra={name: "low"})
        assert (f"refuses {name} ({option})" in str(refused.value)) == (shown == message)
        assert isinstance(refused.value, LLMError) == (shown != message), "the work ends at once if the cause is known"
        assert all(name in body for body in BODIES)


def test_top_p_and_seed_are_sent_only_if_they_are_set(store: Store) -> None:
    served(lambda *_: chat(ANSWER), say, store)
    assert set(BODIES[0]) == {"model", "messages", "max_tokens", "temperature"}


def test_a_schema_with_pinned_tokens_falls_back_to_a_plain_one(store: Store) -> None:
    from cratelm.interpretation.prompts.simulator import structured_schema

    def strict(body: Body, _number: int) -> Answer:
        return error("Invalid schema: 'prefixItems' is not permitted") if "prefixItems" in str(body) else chat(JSON)

    schema = structured_schema(["a", " b"])
    rows = schema["properties"]["activations"]  # type: ignore[index]
    assert [item["properties"]["token"]["const"] for item in rows["prefixItems"]] == ["a", " b"]
    assert served(strict, lambda llm: say(llm, schema=schema), store).text == JSON
    sent = BODIES[-1]["response_format"]["json_schema"]["schema"]["properties"]["activations"]
    assert sent["items"]["properties"]["token"] == {"type": "string"}
    assert (sent["minItems"], sent["maxItems"]) == (2, 2)


def test_a_template_that_fails_with_a_system_message_gets_none(store: Store) -> None:
    def failing(body: Body, _number: int) -> Answer:
        return error("jinja", 500) if body["messages"][0]["role"] == "system" else chat(ANSWER)

    assert served(failing, say, store).text == ANSWER
    assert len(BODIES) == 3
    with pytest.raises(LLMError, match="failed 7 times"):  # no trial helps
        served(lambda *_: error("broken", 500), lambda llm: say(llm, max_tokens=6), store)
    assert len(BODIES) == 2 + 1 + 7


PASSING = {
    "finish reason": failed_choice(""), "null": failed_choice(None), "text": failed_choice("rain"),
    "choice": failed_choice("", finish_reason="stop", error={"code": 502, "message": "away"}),
    "200 and 503": error("overloaded", 503, http=200), "200 and words": Answer({"error": "server overloaded"}),
    "200 and 429": Answer({"error": {"message": "Rate limit reached", "type": "rate_limit_error"}}),
    **{str(status): error("too early", status) for status in (418, 420, 425, 429, 499, 502, 504, 520, 529)},
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_an_error_that_passes_is_retried_and_never_stored(fault: Answer, store: Store) -> None:
    usage = Usage()
    assert served(first(fault, 2), say, store, usage=usage).text == ANSWER
    assert (usage.calls, usage.unusable, usage.retries) == (1, 0, 2)
    with pytest.raises(CrateError) as caught:
        served(lambda *_: fault, lambda llm: say(llm, max_tokens=6), store)
    assert isinstance(caught.value, Postponed) or "rate limit" in str(caught.value)
    assert not isinstance(caught.value, LLMError)
    assert len(BODIES) == 7
    assert sum(spent(store)) == 13, "only the answer is stored"


@pytest.mark.parametrize(
    "fault",
    [
        error("Insufficient Balance", 402), error("Insufficient credits", 402, http=200),
        error("You exceeded your quota", 429, code="insufficient_quota"), error("Your credit balance is too low", 400),
        error("This account is suspended", 403), error("no such key", 401), error("not allowed", 403),
    ],
)  # fmt: skip
def test_an_error_of_the_account_ends_the_work_with_the_servers_words(fault: Answer, store: Store) -> None:
    with pytest.raises(CrateError) as caught:
        served(lambda *_: fault, say, store)
    assert type(caught.value) is CrateError
    assert json.loads(fault.content)["error"]["message"] in str(caught.value)
    assert len(BODIES) == 1
    assert spent(store) == (0, 0)


def test_one_flagged_prompt_fails_alone_with_the_servers_words(store: Store) -> None:
    async def three(llm: Cached) -> list[Any]:
        return [await asyncio.gather(say(llm, max_tokens=n), return_exceptions=True) for n in (5, 6, 7)]

    def flagged(body: Body, _number: int) -> Answer:
        return error("Access to this prompt is denied", 403) if body["max_tokens"] == 6 else chat(ANSWER)

    found = [one for (one,) in served(flagged, three, store)]
    assert [isinstance(one, LLMError) for one in found] == [False, True, False]
    assert "Access to this prompt is denied" in str(found[1])


@pytest.mark.parametrize("number", [-5, 10**18, "12", None, [1], True, {"a": 1}, 1e300])
def test_odd_usage_is_estimated_and_never_credited(number: Any, store: Store) -> None:
    body = completion(ANSWER) | {"usage": {"prompt_tokens": number, "completion_tokens": number}}
    usage = Usage()
    assert served(lambda *_: Answer(body), say, store, usage=usage).text == ANSWER
    assert 0 < usage.prompt_tokens < 1000
    assert 0 < usage.new_tokens < 1000
    assert spent(store) == (usage.prompt_tokens, usage.new_tokens)
    raw = Answer(json.dumps(body | {"usage": {"prompt_tokens": float("nan")}}).encode())
    assert served(lambda *_: raw, lambda llm: say(llm, max_tokens=6), store).text == ANSWER


def test_context_lengths_are_read_as_servers_write_them() -> None:
    read = [tokens_in(value) for value in (4096, "8192", "128k", "1M", 4096.0, "32 K", "many", None, -1, True, [1], 0)]
    assert read == [4096, 8192, 128_000, 1_000_000, 4096, 32_000, None, None, None, None, None, None]


HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]text[/nonsense] \u202e \x00"


@pytest.mark.parametrize("answer", [
    error(HOSTILE, 400), error(HOSTILE, 500), error(HOSTILE, 402), chat(None, refusal=HOSTILE),
    chat("<think>" + HOSTILE), Answer(HOSTILE.encode()), Answer({"error": HOSTILE}), Answer({"choices": HOSTILE}),
])  # fmt: skip
def test_text_of_a_server_is_escaped_in_errors(answer: Answer, store: Store) -> None:
    with pytest.raises(CrateError) as caught:
        served(lambda *_: answer, say, store)
    assert str(caught.value) == printable(str(caught.value))


def test_the_console_prints_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from cratelm.runtime import console

    console.print(HOSTILE, soft_wrap=True)
    printed = capsys.readouterr().err
    assert printed.strip() == r"\x1b[31mred\x1b]0;title\x07 [bold]text[/nonsense] \u202e \x00"


def test_a_redirect_to_another_host_is_refused(store: Store) -> None:
    with Server(lambda *_: chat(ANSWER)) as other:
        away = Answer({}, status=307, headers={"Location": f"{other.url}/chat/completions"})
        with pytest.raises(CrateError, match="redirects to http://127.0.0.1:.*, which is refused"):
            served(lambda *_: away, say, store)
        assert not other.asked
    here = Answer({}, status=307, headers={"Location": "/v1/chat/completions"})
    assert served(first(here), say, store).text == ANSWER


def test_an_answer_without_end_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LONGEST_ANSWER", 10_000)
    with pytest.raises(LLMError, match="an answer of more than"):
        served(lambda *_: chat("word " * 100_000), say, store)


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, '{"answers": ' + "[" * 100_000 + "}", "9" * 5000])
def test_deep_json_is_an_unusable_answer(deep: str, store: Store) -> None:
    with pytest.raises(LLMError, match="could not parse"):
        served(lambda *_: Answer(b'{"choices": ' + deep.encode()), say, store)
    for text in (deep, '{"activations": ' + deep, f"{{{deep}}}"):
        with pytest.raises(LLMError):
            structured_activations(text, ["a"])
        assert _read(text, "detection", 2) is None


def test_json_is_found_among_words_and_a_lost_space_is_accepted() -> None:
    for text in (f"Here: {JSON} Done.", f"```json\n{JSON}\n```", f"```\n{JSON}```", f"draft {{}} then {JSON}", JSON):
        assert structured_activations(text, ["a", " b"]).tolist() == [3, 0]
    assert structured_activations(JSON.replace('" b"', '"b"'), ["a", " b"]).tolist() == [3, 0]
    for tokens in (["b", " a"], ["a", "  c"], ["a"], ["a", " b", "c"]):
        with pytest.raises(LLMError):
            structured_activations(JSON, tokens)
