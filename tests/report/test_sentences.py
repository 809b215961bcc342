"""The page's sentences: who wins where, at what cost, and how far above the controls."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report.tables.test_tables import scored_runs

from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.report.results.gather import Results, RunResult, gather, outcome
from cratelm.report.results.loss import DocumentLosses, Loss
from cratelm.report.sentences import verdict


def rescored(run: RunResult, points: float, half: float, **more: object) -> RunResult:
    """The run with every mean at `points` and an interval of `half` to each side."""

    def moved(scores: ModelAggregate) -> ModelAggregate:
        return replace(scores, mean=points, interval=(points - half, points + half))

    return replace(run, scores={name: moved(one) for name, one in run.scores.items()}, **more)  # type: ignore[arg-type]


def loss(nats: float) -> Loss:
    return Loss(
        nats_per_token=nats, standard_error=0.01, perplexity=1.0, bits_per_byte=1.0, tokens=1, documents=1, split="val"
    )


def loss_of(nats: np.ndarray, tokens: np.ndarray) -> Loss:
    """The loss of these documents, which differ so much that its own standard error says nothing."""
    return replace(
        loss(float(nats.sum() / tokens.sum())), standard_error=9.0, documents=len(tokens), tokens=int(tokens.sum()),
        data_hash="data", by_document=DocumentLosses(nats=nats, tokens=tokens),
    )  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> Results:
    return gather(scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l", "crate-2l-random"))


def test_the_verdict_says_higher_lower_and_no_clear_difference(pair: Results) -> None:
    crate, gpt2 = pair.models
    high = rescored(crate, 12.0, 1.0, loss=loss(3.5), parameters=80, flops_per_token=140)
    low = rescored(gpt2, 8.0, 1.0, loss=loss(3.1), parameters=100, flops_per_token=100)
    first, *_ = verdict(replace(pair, models=(high, low)))
    numbers = "(12.0 against 8.0 points)"
    assert first == (
        "CRATE-2L scores higher than GPT-2-2L on "
        f"top-and-random {numbers}, random-only {numbers} and anthropic {numbers}; "
        "the loss of CRATE-2L is 0.400 nats per token worse at 20 % fewer parameters and 1.40 times the FLOPs "
        "per token."
    )
    first, *_ = verdict(replace(pair, models=(low, high)))
    assert first.startswith("GPT-2-2L scores lower than CRATE-2L on top-and-random (8.0 against 12.0 points)")
    assert "0.400 nats per token better at 25 % more parameters and 0.71 times" in first
    near = rescored(crate, 9.0, 1.0, loss=loss(3.1), parameters=100)
    first, *_ = verdict(replace(pair, models=(near, low)))
    assert first.startswith(
        "No clear difference between CRATE-2L and GPT-2-2L on top-and-random (9.0 against 8.0 points)"
    )
    assert "0.000 nats per token better at as many parameters" in first
    assert "clearly different" not in first
    mixed = replace(high, scores={**high.scores, "anthropic": near.scores["anthropic"]})
    first, *_ = verdict(replace(pair, models=(mixed, low)))
    assert (
        "and random-only (12.0 against 8.0 points); no clear difference on anthropic (9.0 against 8.0 points);" in first
    )


def test_losses_on_the_same_documents_are_called_clearly_different_or_not(
    pair: Results, rng: np.random.Generator
) -> None:
    crate, gpt2 = pair.models
    tokens = rng.integers(50, 500, size=200)
    hard = tokens * rng.uniform(1, 6, size=200)
    noise = rng.normal(0, 0.2, size=200)
    noise -= (tokens * noise).sum() / tokens.sum()
    for shift, words in ((0.3, "is clearly"), (-0.3, "is clearly"), (0.005, "is not clearly")):
        apart = tokens * (shift + noise)
        models = tuple(
            replace(one, loss=loss_of(nats, tokens)) for one, nats in ((crate, hard + apart), (gpt2, hard))
        )  # fmt: skip
        mean = apart.sum() / tokens.sum()
        error = np.sqrt(200 / 199 * np.sum((apart - mean * tokens) ** 2)) / tokens.sum()
        side = "worse" if mean > 0 else "better"
        first, *_, last = verdict(replace(pair, models=models))
        assert (
            f"the loss of CRATE-2L {words} different, {abs(mean):.3f} ± {error:.3f} nats per token {side}, at as"
            in first
        )
        assert "one in loss, taken document by document, where it is more than 1.96 times" in last
    bare = tuple(replace(one, loss=replace(one.loss, by_document=None)) for one in models if one.loss is not None)
    first, *_, last = verdict(replace(pair, models=bare))
    assert "clearly different" not in first.partition("the loss of")[2]
    assert last == "A difference in score is clear where the 95 % intervals do not overlap."


def test_the_verdict_mentions_how_far_a_model_stands_above_its_controls(pair: Results) -> None:
    crate, gpt2 = pair.models
    assert crate.random_init is not None
    control = rescored(crate.random_init, 2.0, 1.0)
    shuffled = {name: replace(one, mean=12.5, interval=(11.0, 14.0)) for name, one in crate.shuffled.items()}
    model = rescored(crate, 12.0, 1.0, random_init=control, shuffled=shuffled)
    tie = "−0.5 (no clear difference)"
    assert (
        "CRATE-2L on top-and-random, random-only and anthropic: +10.0, +10.0 and +10.0 points against the same model "
        f"with random weights; {tie}, {tie} and {tie} points against shuffled explanations."
    ) in verdict(replace(pair, models=(model, gpt2)))
    bare = replace(gpt2, shuffled={}, random_init=None)
    assert not any(text.startswith("GPT-2-2L on") for text in verdict(replace(pair, models=(model, bare))))


def test_one_model_alone_gets_its_scores_and_a_missing_loss_is_said(pair: Results) -> None:
    crate = rescored(pair.models[0], 12.0, 1.0, loss=None)
    first, *_ = verdict(replace(pair, models=(crate,)))
    assert first == (
        "CRATE-2L scores 12.0 points on top-and-random, 12.0 points on random-only and 12.0 points on anthropic; "
        "its loss is not evaluated."
    )
    assert "has as many parameters and 1.00 times" in verdict(replace(pair, models=(crate, pair.models[1])))[0]


def test_intervals_that_touch_do_not_count_as_a_clear_difference(pair: Results, rng: np.random.Generator) -> None:
    scores = pair.models[0].scores["anthropic"]
    for _ in range(50):
        ends = rng.integers(-3, 4, size=4).astype(float)
        (a, b), (c, d) = sorted(ends[:2]), sorted(ends[2:])
        shared = any(a <= x <= b and c <= x <= d for x in ends)
        found = outcome(replace(scores, interval=(a, b)), replace(scores, interval=(c, d)))
        assert found == ("no clear difference" if shared else "higher" if a > d else "lower")
    assert outcome(replace(scores, interval=None), scores) is None
