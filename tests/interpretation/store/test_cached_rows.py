"""Rows of `calls` and notes as earlier versions wrote them, spelled out: they must stay cache hits."""

import asyncio
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cratelm.interpretation.clients.probe import Capabilities
from cratelm.interpretation.llm import InProcess, Message, Prompt, Reply, Sampling
from cratelm.interpretation.store.answer_cache import Cached, add_calls
from cratelm.interpretation.store.database import Store

CHAT = "fb2018a9d679ed6329477613a51a16b0f560c10a"
CHAT_REPLY = '{"text": "Because é.", "finish": "stop", "prompt_tokens": 9, "new_tokens": 4}'
LOGPROBS = "95ab238b1c68bc10045df9b9116a0afe510ae50f"
LOGPROBS_OF_NUMBERS = "d0d5657c69c92d401839dddfd5fb3c48914cf7da"
LOGPROBS_REPLY = (
    '{"tokens": [2, 1, 1, 1, 1], "logprobs": [-0.5, null, null, null, -1.25], '
    '"candidates": [[0, {"10": -0.5, "9": -1.5}], [5, {"0": -1.25}]], "prompt_tokens": 7}'
)
CAPABILITIES = (
    '{"name": "m", "served": ["m"], "context": null, "chat": true, "echo": true, "style": "vllm", "top": 15, '
    '"most": 0, "pieces": {"10": ["10"]}, "schema": false, "several": false, "notes": ["x"]}'
)


class Silent(InProcess):
    """A model that must not be asked."""

    name, identity, context = "judge", "judge-1", None

    def count(self, text: str) -> int:
        return len(text)

    async def chat(self, *_: object) -> Reply:
        raise AssertionError("the answer is cached")

    async def prompt_logprobs(self, *_: object, **__: object) -> Sequence[object]:
        raise AssertionError("the answer is cached")


def test_rows_written_by_an_earlier_version_are_cache_hits(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    rows = ((CHAT, CHAT_REPLY), (LOGPROBS, LOGPROBS_REPLY), (LOGPROBS_OF_NUMBERS, LOGPROBS_REPLY))
    date = "2026-11-01T00:00:00Z"
    add_calls(store, [(key, "judge", 9, 4, date, zlib.compress(reply.encode(), 6)) for key, reply in rows])
    llm = Cached(Silent(), store)  # type: ignore[arg-type]

    turns = [Message("system", "Be brief."), Message("user", "Why?")]
    reply = asyncio.run(llm.chat(turns, Sampling(max_tokens=5, seed=3)))
    assert reply == Reply(text="Because é.", finish="stop", prompt_tokens=9, new_tokens=4)
    for numbers in (False, True):
        prompt = Prompt(prefix="a\t", rest="10\nb\t0", at=(0, 5), numbers=numbers)
        [read] = asyncio.run(llm.prompt_logprobs([prompt]))
        assert read.tokens == ("10", "\n", "b", "\t", "0")
        assert np.array_equal(read.logprobs, [-0.5, np.nan, np.nan, np.nan, -1.25], equal_nan=True)
        assert read.candidates == {0: {"10": -0.5, "9": -1.5}, 5: {"0": -1.25}}
        assert read.prompt_tokens == 7


def test_noted_capabilities_of_an_earlier_version_are_read_and_written_unchanged() -> None:
    noted = Capabilities.of_row(json.loads(CAPABILITIES))
    assert (noted.prompt_logprobs, noted.served, noted.pieces) == (True, ("m",), {"10": ("10",)})
    written = json.loads(json.dumps(noted.row()))
    assert written.pop("next_token") == 0, "a field that earlier versions do not have"
    assert {**written, "several": False} == json.loads(CAPABILITIES), "all but a field that is not used any more"
