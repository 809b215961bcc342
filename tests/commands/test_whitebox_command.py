"""`cratelm whitebox`: what it writes, draws and refuses, and what a training measures along the way."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fixtures.synthetic import make_run
from fixtures.tiny import hidden_bar, make_tokens, random_model, short_training, tiny_config, train_quietly

from cratelm.cli import main
from cratelm.model.config import Architecture
from cratelm.report.figures.whitebox import PANELS, whitebox_figures
from cratelm.report.results.whitebox import View, _view, objective_per_token, open_views, penalty_term
from cratelm.report.tables.form import written
from cratelm.report.tables.whitebox import whitebox_tables
from cratelm.rundir import write_json
from cratelm.whitebox.measure import MeasureConfig, logged_numbers, measure
from cratelm.workflows.measurements import measurements
from cratelm.workflows.printed_tables import print_tables


@pytest.fixture
def runs(tmp_path: Path, rng: np.random.Generator) -> tuple[list[Path], Path]:
    """A trained CRATE with measurements along the way, its control, and a GPT-2."""
    data = make_tokens(tmp_path / "tokens", rng, documents=300)
    made = []
    for arch in get_args(Architecture):
        run = tmp_path / f"{arch}-2l"
        config = tiny_config(arch, vocab_size=data.vocab_size)
        training = short_training(measure_every=6)
        train_quietly(training, config, data, run, measurements=measurements(("whitebox",), data, run))
        made.append(run)
    from cratelm.training.train import write_control

    write_control(made[0], tmp_path / "crate-2l-random")
    return [*made, tmp_path / "crate-2l-random"], data.path


def test_the_command_writes_measurements_tables_and_figures(
    runs: tuple[list[Path], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, data = runs
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [*map(str, result), "--data", str(data), "--device", "cpu", "--tokens", "256"]
    assert main(["whitebox", *arguments]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "CRATE-2L" in out
    report = result[0].parent / "report"
    names = {path.name for path in report.iterdir()}
    tables = ("compression", "sparsification", "dictionary")
    assert names == {
        *(f"whitebox_{table}.{suffix}" for table in tables for suffix in ("md", "csv", "tex")),
        *(f"{figure}.{suffix}" for figure in ("whitebox", "whitebox_training") for suffix in ("svg", "png")),
    }
    written = json.loads((result[0] / "whitebox.json").read_text())
    assert (written["tokens"], written["tokens_per_set"], written["split"]) == (256, 16, "val")
    assert written["origin"]["command"]
    assert written["data_hash"] == json.loads((data / "tokens.json").read_text())["splits"]["val"]["sha256"]
    views = open_views(result)
    assert [view.of for view in views] == [None, None, "crate-2l"]
    # Along the training: step 0, 6 and 12, of both layers, and the first point is the control's own measurement.
    tokens, values = views[0].curves["layer_1.active"]
    assert tokens == (0, 384, 768)
    assert "layer_1.stability" not in views[1].curves
    assert values[0] == pytest.approx(dict(logged_numbers(views[2].layers[1]))["active"], abs=0.05)
    compression, _, dictionary = whitebox_tables(views)
    assert len(compression.rows) == 6
    assert len(dictionary.rows) == 4
    titles = [column.title for column in compression.columns]
    of_layer: dict[str, Any] = dict(zip(titles, compression.rows[0], strict=True))
    assert of_layer["ΔR after"] == pytest.approx(of_layer["R after"] - of_layer["Rᶜ after"])
    assert of_layer["ΔR change"] == pytest.approx(of_layer["ΔR after"] - of_layer["ΔR before"])
    assert of_layer["Sparse objective"] == views[0].layers[0]["sparse_objective"]["shared"]["mean"]
    penalty = of_layer["Penalty per token"]
    assert of_layer["Objective per token"] == pytest.approx(of_layer["ΔR after"] - penalty)
    whole = of_layer["ΔR after"] - of_layer["Tokens per set"] * penalty
    assert of_layer["Sparse objective"] == pytest.approx(whole, rel=1e-5)
    assert views[0].curves["layer_1.rate_reduction_after"][1][0] == pytest.approx(
        dict(logged_numbers(views[2].layers[1]))["rate_reduction_after"], rel=0.05, abs=0.5
    )
    figure = whitebox_figures(views)["whitebox"]
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [panel.title for panel in PANELS]
    drawn = np.array([line.get_ydata() for line in panels["Active neurons"].lines])
    expected = [[100 * dict(logged_numbers(layer))["active"] for layer in view.layers] for view in views]
    assert np.allclose(drawn, expected)


@pytest.mark.usefixtures("quick_report")
def test_the_report_has_a_section_where_the_file_is(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    assert main(["interpret", str(run)]) == 0
    model = random_model(tiny_config(), rng)
    result = measure(model, rng.integers(272, size=64).astype(np.uint16), MeasureConfig(), bar=hidden_bar())
    write_json(run / "whitebox.json", result)
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert "White-box view: compression by attention" in page
    assert 'class="figure-whitebox"' in page
    assert (run / "report" / "whitebox_dictionary.tex").exists()
    assert (run / "report" / "whitebox.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "15"], "a coding rate of a model of width 16 needs 16 tokens"),
        (["--tokens", "0"], "got '0'"),
        (["--epsilon", "0"], "--epsilon must be 1e-06 to 1e+06, got 0"),
        (["--epsilon", "nan"], "--epsilon must be 1e-06 to 1e+06, got nan"),
        (["--epsilon", "1e-200"], "--epsilon must be 1e-06 to 1e+06, got 1e-200"),
        (["--epsilon", "inf"], "--epsilon must be 1e-06 to 1e+06, got inf"),
        (["--tolerance", "nan"], "--tolerance must be a number of at least 0, got nan"),
        (["--tolerance", "inf"], "--tolerance must be a number of at least 0, got inf"),
        (["--split", "nothing"], "nothing"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.weights import save_model

    data = make_tokens(tmp_path / "tokens", rng)
    run = tmp_path / "run"
    model = random_model(tiny_config(vocab_size=data.vocab_size), rng)
    save_model(model, run / "model", load_tokenizer(data.path))
    capsys.readouterr()
    assert main(["whitebox", str(run), "--data", str(data.path), "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (run / "whitebox.json").exists()


@pytest.mark.parametrize("columns", [52, 60, 80, 100, 140])
def test_no_name_heading_or_number_breaks_in_the_terminal(
    columns: int, rng: np.random.Generator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measure(
        random_model(tiny_config(), rng),
        rng.integers(272, size=64).astype(np.uint16),
        MeasureConfig(),
        bar=hidden_bar(),
    )
    views = [
        View(title=title, name=title, arch="crate", of=None, measurements=result, curves={})
        for title in ("CRATE-2L", "CRATE-2L, random-init")
    ]
    monkeypatch.setenv("COLUMNS", str(columns))
    tables = whitebox_tables(views)
    capsys.readouterr()
    print_tables(tables)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    words = set(out.replace(",", " ").split())
    for table in tables:
        shown = [column for column in table.columns if column.title not in ("Tokens per set", "Sets")]
        for column in shown[2:]:
            assert set(column.heading.split()) <= words
        for row in table.rows:
            cells = [written(cell, column.style) for cell, column in zip(row, table.columns, strict=True)]
            assert {"CRATE-2L", *(["random-init"] if "random" in cells[0] else [])} <= words
            assert all(cell.replace(",", " ").split()[-1] in words for cell in cells[2 : len(shown)])


def test_a_file_from_before_still_gives_tables_and_figures(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    result = measure(model, rng.integers(272, size=64).astype(np.uint16), MeasureConfig(), bar=hidden_bar())
    result = json.loads(json.dumps(result))
    for layer in result["layers"]:
        for name in ("rate_reduction", "sparse_objective", "objective_at_zero"):
            del layer[name]
    old = View(title="old", name="old", arch="crate", of=None, measurements=result, curves={})
    compression, sparsification, _ = whitebox_tables([old])
    titles = [column.title for column in compression.columns]
    assert compression.rows[0][titles.index("ΔR after")] is None
    assert sparsification.rows[0][[column.title for column in sparsification.columns].index("Objective step 2")] > 0  # type: ignore[operator]
    whitebox_figures([old])


def test_a_file_without_the_penalty_per_token_gives_it_from_its_other_numbers(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(), rng)
    measured = measure(model, rng.integers(272, size=64).astype(np.uint16), MeasureConfig(), bar=hidden_bar())
    old = json.loads(json.dumps(measured))
    for layer in old["layers"]:
        del layer["penalty_per_token"]
    (tmp_path / "whitebox.json").write_text(json.dumps(old))
    view = _view(tmp_path, "old", {"name": "old", "arch": "crate"})
    for layer, new in zip(view.layers, measured["layers"], strict=True):
        assert penalty_term(layer) == pytest.approx(new["penalty_per_token"]["mean"], rel=1e-6)
        assert objective_per_token(layer) == pytest.approx(objective_per_token(new), rel=1e-6)
