"""Several processes: real jobs under torchrun, killed with -9 and started again on as many processes or on others.

The processes compute the micro-batches that one process computes, so losses differ by the rounding of sums alone. That
is 5e-7 at first; training amplifies it, in the 40 steps here to less than 2e-5 (DDP) and 1e-3 (FSDP sums in another
order within a micro-batch too).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cratelm.data.tokenizer import train_bpe
from cratelm.data.tokens import TokenDirectory, sample_batch, tokenize
from cratelm.errors import CrateError
from cratelm.rundir import read_jsonl
from cratelm.training.config import TrainConfig
from cratelm.training.evaluate import passes

STEPS = 40
FLAGS = (
    "--arch crate --size 1l --context 32 --batch-tokens 512 --micro-batch 4 --learning-rate 1e-3 --warmup-steps 5 "
    f"--tokens {STEPS * 512} --log-every 1 --evaluate-every 10 --evaluate-tokens 1000 --checkpoint-every 5 --device cpu"
).split()
TOLERANCE = {"ddp": 2e-5, "fsdp": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    """A token directory of made-up sentences."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(80)]
    source = tmp_path_factory.mktemp("text")
    for number in range(60):
        (source / f"{number}.txt").write_text(" ".join(rng.choice(words, size=120)) + ".")
    texts = (file.read_text() for file in sorted(source.iterdir()))
    tokenizer = train_bpe(_documents(texts), 300)
    return tokenize([str(source)], tmp_path_factory.mktemp("tokens") / "tokens", tokenizer, held_out=0.3)


def _documents(texts: Iterator[str]):  # type: ignore[no-untyped-def]
    from cratelm.data.text import Document

    return (Document(text=text, origin="made up") for text in texts)


@pytest.fixture(scope="module")
def alone(data: TokenDirectory, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of one process that was never stopped."""
    run = tmp_path_factory.mktemp("alone") / "run"
    with job(data, run, processes=1) as process:
        assert process.wait(60) == 0, process.stderr.read()  # type: ignore[union-attr]
    return read_jsonl(run / "metrics.jsonl")


@contextlib.contextmanager
def job(data: TokenDirectory, run: Path, *more: str, processes: int, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """A training, under torchrun if on several processes; whatever is left of it at the end is killed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launch += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "cratelm", "train"]
    command += ["--data", str(data.path), "--out", str(run), *FLAGS, *more]
    with (run.parent / "stderr").open("w+") as stderr:
        process = subprocess.Popen(command, stderr=stderr, text=True)
        process.stderr = (run.parent / "stderr").open()
        try:
            yield process
        finally:
            left = [process.pid, *children(process.pid)] if process.poll() is None else []
            for one in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            process.wait()
            process.stderr.close()


def children(pid: int) -> list[int]:
    """The processes that a process has started, in the order of their ids."""
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + 120
    while not any(int(one.name[5:]) >= step for one in (run / "checkpoints").glob("step_*")):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check(run: Path, alone: list[dict[str, float]], tolerance: float) -> None:
    """Every step is there once, with the loss of the training that was never stopped."""
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in alone] == list(range(1, STEPS + 1))
    for name in ("loss", "held_out_loss", "learning_rate"):
        ours, theirs = ([row[name] for row in some if name in row] for some in (rows, alone))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    assert (run / "model" / "model.safetensors").exists()
    assert not list((run / "checkpoints").glob(".*"))


linux = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux: finds the processes to kill in /proc")


@pytest.mark.slow
@linux
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_rank_is_started_again_and_the_losses_are_those_of_one_process(
    parallel: str, data: TokenDirectory, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with job(data, run, "--parallel", parallel, processes=2, restarts=2) as process:
        wait_for_step(run, 10, process)
        first = children(process.pid)
        assert len(first) == 2
        os.kill(first[1], signal.SIGKILL)
        assert process.wait(90) == 0, process.stderr.read()  # type: ignore[union-attr]
    check(run, alone, TOLERANCE[parallel])


@pytest.mark.slow
@linux
def test_a_job_that_lost_a_rank_stops_and_one_process_resumes(
    data: TokenDirectory, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with job(data, run, "--parallel", "fsdp", processes=2) as process:
        wait_for_step(run, 10, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(60) != 0
    assert not (run / "model").exists()
    with job(data, run, processes=1) as process:
        assert process.wait(60) == 0, process.stderr.read()  # type: ignore[union-attr]
    check(run, alone, TOLERANCE["fsdp"])


@pytest.mark.slow
@linux
def test_two_processes_finish_the_collection_that_one_began(
    data: TokenDirectory, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with job(data, run, processes=1) as process:
        wait_for_step(run, 10, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    with job(data, run, processes=2) as process:
        assert process.wait(60) == 0, process.stderr.read()  # type: ignore[union-attr]
    check(run, alone, TOLERANCE["ddp"])


@pytest.mark.slow
@linux
def test_a_mistake_is_reported_once_and_stops_all_processes(data: TokenDirectory, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(data, run, "--batch-tokens", "480", "--micro-batch", "3", processes=2) as process:
        assert process.wait(60) != 0
        message = process.stderr.read()  # type: ignore[union-attr]
    assert message.count("error: 2 processes do not divide a batch of 15 sequences") == 1
    assert not (run / "run.json").exists()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_rows_of_all_processes_are_the_batch(size: int, rng: np.random.Generator) -> None:
    config = TrainConfig(context=16, batch_tokens=16 * 24, micro_batch=3, tokens=1600)
    tokens = rng.integers(500, size=2000).astype(np.uint16)
    step = int(rng.integers(100))
    whole = sample_batch(tokens, seed=1, step=step, rows=range(24), context=16)
    parts = [
        sample_batch(tokens, seed=1, step=step, rows=config.rows_of(rank, size), context=16) for rank in range(size)
    ]
    for i in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize(
    ("size", "micro", "message"),
    [(5, 3, "5 processes do not divide a batch of 24 sequences"), (2, 8, "--micro-batch must divide 12")],
)
def test_processes_that_do_not_fit_the_batch_are_refused(size: int, micro: int, message: str) -> None:
    config = TrainConfig(context=16, batch_tokens=16 * 24, micro_batch=micro, tokens=1600)
    with pytest.raises(CrateError, match=message):
        config.rows_of(0, size)


def test_a_process_without_a_separate_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from cratelm.distributed import join_world

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(CrateError, match=r"each process needs a GPU, got 4 or more processes and 2 GPUs"),
        join_world("cuda"),
    ):
        pass


@pytest.mark.parametrize("predicted", [0, 1, 31, 32, 33, 320, 333])
def test_the_passes_of_an_evaluation_predict_every_token_once(predicted: int) -> None:
    covered = [first + i for first, rows, length in passes(predicted, 32, 3) for i in range(rows * length)]
    assert covered == list(range(predicted))
