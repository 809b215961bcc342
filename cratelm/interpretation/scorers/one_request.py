"""Rating, quick detection and output: all items of a neuron in one prompt, answered by one reading of its logprobs.

    rating            how strongly does the neuron fire in this window, 0 to 4? Pearson correlation of the expected
                      rating with the level: 0 for a silent window, 1 to 4 for a quarter of the others by strength
    quick-detection   does the neuron fire in this window? AUC of P(1) / (P(0) + P(1))
    output            does the neuron promote this token (`promoted.py`)? AUC likewise

The prompt has few-shot examples, the explanation, and one line per item that ends with a tab and a question mark. The
number that the model expects in place of each question mark is read, as the all-at-once simulator reads activations. So
no answer is generated, no earlier answer is visible to the model, and a neuron costs one request.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cratelm.activations.records import Excerpt
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Prompt
from cratelm.interpretation.scorers.classification import Questions, enough_windows, filled, too_few
from cratelm.interpretation.scorers.results import UNREADABLE, Judged, Unreadable, auc
from cratelm.interpretation.scorers.windows import Contrast, plain
from cratelm.rundir import read_json

ONE_REQUEST_PROMPTS = Path(__file__).parent.parent / "prompts" / "one_request.json"
CANDIDATES = 20
"""Candidates requested at each place: most servers give no more."""
LEAST_AUC = 0.75
"""Least mean AUC on the obvious texts; random ratings have 0.5 with a standard deviation of 0.07."""
Form = Literal["rating", "detection", "output"]


async def rating(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    """How well the expected rating of each window follows how strongly the neuron fires in it."""
    return await _judged("rating", explanation, contrast, pieces, llm, questions)


async def quick_detection(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    """How well P(1) separates windows in which the neuron fires from windows in which it is silent."""
    return await _judged("detection", explanation, contrast, pieces, llm, questions)


async def output(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    """How well P(1) separates tokens that the neuron promotes from tokens that other neurons promote."""
    return await _judged("output", explanation, contrast, pieces, llm, questions)


async def _judged(
    form: Form, explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    if not enough_windows(form, contrast, questions):
        return too_few(contrast)
    top = _words()[form]["levels"] - 1
    windows = [*contrast.positives, *contrast.negatives]
    levels = [*strength_levels(contrast.positives, top), *(0 for _ in contrast.negatives)]
    order = contrast.rng(questions.seed, "one request").permutation(len(windows))
    texts = [plain(windows[i], pieces) for i in order]
    (answer,) = await llm.prompt_logprobs([one_request_prompt(form, explanation, texts)], top=CANDIDATES)
    places = _places(texts)
    expected = [_expected(answer.candidates.get(place, {}), top) for place in places]
    failures = tuple(
        Unreadable(items=(item,), said=value) for item, value in enumerate(expected) if isinstance(value, str)
    )
    if len(failures) == len(texts):
        raise LLMError(f"the model expected no number at any place: {failures[0].said}")
    truth = tuple(levels[i] for i in order)
    known = [level for level, value in zip(truth, expected, strict=True) if not isinstance(value, str)]
    readable = min(sum(level > 0 for level in known), sum(level == 0 for level in known)) >= questions.least
    return Judged(
        reason="" if readable else UNREADABLE, active=contrast.active, silent=contrast.silent, truth=truth,
        score=tuple(None if isinstance(value, str) else value for value in expected),
        position=tuple(windows[i].position for i in order), failures=failures,
    )  # fmt: skip


async def obvious_aucs(form: Form, llm: LLM) -> dict[str, float]:
    """How well a model separates texts that obviously fit an explanation from others: explanation -> AUC.

    It is asked in the same form as about a neuron. A text without a number counts as 0.
    """
    obvious: dict[str, list[str]] = _words()["obvious"]
    texts = [text for turn in range(4) for texts in obvious.values() for text in texts[turn : turn + 1]]
    prompts = [one_request_prompt(form, explanation, texts) for explanation in obvious]
    aucs, top = {}, _words()[form]["levels"] - 1
    for explanation, answer in zip(obvious, await llm.prompt_logprobs(prompts, top=CANDIDATES), strict=True):
        values = [_expected(answer.candidates.get(place, {}), top) for place in _places(texts)]
        scores = np.array([0.0 if isinstance(value, str) else value for value in values])
        aucs[explanation] = auc(np.array([text in obvious[explanation] for text in texts]), scores)
    return aucs


async def require_obvious(name: str, form: Form, llm: LLM) -> None:
    """Raise `CrateError` if a model does not recognise which texts obviously fit an explanation."""
    aucs = await obvious_aucs(form, llm)
    mean = float(np.mean(list(aucs.values())))
    if mean < LEAST_AUC:
        each = ", ".join(f"{explanation} {value:.2f}" for explanation, value in aucs.items())
        raise CrateError(
            f"{llm.name} cannot do {name}: on obvious texts its mean AUC is {mean:.2f}, and {LEAST_AUC} is the "
            f"least ({each}). Use a larger model, another --scorer, or --skip-self-test"
        )


def strength_levels(positives: Sequence[Excerpt], top: int) -> list[int]:
    """The level of each window in which the neuron fires, from 1 to `top`: equal parts of the windows by strength."""
    strengths = [float(window.activations.max()) for window in positives]
    levels = [0] * len(positives)
    for level, part in enumerate(np.array_split(np.argsort(strengths, kind="stable"), top), 1):
        for window in part.tolist():
            levels[window] = level
    return levels


def one_request_prompt(form: Form, explanation: str, texts: Sequence[str]) -> Prompt:
    """The prompt that asks about all windows; the texts are on one line each."""
    words, unknown = _words()[form], _words()["placeholder"]
    prefix = words["head"]
    for example in words["examples"]:
        lines = "".join(f"{text}\t{unknown if level is None else level}\n" for text, level in example["pieces"])
        prefix += filled(words["entry"], explanation=example["explanation"]) + lines + "\n"
    prefix += filled(words["entry"], explanation=explanation.strip().removeprefix("fires on "))
    rest = "".join(f"{text}\t{unknown}\n" for text in texts)
    return Prompt(prefix=prefix, rest=rest, at=_places(texts), numbers=True)


def _places(texts: Sequence[str]) -> tuple[int, ...]:
    """Offset of each placeholder in the rest of the prompt."""
    ends = np.cumsum([len(text) + len(f"\t{_words()['placeholder']}\n") for text in texts])
    return tuple((ends - len(f"{_words()['placeholder']}\n")).tolist())


def _expected(candidates: Mapping[str, float], top: int) -> float | str:
    """The expected level given that it is a level, scaled to [0, 1]; a message if no level is among the candidates."""
    shares = {level: math.exp(candidates[str(level)]) for level in range(top + 1) if str(level) in candidates}
    if not sum(shares.values()):
        likely = ", ".join(sorted(candidates, key=lambda token: -candidates[token])[:5])
        return f"no level is among the candidates: {likely or 'none'}"
    return sum(level * share for level, share in shares.items()) / sum(shares.values()) / top


@cache
def _words() -> dict[str, Any]:
    """Texts of the prompts."""
    return read_json(ONE_REQUEST_PROMPTS, made_by="pip install --force-reinstall cratelm")
