"""A flipped bit in a file that a result depends on is noticed, once per machine, and `--no-verify` reads it anyway."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fixtures import collecting
from fixtures.autoencoders import write_run_sae

from cratelm import checksums, cli, read_records
from cratelm.checksums import CHECKSUMS, checked_path, read_tensors, verify, write_checksums, write_tensors
from cratelm.commands import collect
from cratelm.errors import CrateError
from cratelm.rundir import write_json


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cratelm" / "checksums.sqlite"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A token directory and a run with a model, records, an autoencoder and measurements."""
    folder = tmp_path_factory.mktemp("collected")
    data = collecting.held_out_documents(folder)
    run, model = collecting.make_run(folder / "run", data)
    shape, sizes = asdict(model.config), {"parameters": 1000, "flops_per_token": 6000}
    write_json(run / "run.json", {"name": "run", "arch": "gpt2", "model": shape, **sizes})
    collect.run(collecting.options(run, data))
    for command in (["evaluate", "--data"], ["whitebox", "--tokens", "300", "--data"], ["dial", *FEW, "--data"]):
        assert cli.main([command[0], str(run), *command[1:], str(data.path)]) == 0
    for command in (["directions", str(run)], ["interpret", str(run), "--protocol", "random-only"]):
        assert cli.main(command) == 0
    write_run_sae(run, "a", "standard", np.random.default_rng(0))
    description = run / "saes" / "a" / "sae.json"
    write_json(description, json.loads(description.read_text()))
    write_checksums(description.parent)
    return data.path, run


FEW = ("--tokens", "200", "--threshold", "0", "--loss-only")
FLIPS = int(os.environ.get("CRATELM_TEST_CASES", "1"))


def flip(path: Path, rng: np.random.Generator) -> None:
    """Flip one bit, outside of the field with the checksum itself."""
    content = bytearray(path.read_bytes())
    size = content.rfind(b'"checksum"') if path.suffix == ".json" else -1
    content[int(rng.integers(len(content) if size < 0 else size))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


GENERATE = ["generate", "{run}", "--tokens", "1"]
SHOW = ["neurons", "{run}", "--layer", "0", "--neuron", "1"]
STEER = ["steer", "{run}", "--sae", "a", "--neuron", "sae:0/2=set:2x", "--prompt", "a", "--tokens", "2"]
FILES = {
    "data/val.bin": ["evaluate", "{run}", "--data", "{data}"],
    "data/train.bin": ["train", "--data", "{data}", "--out", "{run}-new", "--tokens", "64", "--dry-run"],
    "data/tokens.json": ["evaluate", "{run}", "--data", "{data}"],
    "data/tokenizer.json": ["train", "--data", "{data}", "--out", "{run}-new", "--tokens", "64"],
    "model/model.safetensors": GENERATE,
    "model/config.json": GENERATE,
    "model/tokenizer.json": GENERATE,
    "records/fixed/windows.safetensors": ["interpret", "{run}"],
    "records/fixed/neurons/layer_00.safetensors": ["interpret", "{run}"],
    "records/fixed/records.json": ["interpret", "{run}"],
    "records/fixed/tokenizer.json": ["interpret", "{run}"],
    "run.json": ["report", "{run}"],
    "evaluation.json": ["evaluate", "{run}", "--data", "{data}"],
    "evaluation_documents.safetensors": ["report", "{run}"],
    "whitebox.json": ["report", "{run}"],
    "dial.json": ["dial", "{run}", *FEW, "--data", "{data}"],
    "directions/neurons/layer_00.safetensors": SHOW,
    "directions/neurons/directions.json": ["directions", "{run}"],
    "directions/tokenizer.json": ["report", "{run}", "--site"],
    "saes/a/sae_weights.safetensors": STEER,
    "saes/a/cfg.json": STEER,
    "saes/a/sae.json": STEER,
}


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(
    name: str,
    collected: tuple[Path, Path],
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for attempt in range(FLIPS):
        data, run = tmp_path / f"data-{attempt}", tmp_path / f"run-{attempt}"
        shutil.copytree(collected[0], data)
        shutil.copytree(collected[1], run)
        path = data / name.removeprefix("data/") if name.startswith("data/") else run / name
        flip(path, rng)
        assert cli.main([part.format(run=run, data=data) for part in FILES[name]]) == 2, attempt
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert path.name in error


def test_no_verify_reads_a_changed_file_for_one_command(
    collected: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(collected[1], run)
    config = run / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    command = ["generate", str(run), "--tokens", "1"]
    assert cli.main(command) == 2
    message = "Write it again with the command that made it. Or read it as it is: --no-verify"
    assert message in capsys.readouterr().err
    assert cli.main([*command, "--no-verify"]) == 0
    assert cli.main(command) == 2


def test_a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_memory: Path
) -> None:
    path = tmp_path / "file.bin"
    with checked_path(path) as temporary:
        temporary.write_bytes(b"some bytes")
    hashed: list[Path] = []
    sha256_of = checksums.sha256_of

    def recorded(file: Path) -> str:
        hashed.append(file)
        return sha256_of(file)

    monkeypatch.setattr(checksums, "sha256_of", recorded)
    for _ in range(3):
        verify(path)
    assert hashed == [path]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"some Bytes")
    os.utime(path, ns=times)  # the same size and modification time: the change time differs
    with pytest.raises(CrateError, match="is damaged or was changed"):
        verify(path)
    own_memory.write_bytes(b"not a database")
    with pytest.raises(CrateError, match="is damaged or was changed"):
        verify(path)


def test_a_kill_while_a_file_is_replaced_leaves_one_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layer.safetensors"
    write_tensors(path, {"x": np.zeros(3)})
    written: list[int] = []
    write_json = checksums.write_json

    def killed(*arguments: object) -> None:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(1)
        write_json(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checksums, "write_json", killed)
    for stop in range(2):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            write_tensors(path, {"x": np.full(3, stop + 1.0)})
        arrays = read_tensors(path, hint="")
        assert arrays["x"].tolist() in ([0.0] * 3, [stop + 1.0] * 3)


def test_files_without_a_checksum_are_read_as_they_are(collected: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(collected[1], run)
    for path in run.rglob(CHECKSUMS):
        path.unlink()
    assert read_records(run, 0).num_neurons == read_records(collected[1], 0).num_neurons


def test_a_malformed_list_of_checksums_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with checked_path(path) as temporary:
        temporary.write_bytes(b"some bytes")
    (tmp_path / CHECKSUMS).write_text(json.dumps({"format_version": 1, "sha256": {"file.bin": 3}}))
    with pytest.raises(CrateError, match="sha256.file.bin must be a list, got 3"):
        verify(path)
