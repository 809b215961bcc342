"""Settings of a training: which are refused, and what the schedule does at its ends."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import make_tokens, short_training, tiny_config, train_quietly

from cratelm import cli
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.training.config import Execution, TrainConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", math.nan), ("learning_rate", math.inf), ("learning_rate", 0.0), ("final_learning_rate", -1.0),
        ("final_learning_rate", math.nan), ("warmup_steps", -3), ("weight_decay", -1.0), ("weight_decay", math.inf),
        ("beta1", 2.0), ("beta1", 1.0), ("beta1", math.nan), ("beta2", -1.0), ("clip", 0.0), ("clip", math.nan),
        ("decay_share", math.nan), ("seed", 99999999999999999999999), ("seed", -(2**63) - 1),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(CrateError, match=f"unusable training configuration: {name} must be ") as refusal:
        TrainConfig(**{name: value})
    assert "\n" not in str(refusal.value)


def test_settings_at_the_ends_of_their_ranges_are_taken() -> None:
    config = TrainConfig(
        final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0, beta1=0.0, beta2=0.0, clip=math.inf, seed=2**64 - 1
    )
    assert torch.Generator().manual_seed(config.seed).initial_seed() == config.seed


@pytest.mark.parametrize("prefetch", [0, -1])
def test_a_queue_without_an_end_is_refused(prefetch: int) -> None:
    with pytest.raises(CrateError, match=f"prefetch must be at least 1, got {prefetch}"):
        Execution(prefetch=prefetch)


@pytest.mark.parametrize("flag", [("--beta1", "2"), ("--seed", "99999999999999999999999"), ("--prefetch", "0")])
def test_the_command_line_refuses_them_in_one_line(flag: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "nowhere", "--out", "nowhere-else", *flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert flag[0].removeprefix("--") in error


def test_the_cosine_schedule_is_the_released_one_and_ends_one_step_after_the_last() -> None:
    config = short_training(tokens=64 * 100, warmup_steps=10)
    for step in range(10, 101):
        falling = 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert config.learning_rate_at(step) == pytest.approx(1e-3 + falling * 9e-3, rel=1e-12)
    assert config.learning_rate_at(100) == 1e-3


@pytest.mark.parametrize(("warmup", "share"), [(10, 1.0), (60, 0.5), (99, 0.3), (100, 0.2), (2000, 0.2), (41, 0.6)])
def test_a_warm_up_that_meets_the_decay_turns_without_a_jump(warmup: int, share: float) -> None:
    config = short_training(tokens=64 * 100, warmup_steps=warmup, schedule="wsd", decay_share=share)
    rates = np.array([config.learning_rate_at(step) for step in range(100)])
    assert np.abs(np.diff(rates)).max() <= max(1e-2 / warmup, 9e-3 / (share * 100)) * (1 + 1e-9)
    assert rates[-1] <= 1e-3 * (1 + 1e-12)
    assert np.all(rates > 0)
    note = config.schedule_note()
    assert note is not None
    assert f"rises to {rates.max():.3g} of 0.01" in note


@pytest.mark.parametrize(
    ("schedule", "warmup", "message"),
    [("cosine", 100, False), ("cosine", 101, True), ("cosine", 0, False), ("wsd", 80, False), ("wsd", 81, True)],
)
def test_a_rate_that_never_reaches_its_peak_is_reported(schedule: Any, warmup: int, message: bool) -> None:
    config = short_training(tokens=64 * 100, warmup_steps=warmup, schedule=schedule)
    highest = max(map(config.learning_rate_at, range(100)))
    assert (config.schedule_note() is not None) == message == (highest < 1e-2 * (1 - 1e-12))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0))


def nothing_timed(*_: Any, **__: Any) -> None:
    raise AssertionError("something was timed before it was checked")


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("train", ["--size", "1l", "--vocab-size", "10"], "--vocab-size must be at least 270"),
        ("study", ["--sizes", "1l", "--vocab-size", "10"], "--vocab-size must be at least 270"),
        (
            "train",
            ["--size", "1l", "--context", "5000000", "--batch-tokens", "5000000", "--micro-batch", "1"],
            "fewer than",
        ),
        (
            "study",
            ["--sizes", "1l", "--context", "5000000", "--batch-tokens", "5000000", "--micro-batch", "1"],
            "fewer than",
        ),
        ("study", ["--sizes", "1l", "--variant", "small:context_length=8"], "must be at most the model's context of 8"),
    ],
)
def test_data_and_model_are_checked_before_anything_is_timed_or_written(
    verb: str, flags: list[str], message: str, dry_run: bool, data: TokenDirectory, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("cratelm.training.forecast.forecast", nothing_timed)
    command = [verb, "--data", str(data.path), "--out", str(tmp_path / "run"), "--tokens", "4096", "--device", "cpu"]
    command += ["--context", "16", "--batch-tokens", "512", *flags]
    assert cli.main([*command, "--dry-run"] if dry_run else command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_over_another_run_is_refused(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_quietly(short_training(tokens=64), tiny_config(), data, tmp_path / "run")
    command = ["train", "--data", str(data.path), "--out", str(tmp_path / "run"), "--size", "1l", "--device", "cpu"]
    assert cli.main([*command, "--context", "16", "--batch-tokens", "128", "--dry-run"]) == 2
    assert "is another run" in capsys.readouterr().err


def test_the_note_on_the_schedule_is_printed_before_the_first_step(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(data.path), "--out", str(tmp_path / "run"), "--size", "1l", "--device", "cpu"]
    command += ["--context", "16", "--batch-tokens", "128", "--tokens", "1280", "--dry-run"]
    assert cli.main(command) == 0
    assert "10 steps leave none after a warm-up of 2000: the learning rate rises to 3e-06" in capsys.readouterr().err
    assert cli.main([*command, "--warmup-steps", "5"]) == 0
    assert "warm-up" not in capsys.readouterr().err


def test_a_tracker_without_a_key_is_reported_in_one_line(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UsageError(Exception):
        """As wandb's are."""

    def init(**_: Any) -> None:
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    fake = ModuleType("wandb")
    vars(fake).update(Error=UsageError, init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(CrateError, match=r"--track wandb could not start \(No API key configured\.\)") as refusal:
        train_quietly(short_training(), tiny_config(), data, tmp_path, execution=Execution(track=("wandb",)))
    assert "\n" not in str(refusal.value)
