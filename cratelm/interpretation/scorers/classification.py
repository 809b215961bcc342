"""Detection, fuzzing and intruder: short questions that a language model answers with a few numbers.

    detection        does this window show what the explanation says? In half of the windows the neuron fires
    fuzzing          do the marked tokens fit the explanation? They are tokens on which the neuron fires, or random
    fuzzing-active   the same, but the wrong marks are on weak tokens of the windows on which the neuron fires
    intruder         which window differs from the others? No explanation is shown: it tests the neuron itself

The scorers of Paulo et al. (2024, automated interpretation of sparse autoencoders), with windows from documents that
the explainer did not see, drawn without replacement. Answers that fail to parse are counted and stored.
"""

import asyncio
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cratelm.activations.records import Excerpt
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Message, Prompt, Sampling
from cratelm.interpretation.reasoning import without_reasoning
from cratelm.interpretation.scorers.results import UNREADABLE, Judged, Unreadable, enough
from cratelm.interpretation.scorers.windows import (
    TOO_FEW,
    Contrast,
    Windows,
    drawn_marks,
    marked,
    num_marks_for_negatives,
    plain,
    signs_for,
    strong,
)
from cratelm.rundir import read_json

_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions(Windows):
    """Which windows are in the prompts, and how the answers are read."""

    per_prompt: int = 5
    """Windows in one prompt, positives and negatives shuffled (detection and fuzzing)."""
    options: int = 5
    """Windows of a question, the intruder included."""
    answers: Literal["json", "probabilities"] = "json"
    """json: a chat answers per_prompt windows at once. probabilities: one prompt per window, P(1) / (P(0) + P(1)) from
    the logprobs of the next token, which also gives an AUC (detection and fuzzing)."""

    answer_tokens: int = 64
    """Longest answer in the model's tokens. A model that writes its reasoning needs many more."""

    def __post_init__(self) -> None:
        Windows.__post_init__(self)
        if self.per_prompt < 1 or self.options < 2:
            raise CrateError(
                f"per_prompt must be at least 1, options at least 2, got {self.per_prompt} and {self.options}"
            )


@dataclass(frozen=True, slots=True)
class _Item:
    """One window as the prompt shows it."""

    truth: int
    text: str
    position: int


async def detection(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    """Does the explanation separate windows on which the neuron fires from windows on which it is silent?"""
    if not enough_windows("detection", contrast, questions):
        return too_few(contrast)
    items = [_Item(1, plain(window, pieces), window.position) for window in contrast.positives]
    items += [_Item(0, plain(window, pieces), window.position) for window in contrast.negatives]
    return await _classify("detection", explanation, items, ("", ""), contrast, llm, questions)


async def fuzzing(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions, *,
    active: bool = False,
) -> Judged:  # fmt: skip
    """Does the explanation separate tokens on which the neuron fires from other tokens?

    `active`: the other tokens are weak tokens of the same windows, not tokens of windows on which it is silent.
    """
    if not enough_windows("fuzzing-active" if active else "fuzzing", contrast, questions):
        return too_few(contrast)
    rng = contrast.rng(questions.seed, "marks", "active" if active else "")
    count = num_marks_for_negatives(contrast.positives)
    wrong: list[tuple[Excerpt, np.ndarray]]
    if active:
        weak = [(window, ~strong(window)) for window in contrast.positives]
        wrong = [(window, drawn_marks(allowed, count, rng)) for window, allowed in weak if allowed.any()]
    else:
        everywhere = np.ones(questions.width, dtype=bool)
        wrong = [(window, drawn_marks(everywhere, count, rng)) for window in contrast.negatives]
    right = [(window, strong(window)) for window in contrast.positives]
    signs = signs_for(plain(window, pieces) for window, _ in (*right, *wrong))
    items = [
        _Item(truth, marked(window, marks, pieces, signs), window.position)
        for truth, group in ((1, right), (0, wrong))
        for window, marks in group
    ]
    return await _classify("fuzzing", explanation, items, signs, contrast, llm, questions)


async def intruder(contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions) -> Judged:
    """Does a window on which the neuron is silent stand out among windows on which it fires? One question per negative.

    The other windows of a question have one strength; questions cycle through the strengths.
    """
    others = questions.options - 1
    if not enough_windows("intruder", contrast, questions):
        return too_few(contrast)
    groups = min(questions.strengths, len(contrast.positives) // others)
    rng = contrast.rng(questions.seed, "intruder")
    strengths = np.array_split(np.arange(len(contrast.positives)), groups)
    count = num_marks_for_negatives(contrast.positives)
    everywhere = np.ones(questions.width, dtype=bool)
    truth, answer, failures, asking = list[int](), list[int | None](), list[Unreadable](), []
    for place, negative in enumerate(contrast.negatives):
        chosen = rng.choice(strengths[place % groups], size=others, replace=False)
        shown = [(contrast.positives[i], strong(contrast.positives[i])) for i in chosen]
        seat = int(rng.integers(questions.options))
        shown.insert(seat, (negative, drawn_marks(everywhere, count, rng)))
        signs = signs_for(plain(window, pieces) for window, _ in shown)
        texts = [marked(window, marks, pieces, signs) for window, marks in shown]
        asking.append(_ask(llm, _chat("intruder", signs, texts), "intruder", questions.options, questions))
        truth.append(seat + 1)
    for place, (response, numbers) in enumerate(await asyncio.gather(*asking)):
        answer.append(numbers[0] if numbers else None)
        if not numbers:
            failures.append(Unreadable(items=(place,), said=response))
    _check_any_answer(failures, len(truth))
    return Judged(
        reason="" if sum(number is not None for number in answer) >= questions.least else UNREADABLE,
        active=contrast.active, silent=contrast.silent, truth=tuple(truth), answer=tuple(answer),
        position=tuple(window.position for window in contrast.negatives), options=questions.options,
        failures=tuple(failures),
    )  # fmt: skip


def enough_windows(scorer: str, contrast: Contrast, questions: Questions) -> bool:
    """Whether a neuron has enough windows for a scorer; otherwise no call is made."""
    fires, silent = len(contrast.positives), len(contrast.negatives)
    if scorer == "fuzzing-active":
        silent = sum(bool((~strong(window)).any()) for window in contrast.positives)
    company = questions.options - 1 if scorer == "intruder" else 0
    return fires >= max(questions.least, company) and silent >= questions.least


def too_few(contrast: Contrast) -> Judged:
    """The result of a neuron without enough windows."""
    return Judged(reason=TOO_FEW, active=contrast.active, silent=contrast.silent)


async def _classify(
    kind: Literal["detection", "fuzzing"], explanation: str, items: Sequence[_Item], signs: tuple[str, str],
    contrast: Contrast, llm: LLM, questions: Questions,
) -> Judged:  # fmt: skip
    """Ask about all items in a random order, and collect the answers."""
    order = contrast.rng(questions.seed, kind).permutation(len(items))
    asked = [items[i] for i in order]
    answer: list[int | None] = [None] * len(asked)
    score: list[float | None] = []
    failures: list[Unreadable] = []
    if questions.answers == "probabilities":
        for place, probability in enumerate(await _probabilities(kind, explanation, asked, signs, llm)):
            score.append(probability if isinstance(probability, float) else None)
            if isinstance(probability, float):
                answer[place] = int(probability > 0.5)
            else:
                failures.append(Unreadable(items=(place,), said=probability))
    else:
        parts = list(_parts(len(asked), questions.per_prompt))
        chats = [_chat(kind, signs, [asked[i].text for i in part], explanation) for part in parts]
        asking = (_ask(llm, chat, kind, len(part), questions) for chat, part in zip(chats, parts, strict=True))
        for part, (response, numbers) in zip(parts, await asyncio.gather(*asking), strict=True):
            if numbers is None:
                failures.append(Unreadable(items=tuple(part), said=response))
            else:
                answer[part.start : part.stop] = numbers
    _check_any_answer(failures, len(asked))
    truth = tuple(item.truth for item in asked)
    return Judged(
        reason="" if enough(truth, answer, questions.least) else UNREADABLE, active=contrast.active,
        silent=contrast.silent, truth=truth, answer=tuple(answer), score=tuple(score),
        position=tuple(item.position for item in asked), failures=tuple(failures),
    )  # fmt: skip


def _parts(count: int, size: int) -> Iterator[range]:
    """Ranges of items, one per prompt, of nearly equal size."""
    prompts = math.ceil(count / size)
    ends = [round(count * i / prompts) for i in range(prompts + 1)]
    yield from (range(first, last) for first, last in zip(ends[:-1], ends[1:], strict=True))


def _check_any_answer(failures: Sequence[Unreadable], items: int) -> None:
    """Raise if no answer about a neuron could be parsed, with the first answer."""
    if failures and sum(len(failure.items) for failure in failures) == items:
        raise LLMError(f"none of {len(failures)} answers could be parsed; the first is {failures[0].said!r}")


async def _ask(
    llm: LLM, chat: Sequence[Message], kind: str, count: int, questions: Questions
) -> tuple[str, list[int] | None]:
    """The model's answer or its error message, and the numbers in it; None if it is unusable."""
    sampling = Sampling(max_tokens=questions.answer_tokens, schema=_schema(kind, count))
    try:
        text = (await llm.chat(chat, sampling)).text
    except LLMError as error:
        return str(error), None
    return text, _read(text, kind, count)


SCORER_PROMPTS = Path(__file__).parent.parent / "prompts" / "scorers.json"


@cache
def words() -> dict[str, Any]:
    """Texts of the prompts."""
    return read_json(SCORER_PROMPTS, made_by="pip install --force-reinstall cratelm")


def _chat(kind: str, signs: tuple[str, str], texts: Sequence[str], explanation: str = "") -> tuple[Message, ...]:
    """The task, few-shot examples, and the question."""
    text = words()[kind]

    def question(pieces: Sequence[str], about: str) -> Message:
        numbered = "\n".join(f"{number}. {piece}" for number, piece in enumerate(pieces, 1))
        return Message("user", filled(text["question"], explanation=about, pieces=numbered))

    messages = [Message("system", filled(text["system"], open=signs[0], close=signs[1]))]
    for example in text["examples"]:
        answer = {key: example[key] for key in ("answers", "intruder") if key in example}
        pieces = [filled(piece, open=signs[0], close=signs[1]) for piece in example["pieces"]]
        messages.append(question(pieces, example.get("explanation", "")))
        messages.append(Message("assistant", json.dumps(answer)))
    return (*messages, question(texts, explanation))


def filled(template: str, **values: str) -> str:
    """Replace `{names}` in a template, in one pass: the values may contain braces, as code does."""
    return re.sub(r"\{(\w+)\}", lambda name: values.get(name[1], name[0]), template)


def _schema(kind: str, count: int) -> dict[str, Any]:
    """The JSON schema of an answer."""
    label: dict[str, Any] = {"type": "integer", "enum": [0, 1]}
    number = {"type": "integer", "minimum": 1, "maximum": count}
    name = "intruder" if kind == "intruder" else "answers"
    value = number if kind == "intruder" else {"type": "array", "items": label, "minItems": count, "maxItems": count}
    return {"type": "object", "properties": {name: value}, "required": [name], "additionalProperties": False}


def _read(text: str, kind: str, count: int) -> list[int] | None:
    """The numbers of an answer; None if it does not have exactly the requested form.

    Text around the single JSON object is ignored, and so is the reasoning of a reasoning model. Nothing else is
    repaired: in a list of the wrong length the model lost count, and its numbers cannot be assigned to items.
    """
    objects = _OBJECT.findall(without_reasoning(text))
    if len(objects) != 1:
        return None
    try:
        parsed = json.loads(objects[0])
    except (ValueError, RecursionError):
        return None
    name = "intruder" if kind == "intruder" else "answers"
    if set(parsed) != {name}:
        return None
    numbers = [parsed[name]] if kind == "intruder" else parsed[name]
    allowed, wanted = (range(1, count + 1), 1) if kind == "intruder" else (range(2), count)
    if not isinstance(numbers, list) or len(numbers) != wanted:
        return None
    return numbers if all(type(number) is int and number in allowed for number in numbers) else None


async def _probabilities(
    kind: str, explanation: str, items: Sequence[_Item], signs: tuple[str, str], llm: LLM
) -> list[float | str]:
    """P(1) / (P(0) + P(1)) of each item, from the logprobs at the place of the answer; a message if neither is there.

    Each item is one prompt and all share a prefix, which is computed once. A number that is not among the returned
    candidates has probability 0.
    """
    form = words()["single"][kind]
    before, after = form.split("{piece}")
    examples = "".join(
        filled(form, explanation=example["explanation"], piece=filled(piece, open=signs[0], close=signs[1]))
        + f"{number}\n\n"
        for example in words()[kind]["examples"]
        for piece, number in zip(example["pieces"], example["answers"], strict=True)
    )
    prefix = words()["single"]["head"] + examples + filled(before, explanation=explanation)
    prompts = []
    for item in items:
        rest = item.text + after
        prompts.append(Prompt(prefix=prefix, rest=f"{rest}0", at=(len(rest),)))
    probabilities: list[float | str] = []
    for prompt, answer in zip(prompts, await llm.prompt_logprobs(prompts), strict=True):
        next_tokens = answer.candidates.get(prompt.at[0] if prompt.at else 0, {})
        no, yes = (math.exp(next_tokens[text]) if text in next_tokens else 0.0 for text in ("0", "1"))
        likely = ", ".join(sorted(next_tokens, key=lambda token: -next_tokens[token])[:5])
        probabilities.append(yes / (no + yes) if no + yes > 0 else f"neither 0 nor 1 is among the candidates: {likely}")
    return probabilities
