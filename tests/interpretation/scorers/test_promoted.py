"""Promoted tokens and the scorer `output`: which tokens are asked about, and what a model that knows them gets."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from interpretation.scorers.test_one_request import Rater
from interpretation.stages.test_judge import KEY, apply, make_explained, pieces

from cratelm import CrateError
from cratelm.activations.direction_files import LayerDirections, directions_file, directions_folder
from cratelm.checksums import write_tensors
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.one_request import output
from cratelm.interpretation.scorers.promoted import promoted_tokens, promoting_directions
from cratelm.interpretation.scorers.windows import TOO_FEW
from cratelm.interpretation.stages.judge import judged, judged_key
from cratelm.interpretation.store.database import Store

QUESTIONS = Questions(seed=1)


def effects(rng: np.random.Generator, neurons: int, vocabulary: int) -> np.ndarray:
    return rng.normal(size=(neurons, vocabulary)).astype(np.float32)


def arrays_of(logits: np.ndarray, keep: int = 20) -> dict[str, np.ndarray]:
    order = np.argsort(-logits, axis=1)[:, :keep].astype(np.int32)
    return {
        "tokens_out.largest.index": order,
        "tokens_out.largest.value": np.take_along_axis(logits, order, axis=1),
        "write_norm": np.ones(len(logits), dtype=np.float32),
    }


def write_directions(run: Path, logits: np.ndarray, model_hash: str = "m") -> None:
    write_tensors(directions_file(run, 0), arrays_of(logits))
    described = {
        "format_version": 1,
        "model_hash": model_hash,
        "keep": 20,
        "tap": "neurons",
        "layers": {"0": ["tokens_out"]},
    }
    (directions_folder(run) / "directions.json").write_text(json.dumps(described))


def test_promoted_tokens_are_those_whose_logits_rise_most_and_the_others_are_of_other_neurons(
    rng: np.random.Generator,
) -> None:
    logits = effects(rng, 6, 90)
    directions = LayerDirections(tap="neurons", layer=0, arrays=arrays_of(logits))
    for neuron in range(6):
        items = promoted_tokens(directions, neuron, QUESTIONS)
        tops = [set(np.argsort(-row)[:20].tolist()) for row in logits]
        positives = [int(window.tokens[0]) for window in items.positives]
        negatives = [int(window.tokens[0]) for window in items.negatives]
        assert positives == np.argsort(-logits[neuron])[:20].tolist()
        assert [float(window.activations[0]) for window in items.positives] == sorted(logits[neuron])[-20:][::-1]
        others = set().union(*(top for other, top in enumerate(tops) if other != neuron)) - tops[neuron]
        assert set(negatives) <= others
        assert len(negatives) == len(set(negatives)) == 20
        assert (items.active, items.silent) == (20, len(others))
        assert negatives == [int(w.tokens[0]) for w in promoted_tokens(directions, neuron, QUESTIONS).negatives]


def test_a_token_that_the_neuron_makes_less_probable_is_not_promoted() -> None:
    logits = np.full((3, 30), -1.0, dtype=np.float32)
    logits[0, :4] = 1.0
    directions = LayerDirections(tap="neurons", layer=0, arrays=arrays_of(logits))
    items = promoted_tokens(directions, 0, QUESTIONS)
    assert ([int(window.tokens[0]) for window in items.positives], items.negatives) == ([0, 1, 2, 3], ())
    result = asyncio.run(output("x", items, [b"a"] * 30, Rater(lambda _: {"1": 1.0}), QUESTIONS))
    assert result.reason == TOO_FEW


def test_a_model_that_knows_the_promoted_tokens_scores_1_and_its_opposite_0(rng: np.random.Generator) -> None:
    names = [f" w{i}" for i in range(90)]
    directions = LayerDirections(tap="neurons", layer=0, arrays=arrays_of(effects(rng, 6, 90)))
    items = promoted_tokens(directions, 3, QUESTIONS)
    promoted = {names[int(window.tokens[0])] for window in items.positives}
    scores = {}
    for name, yes in (("right", 0.9), ("wrong", 0.1)):
        model = Rater(lambda text, yes=yes: {"1": yes if text in promoted else 1 - yes, "0": 0.5})  # type: ignore[misc]
        result = asyncio.run(output("x", items, [text.encode() for text in names], model, QUESTIONS))
        scores[name] = result.numbers()["auc"]
        assert {names[token] for token, truth in zip(result.position, result.truth, strict=True) if truth} == promoted
    assert scores == {"right": 1, "wrong": 0}


def test_the_explanations_of_a_layer_are_asked_about_with_their_tokens(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_explained(tmp_path / "run", rng)
    write_directions(run, effects(rng, 12, len(pieces(run))))
    model = Rater(lambda text: {"1": 0.75 if text.strip() else 0.5, "0": 0.25})
    apply(run, "output", model)
    store, directions = Store.open(run), promoting_directions(run, "neurons", 0)
    results, beginnings = judged(store, judged_key(KEY, "output", "judge"), "output"), set()
    assert len(model.prompts) == len(results) > 0
    for neuron, result in results.items():
        promoted = {int(window.tokens[0]) for window in promoted_tokens(directions, neuron, Questions()).positives}
        assert {token for token, truth in zip(result.position, result.truth, strict=True) if truth} == promoted
        assert len(result.truth) == 40
        beginnings.add(store.texts(KEY)[neuron].removeprefix("fires on "))
    assert {
        prompt.prefix.splitlines()[-1].removeprefix("The neuron fires on ") for prompt in model.prompts
    } == beginnings


def test_other_directions_are_asked_about_again_and_missing_ones_are_named(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_explained(tmp_path / "run", rng)
    with pytest.raises(CrateError, match=r"no directions of layer 0.*Run: cratelm directions"):
        apply(run, "output", Rater(lambda _: {"1": 1.0}))
    logits = effects(rng, 12, len(pieces(run)))
    numbers = []
    for model_hash in ("m", "m", "another"):
        write_directions(run, logits, model_hash)
        model = Rater(lambda _: {"1": 1.0})
        apply(run, "output", model)
        numbers.append(len(model.prompts))
    assert numbers[0] == numbers[2] > numbers[1] == 0
    with pytest.raises(CrateError, match="need --tap neurons"):
        promoting_directions(run, "sae-small", 0)
