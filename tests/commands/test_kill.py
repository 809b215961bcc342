"""`kill -9` at random moments, the same command again, and the files of a run that nothing disturbed."""

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import forking
from fixtures.forking import Forks
from fixtures.tiny import make_tokens, random_model, rows, tiny_config, weights_of

from cratelm import cli
from cratelm.data.tokens import TokenDirectory
from cratelm.model.weights import save_model

TRAIN = "train --size 1l --context 16 --batch-tokens 64 --micro-batch 4 --warmup-steps 5 --log-every 1 --out {run}"
linux = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux may a process that has imported torch fork")
KILLS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0), documents=300)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A process that runs commands in forks."""
    with forking.forks(tmp_path_factory.mktemp("forks")) as process:
        yield process


def kill_at_random(forks: Forks, whole: Path, killed: Path, command: str) -> None:
    assert forks.ask("kill_at_random", KILLS, str(whole), str(killed), command) == KILLS


def left_behind(run: Path) -> list[Path]:
    return [file for file in run.rglob(".*") if file.name not in (".lock", ".metadata")]


@linux
def test_training_killed_at_any_moment_ends_with_the_same_model(
    forks: Forks, data: TokenDirectory, tmp_path: Path
) -> None:
    """With a checkpoint at every step, half of the kills hit one half-written."""
    whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    kill_at_random(
        forks, whole, killed, f"{TRAIN} --data {data.path} --tokens 768 --checkpoint-every 1 --evaluate-every 4"
    )
    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(killed)] == list(range(1, 13))
    assert weights_of(killed) == weights_of(whole)
    assert left_behind(killed) == []


def test_a_killed_command_resumes_from_its_checkpoint(data: TokenDirectory, tmp_path: Path) -> None:
    """The real command line, `python -m cratelm train`, killed in its loop."""
    flags = f"{TRAIN} --data {data.path} --arch gpt2 --tokens 8192 --checkpoint-every 10 --evaluate-every 64"
    whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert cli.main(flags.format(run=whole).split()) == 0
    metrics = killed / "metrics.jsonl"
    command = [sys.executable, "-m", "cratelm", *flags.format(run=killed).split()]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not metrics.exists():
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(killed)] == list(range(1, 129))
    assert weights_of(killed) == weights_of(whole)


@linux
def test_two_ranks_train_and_collect_what_one_process_does(
    forks: Forks, data: TokenDirectory, untouched: Path, tmp_path: Path
) -> None:
    """Without torchrun: `tests/training/test_distributed.py` and `test_collect_processes.py` have real jobs."""
    train = f"{TRAIN} --data {data.path} --tokens 768 --evaluate-every 4 --device cpu"
    alone, ranks = (shutil.copytree(untouched, tmp_path / name / "run") for name in "ab")
    collect = f"collect {{run}} --data {data.path} --batch-rows 4 --device cpu"
    for size, run in ((1, alone), (2, ranks)):
        assert forks.ask("run_ranks", size, train.format(run=run / "trained")) == size
        assert forks.ask("run_ranks", size, collect.format(run=run)) == size
    expected, result = ([row["loss"] for row in rows(run / "trained")] for run in (alone, ranks))
    assert len(expected) == 12
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)
    assert files(ranks / "records") == files(alone / "records")


@pytest.fixture(scope="module")
def untouched(data: TokenDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a model and no records."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    model = random_model(tiny_config(context_length=72), np.random.default_rng(0))
    save_model(model, run / "model", data.tokenizer())
    return run


def files(folder: Path) -> dict[str, Any]:
    """Name -> content of every file; of JSON files without their origin."""
    result: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            result[str(file.relative_to(folder))] = file.read_bytes()
            if file.name == "records.json":
                result[str(file.relative_to(folder))] = {
                    k: v for k, v in json.loads(file.read_text()).items() if k not in ("origin", "checksum")
                }
    return result


@linux
def test_a_killed_collection_ends_with_the_same_records(
    forks: Forks, data: TokenDirectory, untouched: Path, tmp_path: Path
) -> None:
    whole, killed = (shutil.copytree(untouched, tmp_path / name / "run") for name in "ab")
    kill_at_random(forks, whole, killed, f"collect {{run}} --data {data.path}")
    result, expected = files(killed / "records"), files(whole / "records")
    assert result == expected
    assert sum("layer_" in name for name in result) == 2
    assert left_behind(killed) == []


def tables(run: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Table -> its rows, of the tables that hold results."""
    with closing(sqlite3.connect(run / "interpretation.sqlite")) as connection:
        connection.execute("INSERT INTO explanation_search (explanation_search) VALUES ('integrity-check')")
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        names = [name for name in names if not name.startswith("explanation_search") and name != "stages"]
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}


@linux
def test_a_killed_interpretation_ends_with_the_same_scores(
    forks: Forks, data: TokenDirectory, untouched: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(untouched, tmp_path / "run")
    assert cli.main(["collect", str(run), "--data", str(data.path)]) == 0
    whole, killed = (shutil.copytree(run, tmp_path / name / "run") for name in "ab")
    kill_at_random(forks, whole, killed, "interpret {run} --controls shuffled")
    result, expected = tables(killed), tables(whole)
    assert result == expected
    assert len(result["scores"]) == 2 * 64 * 3 * 2
    assert left_behind(killed) == []
