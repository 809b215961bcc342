"""Training: the arithmetic of a step, the schedule, what is learned and what is logged."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import make_tokens, rows, short_training, tiny_config, train_quietly

from cratelm import cli
from cratelm.data.tokenizer import tokenizer_hash
from cratelm.data.tokens import TokenDirectory, sample_batch
from cratelm.distributed import ALONE
from cratelm.errors import CrateError
from cratelm.model.config import sized
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load, weights_hash
from cratelm.runtime import human
from cratelm.training.batches import Batches
from cratelm.training.config import Execution, TrainConfig
from cratelm.training.learner import Learner
from cratelm.training.optimizer import build_optimizers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens", np.random.default_rng(0))


def train_step(
    config: TrainConfig, model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: np.ndarray, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step of one process; mean loss and gradient norm."""
    learner = Learner(config, model, [optimizer], ALONE, Execution())
    rows = config.rows_of(0, 1)
    with Batches(config, tokens, rows, first=step, device=model.device, ahead=2, vocab_size=1 << 16) as batches:
        taken = learner.step(batches, step)
    return taken.losses.mean(), taken.norm


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step and changes nothing."""

    def step(self) -> None:  # type: ignore[override]
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    micro_batch: int, data: TokenDirectory, rng: np.random.Generator
) -> None:
    config = short_training(micro_batch=micro_batch, clip=1e9, seed=int(rng.integers(1 << 31)))
    model = LanguageModel(tiny_config()).initialise(config.seed)
    optimizer = Recorder(model.parameters(), lr=0.1)
    loss, norm = train_step(config, model, optimizer, data.tokens("train"), 5)
    assert all(parameter.grad is None for parameter in model.parameters())
    inputs, targets = sample_batch(data.tokens("train"), seed=config.seed, step=5, rows=range(4), context=16)
    expected = model.loss(torch.from_numpy(inputs), torch.from_numpy(targets))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    total = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    assert norm.item() == pytest.approx(math.sqrt(total), rel=1e-5)
    for actual, parameter in zip(optimizer.gradients, model.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_the_norm(data: TokenDirectory) -> None:
    model = LanguageModel(tiny_config()).initialise(0)
    optimizer = Recorder(model.parameters(), lr=0.1)
    _, norm = train_step(short_training(clip=0.01), model, optimizer, data.tokens("train"), 0)
    assert norm > 0.1
    clipped = math.sqrt(sum(float(gradient.square().sum()) for gradient in optimizer.gradients))
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_the_optimizer_is_adamw_with_decay_on_matrices_only(data: TokenDirectory) -> None:
    """Four steps against the textbook update in float64."""
    config = short_training(weight_decay=0.3, clip=1e9)
    model = LanguageModel(tiny_config("gpt2", bias=True)).initialise(0)
    (optimizer,) = build_optimizers(model, config)
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    first, second = ({name: 0 * w for name, w in weights.items()} for _ in range(2))
    for step in range(4):
        spy = Recorder(model.parameters(), lr=0.1)
        train_step(config, model, spy, data.tokens("train"), step)
        train_step(config, model, optimizer, data.tokens("train"), step)
        rate = config.learning_rate_at(step)
        for (name, w), gradient in zip(weights.items(), spy.gradients, strict=True):
            g = gradient.double().numpy()
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            if w.ndim >= 2:
                w *= 1 - rate * 0.3
            w -= (
                rate
                * (first[name] / (1 - 0.9 ** (step + 1)))
                / (np.sqrt(second[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            )
    for name, parameter in model.named_parameters():
        # A gradient near 0 may change sign between the two, hence a few weights may be one update apart.
        apart = np.abs(parameter.detach().numpy() - weights[name])
        assert np.quantile(apart, 0.99) < 1e-5, name


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_weight_decay_is_for_tensors_of_two_dimensions(arch: Any) -> None:
    model = LanguageModel(tiny_config(arch, bias=arch == "gpt2"))
    decay = {
        id(p): group["weight_decay"] for group in build_optimizers(model, short_training())[0].param_groups
        for p in group["params"]
    }  # fmt: skip
    actual = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert actual == {name: 0.0 if p.dim() == 1 else 0.1 for name, p in model.named_parameters()}
    assert actual["embedding.weight"] == actual["positions.weight"] == 0.1
    assert actual["norm.weight"] == actual["blocks.0.norm_1.weight"] == actual["norm.bias"] == 0


def test_the_paper_is_the_default() -> None:
    config = TrainConfig()
    assert (config.steps, config.sequences) == (600_000, 256)
    assert config.learning_rate_at(0) == 6e-4 / 2000
    assert config.learning_rate_at(999) == pytest.approx(3e-4)
    assert config.learning_rate_at(1999) == config.learning_rate_at(2000) == 6e-4
    assert config.learning_rate_at(301_000) == pytest.approx((6e-4 + 6e-5) / 2)
    assert config.learning_rate_at(151_500) == pytest.approx(6e-5 + 5.4e-4 * (1 + math.sqrt(0.5)) / 2)
    assert config.learning_rate_at(599_999) == pytest.approx(6e-5, rel=1e-6)
    assert config.learning_rate_at(700_000) == 6e-5
    rates = [config.learning_rate_at(step) for step in range(0, 600_000, 999)]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("changes", [{"warmup_steps": 0}, {"warmup_steps": 12}, {"warmup_steps": 99}])
def test_any_warm_up_gives_a_rate(changes: dict[str, Any]) -> None:
    config = short_training(**changes)
    rates = [config.learning_rate_at(step) for step in range(config.steps)]
    assert all(0 < rate < 1.0000001e-2 for rate in rates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"context": 0, "tokens": -1}, "tokens must be at least 1, got -1; context must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"evaluate_tokens": 0}, "evaluate_tokens must be at least 1, got 0"),
        ({"batch_tokens": 100}, "batch_tokens must be a multiple of context 16, got 100"),
        ({"micro_batch": 3}, "micro_batch must divide the 4 sequences of a batch, got 3"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0 and finite, got -1.0"),
        ({"clip": math.nan}, "clip must be above 0, got nan"),
    ],
)
def test_an_impossible_configuration_says_everything_that_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CrateError, match=message):
        short_training(**changes)


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_a_model_learns_a_small_language(arch: Any, data: TokenDirectory, tmp_path: Path) -> None:
    config = short_training(
        tokens=150 * 256, batch_tokens=256, micro_batch=16, log_every=10, evaluate_every=50, checkpoint_every=150
    )
    train_quietly(config, tiny_config(arch), data, tmp_path / "run")
    actual = rows(tmp_path / "run")
    losses = [row["loss"] for row in actual if "loss" in row]
    assert losses[0] > 3
    assert losses[-1] < 1.5
    assert [row["step"] for row in actual] == list(range(10, 151, 10))
    assert [row["step"] for row in actual if "held_out_loss" in row] == [50, 100, 150]
    assert actual[-1]["held_out_loss"] == pytest.approx(losses[-1], abs=0.3)


def test_the_log_has_a_line_per_step_with_what_the_step_did(data: TokenDirectory, tmp_path: Path) -> None:
    train_quietly(short_training(), tiny_config(), data, tmp_path)
    actual = rows(tmp_path)
    assert [row["step"] for row in actual] == list(range(1, 13))
    assert [row["tokens"] for row in actual] == [64 * step for step in range(1, 13)]
    assert [row["learning_rate"] for row in actual] == [short_training().learning_rate_at(step) for step in range(12)]
    model = LanguageModel(tiny_config()).initialise(1337)
    batch = sample_batch(data.tokens("train"), seed=1337, step=0, rows=range(4), context=16)
    assert actual[0]["loss"] == pytest.approx(model.loss(*map(torch.from_numpy, batch)).item(), rel=1e-6)
    assert [row["step"] for row in actual if "held_out_loss" in row] == [5, 10, 12]


FLAGS = "--size 1l --context 16 --tokens 384 --batch-tokens 64 --micro-batch 2 --log-every 1 --warmup-steps 2 --seed 7"


def command(data: TokenDirectory, out: Path, flags: str = "") -> int:
    return cli.main(["train", "--data", str(data.path), "--out", str(out), *FLAGS.split(), *flags.split()])


def test_the_command_trains_and_writes_a_run_directory(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "gpt"
    assert command(data, run, "--arch gpt2 --activation gelu") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "gpt2 with 1 layers, 238k parameters, on 384 tokens: 6 steps of 64" in " ".join(err.split())
    assert "next: cratelm evaluate" in " ".join(err.split())
    model, tokenizer = load(run)
    assert tokenizer is not None
    assert tokenizer_hash(tokenizer) == data.tokenizer_hash
    assert (model.config.arch, model.config.activation) == ("gpt2", "gelu")
    assert (model.config.vocab_size, model.config.context_length) == (320, 16)
    actual = json.loads((run / "run.json").read_text())
    assert actual["name"] == "gpt"
    assert actual["control"] is actual["of"] is None
    assert actual["model"] == model.config.as_dict()
    assert actual["parameters"] == model.config.num_parameters
    assert actual["training"]["data_hash"] == data.splits["train"].sha256
    assert (actual["training"]["seed"], actual["training"]["tokens"]) == (7, 384)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(data, tmp_path / "run", "--dry-run") == 0
    config = sized("crate", "1l", vocab_size=320, context_length=16)
    message = f"{human(config.num_parameters)} parameters, on 384 tokens: 6 steps of 64, "
    flops = human(3 * config.flops_per_token() * 384)
    assert f"{message}{flops}FLOP" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_ends_with_one_line_and_exit_code_2(
    data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(data, tmp_path, "--learning-rate 1e30 --clip 1e30") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the ")
    assert f"of {tmp_path}; there is no checkpoint yet. Train again with a lower --learning-rate" in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vocab-size 99", "--vocab-size must be at least 270"),
        ("--batch-tokens 100", "batch_tokens must be a multiple of context 16, got 100"),
        ("--arch crate --activation gelu", "--activation is an option of GPT-2 only"),
        ("--data nowhere", "nowhere is not a token directory"),
        ("--size xl", "invalid choice"),
    ],
)
def test_a_wrong_flag_gets_one_line_and_writes_nothing(
    flags: str, message: str, data: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(data, tmp_path / "run", flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.fixture
def trained(data: TokenDirectory, tmp_path: Path) -> Path:
    train_quietly(short_training(tokens=64), tiny_config(), data, tmp_path / "crate")
    return tmp_path / "crate"


def control(of: Path, out: Path, *flags: str) -> int:
    return cli.main(["train", "--control-of", str(of), "--out", str(out), *flags])


def test_a_control_is_the_model_before_its_first_step(trained: Path, tmp_path: Path) -> None:
    assert control(trained, tmp_path / "random", "--dry-run") == 0
    assert not (tmp_path / "random").exists()
    for _ in range(2):  # the second time it is there already
        assert control(trained, tmp_path / "random") == 0
        model, tokenizer = load(tmp_path / "random")
        assert weights_hash(model) == weights_hash(LanguageModel(tiny_config()).initialise(1337))
        assert tokenizer is not None
        own = load(trained)[1]
        assert own is not None
        assert tokenizer.to_str() == own.to_str()
        actual = json.loads((tmp_path / "random" / "run.json").read_text())
        assert (actual["control"], actual["of"], actual["training"]) == ("random-init", "crate", None)
        assert actual["model"] == model.config.as_dict()
    shutil.rmtree(tmp_path / "random" / "model")  # killed in between
    assert control(trained, tmp_path / "random") == 0
    assert weights_hash(load(tmp_path / "random")[0]) == weights_hash(model)


def test_a_control_belongs_to_one_trained_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert control(trained, tmp_path / "random") == 0
    other = shutil.copytree(trained, tmp_path / "other")
    unfinished = shutil.copytree(trained, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "model")
    for of, out, message in (
        (other, tmp_path / "random", "is another run (of 'crate' -> 'other')"),
        (trained, other, "is another run (control None -> 'random-init', of None -> 'crate')"),
        (tmp_path / "random", tmp_path / "new", "is not a trained model (control: random-init)"),
        (unfinished, tmp_path / "new", "is not finished (no model/ there). Run: cratelm train"),
        (tmp_path / "nowhere", tmp_path / "new", "nowhere/run.json is not there. Run: cratelm train"),
    ):
        capsys.readouterr()
        assert control(of, out) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
