"""`docs/formats.md`: its reader is run on records, and what it names is what is on disk."""

import gzip
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from fixtures import collecting
from fixtures.synthetic import make_run

from cratelm.activations.interchange import import_neuron_records
from cratelm.activations.records import Mode, read_records
from cratelm.cli import main
from cratelm.commands import collect
from cratelm.interpretation.store.database import Store

PAGE = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")


def reader() -> dict[str, Any]:
    """The functions of the page's first Python block."""
    block = PAGE.split("```python\n")[1].split("```")[0]
    assert "cratelm" not in re.sub('".*?"', "", block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 30
    result: dict[str, Any] = {}
    exec(compile(block, "docs/formats.md", "exec"), result)
    return result


@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_the_reader_of_the_page_reads_what_cratelm_reads(mode: Mode, tmp_path: Path, rng: np.random.Generator) -> None:
    make_run(tmp_path, rng, neurons=6, mode=mode)
    functions, folder = reader(), tmp_path / "records" / mode
    for layer in (0, 1):
        records = read_records(tmp_path, layer, mode=mode)
        tensors = functions["read_tensors"](folder / "neurons" / f"layer_{layer:02d}.safetensors")
        for name, values in records.statistics.items():
            np.testing.assert_array_equal(tensors[name], values)
        for index in range(records.num_neurons):
            for (width, split, kind), expected in records[index].excerpts.items():
                result = list(functions["excerpts"](folder, "neurons", layer, index, f"{width}.{split}.{kind}"))
                assert len(result) == len(expected)
                for (document, tokens, activations), excerpt in zip(result, expected, strict=True):
                    assert document == excerpt.document
                    np.testing.assert_array_equal(tokens, excerpt.tokens)
                    np.testing.assert_array_equal(activations, excerpt.activations)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `cratelm collect` recorded, in both modes."""
    folder = tmp_path_factory.mktemp("collected")
    data = collecting.held_out_documents(folder)
    run, _ = collecting.make_run(folder / "tiny", data)
    for mode in ("fixed", "compat"):
        collect.run(collecting.options(run, data, mode=mode))
    return run


def test_the_page_names_every_file_tensor_and_field_of_a_collection(collected: Path) -> None:
    described = PAGE.split("## Records")[1].split("## Interpretations")[0]
    shown = {
        "checksums.json",
        "windows.safetensors",
        "records.json",
        "tokenizer.json",
        "layer_00.safetensors",
        "layer_01.safetensors",
    }
    for mode in ("fixed", "compat"):
        folder = collected / "records" / mode
        assert {path.name for path in folder.rglob("*") if path.is_file()} == shown
        for file in folder.rglob("*.safetensors"):
            for name, values in reader()["read_tensors"](file).items():
                named = f"`{re.sub('^.*[.]', '<set>.', name)}`"
                cells = [line.split(" | ") for line in described.splitlines() if line.startswith("| ")]
                assert any(named in first and values.dtype.name in second for first, second, *_ in cells), name
                width, split, kind = name.split(".")[:3] if "." in name else ("64", "all", "top")
                assert {width, split, kind} <= {"64", "8", "explain", "score", "all", "top", "random", "quantile"}


def test_a_collected_run_is_listed_and_exported_with_what_only_collections_have(
    collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["neurons", str(collected), "--neuron", "3"]) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    records = read_records(collected, 0)
    nearest = records.tables["similar_neuron"][3][0]
    assert f"nearest by what they write (cosine): {nearest} ({records.tables['similar_cosine'][3][0]:.2f})" in printed
    assert f"nearest by when they fire (Jaccard): {records.tables['cofiring_neuron'][3][0]} " in printed
    for form in ("neuronpedia", "neuronrecord", "csv"):
        assert main(["export", str(collected), "--format", form, "--layer", "0", "--out", str(tmp_path / form)]) == 0
    (batch,) = (tmp_path / "neuronpedia" / "tiny" / "0-cratelm-neurons" / "features").iterdir()
    feature = json.loads(gzip.decompress(batch.read_bytes()).splitlines()[3])
    assert feature["topkCosSimIndices"] == records.tables["similar_neuron"][3].tolist()
    counted = records.tables["histogram"][3, 1:].sum()
    assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(counted, abs=1)
    import_neuron_records(tmp_path / "neuronrecord", tmp_path / "again")
    again = read_records(tmp_path / "again", 0)
    assert {len(again[i].excerpts[64, "explain", "top"]) for i in range(again.num_neurons)} <= set(range(21))
    np.testing.assert_array_equal(again.statistics["kurtosis"], records.statistics["kurtosis"])


def test_the_reader_of_the_page_refuses_a_newer_file(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "new.safetensors", metadata={"format_version": "2"})
    with pytest.raises(AssertionError, match="newer cratelm"):
        reader()["read_tensors"](tmp_path / "new.safetensors")


def test_the_page_names_every_table_and_column_of_the_store(tmp_path: Path, rng: np.random.Generator) -> None:
    store = Store.create(make_run(tmp_path, rng, neurons=5, layers=1))
    connection = sqlite3.connect(store.path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    described = PAGE.split("## Interpretations")[1].split("\n## ")[0]
    for table in tables:
        if not table.startswith(("sqlite_", "explanation_search_")):
            row = next(line for line in described.splitlines() if line.startswith(f"| `{table}` |"))
            for column in connection.execute(f"SELECT name FROM pragma_table_info('{table}')").fetchall():
                assert f"`{column[0]}`" in row or table == "explanation_search", (table, column)
    connection.close()
