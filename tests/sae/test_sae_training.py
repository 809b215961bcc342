"""Training autoencoders: schedules, checkpoints, every kind loaded by sae-lens, and error messages."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import hidden_bar
from torch import Tensor

from cratelm.commands.sae_train import sae_name
from cratelm.errors import CrateError
from cratelm.sae.config import SaeConfig
from cratelm.sae.kinds import SAE_KINDS
from cratelm.sae.loading import load_sae
from cratelm.sae.training import TrainingPlace, train_sae

NEEDED = "sae-lens is not installed (make test-all installs it)"
D_IN, BATCH, STEPS = 6, 32, 24
PLACE = TrainingPlace(
    tap="neurons", layer=0, path="blocks.0.ista.neurons", d_in=D_IN, context=16, identity={"model_hash": "m"},
    model_flops_per_token=1000,
)  # fmt: skip


def small(kind: str, **changes: Any) -> SaeConfig:
    """24 steps on activations of width 6."""
    settings: dict[str, Any] = {
        "kind": kind, "expansion": 4, "batch_tokens": BATCH, "buffer_tokens": 64, "learning_rate": 1e-2, "k": 3,
        "warmup_steps": 2, "log_every": 4, "dead_after": 5 * BATCH, "resample_at": (8, 16), "resample_window": 5,
    }  # fmt: skip
    return SaeConfig(**settings | ({"l1": 1e-3} if kind == "paper" else {}) | changes)


class Stream(Iterator[Tensor]):
    """Batches of sparse mixtures of a few directions; a batch depends only on its number."""

    def __init__(self, seed: int, first: int) -> None:
        self.seed, self.number = seed, first
        self.directions = np.random.default_rng(seed).normal(size=(8, D_IN))

    def __next__(self) -> Tensor:
        rng = np.random.default_rng((self.seed, self.number))
        self.number += 1
        weights = rng.exponential(size=(BATCH, 8)) * (rng.random((BATCH, 8)) < 0.3)
        return torch.from_numpy(3 * weights @ self.directions).float()


def train(kind: str, folder: Path, seed: int, *, stop_after: int | None = None, **changes: Any) -> None:
    """Train on this stream, and stop after `stop_after` steps."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > 2 * stop_after  # called twice per step

    train_sae(
        small(kind, **changes), PLACE, lambda first: Stream(seed, first), folder, tokens=STEPS * BATCH + 5,
        device=torch.device("cpu"), bar=hidden_bar(), stop=stop,
        candidates=lambda _trainer, count, step: torch.from_numpy(
            np.random.default_rng((seed, step)).normal(size=(count, D_IN))
        ).float(),
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the timing."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAE_KINDS)
def test_every_kind_reduces_the_error_and_loads_in_sae_lens(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason=NEEDED)
    folder, seed = tmp_path / "saes" / "a", int(rng.integers(1 << 31))
    train(kind, folder, seed)
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    theirs, ours = sae_lens.SAE.load_from_disk(folder), load_sae(tmp_path, "a")
    names = {"topk": "TopKSAE", "gated": "GatedSAE", "standard": "StandardSAE", "paper": "StandardSAE"}
    assert type(theirs).__name__ == names.get(kind, "JumpReLUSAE")
    assert theirs.cfg.metadata.hook_name == "blocks.0.ista.neurons"
    assert theirs.cfg.metadata.training_architecture == {
        "matryoshka": "matryoshka_batchtopk", "paper": "cratelm_paper"
    }.get(kind, kind)  # fmt: skip
    x = torch.cat([next(Stream(seed, 1000 + i)) for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(24), rtol=1e-4, atol=1e-4)
    assert (ours.tap, ours.layer, ours.d_in, ours.width) == ("neurons", 0, D_IN, 24)
    description = ours.description
    assert (description["kind"], description["tokens"], description["dead_after"]) == (kind, STEPS * BATCH, 160)
    assert description["training_flops"] == STEPS * BATCH * (12 * D_IN * 24 + 1000)
    assert (description["scale"] is None) == (kind == "paper")
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json", "checksums.json", "metrics.jsonl", "sae.json", "sae_weights.safetensors"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_a_saved_autoencoder_reconstructs_as_well_as_the_trained_one(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Scale and norms are folded into the weights, so the last batch has the FVU and L0 that were logged for it."""
    pytest.importorskip("sae_lens", reason=NEEDED)
    seed = int(rng.integers(1 << 31))
    # The last line describes the weights before the last step, so that step must not change them.
    train(kind, tmp_path / "saes" / "a", seed, warmup_steps=0, learning_rate=1e-12)
    sae, last = load_sae(tmp_path, "a"), metrics(tmp_path / "saes" / "a")[-1]
    x = next(Stream(seed, STEPS - 1))
    if kind in ("batchtopk", "matryoshka"):  # the saved threshold approximates the choice within a batch
        assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(last["l0"], rel=0.5)
        return
    fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(last["fvu"], rel=1e-3)
    # A latent whose activation is near 0 may fall on the other side of it after the folding.
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(last["l0"], rel=2e-2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "at"), [("standard", 1), ("topk", 9), ("batchtopk", 13), ("paper", 11)])
def test_a_resumed_training_ends_with_the_same_weights(
    kind: str, at: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    seed = int(rng.integers(1 << 31))
    train(kind, tmp_path / "whole", seed)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(kind, stopped, seed, stop_after=at)
    assert not (stopped / "cfg.json").exists()
    with open(stopped / "metrics.jsonl", "a") as file:  # a killed process logged steps after its checkpoint
        file.write('{"step": 23, "loss": 0.0}\n')
    train(kind, stopped, seed)
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "whole") == metrics(stopped)
    before = (stopped / "sae.json").read_bytes()
    train(kind, stopped, seed)
    assert (stopped / "sae.json").read_bytes() == before, "a finished autoencoder is not written again"


@pytest.mark.filterwarnings("ignore")
def test_the_name_of_another_training_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    with pytest.raises(KeyboardInterrupt):
        train("standard", tmp_path / "a", 1, stop_after=3)
    with pytest.raises(
        CrateError, match=r"checkpoint.json has other settings than this command \(expansion 4 -> 2\).*--name"
    ):
        train("standard", tmp_path / "a", 1, expansion=2)
    train("standard", tmp_path / "a", 1)
    with pytest.raises(CrateError, match=r"sae.json has other settings than this command \(l1 None -> 9\.0\).*--name"):
        train("standard", tmp_path / "a", 1, l1=9.0)
    with pytest.raises(CrateError, match="loss must be finite, got nan at step"):
        train("standard", tmp_path / "b", int(rng.integers(99)), learning_rate=1e25, log_every=1)


@pytest.mark.filterwarnings("ignore")
def test_activations_that_are_all_zero_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    with pytest.raises(CrateError, match="all zero"):
        train_sae(
            small("standard"), PLACE, lambda _: iter([torch.zeros(BATCH, D_IN)]), tmp_path / "a", tokens=STEPS * BATCH,
            device=torch.device("cpu"), bar=hidden_bar(),
        )  # fmt: skip


def test_the_schedules_follow_their_formulas() -> None:
    paper = SaeConfig(kind="paper", resample_at=(5000,))
    assert [paper.rate_at(step, 10**6) for step in (0, 500, 1000, 4999)] == pytest.approx([0.1, 0.55, 1, 1])
    assert [paper.rate_at(step, 10**6) for step in (5000, 5500, 6000)] == pytest.approx([0.1, 0.55, 1])
    assert paper.rate_at(250, 10**6) == pytest.approx(0.1 + 0.9 * (1 - np.cos(np.pi / 4)) / 2)
    assert (paper.rate(512), paper.penalty) == (4e-4, 8e-5)
    other = SaeConfig(kind="topk", warmup_steps=10)
    assert [other.rate_at(step, 100) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 0.5, 0.05]
    )
    assert SaeConfig(kind="topk", warmup_steps=1000).rate_at(0, 100) == pytest.approx(0.1)
    assert SaeConfig(kind="topk", expansion=16).rate(512) == pytest.approx(2e-4 / np.sqrt(0.5))
    assert SaeConfig(warmup_steps=0).rate_at(0, 5) == 1
    assert SaeConfig(batch_tokens=1000).dead_steps(2_000_000) == 200
    assert SaeConfig(batch_tokens=1000).dead_steps(10**12) == 10_000
    assert sae_name(SaeConfig(kind="gated", expansion=16), "neurons", 3) == "gated-16x-layer3"
    assert sae_name(SaeConfig(), "h.{layer}.mlp:input", 0) == "standard-4x-layer0-h.L.mlp-input"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion": 0}, "--expansion must be at least 1, got 0"),
        (
            {"batch_tokens": 100, "buffer_tokens": 99},
            r"--buffer-tokens must be at least --batch-tokens \(100\), got 99",
        ),
        ({"kind": "topk", "l1": 1.0}, "--l1 must be left out for the kind topk, got 1.0. Hint: use --k"),
        ({"learning_rate": 0.0}, "--learning-rate must be a number above 0, got 0.0"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a number above 0, got inf"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a number above 0, got nan"),
        ({"l1": -5.0}, "--l1 must be a number of at least 0, got -5.0"),
        ({"l1": float("nan")}, "--l1 must be a number of at least 0, got nan"),
        ({"kind": "paper", "l1": float("inf")}, "--l1 must be a number of at least 0, got inf"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0, got -1"),
        ({"dead_after": 0}, "--dead-after must be at least 1, got 0"),
        ({"kind": "sparse"}, "--kind must be one of standard, gated, .*, got sparse"),
    ],
)
def test_invalid_settings_raise_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CrateError, match=message):
        SaeConfig(**settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["cut", "planted", "description", "not described"])
def test_a_damaged_checkpoint_is_set_aside_and_runs_no_code(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    train("standard", tmp_path / "whole", 1)
    folder, made = tmp_path / "stopped", tmp_path / "made"
    with pytest.raises(KeyboardInterrupt):
        train("standard", folder, 1, stop_after=9)
    state = folder / "checkpoint" / "trainer_state.pt"
    match damage:
        case "cut":
            state.write_bytes(state.read_bytes()[:-100])
        case "planted":
            (folder / "checkpoint" / "checksums.json").unlink()
            torch.save(Planted(made), state)
        case "description":
            (folder / "checkpoint" / "checkpoint.json").write_text("[" * 100_000)
        case _:
            (folder / "checkpoint" / "checkpoint.json").unlink()
    train("standard", folder, 1)
    assert "now damaged_checkpoint" in " ".join(capsys.readouterr().err.split())
    assert not made.exists()
    assert not list(folder.glob("*checkpoint*"))
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


class Planted:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")
