import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import make_run

from cratelm import rundir
from cratelm.commands import interpret, report
from cratelm.errors import CrateError
from cratelm.interpretation.scoring.correlation import aggregate
from cratelm.interpretation.store.database import Store
from cratelm.report.results.gather import gather
from cratelm.report.tables import paper as tables
from cratelm.report.tables.form import ABSENT, Cell, Column, Style, Table, as_csv, as_latex, as_markdown, written
from cratelm.workflows.naming import report_folder

TABLES = ("performance", "interpretability", "layers", "firing", "firing_layers", "paired")
FIGURES = ("loss", "scores", "firing", "firing_layers")
HOSTILE = "=cmd|a & b_c $x$ #1 50% {y} ~ ^ \\input{z} <script>`*[k](l)\n\\\\"


def scored_runs(folder: Path, rng: np.random.Generator, *names: str, layers: int = 2, neurons: int = 12) -> list[Path]:
    """Runs with scores and shuffled explanations; a name that ends in `-random` is the control of the rest of it."""
    runs = []
    for name in names:
        control = "random-init" if name.endswith("-random") else None
        of = name.removesuffix("-random")
        runs.append(make_run(folder / name, rng, name=of, layers=layers, neurons=neurons, control=control))
    interpret.run(interpret.Options(runs=tuple(runs), controls=("shuffled",)))
    return runs


def cells(table: Table, title: str) -> list[tables.Cell]:
    column = [column.title for column in table.columns].index(title)
    return [row[column] for row in table.rows]


def change(path: Path, **fields: object) -> None:
    rundir.write_json(path, {**json.loads(path.read_text()), **fields})


def test_the_interpretability_table_holds_what_the_scores_give(tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l")
    table = tables.interpretability(gather([run]))
    for place, protocol in enumerate(cells(table, "Protocol")):
        layers = [Store.open(run).read_scores(layer, str(protocol)) for layer in range(2)]
        means = [round(100 * float(np.nanmean(one.correlation)), 1) for one in layers]
        assert cells(table, "Mean")[place] == pytest.approx(np.mean(means))
        assert cells(table, "Variance")[place] == pytest.approx(np.var(means))
        zeros = np.mean([100 * np.nan_to_num(one.correlation).mean() for one in layers])
        assert cells(table, "Undefined = 0")[place] == pytest.approx(zeros)
        defined = sum(int((~np.isnan(one.correlation)).sum()) for one in layers)
        assert cells(table, "Scored")[place] == (defined, 24)
        shuffled = [Store.open(run).read_scores(layer, str(protocol), control="shuffled") for layer in range(2)]
        assert cells(table, "Shuffled")[place] == aggregate(shuffled, protocol=str(protocol)).mean
        found = aggregate(layers, protocol=str(protocol))
        assert cells(table, "95 % interval")[place] == found.interval


def test_every_interpretability_number_has_loss_parameters_and_flops_in_its_row(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    results = gather(scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l"))
    for table in (tables.summary(results), tables.interpretability(results), tables.by_layer(results)):
        for title in ("Loss", "Parameters", "FLOPs"):
            assert all(isinstance(cell, int | float | None) for cell in cells(table, title))
    loss = json.loads((tmp_path / "gpt2-2l" / "evaluation.json").read_text())["nats_per_token"]
    assert loss in cells(tables.by_layer(results), "Loss")


def test_the_layer_table_counts_every_neuron_once(tmp_path: Path, rng: np.random.Generator) -> None:
    table = tables.by_layer(gather(scored_runs(tmp_path, rng, "crate-2l", "crate-2l-random")))
    for counted, *lost in zip(
        *(cells(table, title) for title in ("Scored", "Dead", "Too rare", "Otherwise")), strict=True
    ):
        assert isinstance(counted, tuple)
        assert counted[0] + sum(count for count in lost if isinstance(count, int)) == counted[1] == 12
    assert set(cells(table, "Dead")) == {1}


def test_a_control_is_shown_next_to_its_model_and_below_it(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = scored_runs(tmp_path, rng, "gpt2-2l-random", "crate-2l", "gpt2-2l", "crate-2l-random")
    results = gather(runs)
    assert [run.title for run in results.rows] == [
        "CRATE-2L", "CRATE-2L, random-init", "GPT-2-2L", "GPT-2-2L, random-init",
    ]  # fmt: skip
    table = tables.interpretability(results)
    means, beside = cells(table, "Mean"), cells(table, "Random-init")
    assert beside[0::2] == means[1::2]
    assert beside[1::2] == [None] * len(beside[1::2])


def test_runs_of_one_name_are_told_apart_and_keep_their_own_controls(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = [
        path for seed in ("one", "two") for path in scored_runs(tmp_path / seed, rng, "crate-2l", "crate-2l-random")
    ]
    models = gather(runs[::-1]).models
    assert [model.title for model in models] == ["CRATE-2L (two/crate-2l)", "CRATE-2L (one/crate-2l)"]
    for model in models:
        assert model.random_init is not None
        assert model.random_init.path.parent == model.path.parent


def test_from_six_layers_on_the_means_with_the_last_layer_are_shown_too(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-s", layers=6, neurons=8)
    table = tables.interpretability(gather([run]))
    layers = [Store.open(run).read_scores(layer, "anthropic") for layer in range(6)]
    means = [round(100 * float(np.nanmean(one.correlation)), 1) for one in layers]
    row = cells(table, "Protocol").index("anthropic")
    assert cells(table, "Mean")[row] == pytest.approx(np.mean(means[:5]))
    assert cells(table, "Mean, all layers")[row] == pytest.approx(np.mean(means))
    [two_layers] = scored_runs(tmp_path, rng, "crate-2l")
    assert "Mean, all layers" not in as_markdown(tables.interpretability(gather([two_layers])))


def test_layers_without_any_score_give_dashes_not_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    results = gather(scored_runs(tmp_path, rng, "crate-2l", neurons=3))
    table = tables.interpretability(results)
    assert set(cells(table, "Mean")) == {None}
    assert "nan" not in as_csv(table).lower()
    assert f"| {ABSENT} |" in as_markdown(table)


@pytest.mark.parametrize("text", ["null", "NaN", "Infinity"])
def test_numbers_an_evaluation_does_not_have_are_dashes(text: str, tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l")
    change(run / "evaluation.json", standard_error=json.loads(text), perplexity=json.loads(text))
    table = tables.performance(gather([run]))
    assert cells(table, "Standard error") == cells(table, "Perplexity") == [None]
    assert isinstance(cells(table, "Loss")[0], float)
    assert f"| {ABSENT} | {ABSENT} |" in as_markdown(table)


def test_csv_holds_unrounded_what_markdown_rounds(tmp_path: Path, rng: np.random.Generator) -> None:
    results = gather(scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l"))
    for table in (tables.performance(results), tables.interpretability(results), tables.by_layer(results)):
        rows = list(csv.DictReader(io.StringIO(as_csv(table))))
        shown = [line.strip("| ").split(" | ") for line in as_markdown(table).splitlines() if line.startswith("| ")]
        for row, texts in zip(rows, shown[2:], strict=True):
            for column, text in zip(table.columns, texts, strict=True):
                if column.style in ("0.1", "0.01", "0.001") and text != ABSENT:
                    number = float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))
                    assert abs(float(row[column.heading]) - number) <= 0.5001 * float(
                        "1e-" + str(len(column.style) - 2)
                    )


def test_text_that_means_something_to_a_format_is_only_text_in_it() -> None:
    table = Table(
        name="t", caption=HOSTILE, columns=(Column(HOSTILE), Column("n", "0.1")), rows=((HOSTILE, 1.0), ("-1+1", 2.0))
    )
    markdown = [line for line in as_markdown(table).splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line.replace(r"\\", ""))) == 3 for line in markdown)
    assert re.search(r"(?<!\\)[<`*\[$]", as_markdown(table).replace(r"\\", "").replace("**", "")) is None
    assert re.search(r"&(?!amp;)", as_markdown(table)) is None
    rows = list(csv.reader(io.StringIO(as_csv(table))))
    assert [row[0][0] for row in rows[1:]] == ["'", "'"]
    assert rows[1][0] == "'" + HOSTILE
    latex = as_latex(table)
    body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")]
    plain = body.replace(r"\textbackslash{}", "").replace(r"\\", "").replace(r"\midrule", "")
    assert plain.count(" & ") == 2
    assert re.search(r"(?<!\\)[&%$#_]", plain.replace(" & ", " ")) is None
    assert r"\input" not in latex
    assert latex.count("{") == latex.count("}")


@pytest.mark.parametrize(
    ("cell", "style", "text"),
    [
        (-0.04, "0.1", "0.0"), (-0.06, "0.1", "−0.1"), (1234.5678, "0.01", "1,234.57"), (None, "0.1", ABSENT),
        (math.nan, "0.1", ABSENT), ((-1.26, 2.0), "interval", "[−1.3, 2.0]"), (6_637_056, "human", "6.64M"),
        ((3, 3072), "share", "3/3,072"), (12, "count", "12"),
    ],
)  # fmt: skip
def test_a_cell_is_written_as_its_column_says(cell: Cell, style: Style, text: str) -> None:
    assert written(cell, style) == text


def test_what_is_not_there_yet_is_named_with_the_command_that_makes_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    with pytest.raises(CrateError, match=f"not scored. Run: cratelm interpret {run}$"):
        gather([run])
    interpret.run(interpret.Options(runs=(run,), protocol=("random-only",), layer=(1,)))
    with pytest.raises(CrateError, match=r"scored on 1 of its 2 layers .*--protocol random-only"):
        gather([run])
    interpret.run(interpret.Options(runs=(run,), protocol=("random-only",)))
    (run / "evaluation.json").unlink()
    results = gather([run])
    assert results.protocols == ("random-only",)
    assert any(line.endswith(f"cratelm evaluate {run} --data DIR") for line in results.missing)
    assert cells(tables.performance(results), "Loss") == ["not evaluated"]
    assert f"cratelm evaluate {run} --data DIR" in as_markdown(tables.performance(results)).replace("\\", "")
    with pytest.raises(CrateError, match=r"no compat scores .*--mode compat"):
        gather([run], mode="compat")
    with pytest.raises(CrateError, match=r"run\.json is not there"):
        gather([tmp_path])


def test_scores_in_compat_mode_are_reported_as_such(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "gpt2-2l", rng, name="gpt2-2l", mode="compat")
    interpret.run(interpret.Options(runs=(run,), mode="compat"))
    assert "compat mode" in tables.interpretability(gather([run], mode="compat")).caption


@pytest.mark.usefixtures("quick_report")
def test_the_command_writes_every_file_and_prints_a_table_of_80_columns(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l", "crate-2l-random")
    capsys.readouterr()
    report.run(report.Options(runs=tuple(runs)))
    printed = capsys.readouterr().out
    folder = tmp_path / "report"
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.{kind}" for name in TABLES for kind in ("md", "csv", "tex")),
        *(f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")),
        "report.html",
    }  # fmt: skip
    *lines, last = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert last == str(folder / "report.html")
    for row in tables.summary(gather(runs)).rows:
        assert str(row[0]) in printed
        assert str(row[1]).split()[0] in printed


def test_a_report_of_one_run_lies_in_the_run() -> None:
    assert report_folder((Path("runs/a"),)) == Path("runs/a/report")
    assert report_folder((Path("runs/a"), Path("runs/b/c"))) == Path("runs/report")


def test_a_newer_format_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    [run] = scored_runs(tmp_path, rng, "crate-2l")
    change(run / "run.json", format_version=rundir.FORMAT_VERSION + 1)
    with pytest.raises(CrateError, match="format version"):
        gather([run])


def test_a_table_with_ragged_rows_is_a_programming_error() -> None:
    table = Table(name="t", caption="", columns=(Column("a"), Column("b")), rows=())
    with pytest.raises(AssertionError):
        replace(table, rows=(("only one",),))
