"""The simulator on servers that return candidates of the next token only: its numbers, its requests, and its choice."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from fakes.language_models import KINDS, Kind, make_llm
from fakes.llm_server import Answer, Body, ModelServer, Shape
from fakes.rule_follower import RULES, RuleFollower
from fakes.rule_server import RuleServer
from interpretation.simulators.test_simulators_local import counting_llm

from cratelm.errors import CrateError
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import Capabilities, probe
from cratelm.interpretation.clients.usage import Budget, Metered, Usage
from cratelm.interpretation.llm import LLMError, Prompt
from cratelm.interpretation.simulators.next_token import NextToken
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.simulators.self_test import require_self_test
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store
from cratelm.workflows.llm.opening import choose_simulator, many_calls_cost_little
from cratelm.workflows.options.language_model import Simulating, Spending

EXCERPTS = (["The", " rain", r"\n", "é", r"\xc3", " :", " 4", " [", "10"], [" over", "(", ")"])


class SlotServer(RuleServer):
    """A server with two slots, as llama.cpp reports them, that counts the requests in progress."""

    def __init__(self, slots: int = 2) -> None:
        super().__init__(probabilities=False, next_token=True)
        self.slots, self.in_progress, self.most = slots, 0, 0

    def get(self, path: str) -> Answer:
        """The slots, or the list of models."""
        props = {"total_slots": self.slots, "default_generation_settings": {"n_ctx": 8192}}
        return Answer(props) if path == "/props" else super().get(path)

    def complete(self, body: Body) -> Answer:
        with self.lock:
            self.in_progress += 1
            self.most = max(self.most, self.in_progress)
        self.stopped.wait(0.01)
        answer = super().complete(body)
        with self.lock:
            self.in_progress -= 1
        return answer


def completions(server: Any) -> list[str]:
    return [body["prompt"] for path, body in server.asked if path == "/v1/completions"]


async def connected(url: str, model: str, **options: Any) -> Endpoint:
    endpoint = Endpoint(url, model, **options)
    await endpoint.connect()
    return endpoint


@pytest.mark.parametrize("shape", ["next-openai", "next-llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_next_tokens_of_a_server_give_the_numbers_of_prompt_logprobs(
    kind: Kind, shape: Shape, rng: np.random.Generator
) -> None:
    llm = counting_llm(rng, kind)

    async def both(url: str) -> tuple[Any, Any, Any]:
        local = await open_simulator("all-at-once", llm)
        endpoint = await connected(url, "small")
        remote = NextToken(llm=endpoint, read_out=local.read_out, unknown=local.unknown)  # type: ignore[attr-defined]
        here = NextToken(llm=llm, read_out=local.read_out, unknown=local.unknown)  # type: ignore[attr-defined]
        try:
            return [await simulator.simulate("brackets", EXCERPTS) for simulator in (local, remote, here)]  # type: ignore[return-value]
        finally:
            await endpoint.close()

    with ModelServer(llm.reader.model, llm.tokenizer.backend_tokenizer, shape) as server:
        expected, *others = asyncio.run(both(server.url))
    assert np.ptp(np.concatenate(expected)) > 1e-3
    for simulated in others:
        np.testing.assert_allclose(np.concatenate(simulated), np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("ten", [True, False])
def test_a_server_that_follows_rules_is_read_exactly_on_its_scale(ten: bool) -> None:
    excerpts = [["The", " row", ":", " 3", " [", "x", "]"], [" the", " wind", ";"]]

    async def simulated(url: str) -> tuple[str, Sequence[Any]]:
        simulator = await open_simulator("next-token", endpoint := await connected(url, "rules"))
        await require_self_test(simulator)
        answers = [await simulator.simulate(rule, excerpts) for rule in ("digits after a colon", "brackets")]
        await endpoint.close()
        return str(simulator.name), answers

    with RuleServer(probabilities=False, next_token=True, ten=ten) as server:
        name, answers = asyncio.run(simulated(server.url))
    assert name == ("next-token:rules" if ten else "next-token-0-9:rules")
    for rule, simulations in zip(("digits after a colon", "brackets"), answers, strict=True):
        for tokens, activations in zip(excerpts, simulations, strict=True):
            expected = [min(RULES[rule](tokens, i), 10 if ten else 9) for i in range(len(tokens))]
            assert activations == pytest.approx(expected, abs=1e-6)


def test_each_request_extends_the_last_one_of_its_excerpt_and_slots_limit_the_excerpts() -> None:
    tokens = [[f" w{excerpt}{i}" for i in range(4)] for excerpt in range(5)]

    async def simulate(url: str) -> None:
        endpoint = await connected(url, "rules")
        assert (endpoint.slots, endpoint.context) == (2, 8192)
        await NextToken(llm=endpoint, read_out=(await open_simulator("next-token", endpoint)).read_out).simulate(  # type: ignore[attr-defined]
            "brackets", tokens
        )
        await endpoint.close()

    with SlotServer() as server:
        asyncio.run(simulate(server.url))
    rows = [text.rpartition("<start>\n")[2] for text in completions(server) if "<start>" in text]
    assert len(rows) == 20
    assert server.most == 2
    for excerpt in range(5):
        own = [text for text in rows if text.startswith(f" w{excerpt}")]
        assert all(later.startswith(earlier) for earlier, later in zip(own, own[1:], strict=False))
    begun = [text for text in rows if text.count("\t") == 1]
    assert rows.index(begun[2]) > 3, "a third excerpt waits until one of the first two is done"


def test_what_was_answered_is_not_asked_again_and_each_request_is_metered(tmp_path: Path) -> None:
    store, usage = Store.create(tmp_path), Usage()

    async def simulate(url: str, budget: int | None = None) -> Any:
        endpoint = await connected(url, "rules", usage=usage)
        llm = Cached(Metered(endpoint, usage, Budget(tokens=budget)), store, usage)
        simulator = await open_simulator("next-token", llm)
        try:
            return await simulator.simulate("brackets", EXCERPTS)
        finally:
            await llm.settle()
            await endpoint.close()

    with RuleServer(probabilities=False, next_token=True) as server:
        with pytest.raises(CrateError, match="the budget is spent"):
            asyncio.run(simulate(server.url, 9_000))
        assert 0 < usage.prompt_tokens + usage.new_tokens <= 9_000
        first = len(completions(server))
        assert usage.calls == first < 13
        simulated = asyncio.run(simulate(server.url))
        assert len(completions(server)) == len(set(completions(server))) == usage.calls == 13
        assert np.ptp(np.concatenate(simulated)) > 1
        asyncio.run(simulate(server.url))
        assert usage.calls == 13


def probed(server: Any, **spending: Any) -> tuple[Capabilities, str]:
    """What the probe reports, and the simulator that is chosen for it."""

    async def main() -> tuple[Capabilities, str]:
        endpoint = await connected(server.url, "rules")
        can = await probe(endpoint)
        cheap = many_calls_cost_little(server.url.replace("127.0.0.1", "llm.example"), endpoint, Spending(**spending))
        simulator = await choose_simulator(endpoint, Simulating(), "fixed", can, many_calls=cheap)
        await endpoint.close()
        return can, str(simulator.name)

    with server:
        return asyncio.run(main())


def test_the_probe_chooses_the_next_token_where_many_requests_cost_little() -> None:
    can, chosen = probed(SlotServer())
    assert (can.prompt_logprobs, can.next_token, can.style, chosen) == (False, 2, "next-token", "next-token:rules")
    assert "returns no prompt logprobs, but 2 candidates of the next token" in can.reason
    assert Capabilities.of_row(json.loads(json.dumps(can.row()))) == can
    assert probed(SlotServer(), price_in=1.0)[1] == "structured:rules"
    assert probed(RuleServer(probabilities=False, next_token=True))[1] == "structured:rules", "a distant server"
    assert probed(RuleServer(next_token=True))[1] == "all-at-once:rules"


@pytest.mark.parametrize(("url", "cheap"), [("http://127.0.0.1:1/v1", True), ("https://llm.example/v1", False)])
def test_a_server_on_this_machine_may_get_many_requests(url: str, cheap: bool) -> None:
    assert many_calls_cost_little(url, Endpoint(url, "x"), Spending()) is cheap
    assert many_calls_cost_little(url, Endpoint(url, "x"), Spending(price_in=0.1)) is False
    assert many_calls_cost_little("directory", RuleFollower(), Spending()) is True


class SampledServer(RuleServer):
    """Returns candidates as they are after sampling at temperature 0."""

    def complete(self, body: Body) -> Answer:
        answer = json.loads(super().complete(body).content)
        if lists := answer["choices"][0]["logprobs"]:
            for place, entry in enumerate(lists["content"][0]["top_logprobs"]):
                entry["logprob"] = -1000.0 * bool(place)
        return Answer(answer)


def test_candidates_after_sampling_are_not_used() -> None:
    can, chosen = probed(SampledServer(probabilities=False, next_token=True))
    assert (can.next_token, chosen) == (0, "structured:rules")
    assert "its candidates of the next token are not usable: they are those after sampling" in can.notes


class FewServer(RuleServer):
    """Refuses more than five candidates, as OpenAI does."""

    def complete(self, body: Body) -> Answer:
        refused = (body.get("logprobs") or 0) > 5
        message = {"error": {"message": "logprobs must be at most 5"}}
        return Answer(message, status=400) if refused else super().complete(body)


def test_fewer_candidates_are_requested_if_many_are_refused() -> None:
    server = FewServer(probabilities=False, next_token=True)
    can, _ = probed(server)
    assert (can.next_token > 0, can.most) == (True, 5)
    assert [body["logprobs"] for _, body in server.asked if body.get("logprobs") and not body.get("echo")] == [15, 5, 5]


def test_a_server_without_candidates_is_refused_in_words() -> None:
    async def ask(url: str) -> None:
        endpoint = await connected(url, "rules")
        with pytest.raises(LLMError, match="does not return candidates of the next token"):
            await endpoint.prompt_logprobs([Prompt(prefix="", rest="a\t", at=(2,))])
        can = await probe(endpoint)
        with pytest.raises(CrateError, match="next-token needs candidates of the next token"):
            await choose_simulator(endpoint, Simulating(simulator="next-token"), "fixed", can)
        await endpoint.close()

    with RuleServer(probabilities=False) as server:
        asyncio.run(ask(server.url))


def test_the_next_token_of_a_local_model_is_that_of_a_longer_prompt(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    whole = Prompt(prefix="the storm\n" * 20, rest=" rain\tunknown\n")
    cut = replace(whole, rest=" rain\t", at=(6,))
    expected, found = (asyncio.run(llm.prompt_logprobs([prompt]))[0] for prompt in (whole, cut))
    assert "".join(found.tokens) == " rain\t"
    assert list(found.candidates) == [6]
    assert found.candidates[6] == pytest.approx(expected.candidates[6], abs=1e-9)
