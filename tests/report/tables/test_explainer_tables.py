"""Explainers side by side in a report: a language model next to lookup on the same neurons, chance, pairs of models."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.scripted import ScriptedLLM, simulate
from fixtures.synthetic import make_run

from cratelm.activations.records import read_records, records_tokenizer
from cratelm.cli import main
from cratelm.commands import interpret, report
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scoring.correlation import CONSTANT_SIMULATION
from cratelm.interpretation.scoring.statistics import components, holm
from cratelm.interpretation.simulators.language_model import simulate_set
from cratelm.interpretation.stages.pipeline import score_set
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import write_simulations
from cratelm.interpretation.store.neuron_selection import chosen
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.firing import gather_firing
from cratelm.report.results.gather import gather
from cratelm.report.sentences import verdict
from cratelm.report.tables.explainers import explainer_tables
from cratelm.report.tables.paper import by_layer, interpretability, summary

NAME, BY = "top-and-random", "by-rule:scripted"


def ask(
    run: Path, *, neurons: str = "6", seed: int | None = None, samples: int = 1, controls: Sequence[str] = ("shuffled",)
) -> None:
    """Interpret a run with the scripted model, on some neurons."""
    strings = prompt_strings(load_tokenizer(records_tokenizer(run, "fixed")))
    settings = explainer_settings("fixed", samples=samples)
    for layer in range(2):
        for sample in range(samples):
            key = SetKey(layer=layer, protocol=NAME, explainer="scripted", sample=sample)
            task = SetTask(
                store=Store.create(run), key=key, records=read_records(run, layer), protocol=protocol(NAME),
                chosen=chosen(neurons, seed=seed),
            )  # fmt: skip
            asyncio.run(LLMExplainer(llm=ScriptedLLM(), settings=settings, strings=strings).explain(task))
            for control in ("", *controls) if sample == 0 else ("",):
                own = replace(task, key=replace(key, simulator=BY, control=control))
                asyncio.run(simulate_set(own, simulate, {}, strings))
                asyncio.run(score_set(own))


@pytest.fixture
def runs(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    found = [make_run(tmp_path / name, rng, name=name) for name in ("crate-2l", "gpt2-2l")]
    interpret.run(interpret.Options(runs=tuple(found), protocol=(NAME,), controls=("shuffled",)))
    return found


@pytest.mark.usefixtures("quick_report")
def test_a_language_model_is_shown_next_to_lookup_on_the_same_neurons(runs: list[Path], tmp_path: Path) -> None:
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
        means.append(round(100 * float(np.nanmean(lookup.correlation[same])), 1))
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
    with pytest.raises(
        CrateError, match="by the explainer other. Use one of: --explainer scripted --simulator by-rule"
    ):
        gather([run], explainer="other")
    assert main(["neurons", str(run), "--explainer", "scripted"]) == 0
    said = capsys.readouterr().out
    assert "not sampled" in said
    assert "by scripted" in said


def cells_of(run: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row of the scripted model in the table of explainers, and the notes on it."""
    [table] = [table for table in explainer_tables(gather([run], explainer="scripted")) if table.name == "explainers"]
    titles = [column.title for column in table.columns]
    [row] = [row for row in table.rows if row[2] == "scripted"]
    return dict(zip(titles, row, strict=True)), tuple(note for note in table.notes if "control" in note)


@pytest.mark.usefixtures("quick_report")
def test_a_control_of_other_neurons_is_compared_with_nothing(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    ask(run, neurons="0-5", controls=("shuffled", "constant"))
    assert gather([run]).of_other_neurons == ()
    assert cells_of(run)[0]["Shuffled"] == gather([run]).models[0].shuffled[NAME].mean
    ask(run, neurons="4-8", controls=())
    results = gather([run])
    assert (results.models[0].shuffled, results.models[0].shuffled_elsewhere) == ({}, (NAME,))
    said = (
        f"The shuffled control of CRATE-2L on {NAME} is of other neurons than the scores, so it is not compared. "
        f"Run: cratelm interpret {run} --llm URL --controls shuffled, with the --neurons and --neuron-seed of the "
        "scores"
    )
    assert results.of_other_neurons == (said,)
    assert not any("no control with shuffled" in line for line in results.missing), "it is there"
    assert [row[0] for row in summary(results).rows] == ["CRATE-2L", "shuffled"]
    for table in (summary(results), interpretability(results), by_layer(results)):
        assert said in table.notes
        shuffled = [dict(zip([one.title for one in table.columns], row, strict=True)) for row in table.rows]
        assert all(cells.get("Shuffled") is None for cells in shuffled)
    assert summary(results).rows[1][1] is None
    assert "shuffled" not in " ".join(verdict(results))
    assert [run.shuffled for run in gather_firing(results)] == [None]
    cells, notes = cells_of(run)
    assert (cells["Shuffled"], cells["Constant"]) == (None, None)
    assert [note.split(" is of other neurons")[0] for note in notes if "is of other neurons" in note] == [
        f"The {name} control of CRATE-2L on {NAME}, explained by scripted, simulated by {BY}"
        for name in ("shuffled", "constant")
    ]
    assert not any("not made. Run: cratelm interpret RUN --llm" in note for note in notes)
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert said.partition(" Run:")[0] in " ".join(capsys.readouterr().out.split())
    ask(run, neurons="4-8")
    assert gather([run]).of_other_neurons == ()
    assert set(gather([run]).models[0].shuffled) == {NAME}, "what the note says to run makes it"


def test_a_sentence_on_controls_says_where_there_is_none_to_compare(runs: list[Path]) -> None:
    results = gather(runs[:1])
    scores, shuffled = results.models[0].scores[NAME], results.models[0].shuffled[NAME]
    other = "random-only"
    model = replace(
        results.models[0], scores={NAME: scores, other: scores}, shuffled={NAME: shuffled}, shuffled_elsewhere=(other,)
    )
    [sentence] = [
        text
        for text in verdict(replace(results, models=(model,), protocols=(NAME, other)))
        if "shuffled explanations" in text
    ]
    assert "and not compared points against shuffled explanations" in sentence


def test_a_control_without_any_score_was_made(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    ask(run, controls=("shuffled", "constant"))
    store = Store.open(run)
    for layer in range(2):
        key = SetKey(layer=layer, protocol=NAME, explainer="scripted", simulator=BY, control="constant")
        scores = store.scores(key)
        nothing = np.full(len(scores.neuron), np.nan)
        reasons = (CONSTANT_SIMULATION,) * len(nothing)
        store.write_scores(key, replace(scores, correlation=nothing, reason=reasons))
    cells, notes = cells_of(run)
    assert cells["Constant"] == "0/12 scored"
    assert isinstance(cells["Shuffled"], float)
    assert not any("A dash under" in note for note in notes if "--llm" in note)


def test_a_control_has_one_value_in_every_table(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    ask(run)
    store = Store.open(run)
    for layer, points in enumerate((-0.3449, -0.4449)):  # -0.3 and -0.4 as in the paper, whose mean is not theirs
        key = SetKey(layer=layer, protocol=NAME, explainer="scripted", simulator=BY, control="shuffled")
        scores = store.scores(key)
        same = np.full(len(scores.neuron), points / 100)
        store.write_scores(key, replace(scores, correlation=same, reason=("",) * len(same)))
    results = gather([run])
    [row] = interpretability(results).rows
    shown = row[[column.title for column in interpretability(results).columns].index("Shuffled")]
    assert cells_of(run)[0]["Shuffled"] == shown == pytest.approx(-0.35)


def test_lookup_is_shown_where_a_language_model_scored_less(runs: list[Path]) -> None:
    ask(runs[0])
    assert gather(runs).explainer == "lookup", "the other run knows no language model"
    ask(runs[1])
    assert gather(runs).explainer == "scripted"
    interpret.run(interpret.Options(runs=tuple(runs[1:]), protocol=("random-only",)))
    assert gather(runs).explainer == "lookup", "the model was not asked about one protocol"
    assert gather(runs[:1]).explainer == "scripted"


def test_the_share_of_the_simulators_is_shown_if_several_simulated_the_same_explanations(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    ask(run)
    store, other, columns = Store.open(run), f"other:{BY}", []
    for layer in range(2):
        key = SetKey(layer=layer, protocol=NAME, explainer="scripted", simulator=BY)
        scores = store.scores(key)
        changed = np.clip(scores.correlation + rng.normal(0, 0.1, len(scores.neuron)), -1, 1)
        write_simulations(store, replace(key, simulator=other), store.simulations(key))
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
