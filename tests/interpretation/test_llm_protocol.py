"""The `LLM` protocol: every model and wrapper implements it, and callers ask it instead of testing for a class."""

import asyncio
import re
from pathlib import Path

import pytest
from fakes.scripted import ScriptedLLM

import cratelm
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.llm import LLM, InProcess
from cratelm.interpretation.stages.estimate import CountingLLM
from cratelm.interpretation.store.answer_cache import Cached
from cratelm.interpretation.store.database import Store


def test_no_code_tests_whether_a_model_is_an_endpoint() -> None:
    test = re.compile(r"isinstance\([^)]*\b(Endpoint|InProcess|LocalLLM)\b|hasattr\(\w*llm")
    files = Path(cratelm.__file__).parent.rglob("*.py")
    assert [str(path) for path in files if test.search(path.read_text())] == []


@pytest.mark.parametrize("exact", [True, False])
def test_wrappers_pass_on_what_a_server_model_is(exact: bool, tmp_path: Path) -> None:
    endpoint = Endpoint("http://localhost:1/v1", "small", counter=len if exact else None)
    endpoint.context, endpoint.served, endpoint.tokens_per_byte = 512, ("small",), 0.4
    store = Store(tmp_path)
    llm = CountingLLM(Cached(Metered(endpoint, Usage()), store), store)
    assert isinstance(endpoint, LLM)
    assert isinstance(llm, LLM)
    assert (llm.remote, llm.served, llm.context, llm.counts_exactly) == (True, ("small",), 512, exact)
    assert (llm.count("a" * 100), llm.expected("a" * 100)) == ((100, 100) if exact else (50, 40))
    llm.set_logprobs_format("openai", 5)
    assert llm.logprobs_format == endpoint.logprobs_format == ("openai", 5)
    assert asyncio.run(llm.calibrate(0.25)) == 0.25
    assert llm.expected("a" * 100) == (100 if exact else 25)


def test_a_model_in_this_process_counts_exactly_and_has_no_server() -> None:
    llm = ScriptedLLM()
    assert isinstance(llm, InProcess)
    assert isinstance(llm, LLM)
    assert (llm.remote, llm.served, llm.counts_exactly, llm.logprobs_format) == (False, (), True, None)
    assert llm.expected("a\nb") == llm.count("a\nb") == 2
