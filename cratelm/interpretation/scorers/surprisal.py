"""Surprisal: how much better a language model predicts a window once it has read the explanation.

With a description D before the window x, and G a description of nothing in particular,

    gain(x) = mean over the tokens of x of   log p(token | D, what precedes) - log p(token | G, what precedes)

in nats per token. An explanation that says something about what a neuron fires on gains on windows where it fires and
not on those where it is silent: the score is the AUC of the gain. After Paulo et al. (2024).
"""

from collections.abc import Sequence

import numpy as np

from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Prompt, PromptLogprobs
from cratelm.interpretation.scorers.classification import Questions, enough_windows, filled, words
from cratelm.interpretation.scorers.results import UNREADABLE, Judged, Unreadable
from cratelm.interpretation.scorers.windows import TOO_FEW, Contrast, raw


async def surprisal(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: LLM, questions: Questions
) -> Judged:
    """How well the gain in nats per token tells windows on which the neuron fires from those on which it is silent."""
    if not enough_windows("surprisal", contrast, questions):
        return Judged(reason=TOO_FEW, active=contrast.active, silent=contrast.silent)
    windows = (*contrast.positives, *contrast.negatives)
    order = contrast.rng(questions.seed, "surprisal").permutation(len(windows))
    asked = [windows[i] for i in order]
    texts = [raw(window, pieces) for window in asked]
    generic = words()["surprisal"]["generic"]
    with_it = await llm.prompt_logprobs([Prompt(prefix=_before(explanation), rest=text) for text in texts], top=1)
    without = await llm.prompt_logprobs([Prompt(prefix=_before(generic), rest=text) for text in texts], top=1)
    gains = [_gain(ours, theirs) for ours, theirs in zip(with_it, without, strict=True)]
    failures = tuple(
        Unreadable(items=(place,), said="the probabilities of its tokens are not all told")
        for place, gain in enumerate(gains)
        if gain is None
    )
    if len(failures) == len(gains):
        raise LLMError("the model told none of the probabilities that it was asked for")
    truth = tuple(int(i < len(contrast.positives)) for i in order)
    told = [true for true, gain in zip(truth, gains, strict=True) if gain is not None]
    return Judged(
        reason="" if min(sum(told), len(told) - sum(told)) >= questions.least else UNREADABLE, active=contrast.active,
        silent=contrast.silent, truth=truth, score=tuple(gains), failures=failures,
        position=tuple(window.position for window in asked),
    )  # fmt: skip


def _before(description: str) -> str:
    """Solved examples, and the description that a window follows."""
    text = words()["surprisal"]
    examples = "".join(
        f"{filled(text['entry'], description=one['description'])}{one['piece']}\n\n" for one in text["examples"]
    )
    return f"{text['head']}{examples}{filled(text['entry'], description=description)}"


def _gain(ours: PromptLogprobs, theirs: PromptLogprobs) -> float | None:
    """Nats per token; None where a token's probability is not known or the two were cut into other tokens.

    A first token that begins before the window, as where a tokenizer joins a colon and a line break, is left out.
    """
    if ours.tokens != theirs.tokens or not len(ours.logprobs):
        return None
    gains = ours.logprobs - theirs.logprobs
    joined = len(gains) > 1 and np.isnan(ours.logprobs[0]) and np.isnan(theirs.logprobs[0])
    gain = float(np.mean(gains[1:] if joined else gains))
    return gain if np.isfinite(gain) else None


async def check_prompt_logprobs(llm: LLM) -> None:
    """Refuse a model that does not tell the probabilities of a prompt, with what to use instead."""
    try:
        (answer,) = await llm.prompt_logprobs([Prompt(prefix="The sun rises in the", rest=" east")], top=1)
    except LLMError as error:
        said = str(error).rstrip(".")
    else:
        if len(answer.logprobs) and np.isfinite(answer.logprobs).all():
            return
        said = "it answered without them"
    raise CrateError(
        f"{llm.name} does not give the probabilities of a prompt's tokens ({said}), which this scorer needs. "
        "Use --scorer detection, fuzzing or intruder, or a server that gives them, as vLLM does"
    )
