"""The table that compares scorers with the simulation of the same explanations."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.judges import Judge
from interpretation.stages.test_judge import always
from report.tables.test_tables import scored_runs

from cratelm import read_records
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.registry import SCORERS, Scorer
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.scorers.windows import Contrast
from cratelm.interpretation.stages.judge import JudgeContext, judge_set, judged_key
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.neuron_selection import chosen
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.contents import ReportContents
from cratelm.report.results.gather import Results, gather
from cratelm.report.tables.agreement import agreement_tables

KEYS = [SetKey(layer=layer, protocol="top-and-random") for layer in (0, 1)]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return gather(scored_runs(tmp_path, np.random.default_rng(5), "crate-2l", "crate-2l-random", neurons=16))


def apply(results: Results, control: str = "") -> None:
    run = results.models[0].path
    for key in KEYS:
        task = SetTask(
            store=Store.open(run), key=judged_key(replace(key, control=control), "toy", "judge"),
            records=read_records(run, key.layer), protocol=protocol(key.protocol), chosen=chosen("all"),
        )  # fmt: skip
        context = JudgeContext(pieces=[b"?"] * 400, questions=Questions(), llm=Judge(always(1)))
        asyncio.run(judge_set(task, "toy", context))


def test_a_scorer_that_returns_the_simulations_own_number_agrees_with_it(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(results.models[0].path)
    correlations = {key.layer: store.scores(key).correlation for key in KEYS}

    def copied(_: str, windows: Contrast, *__: object) -> Judged:
        of_layer = correlations[windows.neuron.layer]
        right = 10 * int((of_layer < of_layer[windows.neuron.index]).sum())  # ranked as the simulation ranks it
        return Judged(truth=(1,) * 400 + (0,) * 400, answer=(1,) * right + (0,) * (800 - right))

    monkeypatch.setitem(SCORERS, "toy", Scorer(name="toy", needs="chat", run=copied, number="balanced_accuracy"))
    assert agreement_tables(results) == ()
    apply(results, control="shuffled")
    assert agreement_tables(results) == (), "a control is compared with nothing"
    apply(results)
    (table,) = agreement_tables(results)
    ((scorer, title, explained, asked, by, correlation, ends, neurons),) = table.rows
    assert (scorer, title) == ("toy", "CRATE-2L")
    assert (explained, asked, by) == ("lookup, top-and-random", "judge", "lookup")
    assert isinstance(correlation, float)
    assert isinstance(ends, tuple)
    assert isinstance(neurons, int)
    assert correlation == pytest.approx(100)
    assert ends[0] <= correlation <= ends[1] + 1e-9
    assert 5 < neurons <= sum(int((~np.isnan(values)).sum()) for values in correlations.values())
    assert table in ReportContents(results).tables
