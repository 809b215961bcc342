"""Neurons and autoencoder latents: scores times the share kept, and cost."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import make_run

from cratelm import rundir
from cratelm.activations.records import layer_file
from cratelm.commands import interpret, report
from cratelm.interpretation.store.database import Store
from cratelm.report.results.faithfulness import compared
from cratelm.report.results.gather import gather
from cratelm.report.tables.faithfulness import faithfulness, faithfulness_summary
from cratelm.report.tables.form import Table

EVALUATION: dict[str, Any] = {
    "name": "a", "kind": "topk", "tap": "neurons", "layer": 1, "parameters": 1000, "sae_hash": "h", "tokens": 5000,
    "ce": 3.0, "ce_sae": 3.4, "ce_mean": 5.0, "ce_zero": 8.0, "ce_unigram": 7.0, "ce_added": 0.4, "fvu": 0.1,
    "kept_model": 0.9, "recovered_mean": 0.8,
}  # fmt: skip


def make_compared(folder: Path, rng: np.random.Generator, name: str = "crate-2l", **changes: Any) -> Path:
    """A scored run with an autoencoder on layer 1, whose latents are the neurons of layer 0."""
    run = make_run(folder / name, rng, name=name, layers=2, neurons=12)
    file = layer_file(run, "fixed", "sae-a", 1)
    file.parent.mkdir(parents=True)
    shutil.copyfile(layer_file(run, "fixed", "neurons", 0), file)
    records = run / "records" / "fixed" / "records.json"
    taps = {"neurons": {"layers": [0, 1], "signed": False}, "sae-a": {"layers": [1], "signed": False, "sae_hash": "h"}}
    rundir.write_json(records, json.loads(records.read_text()) | {"taps": taps})
    for tap in taps:
        interpret.run(interpret.Options(runs=(run,), tap=tap))
    rundir.write_json(run / "saes" / "a" / "evaluation.json", EVALUATION | changes)
    rundir.write_json(run / "saes" / "a" / "sae.json", {"name": "a", "training_flops": 5_000_000})
    return run


def cells(table: Table, title: str, unit: str = "") -> list[Any]:
    """One column of a table."""
    names = [(column.title, column.unit) for column in table.columns]
    [place] = [i for i, (name, its) in enumerate(names) if name == title and (not unit or its == unit)]
    return [row[place] for row in table.rows]


def test_scores_are_multiplied_by_what_is_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_compared(tmp_path, rng)
    results = gather([run])
    units = compared(results)
    assert [(one.title, one.layer, one.scores[next(iter(one.scores))].total) for one in units] == [
        ("CRATE-2L, neurons", 1, 12), ("CRATE-2L + a", 1, 12)
    ]  # fmt: skip
    table = faithfulness(results, units)
    store = Store.open(run)
    assert len(table.rows) == 6
    for row, (protocol, title) in enumerate(zip(cells(table, "Protocol"), cells(table, "Units"), strict=True)):
        latents = title.endswith("a")
        scores = store.read_scores(1, protocol, tap="sae-a" if latents else "neurons").correlation
        mean = round(100 * float(np.nanmean(scores)), 1)
        kept, layer = (0.9, 0.8) if latents else (1.0, 1.0)
        assert cells(table, "Score")[row] == pytest.approx(mean)
        assert (cells(table, "Kept", "of the model")[row], cells(table, "Kept", "of the layer")[row]) == (kept, layer)
        assert cells(table, "Adjusted")[row] == pytest.approx(mean * kept)
        assert cells(table, "Adjusted, layer")[row] == pytest.approx(mean * layer)
        assert cells(table, "Parameters")[row] == 1_234_567 + (1000 if latents else 0)
        assert cells(table, "Training")[row] == 3 * 2_345_678 * 64_000 + (5_000_000 if latents else 0)
        assert cells(table, "CE added")[row] == (0.4 if latents else 0.0)
        assert cells(table, "Scored")[row] == (int((~np.isnan(scores)).sum()), 12)
    assert not any("inflated" in note for note in table.notes)
    brief = faithfulness_summary(results, units)
    first = cells(table, "Score")[1], cells(table, "Adjusted")[1]
    assert cells(brief, "top-and-random")[1] == f"{first[0]:.1f} → {first[1]:.1f}"


@pytest.mark.parametrize(("kept", "expected"), [(1.02, 1.0), (-0.5, 0.0), (None, 0.0), (0.5, 0.5)])
def test_the_share_kept_stays_between_0_and_1(
    kept: float | None, expected: float, tmp_path: Path, rng: np.random.Generator
) -> None:
    results = gather([make_compared(tmp_path, rng, kept_model=kept)])
    assert compared(results)[1].kept("model") == expected


def test_a_layer_that_nothing_leads_round_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    results = gather([make_compared(tmp_path, rng, ce_mean=6.9)])
    [note] = [note for note in faithfulness(results, compared(results)).notes if "inflated" in note]
    assert "CRATE-2L + a" in note


def test_what_is_not_the_same_autoencoder_or_not_scored_is_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    other = make_compared(tmp_path, rng, sae_hash="another")
    assert compared(gather([other])) == ()
    plain = make_run(tmp_path / "gpt2-2l", rng, name="gpt2-2l")
    interpret.run(interpret.Options(runs=(plain,)))
    rundir.write_json(plain / "saes" / "a" / "evaluation.json", EVALUATION)
    records = plain / "records" / "fixed" / "records.json"
    rundir.write_json(records, json.loads(records.read_text()) | {"taps": {"neurons": {"layers": [0, 1]}}})
    assert compared(gather([plain])) == ()


@pytest.mark.usefixtures("quick_report")
def test_the_report_has_the_table_in_every_format(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = (make_compared(tmp_path, rng), make_compared(tmp_path, rng, "gpt2-2l"))
    report.run(report.Options(runs=runs, out=tmp_path / "report"))
    said = capsys.readouterr().out
    assert "GPT-2-2L + a" in said
    assert "→" in said
    for suffix in ("md", "csv", "tex"):
        assert "GPT-2-2L + a" in (tmp_path / "report" / f"faithfulness.{suffix}").read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "adjusted for the behaviour kept" in page
    assert "mean ablation" in page
