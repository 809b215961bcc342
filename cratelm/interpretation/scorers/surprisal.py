"""Surprisal: how much better a language model predicts a window once it has read the explanation.

With a description D before the window x, and a generic description G,

    gain(x) = mean over the tokens of x of   log p(token | D, what precedes) - log p(token | G, what precedes)

in nats per token. A good explanation gains on windows where the neuron fires and not on windows where it is silent:
the score is the AUC of the gain. After Paulo et al. (2024).
"""

from collections.abc import Sequence

import numpy as np

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Prompt, PromptLogprobs
from cratelm.interpretation.scorers.classification import Questions, enough_windows, filled, too_few, words
from cratelm.interpretation.scorers.results import UNREADABLE, Judged, Unreadable
from cratelm.interpretation.scorers.windows import Contrast, raw


async def surprisal(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    """How well the gain in nats per token separates windows on which the neuron fires from silent ones."""
    if not enough_windows("surprisal", contrast, questions):
        return too_few(contrast)
    windows = (*contrast.positives, *contrast.negatives)
    order = contrast.rng(questions.seed, "surprisal").permutation(len(windows))
    asked = [windows[i] for i in order]
    texts = [raw(window, pieces) for window in asked]
    generic = words()["surprisal"]["generic"]
    with_it = await llm.prompt_logprobs([Prompt(prefix=_before(explanation), rest=text) for text in texts], top=1)
    without = await llm.prompt_logprobs([Prompt(prefix=_before(generic), rest=text) for text in texts], top=1)
    gains = [_gain(ours, theirs) for ours, theirs in zip(with_it, without, strict=True)]
    failures = tuple(
        Unreadable(items=(place,), said="some of its tokens have no log-probability")
        for place, gain in enumerate(gains)
        if gain is None
    )
    if len(failures) == len(gains):
        raise LLMError("the model returned none of the requested log-probabilities")
    truth = tuple(int(i < len(contrast.positives)) for i in order)
    known = [true for true, gain in zip(truth, gains, strict=True) if gain is not None]
    return Judged(
        reason="" if min(sum(known), len(known) - sum(known)) >= questions.least else UNREADABLE,
        active=contrast.active, silent=contrast.silent, truth=truth, score=tuple(gains), failures=failures,
        position=tuple(window.position for window in asked),
    )  # fmt: skip


def _before(description: str) -> str:
    """Few-shot examples, and the description before a window."""
    text = words()["surprisal"]
    examples = "".join(
        f"{filled(text['entry'], description=example['description'])}{example['piece']}\n\n"
        for example in text["examples"]
    )
    return f"{text['head']}{examples}{filled(text['entry'], description=description)}"


def _gain(ours: PromptLogprobs, theirs: PromptLogprobs) -> float | None:
    """Gain in nats per token; None if a log-probability is missing or the two tokenizations differ.

    A first token that begins before the window is left out, as when a tokenizer joins a colon and a line break.
    """
    if ours.tokens != theirs.tokens or not len(ours.logprobs):
        return None
    gains = ours.logprobs - theirs.logprobs
    joined = len(gains) > 1 and np.isnan(ours.logprobs[0]) and np.isnan(theirs.logprobs[0])
    gain = float(np.mean(gains[1:] if joined else gains))
    return gain if np.isfinite(gain) else None


async def check_prompt_logprobs(llm: LLM) -> None:
    """Refuse a model that does not return prompt logprobs, and say what to use instead."""
    try:
        (answer,) = await llm.prompt_logprobs([Prompt(prefix="The sun rises in the", rest=" east")], top=1)
    except LLMError as error:
        reason = str(error).rstrip(".")
    else:
        if len(answer.logprobs) and np.isfinite(answer.logprobs).all():
            return
        reason = "the answer has none"
    raise CrateError(
        f"{llm.name} does not return prompt logprobs ({reason}), which this scorer needs. "
        "Use --scorer detection, fuzzing or intruder, or a server that returns them, such as vLLM"
    )
