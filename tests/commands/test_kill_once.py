"""Commands that write one thing: killed at any step on disk, the same command finishes, or says that it is done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.synthetic import make_tokenizer
from fixtures.tiny import random_model, tiny_config

from cratelm import cli
from cratelm.data.tokenizer import vocabulary_size
from cratelm.model.official import read_official, write_official
from cratelm.model.weights import save_model, weights_hash

CONFIG = tiny_config(context_length=72, vocab_size=vocabulary_size(make_tokenizer()))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a model directory, neuron records and texts."""
    folder = tmp_path_factory.mktemp("inputs")
    model = random_model(CONFIG, np.random.default_rng(0))
    write_official(model, folder / "ckpt.pt")
    save_model(model, folder / "model", make_tokenizer())
    (folder / "records" / "0").mkdir(parents=True)
    excerpt = {"tokens": ["a", " b"], "activations": [0.0, 1.5]}
    for neuron in range(3):
        record = {"most_positive_activation_records": [excerpt] * 4, "random_sample": [excerpt] * 3}
        (folder / "records" / "0" / f"{neuron}.json").write_text(json.dumps(record))
    (folder / "texts").mkdir()
    for number in range(20):
        (folder / "texts" / f"{number}.txt").write_text(f"text number {number}")
    return folder


def content(path: Path) -> dict[str, Any]:
    """Name -> bytes of every file; of JSON files the values, without those that name the time and the folder."""
    if path.is_file():  # its parts are named after it
        return {"weights": weights_hash(read_official(path)[0])}
    files: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != ".lock":
            name = str(file.relative_to(path))
            files[name] = file.read_bytes().replace(path.name.encode(), b"NAME")
            if file.suffix == ".json":
                value = json.loads(files[name])
                value.get("source", {}).pop("origin", None)
                files[name] = {key: part for key, part in value.items() if key not in ("origin", "checksum")}
    return files


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux may a process that has imported torch fork")
@pytest.mark.parametrize(
    "command",
    [
        "import {inputs}/ckpt.pt --tokenizer none --out {out}",
        "import {inputs}/model --out {out}",
        "import {inputs}/records --out {out}",
        "export {inputs}/model --format official --out {out}",
        "export {inputs}/model --format hf --out {out}",
        "tokenize {inputs}/texts --tokenizer bpe:280 --held-out 0.3 --out {out}",
    ],
)
def test_a_command_killed_at_any_step_finishes_when_it_runs_again(command: str, inputs: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "fixtures" / "kill_at_each.py"
    arguments = [sys.executable, str(script), "4", str(tmp_path), *command.replace("{inputs}", str(inputs)).split()]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected, killed = content(tmp_path / "whole"), sorted(tmp_path.glob("killed_*"))
    assert len(killed) >= 3
    for path in killed:
        assert content(path) == expected, path
    assert not list(tmp_path.rglob(".*.tmp"))


def test_another_import_or_export_into_the_same_place_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save_model(random_model(CONFIG, np.random.default_rng(1)), other / "model", make_tokenizer())
    for verb, then, message in (
        ("import", other / "model", "--out must not contain another run"),
        ("import", inputs / "ckpt.pt", "--out must not contain another run"),
        ("export", other / "model", "--out must not exist"),
    ):
        out = ["--out", str(tmp_path / f"{verb}_out")]
        assert cli.main([verb, str(inputs / "model"), *out]) == 0
        capsys.readouterr()
        assert cli.main([verb, str(then), *out, *(["--tokenizer", "none"] * (then.suffix == ".pt"))]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert cli.main(["import", str(inputs / "model"), "--out", str(tmp_path / "mine")]) == 2
    assert not list((tmp_path / "mine" / "model").iterdir())
