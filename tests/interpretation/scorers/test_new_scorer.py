"""A scorer is its function and a line in the registry: the store, the tables and the command line derive from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.judges import Judge
from interpretation.stages.test_judge import KEY, always, apply, make_explained

from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.registry import SCORERS, Scorer, chosen_scorers
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.scorers.windows import Contrast
from cratelm.interpretation.stages.judge import aggregate_judged, judged, judged_key, judged_sets
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Layer
from cratelm.report.browser.measures import open_measures


async def toy(
    explanation: str, contrast: Contrast, pieces: Sequence[bytes], llm: Judge, questions: Questions
) -> Judged:
    """Right about every window."""
    assert (bool(explanation), len(pieces) > 0, llm.name, questions.least) == (True, True, "judge", 5)
    truth = (1,) * len(contrast.positives) + (0,) * len(contrast.negatives)
    return Judged(active=contrast.active, silent=contrast.silent, truth=truth, answer=truth)


def test_a_scorer_without_a_function_cannot_be_registered() -> None:
    fields: dict[str, Any] = {"name": "toy", "needs": "chat", "number": "balanced_accuracy"}
    nothing: Any = None
    with pytest.raises(TypeError, match="run"):
        Scorer(**fields)
    with pytest.raises((AssertionError, TypeError)):
        Scorer(**fields, run=nothing)
    assert all(callable(scorer.run) for scorer in SCORERS.values())


def test_names_in_stores_stay_the_same() -> None:
    assert list(SCORERS) == [
        "detection", "fuzzing", "fuzzing-active", "intruder", "surprisal", "embedding", "example-embedding",
        "quick-detection", "rating", "output",
    ]  # fmt: skip


def test_a_line_in_the_registry_is_all_that_a_new_scorer_needs(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCORERS, "toy", Scorer(name="toy", needs="chat", run=toy, number="balanced_accuracy"))
    assert chosen_scorers(["toy"]) == ("toy",)
    assert chosen_scorers(["all"])[-1] == "toy"

    run, key = make_explained(tmp_path / "run", rng), judged_key(KEY, "toy", "judge")
    tally = apply(run, "toy", Judge(always(1)))
    store = Store.open(run)
    assert tally.done == len(store.texts(KEY))
    assert judged_sets(store) == [(key, "toy")]
    results = judged(store, key, "toy")
    assert {result.numbers()["balanced_accuracy"] for result in results.values() if not result.reason} == {1.0}
    assert aggregate_judged(store, key, "toy").mean == 100.0
    assert json.dumps(next(iter(results.values())).row())

    layer = Layer(run=run, model="m", tap="neurons", tap_slug="neurons", layer=0, mode="fixed", folder="f")
    assert [scorer for _, scorer, *_ in open_measures(layer, store).judged] == ["toy"]
