"""The self-test of explainers: which explanations are copies, and which models are refused."""

import asyncio
from collections.abc import Sequence

import pytest
from fakes.scripted import ScriptedLLM

from cratelm.errors import CrateError
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.explainers.self_test import copied, explainer_self_test, require_explainer_self_test
from cratelm.interpretation.llm import Message, Sampling
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.simulators.self_test import puzzles
from cratelm.interpretation.store.identities import PromptForm


def answering(answers: Sequence[str], prompt: PromptForm = "table", context: int | None = None) -> LLMExplainer:
    """An explainer whose model gives these answers about the obvious neurons, in their order."""

    def answer(messages: Sequence[Message], _: Sampling) -> str:
        about = messages[-1].text
        strong = [[t for t, a in zip(p.tokens, p.activations, strict=True) if a] for p in puzzles()]
        [place] = [i for i, tokens in enumerate(strong) if all(token.strip() in about for token in tokens)]
        return answers[place]

    llm = ScriptedLLM(answer, context=context)
    return LLMExplainer(llm=llm, settings=explainer_settings("fixed", prompt=prompt), strings=())


def test_five_words_in_a_row_of_a_few_shot_example_or_of_another_explanation_make_a_copy() -> None:
    example = few_shot_neurons()[2].explanation
    assert example == "the word 'than' and the end of the comparison that it opens"
    own = ["names of people", "words for animals and plants", "the end of a comparison", "colours of the rainbow"]
    assert copied(own) == []
    assert copied([*own, "the word 'self' and THE END of the comparison, that it opens"]) == [
        "the word 'self' and THE END of the comparison, that it opens"
    ]
    twice = ["tokens of a Python program here", "some tokens of a Python program"]
    assert copied([*own, *twice]) == twice
    assert copied(["names of people"] * 3) == [], "fewer than five words"
    assert copied([]) == []


@pytest.mark.parametrize("prompt", ["table", "compact"])
def test_a_model_that_copies_nothing_passes(prompt: PromptForm) -> None:
    answers = [puzzle.explanation for puzzle in puzzles()]
    explainer = answering(answers, prompt)
    result = asyncio.run(require_explainer_self_test(explainer))
    assert (list(result.explanations.values()), result.copied, result.failures) == (answers, [], {})
    assert len(explainer.llm.asked) == 6  # type: ignore[attr-defined]


def test_a_model_that_mostly_copies_is_refused_with_what_it_said() -> None:
    copy = "the word '{}' and the end of the comparison that it opens"
    answers = [copy.format(word) for word in ("red", "9", "Anna")] + ["animals", "I am sorry, I cannot", "body"]
    result = asyncio.run(explainer_self_test(answering(answers)))
    assert (len(result.copied), len(result.explanations), len(result.failures)) == (3, 5, 1)
    message = (
        "^scripted cannot explain: 3 of its 5 explanations of obvious neurons repeat a few-shot example or each other "
        r"\(words for colours: .*'red'.*\)\. Use a larger model or --explainer-prompt compact$"
    )
    with pytest.raises(CrateError, match=message):
        asyncio.run(require_explainer_self_test(answering(answers)))
    asyncio.run(require_explainer_self_test(answering([*answers[:2], "names", *answers[3:]])))


def test_a_context_that_is_too_short_is_the_error() -> None:
    with pytest.raises(PromptTooLong, match="too long for a context of 20"):
        asyncio.run(explainer_self_test(answering(["a"] * 6, context=20)))
