"""Rating and quick detection on made-up models: what the single prompt has, and what is read from its logprobs."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes.judges import Judge
from fixtures.synthetic import make_run
from interpretation.scorers.test_classification import exact, texts_of
from interpretation.stages.test_judge import KEY, apply, make_explained

from cratelm import CrateError, read_records
from cratelm.interpretation.llm import LLMError, Prompt, PromptLogprobs
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.one_request import (
    Form,
    obvious_aucs,
    one_request_prompt,
    quick_detection,
    rating,
    strength_levels,
)
from cratelm.interpretation.scorers.registry import aggregate_scorer, chance, check_llm
from cratelm.interpretation.scorers.results import UNREADABLE, Judged, auc, weighted_correlation
from cratelm.interpretation.scorers.windows import TOO_FEW, Contrast, contrast, plain
from cratelm.interpretation.stages.judge import aggregate_judged, judged, judged_key
from cratelm.interpretation.store.database import Store

QUESTIONS = Questions(seed=1)
Expect = Callable[[str], Mapping[str, float]]
"""The text of a window -> probability of each next token after its tab."""


class Rater(Judge):
    """Answers each place of a prompt by the line that it ends; keeps the prompts."""

    def __init__(self, expect: Expect) -> None:
        super().__init__(lambda *_: "")
        self.expect, self.prompts = expect, list[Prompt]()

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        self.prompts.extend(prompts)
        return [self.read(prompt, top) for prompt in prompts]

    def read(self, prompt: Prompt, top: int) -> PromptLogprobs:
        candidates = {}
        for place in prompt.at or ():
            before, after = prompt.rest[:place], prompt.rest[place:]
            assert (before[-1], after[:2]) == ("\t", "?\n"), "a place is a question mark between a tab and a line break"
            likely = sorted(self.expect(before[:-1].rsplit("\n", 1)[-1]).items(), key=lambda pair: -pair[1])[:top]
            candidates[place] = {token: math.log(share) for token, share in likely if share > 0}
        return PromptLogprobs(
            tokens=tuple(prompt.rest), logprobs=np.full(len(prompt.rest), -1.0), candidates=candidates
        )


def forty() -> tuple[Contrast, list[bytes], dict[str, int]]:
    windows, pieces = exact([[0, float(20 - i), 0, 1 / (1 + i)] for i in range(20)], 20)
    return windows, pieces, texts_of(windows, pieces)


def rank_of(windows: Contrast, pieces: Sequence[bytes]) -> dict[str, int]:
    """The level of each text by brute force: how many quarters of the positives are weaker."""
    strengths = [window.activations.max() for window in windows.positives]
    return {
        plain(window, pieces): 1 + 4 * sum(other < window.activations.max() for other in strengths) // len(strengths)
        for window in windows.positives
    }


@pytest.mark.parametrize(("scorer", "number"), [(rating, "correlation"), (quick_detection, "auc")])
def test_a_neuron_costs_one_request_with_every_window(scorer: Callable, number: str) -> None:
    windows, pieces, truth = forty()
    level_of = rank_of(windows, pieces) if scorer is rating else truth
    model = Rater(lambda text: {"?": 0.9, str(level_of.get(text, 0)): 0.1})
    result = asyncio.run(scorer("some words", windows, pieces, model, QUESTIONS))
    (prompt,) = model.prompts
    assert [line.split("\t")[0] for line in prompt.rest.splitlines()] == [
        text for position in result.position for text in truth if text.startswith(f" w{position} ")
    ]
    assert sorted(line.split("\t")[0] for line in prompt.rest.splitlines()) == sorted(truth)
    assert prompt.prefix.endswith("\nThe neuron fires on some words\n")
    assert prompt.numbers, "only numbers are cached"
    assert result.numbers()[number] == pytest.approx(1)
    assert result.truth != tuple(sorted(result.truth, reverse=True)), "positives and negatives are shuffled"


def test_no_window_shows_its_number_and_the_levels_are_quarters_of_the_positives() -> None:
    windows, pieces, truth = forty()
    model = Rater(lambda _: {"1": 1.0})
    result = asyncio.run(rating("some words", windows, pieces, model, QUESTIONS))
    assert {line.split("\t")[1] for line in model.prompts[0].rest.splitlines()} == {"?"}
    by_text = rank_of(windows, pieces)
    shown = [line.split("\t")[0] for line in model.prompts[0].rest.splitlines()]
    assert result.truth == tuple(by_text.get(text, 0) for text in shown)
    assert sorted(strength_levels(windows.positives, 4)) == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    assert result.numbers() == {"auc": 0.5}, "one rating for every window separates nothing and has no correlation"
    assert set(truth) == set(shown)


def test_the_score_is_the_expected_level_given_that_it_is_a_level(rng: np.random.Generator) -> None:
    windows, pieces, truth = forty()
    shares = {text: rng.dirichlet(np.ones(6)) for text in truth}
    model = Rater(lambda text: dict(zip("?01234", shares[text].tolist(), strict=True)))
    result = asyncio.run(rating("some words", windows, pieces, model, QUESTIONS))
    shown = [line.split("\t")[0] for line in model.prompts[0].rest.splitlines()]
    brute = [sum(level * shares[text][1 + level] for level in range(5)) / sum(shares[text][1:]) / 4 for text in shown]
    assert result.score == pytest.approx(brute)
    levels = np.array(result.truth)
    assert result.numbers()["correlation"] == pytest.approx(np.corrcoef(levels, brute)[0, 1])
    assert result.numbers()["auc"] == pytest.approx(auc(levels > 0, np.array(brute)))


def test_a_place_without_a_level_counts_as_unreadable() -> None:
    windows, pieces, truth = forty()
    gone = plain(windows.negatives[3], pieces)
    model = Rater(lambda text: {"?": 1.0} if text == gone else {str(truth[text]): 1.0})
    result = asyncio.run(quick_detection("some words", windows, pieces, model, QUESTIONS))
    assert (result.failed, result.score.count(None)) == (1, 1)
    assert result.failures[0].said == "no level is among the candidates: ?"
    assert result.numbers() == {"auc": 1}
    silent = Rater(lambda text: {str(truth[text]): 1.0} if truth[text] else {"?": 1.0})
    assert asyncio.run(quick_detection("x", windows, pieces, silent, QUESTIONS)).reason == UNREADABLE
    with pytest.raises(LLMError, match="expected no number at any place"):
        asyncio.run(rating("x", windows, pieces, Rater(lambda _: {"?": 1.0}), QUESTIONS))


def test_few_windows_ask_nothing() -> None:
    windows, pieces = exact([[1.0, 0.0]] * 4, 9)
    model = Rater(lambda _: {"1": 1.0})
    assert asyncio.run(rating("x", windows, pieces, model, QUESTIONS)).reason == TOO_FEW
    assert model.prompts == []


def test_a_sentence_by_lookup_does_not_repeat_fires_on() -> None:
    prompt = one_request_prompt("detection", 'fires on " a" (3); on nothing else', ["b"])
    assert prompt.prefix.endswith('\nThe neuron fires on " a" (3); on nothing else\n')
    assert [prompt.rest[place:] for place in prompt.at or ()] == ["?\n"]


def test_weighted_correlations_equal_those_of_repeated_items(rng: np.random.Generator) -> None:
    levels, scores = rng.integers(0, 5, 12), rng.normal(size=12)
    weights = rng.integers(0, 4, size=(20, 12)).astype(float)
    brute = [
        np.corrcoef(np.repeat(levels, row.astype(int)), np.repeat(scores, row.astype(int)))[0, 1] for row in weights
    ]
    np.testing.assert_allclose(weighted_correlation(weights, levels, scores), brute)
    assert np.isnan(weighted_correlation(weights, levels, np.full(12, 0.3))).all()


def test_the_interval_of_one_rated_neuron_is_that_of_its_items(rng: np.random.Generator) -> None:
    truth = (1, 2, 3, 4) * 4 + (0,) * 12
    result = Judged(truth=truth, score=tuple(rng.normal(size=28) + np.array(truth)))
    brute = []
    for _ in range(3000):
        drawn = np.concatenate([rng.choice(16, 16), rng.choice(np.arange(16, 28), 12)])
        brute.append(100 * np.corrcoef(np.array(truth)[drawn], np.array(result.score, dtype=float)[drawn])[0, 1])
    aggregate = aggregate_scorer("rating", {0: result}, rng=rng, resamples=4000)
    low, high = np.percentile(brute, [2.5, 97.5])
    shift = 100 * result.numbers()["correlation"] - np.mean(brute)  # the interval is centred on the observed number
    assert aggregate.interval == pytest.approx((low + shift, high + shift), abs=0.1 * (high - low))
    assert (aggregate.chance, chance("rating"), chance("quick-detection")) == (0, 0, 0.5)


def test_a_layer_is_rated_stored_and_not_asked_about_again(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_explained(tmp_path / "run", rng)
    first, again = (Rater(lambda text: {str(len(text) % 5): 1.0}) for _ in range(2))
    apply(run, "rating", first)
    apply(run, "rating", again)
    store, key = Store.open(run), judged_key(KEY, "rating", "judge")
    results = judged(store, key, "rating")
    assert len(first.prompts) == sum(not result.reason for result in results.values()) > 0
    assert again.prompts == []
    aggregate = aggregate_judged(store, key, "rating")
    assert aggregate.mean == pytest.approx(
        100 * np.mean([result.numbers()["correlation"] for result in results.values() if not result.reason])
    )


def test_ratings_need_prompt_logprobs() -> None:
    with pytest.raises(CrateError, match="does not return prompt logprobs"):
        asyncio.run(check_llm(["rating"], Judge(lambda *_: ""), QUESTIONS))


def test_the_windows_are_those_of_detection(tmp_path: Path, rng: np.random.Generator) -> None:
    make_run(tmp_path, rng, layers=1, neurons=12)
    records = read_records(tmp_path, 0)
    pieces = [f" w{i}".encode() for i in range(int(records.windows.tokens.max()) + 1)]
    for neuron in range(records.num_neurons):
        windows = contrast(records[neuron], QUESTIONS)
        result = asyncio.run(rating("x", windows, pieces, Rater(lambda _: {"2": 1.0}), QUESTIONS))
        if not result.reason:
            both = (*windows.positives, *windows.negatives)
            assert sorted(result.position) == sorted(window.position for window in both)


OBVIOUS = {
    "words for colours": ("green", "scarf", "yellow", "purple"),
    "numbers": ("17", "eggs", "1984", "42"),
    "names of people": ("Robert", "Anna", "Elizabeth", "Peter"),
    "words for animals": ("dog", "horse", "goat", "wolf"),
    "question marks and exclamation marks": ("where are", "come here", "true?", "stop!"),
    "words for parts of the body": ("knee", "hands", "shoulder", "bleeding"),
}


@pytest.mark.parametrize("form", ["rating", "detection"])
def test_a_model_that_does_not_recognise_obvious_texts_is_refused(form: Form) -> None:
    class Knowing(Rater):
        """Right about every obvious text, or about none."""

        def __init__(self, *, right: bool) -> None:
            super().__init__(lambda _: {})
            self.right = right

        def read(self, prompt: Prompt, top: int) -> PromptLogprobs:
            explanation = prompt.prefix.splitlines()[-1].removeprefix("The neuron fires on ")
            fits = OBVIOUS.get(explanation, ())
            self.expect = lambda text: {"1": 0.9 if any(word in text for word in fits) == self.right else 0.1, "0": 0.5}
            return super().read(prompt, top)

    knows, opposite, flat = Knowing(right=True), Knowing(right=False), Rater(lambda _: {"1": 0.5, "0": 0.5})
    assert asyncio.run(obvious_aucs(form, knows)) == dict.fromkeys(OBVIOUS, 1.0)
    assert asyncio.run(obvious_aucs(form, opposite)) == dict.fromkeys(OBVIOUS, 0.0)
    assert {len(prompt.at or ()) for prompt in knows.prompts} == {24}
    name = "rating" if form == "rating" else "quick-detection"
    asyncio.run(check_llm([name], knows, QUESTIONS, skip_self_test=False))
    with pytest.raises(
        CrateError, match=r"mean AUC is 0.50, and 0.75 is the least .*words for colours 0.50.*Use a larger"
    ):
        asyncio.run(check_llm([name], flat, QUESTIONS, skip_self_test=False))
    asyncio.run(check_llm([name], flat, QUESTIONS))
