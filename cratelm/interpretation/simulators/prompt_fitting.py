"""Fit a simulator's prompts into a model's context by leaving out few-shot neurons.

All neurons of a set get prompts with the same few-shot neurons, so the number to leave out is settled before the first
prompt is sent (`examples_to_leave_out`); a prompt that is still too long leaves out more (`fitting_prefix`).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cratelm.interpretation.llm import LLM
from cratelm.interpretation.prompts import simulator as prompts
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.prompts.few_shot import FILE as FEW_SHOT
from cratelm.interpretation.prompts.few_shot import FewShotNeuron, few_shot_neurons

EXPLANATION_TOKENS = 150
"""Tokens reserved for an explanation when the number of few-shot neurons of a set is settled."""
MARGIN = 4
"""Tokens reserved on top of the count: the beginning-of-text token, and the seam between prefix and rest."""

Prefix = Callable[[Sequence[FewShotNeuron]], str]
"""Few-shot neurons -> the beginning that all prompts of an explanation share."""


def fitting_prefix(prefix: Prefix, rests: Sequence[str], llm: LLM, counts: Counter[str], left_out: int) -> str:
    """Build the prefix without the last `left_out` few-shot neurons, and without more of them if the context is full.

    Raises `PromptTooLong` if even a prompt without few-shot neurons does not fit.
    """
    neurons = few_shot_neurons()
    examples = list(neurons[: len(neurons) - left_out])
    longest = llm.count(max(rests, key=len, default="")) if llm.context is not None else 0
    while True:
        text = prefix(examples)
        omitted = sum(len(neuron.records) for neuron in neurons[len(examples) :])
        counts["left out"] = max(counts["left out"], omitted)
        if llm.context is None:
            return text
        needed = llm.count(text) + longest + MARGIN
        if needed <= llm.context:
            return text
        if not examples:
            shorter = ", or --protocol anthropic, whose excerpts are short" if longest > 128 else ""
            raise PromptTooLong(
                f"the simulator's prompt has {needed:,} tokens without any example, too long for a context of "
                f"{llm.context:,}. Use a model with a longer context{shorter}"
            )
        examples.pop()


def examples_to_leave_out(prefix: Prefix, rests: Iterable[str], llm: LLM) -> int:
    """Count the few-shot neurons to leave out for the longest rest to fit, with room for an explanation.

    Rests that never fit are ignored.
    """
    if llm.context is None:
        return 0
    neurons = few_shot_neurons()
    used = [llm.count(prefix(neurons[:count])) + EXPLANATION_TOKENS + MARGIN for count in range(len(neurons), -1, -1)]
    by_size = sorted(set(rests), key=lambda rest: len(rest.encode()), reverse=True)
    if not by_size or used[0] + len(by_size[0].encode()) <= llm.context:  # a token has at least one byte
        return 0
    longest = max((size for size in map(llm.count, by_size) if used[-1] + size <= llm.context), default=0)
    return next(number for number, size in enumerate(used) if size + longest <= llm.context or number == len(neurons))


def simulation_settings(name: str, llm: LLM, settings: Mapping[str, Any], left_out: int = 0) -> dict[str, Any]:
    """Collect every setting that a simulation depends on, apart from explanations and records."""
    digest = hashlib.sha256(prompts.FILE.read_bytes() + FEW_SHOT.read_bytes()).hexdigest()[:16]
    short = {"left_out": left_out} if left_out else {}
    return {"simulator": name, "model": llm.identity, "prompts": digest, **settings, **short}
