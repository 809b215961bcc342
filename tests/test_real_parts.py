"""A real language model from a GGUF file, in the process and on a real server of llama.cpp: all roles, end to end."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra gguf)")
pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")
pytest.importorskip("httpx", reason="httpx is not installed (extra llm)")

from fixtures.real_parts import Proxy, fetched, llama_server, smollm2

from cratelm.cli import main
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import probe
from cratelm.interpretation.llm import Message, Sampling
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.simulators.self_test import puzzles
from cratelm.interpretation.store.database import Store
from cratelm.local_llm import LocalLLM

pytestmark = pytest.mark.slow
T = TypeVar("T")
LAYER = "2"
TEXTS = (
    "The rain fell on 1,234 roofs.\n\tdef f(x):\n        return x ** 2  # œuvre, 東京, 🙂\n",
    "a\t10\n the\tunknown\n  \t3\r\n\n\n", "'ll don't I'VE <|im_start|>user\nhi<|im_end|>", "",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def local() -> LocalLLM:
    return LocalLLM.open(smollm2(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with llama_server(smollm2(), tmp_path_factory.mktemp("llama")) as address:
        yield address


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two layers of the model, on the pages of the documentation."""
    folder = tmp_path_factory.mktemp("subject")
    pages = "\n".join(page.read_text() for page in sorted((Path(__file__).parent.parent / "docs").glob("*.md")))
    texts = [pages[start : start + 420] for start in range(0, 420 * 170, 420)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model, data, run = str(smollm2()), str(folder / "tokens"), folder / "smollm2"
    source = str(folder / "texts.jsonl")
    assert main(["tokenize", source, "--tokenizer", model, "--out", data, "--held-out", "0.9"]) == 0
    collect = ["collect", model, "--data", data, "--out", str(run), "--layer", LAYER, "4", "--context", "128"]
    assert main([*collect, "--device", "cpu"]) == 0
    return run


def asked(address: str, question: Callable[[Endpoint], Awaitable[T]]) -> T:
    """What an endpoint of the server answers."""

    async def ask() -> T:
        (name,) = [entry["id"] for entry in fetched(f"{address}/v1/models")["data"]]
        endpoint = Endpoint(f"{address}/v1", name)
        await endpoint.connect()
        try:
            return await question(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(ask())


def test_the_tokenizer_and_the_chat_template_are_those_of_llama_cpp(local: LocalLLM, server: str) -> None:
    for text in TEXTS:
        expected = fetched(f"{server}/tokenize", {"content": text, "parse_special": True})["tokens"]
        assert local.tokenizer.backend_tokenizer.encode(text).ids == expected
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    turns += [{"role": "user", "content": "Bye"}]
    expected = fetched(f"{server}/apply-template", {"messages": turns})["prompt"]
    assert local._templated([Message(turn["role"], turn["content"]) for turn in turns]) == expected  # type: ignore[arg-type]


def test_the_file_answers_a_chat_and_names_its_quantisation(local: LocalLLM) -> None:
    question = [Message("user", "What is the capital of France?")]
    reply = asyncio.run(local.chat(question, Sampling(max_tokens=20)))
    assert "Paris" in reply.text
    assert reply.finish == "stop"
    assert re.fullmatch(r"[0-9a-f]{16} Q4_1", local.identity)


def test_next_tokens_of_the_server_give_the_simulations_of_the_process(local: LocalLLM, server: str) -> None:
    """The server rounds the inputs of its matrix products to 8 bits, so single values differ."""
    subjects = puzzles()[:2]

    async def simulate(llm: Any, method: str) -> tuple[str, list[np.ndarray]]:
        simulator = await open_simulator(method, llm)
        simulated = [(await simulator.simulate(one.explanation, [one.tokens]))[0] for one in subjects]
        return str(simulator.name), simulated

    name, expected = asyncio.run(simulate(local, "all-at-once"))
    served_name, simulated = asked(server, lambda llm: simulate(llm, "next-token"))
    assert name.startswith("all-at-once-0-9:")
    assert served_name.startswith("next-token-0-9:")
    for values, others in zip(expected, simulated, strict=True):
        assert np.corrcoef(values, others)[0, 1] > 0.97
        np.testing.assert_allclose(others, values, atol=0.7)
    for one, values in zip(subjects, simulated, strict=True):
        scores = [np.corrcoef(one.activations, each)[0, 1] for each in (values, *expected) if len(each) == len(values)]
        assert np.ptp(scores) < 0.15


def test_the_probe_of_the_server_notices_next_tokens_slots_and_schemas(server: str) -> None:
    async def ask(llm: Endpoint) -> Any:
        return await probe(llm), llm.slots, llm.context

    can, slots, context = asked(server, ask)
    assert (can.chat, can.prompt_logprobs, can.next_token, can.schema) == (True, False, 15, True)
    assert (slots, context) == (2, 4096)
    assert can.style == "next-token"


def test_structured_answers_repeat_pinned_tokens(server: str) -> None:
    """A model this small loses tokens unless the schema pins each in its place."""
    tokens = ["The", ' "rain"', r"\n", " é", " fell", r"\xc3"]

    async def simulate(llm: Endpoint) -> Any:
        simulator = await open_simulator("structured", llm)
        return await simulator.simulate("words for the weather", [tokens])

    (values,) = asked(server, simulate)
    assert len(values) == len(tokens)
    assert all(0 <= value <= 10 for value in values)


def test_the_file_is_a_subject_whose_records_name_the_quantisation(run: Path) -> None:
    described, records = (json.loads((run / name).read_text()) for name in ("run.json", "records/fixed/records.json"))
    assert described["quantization"] == records["quantization"] == "Q4_1"
    assert (described["arch"], described["source"]) == ("llama", str(smollm2()))
    assert (described["model"]["num_layers"], records["taps"]["neurons"]["layers"]) == (30, [int(LAYER), 4])
    assert main(["interpret", str(run), "--layer", LAYER, "--protocol", "top-and-random"]) == 0
    assert Store.open(run).scored()


def test_the_file_explains_simulates_and_detects_in_the_process(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["interpret", str(run), "--llm", str(smollm2()), "--layer", LAYER, "--neurons", "1", "--device", "cpu"]
    command += ["--protocol", "random-only", "--explainer-prompt", "compact", "--contrast", "none", "--skip-self-test"]
    command += ["--scorer", "simulation", "quick-detection", "--skip-lookup"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert re.search(r"^asked: [1-9]", printed.out, re.M)
    simulators = {key.simulator for key in Store.open(run).sets("simulate")} - {""}
    assert simulators == {f"all-at-once-0-9:{smollm2().stem}"}
    assert main(command) == 0
    assert re.search(r"^asked: 0 calls", capsys.readouterr().out, re.M)


def test_a_run_against_the_server_that_is_killed_asks_nothing_twice(run: Path, server: str) -> None:
    with Proxy(server) as proxy:
        command = [sys.executable, "-m", "cratelm", "interpret", str(run), "--llm", proxy.url, "--layer", "4"]
        command += [
            "--neurons",
            "1",
            "--protocol",
            "random-only",
            "--explainer-prompt",
            "compact",
            "--contrast",
            "none",
        ]
        command += ["--skip-self-test", "--skip-lookup", "--llm-tokenizer", str(smollm2())]
        root = str(Path(__file__).parent.parent)
        for goal in (30, 75, 120):
            with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL) as process:
                deadline = time.monotonic() + 400
                while simulated(proxy) < goal and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                process.kill()
            assert simulated(proxy) >= goal
        repeated = Counter(body["prompt"] for _, body in proxy.asked if "<start>" in body.get("prompt", ""))
        assert sum(number - 1 for number in repeated.values()) <= 2 * 2, "only what was in flight at the two kills"
        assert len(repeated) >= 110


def simulated(proxy: Proxy) -> int:
    """Requests for a next token of a simulation."""
    return sum("<start>" in body.get("prompt", "") for _, body in proxy.asked)
