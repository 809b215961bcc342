"""Probabilities of a prompt over HTTP, in both shapes, for three kinds of tokenizers, against the model in-process."""

import asyncio
from typing import Any

import numpy as np
import pytest
from fakes.language_models import KINDS, Kind, make_llm
from fakes.llm_server import Answer, Body, ModelServer, Shape, completion

from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import Capabilities, probe
from cratelm.interpretation.clients.prompt_logprobs import read
from cratelm.interpretation.clients.transport import Malformed
from cratelm.interpretation.llm import LLMError, Prompt, PromptLogprobs

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")
pytest.importorskip("transformers", reason="transformers is not installed (extra llm)")

PROMPTS = (
    Prompt(prefix="Boats and café 日本\n", rest="é boat\t10\n the 🦀 \tunknown\n\n  x\t0\n日本語\t"),
    Prompt(prefix="", rest="one\t1\ntwo\t2\n"),
    Prompt(prefix="Boats and café 日本\n", rest=" boat\t10\n boat\t3\n", at=(6, 14)),
)


def server_of(llm: Any, shape: Shape, **more: Any) -> ModelServer:
    return ModelServer(llm.reader.model, llm.tokenizer.backend_tokenizer, shape, **more)


def asked(server: ModelServer) -> tuple[Capabilities, list[PromptLogprobs]]:
    async def main() -> tuple[Capabilities, list[PromptLogprobs]]:
        endpoint = Endpoint(server.url, "small")
        try:
            return await probe(endpoint), list(await endpoint.prompt_logprobs(PROMPTS))
        finally:
            await endpoint.close()

    return asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["vllm", "openai"])
def test_prompt_logprobs_of_a_server_are_those_of_the_model(shape: Shape, kind: Kind, rng: np.random.Generator) -> None:
    llm = make_llm(rng, kind=kind)
    with server_of(llm, shape) as server:
        capabilities, found = asked(server)
    assert (capabilities.prompt_logprobs, capabilities.style, capabilities.chat) == (True, shape, False)
    assert capabilities.whole_ten == (kind == "ten")
    assert capabilities.whole_values
    assert (capabilities.context, capabilities.served) == (4096, ("small",))
    for prompt, ours, theirs in zip(PROMPTS, found, asyncio.run(llm.prompt_logprobs(PROMPTS)), strict=True):
        assert "".join(ours.tokens) == prompt.rest
        if kind == "pieces" and not prompt.prefix:
            continue  # SentencePiece puts a space before a text, and the model in this process takes texts as they are
        assert ours.tokens == theirs.tokens
        both = ~np.isnan(ours.logprobs) & ~np.isnan(theirs.logprobs)
        np.testing.assert_allclose(ours.logprobs[both], theirs.logprobs[both], atol=1e-6)
        assert both.sum() >= (~np.isnan(theirs.logprobs)).sum() - 1
        assert ours.candidates.keys() == theirs.candidates.keys()
        for at in theirs.candidates:
            same = ours.candidates[at].keys() & theirs.candidates[at].keys()
            # A server that shows "▁x" as "x" adds its probability to that of the other "x".
            clear = {text for text in same if text.isdigit() or (kind != "pieces" and text not in ("\ufffd", ""))}
            for text in clear:
                assert ours.candidates[at][text] == pytest.approx(theirs.candidates[at][text], abs=1e-6)


def test_a_token_before_every_text_is_not_taken_for_a_part_of_it(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    for shape in ("vllm", "openai"):
        with server_of(llm, shape, bos=llm.tokenizer.bos_token_id) as server:
            _, found = asked(server)
            ids = [llm.tokenizer.bos_token_id, *server.tokenizer.encode(PROMPTS[1].rest, add_special_tokens=False).ids]
            expected = [server.logprobs(ids)[i, token] for i, token in enumerate(ids[1:])]
        assert "".join(found[1].tokens) == PROMPTS[1].rest
        np.testing.assert_allclose(found[1].logprobs, expected, atol=1e-9)
        assert found[1].prompt_tokens == len(ids)


def test_fewer_candidates_are_taken_where_a_server_gives_no_more(rng: np.random.Generator) -> None:
    with server_of(make_llm(rng), "openai", most=5) as server:
        capabilities, found = asked(server)
    assert (capabilities.prompt_logprobs, capabilities.top) == (True, 5)
    assert max(len(one) for one in found[0].candidates.values()) == 5


def test_a_server_that_says_nothing_of_what_it_ignores_is_noticed(rng: np.random.Generator) -> None:
    with server_of(make_llm(rng), "silent") as server:
        with pytest.raises(LLMError, match="prompt_logprobs: ignored; echo with logprobs: ignored"):
            asked(server)
        before = len(server.asked)
        assert before == 4  # the chat, two forms of prompt logprobs, and candidates for the next token


@pytest.mark.parametrize("fault", ["constant", "other prompt", "shifting"])
def test_probabilities_that_are_made_up_are_noticed(fault: str, rng: np.random.Generator) -> None:
    """Lists of the right lengths, but with one number everywhere, of another text, or different each time."""
    llm = make_llm(rng)

    class Liar(ModelServer):
        shift = 3.0

        def logprobs(self, ids: list[int]) -> np.ndarray:
            right = super().logprobs(ids)
            if fault == "constant":
                return np.full_like(right, -np.log(right.shape[1]))
            self.shift += rng.uniform(0.1, 1)  # by more than 16 bits explain, each time
            return right - self.shift if fault == "shifting" else right

        def encode(self, text: str) -> list[int]:
            return super().encode(text.upper() if fault == "other prompt" else text)

    with Liar(llm.reader.model, llm.tokenizer.backend_tokenizer, "openai") as server:
        capabilities = asyncio.run(probe_alone(server.url))
    assert not capabilities.prompt_logprobs
    told = {"constant": "not log-probabilities", "other prompt": "do not spell", "shifting": "apart"}[fault]
    assert any(told in note for note in capabilities.notes)


async def probe_alone(url: str) -> Capabilities:
    endpoint = Endpoint(url, "small")
    try:
        return await probe(endpoint)
    finally:
        await endpoint.close()


def test_support_of_a_schema_is_detected() -> None:
    def answer(path: str, body: Body) -> Answer:
        if path.endswith("/completions") and "messages" not in body:
            return Answer({"error": {"message": "Not Found"}}, status=404)
        one = completion('{"boats": 3}' if "response_format" in body else "Hello!")
        return Answer(one)

    from fakes.llm_server import Server

    with Server(answer) as server:
        capabilities = asyncio.run(probe_alone(server.url))
        assert (capabilities.chat, capabilities.schema) == (True, True)
        assert not capabilities.prompt_logprobs
        assert "has no chat" not in capabilities.reason
        assert "no prompt logprobs" in capabilities.reason
    with Server(lambda _path, _body: Answer(completion("Hello!"))) as server:
        capabilities = asyncio.run(probe_alone(server.url))
        assert (capabilities.chat, capabilities.schema) == (True, False)


def test_a_model_in_the_process_is_probed_alike(rng: np.random.Generator) -> None:
    llm = make_llm(rng, kind="digits")
    capabilities = asyncio.run(probe(llm))
    assert (capabilities.chat, capabilities.prompt_logprobs, capabilities.whole_ten) == (True, True, False)
    assert capabilities.pieces["10"] == ("1", "0")
    assert capabilities.whole_values
    assert capabilities.reason.startswith("small: answers chats; returns prompt logprobs, ")


def test_only_what_is_asked_about_is_looked_at_and_servers_may_sort() -> None:
    """An invalid answer is ignored where it is not read, and refused where it is read."""
    prompt = Prompt(prefix="ab\t", rest="c\t0\n", at=(2,))
    text = prompt.prefix + prompt.rest

    def answer(bad: int, *, sort: bool = False) -> dict[str, Any]:
        tables: list[Any] = [None]
        for place, token in enumerate(text[1:], 1):
            own = {"logprob": 3.0 if place == bad else -2.0, "decoded_token": token}
            table = {"7": own, "8": {"logprob": -1.0, "decoded_token": "9"}}
            tables.append(dict(reversed(table.items())) if sort else table)
        return {"choices": [{"prompt_logprobs": tables}], "usage": {"prompt_tokens": len(text)}}

    for sort in (False, True):
        for bad in (1, 2):
            found = read("vllm", answer(bad, sort=sort), prompt, 15)
            assert ("".join(found.tokens), found.candidates) == (prompt.rest, {2: {"9": -1.0, "0": -2.0}})
            assert found.logprobs.tolist() == [-2.0] * 4
        for bad in (3, 5, 6):
            with pytest.raises(Malformed, match="log-probability of 3|add up"):
                read("vllm", answer(bad, sort=sort), prompt, 15)
