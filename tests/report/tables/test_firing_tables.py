"""Consistency and distinctiveness in the report: tables, sentences, figures, and neurons side by side."""

import asyncio
import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.judges import Judge
from fixtures.synthetic import make_run
from interpretation.scorers.test_new_scorer import toy
from interpretation.stages.test_judge import always
from report.tables.test_tables import cells, scored_runs

from cratelm import read_records
from cratelm.commands import interpret
from cratelm.interpretation.firing.means import ALL, mean_firing
from cratelm.interpretation.firing.measures import STATED, THRESHOLDS, count_sets
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.registry import SCORERS, Scorer
from cratelm.interpretation.scoring.small_samples import pooled_freedom
from cratelm.interpretation.scoring.statistics import interval
from cratelm.interpretation.stages.judge import JudgeContext, judge_set, judged_key
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import write_simulations
from cratelm.interpretation.store.neuron_selection import chosen
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.contents import ReportContents
from cratelm.report.figures.firing import firing_figures
from cratelm.report.page.html import write_report
from cratelm.report.results.firing import RELEVANT_NEEDED, RunFiring, gather_firing
from cratelm.report.results.gather import Results, RunResult, gather
from cratelm.report.sentences import difference, firing_sentences
from cratelm.report.tables.firing import firing_tables
from cratelm.report.tables.form import points
from cratelm.report.tables.scorers import judged_tables


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Made once; what is compared with a threshold is compared on these numbers."""
    rng, names = np.random.default_rng(5), ("crate-2l", "crate-2l-random", "gpt2-2l")
    return gather(scored_runs(tmp_path_factory.mktemp("runs"), rng, *names, neurons=16))


@pytest.fixture(scope="module")
def found(results: Results) -> tuple[RunFiring, ...]:
    return gather_firing(results)


def keys(control: str = "") -> list[SetKey]:
    return [SetKey(layer=layer, protocol="top-and-random", control=control) for layer in (0, 1)]


def test_the_table_holds_what_the_simulations_give(found: tuple[RunFiring, ...]) -> None:
    table, layers = firing_tables(found)
    titles = [str(title) for title in cells(table, "Model")]
    assert titles == 2 * [
        "CRATE-2L", "CRATE-2L, shuffled", "CRATE-2L, random-init", "CRATE-2L, random-init, shuffled", "GPT-2-2L",
        "GPT-2-2L, shuffled",
    ]  # fmt: skip
    runs = {one.run.title: one.run.path for one in found}
    for place, (kind, title) in enumerate(zip(cells(table, "Excerpts"), titles, strict=True)):
        control = "shuffled" if title.endswith(", shuffled") else ""
        counted = count_sets(runs[title.removesuffix(", shuffled")], keys(control))
        measures = [one.kinds[str(kind)].measures[:, STATED] for one in counted]
        expected = 100 * np.mean([np.nanmean(one, axis=0) for one in measures], axis=0)
        shown = [cells(table, name)[place] for name in ("Consistency", "Strength", "Distinctiveness", "Of mass")]
        np.testing.assert_allclose(np.array(shown, dtype=float), expected)
        firing = 100 * np.mean([one.kinds[str(kind)].firing.mean() for one in counted])
        assert cells(table, "Fires on any token")[place] == pytest.approx(firing)
        assert cells(table, "Neurons")[place] == sum(len(one.neuron) for one in counted)
        ends = cells(table, "95 % interval")[place]
        assert isinstance(ends, tuple)
        assert ends[0] < expected[0] < ends[1] or ends[0] == ends[1]
    assert len(layers.rows) == 2 * len(table.rows)


def test_planted_models_stand_above_their_controls(found: tuple[RunFiring, ...]) -> None:
    crate, control, _ = found
    assert crate.shuffled is not None
    for name in ("consistency", "distinctiveness_mass"):
        own = crate.own.overall["random"].interval(name)
        for other in (crate.shuffled.overall["random"], control.own.overall["random"]):
            ends = other.interval(name)
            assert own is not None and ends is not None  # noqa: PT018
            assert own[0] > ends[1]


def test_a_difference_is_of_means_and_its_interval_of_resampled_ones(found: tuple[RunFiring, ...]) -> None:
    ours, theirs = found[0].own.overall["random"], found[2].own.overall["random"]
    value, low, high = difference(ours, theirs, ("consistency", "firing"))
    expected = [(one.of("consistency") or 0) - (one.of("firing") or 0) for one in (ours, theirs)]
    assert value == pytest.approx(expected[0] - expected[1])
    samples = [one.column("consistency") - one.column("firing") for one in (ours, theirs)]
    freedom = pooled_freedom(
        samples,
        [min(float(one.freedom[ALL.index(name)]) for name in ("consistency", "firing")) for one in (ours, theirs)],
    )
    assert (low, high) == interval(samples[0] - samples[1], freedom)
    assert low < value < high
    same = difference(ours, ours, ("distinctiveness",))
    assert same == (0, 0, 0)


def test_models_are_resampled_apart(found: tuple[RunFiring, ...]) -> None:
    """Two models with the same counts: from shared random numbers their difference would have no width."""
    assert len({one.run.identity for one in found}) == len(found)
    counted = count_sets(found[0].run.path, keys())
    for model in (one.run.identity for one in found):
        again, other = (mean_firing(counted, model=name).overall["random"] for name in (model, f"{model}, another"))
        assert difference(again, again, ("consistency",)) == (0, 0, 0)
        value, low, high = difference(again, other, ("consistency",))
        assert value == 0
        assert low < 0 < high
    own = mean_firing(counted, model=found[0].run.identity).overall["random"]
    np.testing.assert_array_equal(own.samples, found[0].own.overall["random"].samples)


def test_the_sentences_name_both_models_and_what_chance_gives(found: tuple[RunFiring, ...]) -> None:
    first, second = firing_sentences(found)
    ours, theirs = found[0].own.overall["random"], found[2].own.overall["random"]
    for mean in (ours, theirs):
        for name in ("consistency", "firing"):
            assert f"{mean.of(name):.1f} %" in first
        assert f"{mean.of('distinctiveness'):.1f} %" in second
    assert "CRATE-2L" in first
    assert "GPT-2-2L" in second
    assert firing_sentences(found[:2]) == []


def test_examples_are_the_most_consistent_and_distinctive_neurons(found: tuple[RunFiring, ...]) -> None:
    shown = {entry.run.title: entry.examples for entry in found if entry.examples}
    assert list(shown) == ["CRATE-2L", "GPT-2-2L"]
    for title, examples in shown.items():
        run = next(one.run.path for one in found if one.run.title == title)
        counted, store = count_sets(run, keys()), Store.open(run)
        every = [
            (2 / (1 / c + 1 / d), layer.layer, int(neuron))
            for layer in counted
            for counts in [layer.kinds["random"]]
            for neuron, (c, _, d, _), relevant in zip(
                layer.neuron, counts.measures[:, STATED], counts.relevant[:, :, STATED, 0], strict=True
            )
            if relevant.sum() >= RELEVANT_NEEDED and c > 0 and d > 0
            and not np.isnan(store.scores(keys()[layer.layer]).correlation[neuron])
        ]  # fmt: skip
        assert [(one.layer, one.index) for one in examples] == [
            (layer, neuron) for _, layer, neuron in sorted(every, reverse=True)[: len(examples)]
        ]
        for one in examples:
            assert one.explanation == store.texts(keys()[one.layer])[one.index]
            assert len(one.excerpts) == len(one.relevant) == 3
            for excerpt, relevant in zip(one.excerpts, one.relevant, strict=True):
                assert excerpt.tokens.shape == relevant.shape
                assert (excerpt.activations[relevant] > 0).mean() > 0.5 or not relevant.any()


def test_the_curves_drawn_are_the_curves_measured(found: tuple[RunFiring, ...]) -> None:
    figure = firing_figures(found)["firing"]
    for axes, kind in zip(figure.axes, ("top", "random"), strict=True):
        assert axes.get_title(loc="left") == f"{kind} excerpts"
        curve = next(line for line in axes.lines if len(line.get_xdata()) == len(THRESHOLDS))  # type: ignore[arg-type]
        mean = found[0].own.overall[kind]
        np.testing.assert_allclose(np.asarray(curve.get_xdata(), dtype=float), mean.curve("distinctiveness"))
        np.testing.assert_allclose(np.asarray(curve.get_ydata(), dtype=float), mean.curve("consistency"))
        assert {text.get_text() for text in axes.texts} == {"0.05", "0.3", "0.9"}
    layers = firing_figures(found)["firing_layers"]
    assert [axes.get_title(loc="left") for axes in layers.axes] == [
        f"{name}, {kind} excerpts" for name in ("consistency", "distinctiveness") for kind in ("top", "random")
    ]
    assert firing_figures(()) == {}
    assert firing_tables(()) == ()


@pytest.mark.usefixtures("quick_report")
def test_the_report_has_tables_figures_and_neurons_side_by_side(results: Results, tmp_path: Path) -> None:
    page = write_report(ReportContents(results), tmp_path).read_text()
    files = {
        f"{name}.{suffix}" for name in ("firing", "firing_layers") for suffix in ("md", "csv", "tex", "svg", "png")
    }
    assert files <= {file.name for file in tmp_path.iterdir()}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "firing.csv").read_text())))
    assert {row["Excerpts"] for row in rows} == {"top", "random"}
    assert all(0 <= float(row["Consistency (%)"]) <= 100 for row in rows)
    section = page.split('<section id="firing">')[1].split("</section>")[0]
    assert section.count('<article class="neuron">') == 6
    assert '<div class="side-by-side">' in section
    assert "Excerpts scored by top-and-random." in section
    assert re.search(r'<u class="p[1-8]( faint)?"><span class="\w+" title="[^"]+, predicted \d+ % of the', section)
    for run in gather_firing(results):
        for one in run.examples:
            assert one.score == Store.open(run.run.path).scores(keys()[one.layer]).correlation[one.index]
            card = f'neuron {one.index}</h5><span class="score">{points(100 * one.score)}<small> points'
            assert f"Layer {one.layer}, {card}" in section
    assert 'href="#firing"' in page


def test_the_table_has_rows_for_other_explanations_and_simulations(results: Results) -> None:
    run = results.models[1].path
    store, made = Store.open(run), replace(keys()[0], explainer="some-model", simulator="all-at-once:some-model")
    for key in keys():
        write_simulations(store, replace(made, layer=key.layer), store.simulations(key))
    again = gather_firing(replace(results, models=results.models[1:]))
    ((who, firing),) = again[0].others
    assert who == "explained by some-model, simulated by all-at-once:some-model"
    np.testing.assert_array_equal(firing.overall["top"].values, again[0].own.overall["top"].values)
    titles = cells(firing_tables(again)[0], "Model")
    assert titles[:3] == ["GPT-2-2L", "GPT-2-2L, shuffled", f"GPT-2-2L, {who}"]


def test_other_scorers_have_a_separate_table(results: Results) -> None:
    run = results.models[0].path
    assert judged_tables(results) == ()
    for layer in (0, 1):
        for scorer, judge in (("intruder", Judge(lambda *_: '{"intruder": 1}')), ("detection", Judge(always(1)))):
            key = judged_key(SetKey(layer=layer, protocol="top-and-random"), scorer, "judge")
            task = SetTask(
                store=Store.open(run), key=key, records=read_records(run, layer), protocol=protocol("top-and-random"),
                chosen=chosen("all"),
            )  # fmt: skip
            asyncio.run(judge_set(task, scorer, JudgeContext(pieces=[b"?"] * 400, questions=Questions(), llm=judge)))
    (table,) = judged_tables(results)
    assert cells(table, "Scorer") == ["detection"] * 3 + ["intruder"] * 3
    assert cells(table, "Layer") == ["0", "1", "mean"] * 2
    assert cells(table, "Explained by") == ["lookup, top-and-random"] * 3 + ["\N{EN DASH}"] * 3
    assert set(cells(table, "Asked")) == {"judge"}
    assert cells(table, "Score")[:3] == [50, 50, 50]
    assert cells(table, "Chance") == [50.0] * 3 + [20.0] * 3
    for judged, few in zip(cells(table, "Judged"), cells(table, "Too few excerpts"), strict=True):
        assert isinstance(judged, tuple)
        assert isinstance(few, int)
        assert judged[0] + few == judged[1]


def test_a_scorer_of_the_registry_is_in_the_table(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "toy", Scorer(name="toy", needs="chat", run=toy, number="balanced_accuracy"))
    run = results.models[1].path
    key = judged_key(SetKey(layer=0, protocol="top-and-random"), "toy", "judge")
    task = SetTask(
        store=Store.open(run), key=key, records=read_records(run, 0), protocol=protocol("top-and-random"),
        chosen=chosen("all"),
    )  # fmt: skip
    asyncio.run(judge_set(task, "toy", JudgeContext(pieces=[b"?"] * 400, questions=Questions(), llm=Judge(always(1)))))
    (table,) = judged_tables(results)
    assert [row[5] for row in table.rows if row[0] == "toy"] == [100.0]
    assert "toy" in table.notes[0]


def with_protocols(results: Results, *names: str) -> Results:
    """The results of runs that are scored by these protocols alone."""

    def alone(run: RunResult) -> RunResult:
        kept = ({name: made[name] for name in names} for made in (run.scores, run.shuffled))
        scores, shuffled = kept
        return replace(run, random_init=None, scores=scores, shuffled=shuffled, examples=())

    return replace(results, protocols=names, models=tuple(map(alone, results.models)))


@pytest.mark.parametrize("name", ["random-only", "anthropic"])
@pytest.mark.usefixtures("quick_report")
def test_runs_without_the_first_protocol_show_the_one_that_is_there(
    results: Results, tmp_path: Path, name: str
) -> None:
    some = with_protocols(results, name)
    assert some.shown == name
    found = gather_firing(some)
    assert [one.run.title for one in found] == ["CRATE-2L", "GPT-2-2L"]
    kinds = ["random"] if name == "random-only" else ["top", "random"]
    for one in found:
        assert list(one.own.overall) == kinds
        counted = count_sets(one.run.path, [replace(key, protocol=name) for key in keys()])
        expected = np.mean([np.nanmean(layer.kinds["random"].measures[:, STATED, 0]) for layer in counted])
        assert one.own.overall["random"].of("consistency") == pytest.approx(100 * expected)
        assert one.examples
        assert all(len(excerpt.tokens) > 3 for example in one.examples for excerpt in example.excerpts)
    page = write_report(ReportContents(some), tmp_path).read_text()
    assert f"Excerpts scored by {name}." in page
    assert f"excerpts scored by {name} in which it fires most" in page
    assert f"Firing on relevant tokens ({name})" in (tmp_path / "firing.md").read_text()
    assert with_protocols(results, "random-only", "anthropic").shown == "random-only"


@pytest.mark.usefixtures("quick_report")
def test_a_run_with_one_protocol_has_its_own_neurons_on_the_page(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    interpret.run(interpret.Options(runs=(run,), protocol=("anthropic",)))
    results = gather([run])
    [model] = results.models
    best = max(Store.open(run).read_scores(0, "anthropic").correlation.tolist(), key=lambda r: (r == r, r))
    assert max(one.correlation for one in model.examples if one.layer == 0) == best
    assert "by their score on anthropic" in write_report(ReportContents(results), tmp_path / "report").read_text()


@pytest.mark.usefixtures("quick_report")
def test_without_scores_of_any_protocol_nothing_is_measured(results: Results, tmp_path: Path) -> None:
    none = with_protocols(results)
    assert (none.shown, gather_firing(none)) == ("", ())
    assert "Not measured" in write_report(ReportContents(none), tmp_path).read_text()
    assert not (tmp_path / "firing.md").exists()
