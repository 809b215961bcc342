"""Explainers side by side in a report: a language model beside lookup on the same neurons, chance, pairs of models."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedLLM, simulate
from synthetic import make_run

from cratelm.activations.records import read_records, records_tokenizer
from cratelm.cli import main
from cratelm.commands import interpret, report
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.interpretation import llm_stages
from cratelm.interpretation.escape import prompt_strings
from cratelm.interpretation.explainer import Explainer, explainer_settings
from cratelm.interpretation.llm_stages import Task
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.sample import chosen
from cratelm.interpretation.schema import SetKey
from cratelm.interpretation.store import Store
from cratelm.report.explainers import components, explainer_tables, holm
from cratelm.report.results import gather

NAME, BY = "top-and-random", "by-rule:scripted"


def ask(run: Path, *, neurons: str = "6", samples: int = 1) -> None:
    """Interpret a run with the scripted model, on some neurons."""
    strings = prompt_strings(load_tokenizer(records_tokenizer(run, "fixed")))
    settings = explainer_settings("fixed", samples=samples)
    for layer in range(2):
        for sample in range(samples):
            key = SetKey(layer=layer, protocol=NAME, explainer="scripted", sample=sample)
            task = Task(
                store=Store.create(run), key=key, records=read_records(run, layer), protocol=protocol(NAME),
                chosen=chosen(neurons),
            )  # fmt: skip
            asyncio.run(llm_stages.explain(task, Explainer(llm=ScriptedLLM(), settings=settings, strings=strings)))
            for control in ("", "shuffled") if sample == 0 else ("",):
                own = replace(task, key=replace(key, simulator=BY, control=control))
                asyncio.run(llm_stages.simulate(own, simulate, {}, strings))
                Store.open(run).write_scores(
                    own.key, llm_stages.score(own.store, own.key, own.records, own.protocol)
                )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    found = [make_run(tmp_path / name, rng, name=name) for name in ("crate-2l", "gpt2-2l")]
    interpret.run(interpret.Options(runs=tuple(found), protocol=(NAME,), controls=("shuffled",)))
    return found


def test_a_language_model_stands_beside_lookup_on_the_same_neurons(runs: list[Path], tmp_path: Path) -> None:
    for run in runs:
        ask(run, samples=2)
    both = gather(runs)
    assert (both.explainer, both.simulator) == ("scripted", BY), "it scored all that lookup did"
    results = gather(runs, explainer="lookup")
    assert (results.explainer, results.simulator) == ("lookup", "")
    side, chance, paired = explainer_tables(results)
    titles = [column.title for column in side.columns]
    rows: list[dict[str, Any]] = [dict(zip(titles, row, strict=True)) for row in side.rows]
    assert [(row["Model"], row["Explained by"], row["Simulated by"]) for row in rows] == [
        ("CRATE-2L", "lookup", "lookup"), ("CRATE-2L", "scripted", BY),
        ("GPT-2-2L", "lookup", "lookup"), ("GPT-2-2L", "scripted", BY),
    ]  # fmt: skip
    store, means = Store.open(runs[0]), []
    for layer in range(2):
        asked = store.read_scores(layer, NAME, explainer="scripted", simulator=BY)
        lookup = store.read_scores(layer, NAME)
        same = asked.neuron[~np.isnan(asked.correlation)]
        means.append(100 * float(np.nanmean(lookup.correlation[same])))
    assert rows[1]["Lookup, same neurons"] == pytest.approx(np.mean(means))
    assert rows[1]["Scored"][1] == 12
    assert rows[0]["Lookup, same neurons"] is None
    assert rows[1]["Shuffled"] < rows[1]["Mean"]
    assert len(chance.rows) == 2
    assert [row[1] for row in paired.rows] == ["CRATE-2L less GPT-2-2L"]
    report.run(report.Options(runs=tuple(runs), explainer="scripted", out=tmp_path / "report"))
    assert "explained by scripted, simulated by by-rule:scripted" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "explainers.md").exists()
    assert [one.described for one in [gather(runs, explainer="scripted")]] == [
        f"explained by scripted, simulated by {BY}"
    ]  # fmt: skip


def test_runs_that_only_a_language_model_scored_are_shown_with_it(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    ask(run)
    results = gather([run])
    assert (results.explainer, results.simulator) == ("scripted", BY)
    [table] = [table for table in explainer_tables(results) if table.name == "explainers"]
    [row] = table.rows
    cells: dict[str, Any] = dict(zip([column.title for column in table.columns], row, strict=True))
    assert cells["Scored"][1] == 12
    assert (cells["Failed"], cells["Constant"], cells["Lookup, same neurons"]) == (0, None, None)
    assert cells["Shuffled"] is not None
    assert [note for note in table.notes if note.startswith("A dash")] == [
        "A dash under constant: not made. Run: cratelm interpret RUN --llm URL --controls constant",
        "A dash under lookup: not made. Run: cratelm interpret RUN --controls shuffled",
    ]
    with pytest.raises(CrateError, match="by the explainer other. There are: --explainer scripted --simulator by-rule"):
        gather([run], explainer="other")
    assert main(["neurons", str(run), "--explainer", "scripted"]) == 0
    said = capsys.readouterr().out
    assert "not sampled" in said
    assert "by scripted" in said


def test_lookup_is_shown_where_a_language_model_scored_less(runs: list[Path]) -> None:
    ask(runs[0])
    assert gather(runs).explainer == "lookup", "the other run knows no language model"
    ask(runs[1])
    assert gather(runs).explainer == "scripted"
    interpret.run(interpret.Options(runs=tuple(runs[1:]), protocol=("random-only",)))
    assert gather(runs).explainer == "lookup", "the model was not asked about one protocol"
    assert gather(runs[:1]).explainer == "scripted"


def test_the_share_of_the_simulators_is_told_where_several_simulated_the_same_explanations(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    ask(run)
    store, other, columns = Store.open(run), f"other:{BY}", []
    for layer in range(2):
        key = SetKey(layer=layer, protocol=NAME, explainer="scripted", simulator=BY)
        scores = store.scores(key)
        changed = np.clip(scores.correlation + rng.normal(0, 0.1, len(scores.neuron)), -1, 1)
        store.write_simulations(replace(key, simulator=other), store.simulations(key))
        store.write_scores(replace(key, simulator=other), replace(scores, correlation=changed))
        columns.append(100 * np.stack([scores.correlation, changed], axis=1))
    points = np.concatenate(columns)
    points = points[np.isfinite(points).all(axis=1)]
    within = points.var(axis=1, ddof=1).mean()
    [table] = [
        table
        for table in explainer_tables(gather([run], explainer="scripted", simulator=BY))
        if table.name == "simulators"
    ]
    [row] = table.rows
    assert row[:5] == (NAME, "CRATE-2L", "scripted", f"{BY}, {other}", len(points))
    assert row[6] == pytest.approx(np.sqrt(within), rel=1e-4)
    assert row[5] == pytest.approx(np.sqrt(max(points.mean(axis=1).var(ddof=1) - within / 2, 0)), rel=1e-4)


def paired_row(runs: list[Path]) -> dict[str, Any]:
    [table] = [table for table in explainer_tables(gather(runs)) if table.name == "paired"]
    [row] = table.rows
    return dict(zip([column.title for column in table.columns], row, strict=True))


def without_scores(run: Path, layer: int) -> None:
    key = SetKey(layer=layer, protocol=NAME)
    scores = Store.open(run).scores(key)
    nothing = np.full(len(scores.neuron), np.nan)
    reasons = ("constant activations",) * len(nothing)
    Store.open(run).write_scores(key, replace(scores, correlation=nothing, reason=reasons))


def test_models_are_compared_in_the_layers_in_which_both_have_scores(runs: list[Path]) -> None:
    crate, gpt2 = runs
    for layer in range(2):  # equal in layer 0, far apart in layer 1, of which one model then has no score
        scores = Store.open(crate).scores(SetKey(layer=layer, protocol=NAME))
        changed = scores if layer == 0 else replace(scores, correlation=0.1 * scores.correlation)
        Store.open(gpt2).write_scores(SetKey(layer=layer, protocol=NAME), changed)
    assert (paired_row(runs)["Layers"], paired_row(runs)["Layers left out"]) == (2, "none")
    without_scores(crate, 1)
    row = paired_row(runs)
    assert row["Difference"] == pytest.approx(0, abs=1e-9)
    low, high = row["95 % interval"]
    assert low < 0 < high, "two models drawn from the same random numbers would differ by nothing at all"
    assert row["p"] > 0.2
    assert (row["Layers"], row["Layers left out"]) == (1, "1: no score in CRATE-2L")
    assert row == paired_row(runs), "the same inputs give the same numbers"
    without_scores(gpt2, 0)
    row = paired_row(runs)
    assert (row["Difference"], row["95 % interval"], row["p"], row["p after Holm"]) == (None, None, None, None)
    assert row["Layers left out"] == "0: no score in GPT-2-2L; 1: no score in CRATE-2L"


def test_components_of_variance_are_those_of_made_up_scores(rng: np.random.Generator) -> None:
    neurons, samples, between, within = 4000, 3, 12.0, 5.0
    scores = rng.normal(0, between, (neurons, 1)) + rng.normal(0, within, (neurons, samples))
    found = components(scores)
    assert found is not None
    assert np.sqrt(found[:2]) == pytest.approx([between, within], rel=0.05)
    assert components(scores[:1]) is None
    alike = components(np.repeat(rng.normal(0, 1, (5, 1)), 2, axis=1))
    assert alike is not None
    assert alike[1] == 0


def test_holm_corrects_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
