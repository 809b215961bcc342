"""Runs that are stopped, fail, are damaged or do not match, and resume or are refused."""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.disk import small_disk
from fixtures.tiny import make_tokens, rows, short_training, tiny_config, train_quietly, weights_of

from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load_model, weights_hash
from cratelm.rundir import claim
from cratelm.training.checkpoints import Checkpoints
from cratelm.training.learner import Learner, StepResult
from cratelm.training.opening import training_identity
from cratelm.training.optimizer import Optimizers, build_optimizers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0))


@pytest.fixture(scope="module")
def whole(data: TokenDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train_quietly(short_training(), tiny_config(), data, run)
    return run


def checkpoints(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def stop_after(steps: int) -> Callable[[], bool]:
    """True from the `steps`-th question on."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps


@pytest.mark.parametrize("stops", [[1], [4], [7, 2], [3, 3, 3, 2]])
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(
    stops: list[int], data: TokenDirectory, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number, steps in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            train_quietly(short_training(), tiny_config(), data, run, stop=stop_after(steps))
        assert checkpoints(run)[-1] == f"step_{sum(stops[: number + 1]):07d}"
    train_quietly(short_training(), tiny_config(), data, run)
    assert rows(run) == rows(whole)
    assert weights_of(run) == weights_of(whole)
    assert checkpoints(run)[1:] == ["step_0000012"]


@pytest.mark.parametrize("every", [3, 4, 5])
def test_a_run_stopped_during_evaluations_resumes_with_them(every: int, data: TokenDirectory, tmp_path: Path) -> None:
    """Each evaluation is stopped once before its first forward pass; those of the checkpoints and of the end too."""
    config = short_training(evaluate_every=every, checkpoint_every=4, log_every=2)
    train_quietly(config, tiny_config(), data, tmp_path / "whole")
    for step in sorted({*range(every, 13, every), 12}):
        for _ in range(2):  # at the step, and again when the run resumes with the evaluation
            with pytest.raises(KeyboardInterrupt):
                train_quietly(config, tiny_config(), data, tmp_path / "run", stop_evaluation=lambda: True)
            assert checkpoints(tmp_path / "run")[-1] == f"step_{step:07d}"
        if step < 12:
            with pytest.raises(KeyboardInterrupt):  # the evaluation is finished, and no step taken
                train_quietly(config, tiny_config(), data, tmp_path / "run", stop=lambda: True)
    train_quietly(config, tiny_config(), data, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_a_run_stopped_before_its_first_step_leaves_no_checkpoint(
    data: TokenDirectory, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_quietly(short_training(), tiny_config(), data, tmp_path, stop=lambda: True)
    assert not (tmp_path / "checkpoints").exists()
    train_quietly(short_training(), tiny_config(), data, tmp_path)
    assert weights_of(tmp_path) == weights_of(whole)


def test_a_finished_run_is_left_as_it_is(data: TokenDirectory, whole: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.name != ".lock" and file.is_file()}
    model = train_quietly(short_training(), tiny_config(), data, whole)
    after = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.name != ".lock" and file.is_file()}
    assert after == before
    assert weights_hash(model) == weights_hash(load_model(whole / "model"))


def test_a_run_killed_before_its_model_was_written_writes_it(data: TokenDirectory, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "model")
    train_quietly(short_training(), tiny_config(), data, run)
    assert weights_of(run) == weights_of(whole)
    assert rows(run) == rows(whole)


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder: Path) -> None:
    next(folder.glob("*.distcp")).write_bytes(b"")


def forget(folder: Path) -> None:
    (folder / ".metadata").unlink()


def garble(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"nonsense")


def lose(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


@pytest.mark.parametrize("newest_only", [True, False])
@pytest.mark.parametrize("damage", [truncate, empty, forget, garble, lose])
def test_a_damaged_checkpoint_costs_only_time(
    damage: Callable[[Path], None], newest_only: bool, data: TokenDirectory, whole: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "model")
    broken = sorted((run / "checkpoints").iterdir())[1 if newest_only else 0 :]
    for folder in broken:
        damage(folder)
    train_quietly(short_training(), tiny_config(), data, run)
    message = "".join(capsys.readouterr().err.split())
    assert all(f"{folder}isnotreadable" in message for folder in broken)
    assert rows(run) == rows(whole)
    assert weights_of(run) == weights_of(whole)
    assert checkpoints(run) == ["step_0000008", "step_0000012"]


def fresh() -> tuple[LanguageModel, Optimizers]:
    model = LanguageModel(tiny_config()).initialise(0)
    return model, build_optimizers(model, short_training())


def opened(run: Path, data: TokenDirectory) -> Checkpoints:
    training = training_identity(short_training(), data)
    return Checkpoints(run, configuration={"model": tiny_config().as_dict(), "training": training})


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[..., Any]) -> None:
    """Let `change` have its way with the result of one step."""
    real = Learner.step

    def faulty(learner: Learner, batches: Any, at: int) -> StepResult:
        taken = real(learner, batches, at)
        return change(learner.model, taken) if at + 1 == step else taken

    monkeypatch.setattr(Learner, "step", faulty)


def spoil(model: LanguageModel, taken: StepResult) -> StepResult:
    with torch.no_grad():
        model.get_parameter("norm.weight")[3] = math.nan
    return taken


@pytest.mark.parametrize(
    ("step", "change", "message", "kept"),
    [
        (5, spoil, "the held-out loss became nan at step 5", 4),
        (6, spoil, "the loss became nan at step 7", 4),
        (
            8,
            lambda _, taken: replace(taken, norm=taken.norm * math.inf),
            "the norm of the gradient became inf at step 8",
            4,
        ),
        (12, spoil, "the held-out loss became nan at step 12", 8),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    step: int,
    change: Any,
    message: str,
    kept: int,
    data: TokenDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, step, change)
    good = f"checkpoints/step_{kept:07d}"
    with pytest.raises(CrateError, match=f"{message} of .*; the last checkpoint is .*{good}. Train again") as error:
        train_quietly(short_training(), tiny_config(), data, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    model, _, step = opened(tmp_path, data).resume(fresh)
    assert step == kept
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_loss_that_is_not_finite_between_two_log_lines_is_noticed_before_a_checkpoint(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 5, spoil)
    config = short_training(log_every=100, evaluate_every=100)
    with pytest.raises(CrateError, match=r"loss became nan at step 6 .*step_0000004\."):
        train_quietly(config, tiny_config(), data, tmp_path)


def test_a_run_that_fails_at_once_says_that_there_is_no_checkpoint(data: TokenDirectory, tmp_path: Path) -> None:
    with pytest.raises(CrateError, match="there is no checkpoint yet. Train again with a lower --learning-rate"):
        train_quietly(short_training(learning_rate=1e30), tiny_config(), data, tmp_path)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ({"learning_rate": 0.5}, {}, r"\(learning_rate 0.01 -> 0.5\)"),
        ({"seed": 1, "tokens": 640}, {}, r"\(seed 1337 -> 1, tokens 768 -> 640\)"),
        ({}, {"num_layers": 3}, r"\(num_layers 2 -> 3\)"),
        ({}, {"arch": "gpt2"}, "arch 'crate' -> 'gpt2'.*ista_steps 2 -> None"),
    ],
)
def test_another_configuration_is_refused_and_the_fields_named(
    config: dict[str, Any], model: dict[str, Any], message: str, data: TokenDirectory, whole: Path
) -> None:
    before = (whole / "run.json").read_bytes()
    with pytest.raises(CrateError, match=f"is another run .*{message}.*Use another --out"):
        train_quietly(short_training(**config), tiny_config(**model), data, whole)
    assert (whole / "run.json").read_bytes() == before


def test_other_tokens_are_refused(whole: Path, tmp_path: Path) -> None:
    other = make_tokens(tmp_path / "other", np.random.default_rng(1))
    with pytest.raises(CrateError, match=r"is another run \(data_hash '\w+' -> '\w+'"):
        train_quietly(short_training(), tiny_config(), other, whole)


def test_a_run_in_use_is_refused(data: TokenDirectory, tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(CrateError, match="is in use by process"):
        train_quietly(short_training(), tiny_config(), data, tmp_path)


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ({}, {"context_length": 8}, "--context must be at most the model's context of 8, got 16"),
        (
            {},
            {"vocab_size": 269},
            "--vocab-size must be at least 270",
        ),
        (
            {"context": 65536, "batch_tokens": 131072},
            {"context_length": 65536},
            r"has \d+ (train|val) tokens, fewer than one",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused_before_anything_is_written(
    config: dict[str, Any], model: dict[str, Any], message: str, data: TokenDirectory, tmp_path: Path
) -> None:
    with pytest.raises(CrateError, match=message):
        train_quietly(short_training(**config), tiny_config(**model), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lost_tokenizer_is_noticed_before_training(data: TokenDirectory, tmp_path: Path) -> None:
    folder = shutil.copytree(data.path, tmp_path / "tokens")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CrateError, match=r"tokenizer.json is missing"):
        train_quietly(short_training(), tiny_config(), TokenDirectory.open(folder), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_models_train_in_two_threads_and_torch_is_quiet(data: TokenDirectory, whole: Path, tmp_path: Path) -> None:
    """Warnings are errors here, in every thread."""
    config = short_training(checkpoint_every=1)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train_quietly, config, tiny_config(), data, tmp_path / name) for name in ("a", "b")]
    for job, name in zip(jobs, ("a", "b"), strict=True):
        job.result()
        assert weights_of(tmp_path / name) == weights_of(whole)


def test_a_full_disk_keeps_the_earlier_checkpoints(data: TokenDirectory, tmp_path: Path) -> None:
    model, optimizers = fresh()
    with small_disk(tmp_path / "disk", 1000) as disk:
        saved = opened(disk, data)

        def save(step: int) -> None:
            saved.save(model, optimizers, step)
            saved.finish()

        save(1)
        _, used, free = shutil.disk_usage(disk)
        # Wherever in the second checkpoint the disk is full, some library or other is writing.
        for left in range(0, used - 8192, 4096 * 3):
            (disk / "filler").write_bytes(b"x" * (free - left))
            with pytest.raises(CrateError, match="no space left while writing .*step_0000002"):
                save(2)
            assert checkpoints(disk) == ["step_0000001"]
            (disk / "filler").unlink()
        save(2)
        assert saved.resume(fresh)[2] == 2
