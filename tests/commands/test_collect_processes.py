"""Collection by several processes under torchrun: the records of one process, also when a process is killed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures.tiny import make_tokens, random_model, tiny_config

from cratelm import cli
from cratelm.activations.records import LayerRecords, read_records
from cratelm.model.weights import save_model

DRIVER = """
import os, signal, sys
from pathlib import Path
from cratelm import cli
from cratelm.activations import collect
from cratelm.activations.collector import Collector

collect.SAVE_SECONDS = 0
update, seen = Collector.update, []

def dies_once(self, codes, rows):
    update(self, codes, rows)
    seen.append(rows)
    mark = Path(sys.argv[1])
    if os.environ["RANK"] == "1" and len(seen) == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

Collector.update = dies_once
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tokens of enough documents, and the folder of runs with the records of one process."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    data = make_tokens(folder / "tokens", rng, documents=260)
    model = random_model(tiny_config(context_length=80), rng)
    for name in ("alone", "two", "many", "killed"):
        save_model(model, folder / name / "model", data.tokenizer())
    assert cli.main(["collect", str(folder / "alone"), "--data", str(data.path), "--batch-rows", "4"]) == 0
    return data.path, folder


def torchrun(processes: int, *command: str, restarts: int = 0) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=180, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


def collect(run: Path, data: Path, rows: int = 4) -> list[str]:
    return ["collect", str(run), "--data", str(data), "--batch-rows", str(rows), "--device", "cpu"]


def tensors(records: LayerRecords) -> dict[str, np.ndarray]:
    return dict(records.arrays) | dict(records.statistics) | dict(records.tables)


def assert_same_records(first: Path, second: Path) -> None:
    for layer in (0, 1):
        one, other = read_records(first, layer), read_records(second, layer)
        assert np.array_equal(one.windows.tokens, other.windows.tokens)
        assert tensors(one).keys() == tensors(other).keys()
        for name, array in tensors(one).items():
            assert np.array_equal(array, tensors(other)[name], equal_nan=True), name


@pytest.mark.slow
def test_two_processes_write_the_records_of_one(made: tuple[Path, Path]) -> None:
    data, folder = made
    torchrun(2, "-m", "cratelm", *collect(folder / "two", data))
    assert_same_records(folder / "alone", folder / "two")
    assert not list((folder / "two").rglob("*.partial-*"))


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_records_are_the_same(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    data, folder = made
    (tmp_path / "driver.py").write_text(DRIVER)
    driver, mark = str(tmp_path / "driver.py"), tmp_path / "killed"
    torchrun(2, driver, str(mark), *collect(folder / "killed", data), restarts=1)
    assert mark.exists()
    assert_same_records(folder / "alone", folder / "killed")


@pytest.mark.slow
def test_more_processes_than_batches_are_allowed(made: tuple[Path, Path]) -> None:
    data, folder = made
    torchrun(2, "-m", "cratelm", *collect(folder / "many", data, rows=4096))
    for layer in (0, 1):
        one, other = read_records(folder / "alone", layer), read_records(folder / "many", layer)
        assert np.allclose(one.statistics["mean"], other.statistics["mean"], atol=1e-6)
