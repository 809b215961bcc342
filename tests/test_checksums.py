"""A flipped bit in a file that a result depends on is noticed, once per machine, and `--no-verify` reads it anyway."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures import collecting

from cratelm import checksums, cli, read_records
from cratelm.checksums import CHECKSUMS, checked_path, read_tensors, verify, write_tensors
from cratelm.commands import collect
from cratelm.errors import CrateError


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cratelm" / "checksums.sqlite"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A token directory and a run with a model and records."""
    folder = tmp_path_factory.mktemp("collected")
    data = collecting.held_out_documents(folder)
    run, _ = collecting.make_run(folder / "run", data)
    collect.run(collecting.options(run, data))
    return data.path, run


def flip(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


FILES = {
    "val.bin": ["evaluate", "{run}", "--data", "{data}"],
    "model.safetensors": ["generate", "{run}", "--tokens", "1"],
    "config.json": ["generate", "{run}", "--tokens", "1"],
    "windows.safetensors": ["interpret", "{run}"],
    "layer_00.safetensors": ["interpret", "{run}"],
}


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed(
    name: str,
    collected: tuple[Path, Path],
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for attempt in range(4):
        data, run = tmp_path / f"data-{attempt}", tmp_path / f"run-{attempt}"
        shutil.copytree(collected[0], data)
        shutil.copytree(collected[1], run)
        [path] = [*data.rglob(name), *run.rglob(name)][:1]
        flip(path, rng)
        assert cli.main([part.format(run=run, data=data) for part in FILES[name]]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert name in error


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
