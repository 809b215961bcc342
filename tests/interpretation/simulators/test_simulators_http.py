"""The same simulations from a server and in the process, and a model behind a server that follows rules."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from fakes.language_models import KINDS, Kind, make_llm, make_tokenizer
from fakes.llm_server import ModelServer, Shape
from fakes.rule_follower import RULES, RuleFollower
from interpretation.simulators.test_simulators_local import counting_llm

from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.simulators.self_test import require_self_test

EXCERPTS = (["The", " rain", r"\n", "é", r"\xc3", " :", " 4", " [", "10"], [" over", "(", ")"])
SHAPES: tuple[Shape, ...] = ("vllm", "openai")


def over_http(server: ModelServer, method: str, *asked: tuple[str, Sequence[Sequence[str]]]) -> list[list[np.ndarray]]:
    """What a simulator with the server's model says of (explanation, excerpts) each."""

    async def ask() -> list[list[np.ndarray]]:
        endpoint = Endpoint(server.url, "small")
        await endpoint.connect()
        try:
            simulator = await open_simulator(method, endpoint)
            if isinstance(server, RuleModelServer):
                await require_self_test(simulator)
            return [await simulator.simulate(*one) for one in asked]
        finally:
            await endpoint.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_and_the_process_simulate_alike(kind: Kind, shape: Shape, rng: np.random.Generator) -> None:
    llm = counting_llm(rng, kind)
    local = asyncio.run(open_simulator("all-at-once", llm))
    expected = asyncio.run(local.simulate("brackets", EXCERPTS))
    with ModelServer(llm.reader.model, llm.tokenizer.backend_tokenizer, shape) as server:
        (found,) = over_http(server, "all-at-once", ("brackets", EXCERPTS))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert np.ptp(np.concatenate(expected)) > 1e-3


def test_a_server_that_ignores_what_it_is_asked_is_refused(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    with (
        ModelServer(llm.reader.model, llm.tokenizer.backend_tokenizer, "silent") as server,
        pytest.raises(LLMError, match="does not return prompt logprobs"),
    ):
        over_http(server, "all-at-once", ("brackets", EXCERPTS))


class RuleModelServer(ModelServer):
    """A server whose model follows the rule that the prompt's explanation states, at every activation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(None, make_tokenizer("ten"), shape)
        self.follower = RuleFollower()
        vocabulary = self.tokenizer.get_vocab()
        self.ids = {text: vocabulary[text] for text in ("unknown", *map(str, range(11)))}

    def logprobs(self, ids: list[int]) -> np.ndarray:
        size = self.tokenizer.get_vocab_size()
        found = np.full((len(ids), size), -np.log(size))
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        ends = np.cumsum([len(self.text(token)) for token in ids])
        for i, token in enumerate(ids):
            if self.text(token).endswith("\t"):
                known = {
                    self.ids[one]: p for one, p in self.follower.expects(text[: ends[i]], 15).items() if one in self.ids
                }
                found[i] = np.log((1 - sum(map(np.exp, known.values()))) / (size - len(known)))
                found[i, list(known)] = list(known.values())
        return found


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_behind_a_server_that_follows_rules_is_read_exactly(shape: Shape) -> None:
    """It passes the self-test too."""
    excerpts: Any = (["The", " row", ":", " 3", " [", "x", "]"], [" the", " wind", ";"])
    said = ["digits after a colon", "words for the weather", "brackets"]
    with RuleModelServer(shape) as server:
        found = over_http(server, "all-at-once", *((one, excerpts) for one in said))
    for explanation, simulated in zip(said, found, strict=True):
        for tokens, activations in zip(excerpts, simulated, strict=True):
            expected = [RULES[explanation](tokens, i) for i in range(len(tokens))]
            assert activations == pytest.approx(expected, abs=0.05)  # other digits have what is left over
