"""Self-test of explainers: does a model explain obvious neurons, or copy other texts?

A small model repeats a few-shot example of the prompt, or one sentence for every neuron. Such answers look like
explanations. So each explainer first explains the obvious neurons that simulators are tested on (`puzzles.json`), each
from its sentence, and answers that are copies are counted. The prompts are always the same, so repeated runs are cache
hits.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cratelm.errors import CrateError
from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.prompts.explainer import ExplainerPrompt
from cratelm.interpretation.prompts.few_shot import FewShotRecord, few_shot_neurons
from cratelm.interpretation.simulators.self_test import puzzles

COPIED_WORDS = 5
"""Consecutive words that make an explanation a copy of another text."""
MOST_COPIED = 0.5
"""Share of copies among the explanations of the self-test above which a model is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerSelfTest:
    """The answers of an explainer about the obvious neurons."""

    explanations: Mapping[str, str]
    """What the neuron fires on -> the explanation; neurons without a usable answer are missing."""
    failures: Mapping[str, str]
    """What the neuron fires on -> the unusable answer."""

    @property
    def copied(self) -> list[str]:
        """The explanations that are copies."""
        return copied(list(self.explanations.values()))

    @property
    def passed(self) -> bool:
        """Whether at most half of the explanations are copies."""
        return len(self.copied) <= MOST_COPIED * len(self.explanations)


def copied(explanations: Sequence[str]) -> list[str]:
    """The explanations that share `COPIED_WORDS` consecutive words with a few-shot example or with each other."""
    runs = [_word_runs(text) for text in explanations]
    examples = set().union(*(_word_runs(neuron.explanation) for neuron in few_shot_neurons()))
    occurrences = Counter(words for own in runs for words in own)
    return [
        text for text, own in zip(explanations, runs, strict=True)
        if own & examples or any(occurrences[words] > 1 for words in own)
    ]  # fmt: skip


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + COPIED_WORDS]) for i in range(len(words) - COPIED_WORDS + 1)}


def self_test_prompts(explainer: LLMExplainer) -> list[ExplainerPrompt]:
    """The prompts about the obvious neurons. Raises `PromptTooLong` if they do not fit the model's context."""
    return [
        explainer.prompt_of([FewShotRecord(tokens=puzzle.tokens, activations=puzzle.activations, unknown=0)])
        for puzzle in puzzles()
    ]


async def explainer_self_test(explainer: LLMExplainer) -> ExplainerSelfTest:
    """Let an explainer explain the obvious neurons. Raises `PromptTooLong` if they do not fit the model's context."""
    answers = await asyncio.gather(*(_explain(explainer, prompt) for prompt in self_test_prompts(explainer)))
    names = [puzzle.explanation for puzzle in puzzles()]
    return ExplainerSelfTest(
        explanations={name: answer for name, answer in zip(names, answers, strict=True) if isinstance(answer, str)},
        failures={
            name: str(answer) for name, answer in zip(names, answers, strict=True) if not isinstance(answer, str)
        },
    )


async def _explain(explainer: LLMExplainer, prompt: ExplainerPrompt) -> str | LLMError:
    try:
        return await explainer.ask(prompt)
    except LLMError as error:
        return error


class CannotExplain(CrateError):
    """A model whose explanations are mostly copies."""


async def require_explainer_self_test(explainer: LLMExplainer) -> ExplainerSelfTest:
    """Raise `CannotExplain` with the explanations if most of them are copies."""
    result = await explainer_self_test(explainer)
    if result.passed:
        return result
    each = "; ".join(f"{name}: {text!r}" for name, text in result.explanations.items() if text in result.copied)
    other = "" if explainer.settings.prompt == "compact" else " or --explainer-prompt compact"
    raise CannotExplain(
        f"{explainer.llm.name} cannot explain: {len(result.copied)} of its {len(result.explanations)} explanations of "
        f"obvious neurons repeat a few-shot example or each other ({each}). Use a larger model{other}"
    )
