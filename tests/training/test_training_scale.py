"""Parts of training around the loop: schedules, optimizers, checkpoints, measurements, trackers, the preview."""

import json
import math
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import make_tokens, rows, short_training, tiny_config, train_quietly, weights_of

from cratelm.cli import main
from cratelm.data.tokens import TokenDirectory, sample_batch
from cratelm.errors import CrateError
from cratelm.model.crate import ISTA
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load_model
from cratelm.rundir import read_json, read_jsonl
from cratelm.training.batches import Batches
from cratelm.training.checkpoints import best_checkpoint, checkpoints, read_weights
from cratelm.training.config import Execution, TrainConfig
from cratelm.training.evaluate import held_out_loss
from cratelm.training.forecast import forecast
from cratelm.training.learner import Learner, StepResult
from cratelm.workflows.measurements import lookup, samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0), documents=260)


def test_warmup_stable_decay_is_a_trapezium() -> None:
    config = short_training(tokens=64 * 100, warmup_steps=10, schedule="wsd", decay_share=0.25)
    rates = np.array([config.learning_rate_at(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 1e-2 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:74], 1e-2)
    np.testing.assert_allclose(rates[74:], np.linspace(1e-2, 1e-3, 26))
    assert rates[-1] == 1e-3


def test_batches_come_in_order_and_from_any_step(data: TokenDirectory, rng: np.random.Generator) -> None:
    config = short_training(tokens=16 * 12 * 9, batch_tokens=16 * 12, micro_batch=3, seed=int(rng.integers(1 << 31)))
    tokens = data.tokens("train")
    own, first = config.rows_of(1, 2), int(rng.integers(1, 5))
    with Batches(config, tokens, own, first=first, device=torch.device("cpu"), ahead=2, vocab_size=1 << 16) as batches:
        for step in range(first, first + 4):
            result = list(batches.step())
            expected = sample_batch(tokens, seed=config.seed, step=step, rows=own, context=16)
            assert [len(inputs) for inputs, _ in result] == [3, 3]
            for side in (0, 1):
                np.testing.assert_array_equal(torch.cat([pair[side] for pair in result]).numpy(), expected[side])


def test_a_failure_to_read_reaches_the_trainer(data: TokenDirectory) -> None:
    config = short_training(context=16)
    short = data.tokens("train")[:10]
    everything, rows, device = data.tokens("train"), config.rows_of(0, 1), torch.device("cpu")
    for tokens, vocab_size, message in (
        (short, 1 << 16, "a context of .* needs at least .* tokens, got 10"),
        (everything, 2, "the training tokens must have ids below 2, the size of the vocabulary; got "),
    ):
        with (
            Batches(config, tokens, rows, first=0, device=device, ahead=2, vocab_size=vocab_size) as batches,
            pytest.raises(CrateError, match=message),
        ):
            next(batches.step())


def test_muon_learns_and_resumes(data: TokenDirectory, tmp_path: Path) -> None:
    config = short_training(optimizer="muon")
    train_quietly(config, tiny_config(), data, tmp_path / "whole")
    asked = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        train_quietly(config, tiny_config(), data, tmp_path / "run", stop=lambda: next(asked) >= 7)
    train_quietly(config, tiny_config(), data, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert rows(tmp_path / "run")[-1]["loss"] < rows(tmp_path / "run")[0]["loss"] - 0.2


def test_the_best_checkpoint_outlives_newer_ones_and_becomes_a_model(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of four evaluations is made to look best."""
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr("cratelm.training.train.held_out_loss", lambda *_, **__: next(losses))
    config = short_training(tokens=64 * 8, evaluate_every=2, checkpoint_every=2, keep_last=1)
    train_quietly(config, tiny_config(), data, tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_0000004", "step_0000008"]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step_0000004"
    expected = LanguageModel(tiny_config())
    read_weights(best, expected)
    loaded = load_model(tmp_path / "model-best").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict().items())
    assert weights_of(tmp_path) != (tmp_path / "model-best" / "model.safetensors").read_bytes()


def test_a_changed_byte_in_a_checkpoint_is_noticed(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_quietly(short_training(), tiny_config(), data, tmp_path)
    whole = weights_of(tmp_path)
    shutil.rmtree(tmp_path / "model")
    shard = next(checkpoints(tmp_path)[-1].glob("*.distcp"))
    garbled = bytearray(shard.read_bytes())
    garbled[len(garbled) // 2] ^= 1
    shard.write_bytes(garbled)
    train_quietly(short_training(), tiny_config(), data, tmp_path)
    assert "was changed after it was written" in " ".join(capsys.readouterr().err.split())
    assert weights_of(tmp_path) == whole


def test_a_checkpoint_of_another_configuration_names_the_fields(data: TokenDirectory, tmp_path: Path) -> None:
    train_quietly(short_training(), tiny_config(), data, tmp_path / "one")
    train_quietly(short_training(seed=5), tiny_config(d_model=32), data, tmp_path / "other")
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "one" / "checkpoints")
    with pytest.raises(CrateError, match=r"has another configuration \(d_model 32 -> 16, seed 5 -> 1337\)"):
        train_quietly(short_training(), tiny_config(), data, tmp_path / "one")


def test_how_a_run_is_split_and_kept_may_change_between_starts(data: TokenDirectory, tmp_path: Path) -> None:
    asked = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        train_quietly(short_training(), tiny_config(), data, tmp_path, stop=lambda: next(asked) >= 5)
    train_quietly(short_training(micro_batch=4, keep_last=1, log_every=2), tiny_config(), data, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 8, 10, 12]


def test_a_batch_that_is_not_finite_is_recorded(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner.step

    def faulty(learner: Learner, batches: Batches, step: int) -> StepResult:
        taken = real(learner, batches, step)
        return replace(taken, losses=taken.losses * torch.tensor([1.0, math.nan])) if step == 5 else taken

    monkeypatch.setattr(Learner, "step", faulty)
    with pytest.raises(CrateError, match="the loss became nan at step 6"):
        train_quietly(short_training(), tiny_config(), data, tmp_path)
    content = read_json(tmp_path / "diverged.json", made_by="test")
    assert {name: content[name] for name in ("step", "batch", "seed", "rows_not_finite", "learning_rate")} == {
        "step": 6, "batch": 5, "seed": 1337, "rows_not_finite": [2, 3],
        "learning_rate": short_training().learning_rate_at(5),
    }  # fmt: skip


def test_measurements_are_called_on_schedule_and_logged(data: TokenDirectory, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def weigh(model: LanguageModel, step: int) -> Mapping[str, float]:
        seen.append((step, model.training))
        return {"norm": float(model.embedding.weight.norm())}

    measured = {"weight": weigh}
    train_quietly(short_training(measure_every=5), tiny_config(), data, tmp_path, measurements=measured)
    assert seen == [(step, False) for step in (0, 5, 10, 12)]
    result = {row["step"]: row["weight/norm"] for row in rows(tmp_path) if "weight/norm" in row}
    assert list(result) == [0, 5, 10, 12]
    fresh = LanguageModel(tiny_config()).initialise(1337)
    assert result[0] == pytest.approx(float(fresh.embedding.weight.detach().norm()))
    train_quietly(short_training(), tiny_config(), data, tmp_path / "plain")
    assert weights_of(tmp_path) == weights_of(tmp_path / "plain")


def test_lookup_is_measured_and_samples_are_written_once_a_step(data: TokenDirectory, tmp_path: Path) -> None:
    model = tiny_config(context_length=96)
    config = short_training(context=96, batch_tokens=96 * 8, micro_batch=8, tokens=96 * 8 * 4, measure_every=2)
    measured = {"lookup": lookup(data, neurons=16), "samples": samples(data, tmp_path)}
    train_quietly(config, model, data, tmp_path, measurements=measured)
    result = [row for row in rows(tmp_path) if "lookup/points" in row]
    assert [row["step"] for row in result] == [0, 2, 4]
    for row in result:
        assert row["lookup/points"] == pytest.approx((row["lookup/layer_0"] + row["lookup/layer_1"]) / 2)
        assert 0 < row["lookup/scored"] <= 1
    again = measured["lookup"](load_model(tmp_path / "model"), 0)
    assert again["points"] == pytest.approx(result[-1]["lookup/points"])
    measured["samples"](load_model(tmp_path / "model"), 2)
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0, 0, 2, 2]


def test_a_missing_tracker_is_reported_in_one_line(
    data: TokenDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(CrateError, match=r"--track wandb needs .*pip install 'cratelm\[track\]'"):
        train_quietly(short_training(), tiny_config(), data, tmp_path, execution=Execution(track=("wandb",)))


def test_tensorboard_gets_every_line(data: TokenDirectory, tmp_path: Path) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name, reason="tensorboard is not installed")
    train_quietly(short_training(), tiny_config(), data, tmp_path, execution=Execution(track=("tensorboard",)))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    result = {event.step: event.value for event in events.Scalars("loss")}
    assert result == pytest.approx({row["step"]: row["loss"] for row in rows(tmp_path)}, rel=1e-6)


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_the_forecast_counts_operations_and_the_memory_of_weights_and_activations(arch: Any) -> None:
    config, model = short_training(), tiny_config(arch)
    whole = forecast(config, model, device=torch.device("cpu"))
    assert whole.rate * whole.seconds == pytest.approx(3 * model.flops_per_token(16) * whole.tokens)
    assert whole.state_bytes == 16 * sum(p.numel() for p in LanguageModel(model).parameters())
    assert whole.activation_bytes > 2 * 16 * model.vocab_size * 4
    assert 0 < whole.seconds < 60
    half = forecast(
        config, model, device=torch.device("cpu"), world_size=2, execution=Execution(parallel="fsdp")
    )  # fmt: skip
    assert half.state_bytes == whole.state_bytes / 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_the_forecast_of_memory_is_what_a_pass_over_all_rows_saves(arch: Any, recompute: bool) -> None:
    config, device = short_training(batch_tokens=16 * 14, micro_batch=7), torch.device("cpu")
    expected = forecast(config, tiny_config(arch), device=device, execution=Execution(recompute=recompute))
    model = LanguageModel(tiny_config(arch)).initialise(0)
    model.recompute_codes(recompute)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(272, (7, 17))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert loss.requires_grad
    assert expected.activation_bytes == pytest.approx(sum(kept.values()), rel=0.02)


def test_recomputing_codes_keeps_less_and_learns_the_same(data: TokenDirectory, tmp_path: Path) -> None:
    train_quietly(short_training(), tiny_config(), data, tmp_path / "whole")
    model = train_quietly(
        short_training(), tiny_config(), data, tmp_path / "run", execution=Execution(recompute=True)
    )  # fmt: skip
    assert all(module.recompute for module in model.modules() if isinstance(module, ISTA))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    kept = [
        forecast(short_training(), tiny_config(), device=torch.device("cpu"), execution=Execution(recompute=again))
        for again in (False, True)
    ]
    neurons = 4 * 2 * 2 * 16 * 64  # float32, layers, rows, context, neurons: one code of each
    assert kept[0].activation_bytes - kept[1].activation_bytes == neurons


def test_a_dry_run_prints_the_cost_and_writes_nothing(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(data.path), "--out", str(tmp_path / "run"), "--size", "1l", "--context", "32"]
    command += ["--tokens", "4096", "--batch-tokens", "512", "--dry-run", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().err
    assert re.search(r"8 steps of 512, \d.*FLOP\n", printed)
    assert re.search(r"about \S+ \w+ at .* tokens per second .* of memory per device", " ".join(printed.split()))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_writes_a_checkpoint_and_asks_to_resume(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(data.path), "--out", str(tmp_path / "run"), "--size", "1l", "--context", "32"]
    command += ["--tokens", "2048000", "--batch-tokens", "512", "--log-every", "1", "--evaluate-tokens", "500"]

    def interrupt() -> None:
        """Press Ctrl-C once the first step is logged."""
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main([*command, "--device", "cpu"]) == 130
    assert "stopped. Run the same command again to resume." in " ".join(capsys.readouterr().err.split())
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    description = json.loads((checkpoints(tmp_path / "run")[-1] / "checkpoint.json").read_text())
    assert description["step"] == last


def test_the_held_out_loss_is_the_mean_over_all_tokens(data: TokenDirectory) -> None:
    model = LanguageModel(tiny_config()).initialise(0)
    tokens = data.tokens("val")[:337]
    result = held_out_loss(model, tokens, batch=4)
    pieces = [tokens[first : first + 17].astype(np.int64) for first in range(0, 336, 16)]
    losses = [model.token_losses(torch.tensor(p[None, :-1]), torch.tensor(p[None, 1:])).detach() for p in pieces]
    assert result == pytest.approx(float(torch.cat([part.flatten() for part in losses]).double().mean()), rel=1e-6)


@pytest.mark.parametrize("changes", [{"keep_last": 0}, {"measure_every": 0}, {"decay_share": 0.0}])
def test_impossible_settings_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(CrateError, match=next(iter(changes))):
        TrainConfig(**changes)
