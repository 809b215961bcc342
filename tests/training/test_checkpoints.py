"""Damaged checkpoints, and stops during a save: a run always makes progress and loses nothing that was complete."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from fixtures.tiny import make_tokens, rows, short_training, tiny_config, train_quietly, weights_of

from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load_model, weights_hash
from cratelm.training import checkpoints as module
from cratelm.training.checkpoints import Checkpoints, best_checkpoint, checkpoints, read_weights
from cratelm.training.config import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0))


def names(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps


def stopped(config: TrainConfig, data: TokenDirectory, run: Path, steps: int) -> None:
    """Take some steps and be stopped."""
    with pytest.raises(KeyboardInterrupt):
        train_quietly(config, tiny_config(), data, run, stop=stop_after(steps))


def damage(folder: Path) -> None:
    """Turn over fifty bytes in the middle of every file of tensors."""
    for file in folder.glob("*.distcp"):
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 50] = bytes(255 - byte for byte in content[middle : middle + 50])
        file.write_bytes(content)


def test_a_run_whose_checkpoints_were_damaged_keeps_its_new_ones(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_training(checkpoint_every=2, keep_last=1)
    stopped(config, data, tmp_path, 9)
    for folder in checkpoints(tmp_path):
        damage(folder)
    damaged = [f"damaged_{name}" for name in names(tmp_path)]
    stopped(config, data, tmp_path, 3)
    assert names(tmp_path) == [*damaged, "step_0000003"]
    assert all(name in "".join(capsys.readouterr().err.split()) for name in damaged)
    stopped(config, data, tmp_path, 2)
    assert names(tmp_path)[-1] == "step_0000005"
    assert "is not readable" not in " ".join(capsys.readouterr().err.split())
    train_quietly(config, tiny_config(), data, tmp_path)
    train_quietly(config, tiny_config(), data, tmp_path / "whole")
    assert weights_of(tmp_path) == weights_of(tmp_path / "whole")
    assert rows(tmp_path) == rows(tmp_path / "whole")
    assert names(tmp_path)[-1] == "step_0000012"
    assert not [name for name in names(tmp_path) if name.startswith("damaged")]


def test_the_next_best_checkpoint_replaces_a_damaged_best_one(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four evaluations the second looks best and the third next; the second's checkpoint is damaged."""
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr("cratelm.training.train.held_out_loss", lambda *_, **__: next(losses))
    config = short_training(tokens=64 * 8, evaluate_every=2, checkpoint_every=2, keep_last=2)
    train_quietly(config, tiny_config(), data, tmp_path)
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step_0000004"
    expected = LanguageModel(tiny_config())
    read_weights(tmp_path / "checkpoints" / "step_0000006", expected)
    damage(best)
    last = weights_of(tmp_path)
    for folder in ("model", "model-best"):
        shutil.rmtree(tmp_path / folder)
    train_quietly(config, tiny_config(), data, tmp_path)
    assert weights_of(tmp_path) == last
    assert weights_hash(load_model(tmp_path / "model-best")) == weights_hash(expected)
    message = " ".join(capsys.readouterr().err.split())
    assert "was changed after it was written); trying the next" in message


def test_without_a_readable_best_checkpoint_the_model_is_still_written(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0])
    monkeypatch.setattr("cratelm.training.train.held_out_loss", lambda *_, **__: next(losses))
    config = short_training(tokens=64 * 4, evaluate_every=2, checkpoint_every=2)
    train_quietly(config, tiny_config(), data, tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "model-best")
    damage(checkpoints(tmp_path)[0])
    train_quietly(config, tiny_config(), data, tmp_path)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert not (tmp_path / "model-best").exists()


@pytest.mark.parametrize("put_aside", [False, True])
@pytest.mark.parametrize("step", [8, 12])
def test_the_same_checkpoints_are_kept_after_a_kill_while_old_ones_are_removed(
    put_aside: bool, step: int, data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the checkpoint of `step` has its name, before or after an older one was put aside."""
    config = short_training(evaluate_every=4, checkpoint_every=2, keep_last=1)
    train_quietly(config, tiny_config(), data, tmp_path / "whole")
    prune, remove = Checkpoints._prune, shutil.rmtree

    def die_early(self: Checkpoints) -> None:
        if (self.folder / f"step_{step:07d}").exists():
            raise OSError("killed")
        prune(self)

    def die_late(path: Path, ignore_errors: bool = False) -> None:
        if (Path(path).parent / f"step_{step:07d}").exists() and Path(path).name.endswith(".old.tmp"):
            raise OSError("killed")
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patched:
        if put_aside:
            patched.setattr(module.shutil, "rmtree", die_late)
        else:
            patched.setattr(Checkpoints, "_prune", die_early)
        with pytest.raises((CrateError, OSError), match="killed"):
            train_quietly(config, tiny_config(), data, tmp_path / "run")
    train_quietly(config, tiny_config(), data, tmp_path / "run")
    assert names(tmp_path / "run") == names(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_stop_at_a_checkpoint_leaves_it_its_held_out_loss(data: TokenDirectory, tmp_path: Path) -> None:
    config = short_training(evaluate_every=2, checkpoint_every=2)
    stopped(config, data, tmp_path, 4)
    description = json.loads((checkpoints(tmp_path)[-1] / "checkpoint.json").read_text())
    assert description["step"] == 4
    assert description["held_out_loss"] == pytest.approx(rows(tmp_path)[-1]["held_out_loss"])


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": 3, "training": 4, "files": 5}', '{"held_out_loss": "low"}'])
def test_a_description_of_another_shape_is_damage_too(text: str, data: TokenDirectory, tmp_path: Path) -> None:
    config = short_training(checkpoint_every=2)
    stopped(config, data, tmp_path, 4)
    (checkpoints(tmp_path)[-1] / "checkpoint.json").write_text(text)
    stopped(config, data, tmp_path, 1)
    assert names(tmp_path) == ["damaged_step_0000004", "step_0000002", "step_0000003"]


@pytest.mark.parametrize(
    ("every", "message", "step"),
    [(3, "the loss became nan at step 2", 2), (1, "the held-out loss became nan at step 1", 1)],
)
def test_a_batch_that_ruins_the_weights_is_recorded_at_a_step_without_a_log_line(
    every: int, message: str, step: int, data: TokenDirectory, tmp_path: Path
) -> None:
    config = short_training(learning_rate=1e30, log_every=10, evaluate_every=every, checkpoint_every=10)
    with pytest.raises(CrateError, match=message):
        train_quietly(config, tiny_config(), data, tmp_path)
    actual = json.loads((tmp_path / "diverged.json").read_text())
    assert (actual["step"], actual["batch"], actual["seed"]) == (step, step - 1, config.seed)


def test_weights_that_are_not_finite_are_not_measured(data: TokenDirectory, tmp_path: Path) -> None:
    measured: list[int] = []

    def note(_model: LanguageModel, step: int) -> Mapping[str, float]:
        measured.append(step)
        return {}

    config = short_training(learning_rate=1e30, log_every=10, evaluate_every=10, measure_every=3, checkpoint_every=10)
    with pytest.raises(CrateError, match="the loss became nan at step 2"):
        train_quietly(config, tiny_config(), data, tmp_path, measurements={"note": note})
    assert measured == [0]
