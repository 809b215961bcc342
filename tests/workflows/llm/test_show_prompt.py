"""`cratelm explain RUN --show-prompt N`: the prompt of a neuron as the model reads it."""

from pathlib import Path

import numpy as np
import pytest
from fakes.llm_server import Answer, Body, Server, completion, refusal
from fixtures.planted_rules import make_planted

pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from cratelm.cli import main
from cratelm.interpretation.prompts.few_shot import few_shot_neurons


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted(tmp_path_factory.mktemp("planted") / "crate-1l", np.random.default_rng(7))


def templated(body: Body) -> str:
    return "".join(f"<|{turn['role']}|>{turn['content']}" for turn in body["messages"]) + "<|assistant|>"


def llama(path: str, body: Body) -> Answer:
    return Answer({"prompt": templated(body)}) if path == "/apply-template" else Answer(completion("yes"))


def vllm(path: str, body: Body) -> Answer:
    if path == "/tokenize" and body["add_generation_prompt"]:
        return Answer({"count": 3, "tokens": list(templated(body).encode())})
    if path == "/detokenize":
        return Answer({"prompt": bytes(body["tokens"]).decode()})
    return refusal("not found", 404) if path == "/apply-template" else Answer(completion("yes"))


def neither(path: str, _body: Body) -> Answer:
    return Answer(completion("yes")) if path.startswith("/v1") else refusal("not found", 404)


@pytest.mark.parametrize("answer", [llama, vllm, neither])
def test_the_prompt_is_printed_as_the_model_reads_it(
    answer: object, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(answer) as server:  # type: ignore[arg-type]
        assert main(["explain", str(run), "--llm", server.url, "--show-prompt", "2"]) == 0
        chats = [body for path, body in server.asked if path == "/v1/chat/completions"]
    said = capsys.readouterr()
    assert (answer is neither) == ("the server applies its chat template" in said.err)
    begin = "[system]\n" if answer is neither else "<|system|>"
    assert said.out.startswith(begin)
    assert few_shot_neurons()[0].explanation in said.out
    assert "layer 0, neuron 2, top-and-random, for small: about" in said.err
    assert len(chats) <= 1, "the neuron itself is not asked about"
    assert not (run / "interpretation.sqlite").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--llm", "URL", "--show-prompt", "99"], "--show-prompt must be a neuron of layer 0, 0 to 5, got 99"),
    (["--show-prompt", "1"], "--show-prompt shows what a language model is asked"),
])  # fmt: skip
def test_a_mistake_is_one_line(options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(llama) as server:
        assert main(["explain", str(run), *(server.url if option == "URL" else option for option in options)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
