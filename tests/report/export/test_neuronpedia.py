"""Neuronpedia's export format, read by the rules of its import: columns from the first line, types, required, keys."""

import gzip
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import DEAD, RARE, make_run

from cratelm.activations.records import Mode, read_records
from cratelm.activations.running import histogram_edges
from cratelm.cli import main
from cratelm.interpretation.store.database import Store
from cratelm.report.export.neuronpedia import _write_lines, bin_edges, frequency_bars

Types = tuple[type, ...]
TEXT: Types = (str,)
NUMBER: Types = (int, float)
WHOLE: Types = (int,)
FLAG: Types = (bool,)
COMMON: dict[str, Types] = {"creatorId": TEXT, "createdAt": TEXT, "visibility": TEXT}
SCHEMA: dict[str, dict[str, Types]] = {
    "release": {"name": TEXT, "description": TEXT, "creatorName": TEXT, "urls": TEXT} | COMMON,
    "model": {"id": TEXT, "layers": WHOLE, "neuronsPerLayer": WHOLE, "owner": TEXT} | COMMON,
    "sourceset": {"modelId": TEXT, "name": TEXT, "description": TEXT, "creatorName": TEXT, "urls": TEXT} | COMMON,
    "source": {"id": TEXT, "modelId": TEXT, "setName": TEXT} | COMMON,
    "features": {
        "modelId": TEXT, "layer": TEXT, "index": TEXT, "maxActApprox": NUMBER, "frac_nonzero": NUMBER,
        "hasVector": FLAG, "topkCosSimIndices": WHOLE, "topkCosSimValues": NUMBER,
        "freq_hist_data_bar_heights": NUMBER, "freq_hist_data_bar_values": NUMBER,
    },
    "activations": {
        "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "creatorId": TEXT, "tokens": TEXT,
        "values": NUMBER, "maxValue": NUMBER, "maxValueTokenIndex": WHOLE, "minValue": NUMBER, "binMin": NUMBER,
        "binMax": NUMBER, "binContains": NUMBER,
    },
    "explanations": {
        "id": TEXT, "modelId": TEXT, "layer": TEXT, "index": TEXT, "authorId": TEXT, "description": TEXT,
        "typeName": TEXT, "explanationModelName": TEXT,
    },
}  # fmt: skip
"""Columns of Neuronpedia's tables that may not be null, and the type of the value or of the list's elements."""
OTHERS = {
    "release": {"descriptionShort", "creatorNameShort", "defaultSourceSetName"},
    "model": {"displayNameShort", "displayName"},
    "sourceset": {"type", "releaseName"},
    "source": {"num_prompts", "num_tokens_in_prompt", "notes"},
    "features": {"creatorId", "createdAt", "sourceSetName"},
    "activations": {"createdAt", "dataIndex", "qualifyingTokenIndex"},
    "explanations": {"createdAt", "notes"},
}
"""Further columns that its tables have; anything else would be refused or dropped."""


def rows(path: Path) -> Iterator[dict[str, Any]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for line in content.decode().splitlines():
        yield json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """All rows of one table in a layer's folder, checked."""
    single = folder / f"{name}.jsonl"
    numbered = sorted((folder / name).glob("batch-*.jsonl.gz"), key=lambda path: int(path.name[6:-9]))
    found = [row for path in ([single] if single.exists() else numbered) for row in rows(path)]
    for row in found:
        assert row.keys() == found[0].keys() == SCHEMA[name].keys() | OTHERS[name]
        for column, types in SCHEMA[name].items():
            values = row[column] if isinstance(row[column], list) else [row[column]]
            assert all(type(value) in types for value in values), (column, row[column])
    return found


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    run = make_run(tmp_path / "crate-2l", rng, neurons=9)
    assert main(["interpret", str(run), "--layer", "1"]) == 0
    return run


def export(run: Path, out: Path, *more: str) -> Path:
    assert main(["export", str(run), "--format", "neuronpedia", "--out", str(out), *more]) == 0
    return out


def test_every_row_fits_neuronpedias_tables_and_points_at_rows_that_are_there(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out")
    kinds = {name: {row["name"] for row in rows(out / "config" / f"{name}.jsonl")}
             for name in ("explanation_type", "explanation_model_type")}  # fmt: skip
    assert sorted(path.name for path in (out / "config").iterdir()) == [
        "eval_type.jsonl", "explanation_model_type.jsonl", "explanation_score_model.jsonl",
        "explanation_score_type.jsonl", "explanation_type.jsonl",
    ]  # fmt: skip
    for layer in (0, 1):
        folder = out / "crate-2l" / f"{layer}-cratelm-neurons"
        (release,), (model,), (sourceset,), (source,) = (table(folder, name) for name in list(SCHEMA)[:4])
        assert source["id"] == folder.name
        assert source["setName"] == sourceset["name"] == release["defaultSourceSetName"]
        assert sourceset["releaseName"] == release["name"]
        assert model["id"] == sourceset["modelId"] == source["modelId"] == folder.parent.name
        features, activations, explanations = (table(folder, name) for name in list(SCHEMA)[4:])
        assert [row["index"] for row in features] == [str(i) for i in range(9)]
        keys = {(row["modelId"], row["layer"], row["index"]) for row in features}
        assert keys >= {(row["modelId"], row["layer"], row["index"]) for row in activations + explanations}
        ids = [row["id"] for row in activations + explanations]
        assert len(set(ids)) == len(ids)
        assert bool(explanations) == (layer == 1)
        assert {row["typeName"] for row in explanations} <= kinds["explanation_type"]
        assert {row["explanationModelName"] for row in explanations} <= kinds["explanation_model_type"]


@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_activations_are_the_records(mode: Mode, tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "run", rng, neurons=7, layers=1, mode=mode)
    out = export(run, tmp_path / "out", "--mode", mode, "--model-id", "Mine")
    (folder,) = (out / "mine").iterdir()
    records, activations = read_records(run, 0, mode=mode), table(folder, "activations")
    for index, feature in enumerate(table(folder, "features")):
        record = records[index]
        assert np.float32(feature["maxActApprox"]) == np.float32(record.statistics["maximum"])
        assert np.float32(feature["frac_nonzero"]) == np.float32(record.statistics["density"])
        mine = [row for row in activations if row["index"] == str(index)]
        top = [row for row in mine if row["binContains"] == -1]
        every = [(width, kind, one) for (width, _, kind), found in record.excerpts.items() for one in found]
        peaks = [one.activations.max() for width, kind, one in every if (width, kind) == (64, "top")]
        np.testing.assert_array_equal(sorted(np.array([row["maxValue"] for row in top], np.float32)), sorted(peaks))
        assert sum((width, kind) == (64, "quantile") for width, kind, _ in every) == len(mine) - len(top)
        chosen = [row["values"][row["qualifyingTokenIndex"]] for row in top]
        assert chosen == sorted(chosen, reverse=True)
        others = [row for row in mine if row["binContains"] != -1]
        shares = {row["binContains"]: None for row in others}
        assert sum(shares) == pytest.approx(1 if mode == "compat" else 0.2)
        assert [row["binMax"] for row in others] == sorted((row["binMax"] for row in others), reverse=True)
        for row in mine:
            assert len(row["tokens"]) == len(row["values"])
            assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
            assert row["minValue"] == min(row["values"])
            if row["binContains"] != -1:
                assert row["binMin"] <= row["values"][row["qualifyingTokenIndex"]] <= row["binMax"]


def test_an_explanation_is_written_once_with_the_scores_of_its_protocols(run: Path, tmp_path: Path) -> None:
    explanations = table(export(run, tmp_path / "out") / "crate-2l" / "1-cratelm-neurons", "explanations")
    store = Store.open(run)
    for index in range(9):
        mine = [row for row in explanations if row["index"] == str(index)]
        expected: dict[str, dict[str, float | None]] = {}
        for name in ("top-and-random", "random-only", "anthropic"):
            if index in (texts := store.read_explanations(1, name)):
                value = float(store.read_scores(1, name).correlation[index])
                expected.setdefault(texts[index], {})[name] = None if math.isnan(value) else value
        assert {row["description"]: json.loads(row["notes"])["correlation"] for row in mine} == expected
        assert len(mine) == len(expected)
        if index in (DEAD, RARE):
            assert "top-and-random" not in str(mine)


def test_the_same_export_twice_is_the_same_and_a_strange_folder_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(run, tmp_path / "out", "--layer", "0")
    folder = out / "crate-2l" / "0-cratelm-neurons"
    first = [row["id"] for row in table(folder, "activations")]
    export(run, out, "--layer", "0")
    assert [row["id"] for row in table(folder, "activations")] == first
    (folder / "notes.txt").write_text("mine")
    assert main(["export", str(run), "--format", "neuronpedia", "--out", str(out)]) == 2
    assert "has notes.txt, which is not part of an export" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"
    assert main(["export", str(run), "--format", "neuronpedia", "--out", str(out), "--model-id", "a b"]) == 2
    assert "--model-id must be letters" in capsys.readouterr().err


def test_characters_that_postgres_refuses_are_written_as_they_are_shown(tmp_path: Path) -> None:
    rows = [{"tokens": ["boat\0", "\\u0000", "\\\0", "\ud83d", "😀\n"], "description": "\0\0"}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        _write_lines(tmp_path / name, rows)
        data = (tmp_path / name).read_bytes()
        text = (gzip.decompress(data) if name.endswith("gz") else data).decode()
        assert json.loads(text) == {
            "tokens": ["boatU+0000", "\\u0000", "\\U+0000", "U+D83D", "😀\n"], "description": "U+0000U+0000"
        }  # fmt: skip


def test_many_neurons_go_into_batches(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = table(export(run, tmp_path / "whole", "--layer", "1") / "crate-2l" / "1-cratelm-neurons", "activations")
    monkeypatch.setattr("cratelm.report.export.neuronpedia.BATCH", 4)
    folder = export(run, tmp_path / "parts", "--layer", "1") / "crate-2l" / "1-cratelm-neurons"
    assert sorted(path.name for path in (folder / "features").iterdir()) == [f"batch-{i}.jsonl.gz" for i in range(3)]
    assert [row["id"] for row in table(folder, "activations")] == [row["id"] for row in whole]
    for batch in range(3):
        inside = {int(row["index"]) // 4 for row in rows(folder / "activations" / f"batch-{batch}.jsonl.gz")}
        assert inside == {batch}


def test_the_histogram_is_redrawn_in_bars_of_equal_width(rng: np.random.Generator) -> None:
    np.testing.assert_array_equal(bin_edges().astype(np.float32), histogram_edges())
    values = rng.gamma(2.0, 1.5, size=200_000).astype(np.float32)
    counts = np.histogram(values, np.concatenate([[-np.inf], histogram_edges(), [np.inf]]))[0]
    heights, middles = frequency_bars(counts, values.max())
    assert heights.sum() == pytest.approx(len(values), abs=5)
    width = middles[1] - middles[0]
    np.testing.assert_allclose(np.diff(middles), width, rtol=1e-4)
    assert middles[-1] + width / 2 == pytest.approx(values.max(), rel=1e-4)
    assert (heights * middles).sum() / heights.sum() == pytest.approx(values.mean(), rel=0.05)
    assert frequency_bars(np.zeros(64, np.int64), np.float32(0))[0].size == 0


def test_a_run_without_run_json_is_named_by_its_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "records", tmp_path / "My Model" / "records")
    out = export(tmp_path / "My Model", tmp_path / "out", "--layer", "1")
    assert table(out / "my-model" / "1-cratelm-neurons", "explanations") == []
    assert len(table(out / "my-model" / "1-cratelm-neurons", "features")) == 9
