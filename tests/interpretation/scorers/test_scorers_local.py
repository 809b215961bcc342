"""Surprisal and answers by probability with a real model in the process, against its own logits for whole texts."""

import asyncio
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

import torch
from fakes.language_models import make_llm
from interpretation.scorers.test_classification import exact

from cratelm.interpretation.scorers.classification import Questions, detection
from cratelm.interpretation.scorers.registry import check_llm
from cratelm.interpretation.scorers.surprisal import _before, surprisal
from cratelm.interpretation.scorers.windows import plain

QUESTIONS = Questions(width=4, positives=5, negatives=5, least=3, strengths=2)


def logprobs(llm: Any, text: str) -> tuple[list[int], np.ndarray]:
    """The tokens of a text, and the log-probabilities of what follows each beginning of it."""
    ids = llm.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    with torch.no_grad():
        logits = llm.reader.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return ids, torch.log_softmax(logits, dim=1).numpy()


def test_surprisal_is_the_difference_of_what_two_texts_cost(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    windows, pieces = exact([[float(5 - i), 0, 0, 1] for i in range(5)], 5)
    asyncio.run(check_llm(["surprisal"], llm, QUESTIONS))
    found = asyncio.run(surprisal("words for rain", windows, pieces, llm, QUESTIONS))
    assert found.failed == 0
    at = {window.position: window for window in (*windows.positives, *windows.negatives)}

    def cost(description: str, text: str) -> float:
        before = _before(description)
        first = len(logprobs(llm, before)[0])
        ids, table = logprobs(llm, before + text)
        return float(np.mean([table[i - 1, ids[i]] for i in range(first, len(ids))]))

    generic = "text of any kind, with nothing particular in it"
    for position, gain in zip(found.position, found.score, strict=True):
        text = plain(at[position], pieces)
        assert gain == pytest.approx(cost("words for rain", text) - cost(generic, text), abs=1e-6)


def test_an_answer_by_probability_is_the_models_own(rng: np.random.Generator) -> None:
    llm = make_llm(rng, kind="digits")
    windows, pieces = exact([[float(5 - i), 0, 0, 1] for i in range(5)], 5)
    asked: list[Any] = []
    ask = llm.prompt_logprobs

    async def kept(prompts: Any, *, top: int = 15) -> Any:
        asked.extend(prompts)
        return await ask(prompts, top=max(top, 600))

    llm.prompt_logprobs = kept
    found = asyncio.run(
        detection("words for rain", windows, pieces, llm, Questions(**{**_given(), "answers": "probabilities"}))
    )
    vocabulary = llm.tokenizer.backend_tokenizer.get_vocab()
    for prompt, score in zip(asked, found.score, strict=True):
        ids, table = logprobs(llm, prompt.prefix + prompt.rest)
        assert ids[-1] == vocabulary["0"]
        no, yes = (np.exp(table[-2, vocabulary[number]]) for number in ("0", "1"))
        assert score == pytest.approx(yes / (no + yes), abs=1e-6)
    assert found.failed == 0
    assert 0 <= found.numbers()["auc"] <= 1


def _given() -> dict[str, Any]:
    return {"width": 4, "positives": 5, "negatives": 5, "least": 3, "strengths": 2}
