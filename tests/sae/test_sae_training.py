"""Training autoencoders: schedules, checkpoints, every kind opened by sae-lens itself, and what is refused."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import hidden_bar, make_tokens, random_model, tiny_config
from torch import Tensor

import cratelm
from cratelm import cli
from cratelm.commands.sae_train import sae_name
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.weights import save_model
from cratelm.sae.config import SaeConfig
from cratelm.sae.kinds import KINDS, SaeKind, describe_kinds
from cratelm.sae.loading import load_sae
from cratelm.sae.training import Place, train_sae

NEEDED = "sae-lens is not installed (make test-all installs it)"
D_IN, BATCH, STEPS = 6, 32, 24
PLACE = Place(
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
    """Batches of sparse mixtures of a few directions, each a function of its number alone."""

    def __init__(self, seed: int, first: int) -> None:
        self.seed, self.number = seed, first
        self.directions = np.random.default_rng(seed).normal(size=(8, D_IN))

    def __next__(self) -> Tensor:
        rng = np.random.default_rng((self.seed, self.number))
        self.number += 1
        weights = rng.exponential(size=(BATCH, 8)) * (rng.random((BATCH, 8)) < 0.3)
        return torch.from_numpy(3 * weights @ self.directions).float()


def train(kind: str, folder: Path, seed: int, *, stop_after: int | None = None, **changes: Any) -> None:
    """Train on such a stream; with `stop_after` it is stopped after so many steps."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > 2 * stop_after  # it is asked twice a step

    train_sae(
        small(kind, **changes), PLACE, lambda first: Stream(seed, first), folder, tokens=STEPS * BATCH + 5,
        device=torch.device("cpu"), bar=hidden_bar(), stop=stop,
        candidates=lambda _trainer, count, step: torch.from_numpy(
            np.random.default_rng((seed, step)).normal(size=(count, D_IN))
        ).float(),
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a training without what depends on the machine."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_sae_lens_opens_it(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
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
        "cfg.json", "metrics.jsonl", "sae.json", "sae_weights.safetensors"
    ]  # fmt: skip


TOY = """
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

class ToyTrainingSAE(StandardTrainingSAE):
    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        output.losses["toy"] = output.loss.detach()
        return output

class ToyTrainingSAEConfig(StandardTrainingSAEConfig):
    pass
"""


@pytest.mark.filterwarnings("ignore")
def test_a_kind_added_to_the_table_is_trained_saved_loaded_and_evaluated(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    (tmp_path / "toy_saes.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    toy = SaeKind(
        description="a toy", training_class="toy_saes:ToyTrainingSAE", l1=0.5, schedule=lambda *_: 1.0,
        settings=lambda config, _width, _steps: {"l1_coefficient": config.penalty}, learning_rate=lambda _width: 1e-2,
    )  # fmt: skip
    monkeypatch.setitem(KINDS, "toy", toy)
    assert "    toy         a toy" in describe_kinds().splitlines()
    run, data = make_run(tmp_path, rng)
    model, _ = cratelm.load(run)
    place = replace(PLACE, d_in=64, identity={"model_hash": cratelm.model.weights.weights_hash(model)})

    def stream(first: int) -> Iterator[Tensor]:
        return (torch.from_numpy(np.random.default_rng(step).exponential(size=(BATCH, 64))).float()
                for step in range(first, STEPS))  # fmt: skip

    folder = run / "saes" / "toy"
    train_sae(
        SaeConfig(kind="toy", batch_tokens=BATCH, log_every=4), place, stream, folder, tokens=STEPS * BATCH,
        device=torch.device("cpu"), bar=hidden_bar(),
    )  # fmt: skip
    lines = metrics(folder)
    assert lines[-1]["toy"] < lines[0]["toy"]
    assert {line["learning_rate"] for line in lines} == {1e-2}
    sae = load_sae(run, "toy")
    assert (sae.architecture, sae.description["kind"], sae.width) == ("standard", "toy", 256)
    assert cli.main(["sae", "evaluate", str(run), "--data", str(data), "--tokens", "200"]) == 0
    assert "toy " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["standard", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_what_is_saved_reconstructs_as_well_as_what_was_trained(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The scale and the norms are folded into the weights: the last step's batch is reconstructed as its line says."""
    pytest.importorskip("sae_lens", reason=NEEDED)
    seed = int(rng.integers(1 << 31))
    # The line is of the weights before the last step, so that step must not move them.
    train(kind, tmp_path / "saes" / "a", seed, warmup_steps=0, learning_rate=1e-12)
    sae, last = load_sae(tmp_path, "a"), metrics(tmp_path / "saes" / "a")[-1]
    x = next(Stream(seed, STEPS - 1))
    if kind in ("batchtopk", "matryoshka"):  # a threshold stands for the batch's own choice, nearly the same
        assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(last["l0"], rel=0.5)
        return
    fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(last["fvu"], rel=1e-3)
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(last["l0"], rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "at"), [("standard", 1), ("topk", 9), ("batchtopk", 13), ("paper", 11)])
def test_a_training_that_was_stopped_ends_with_the_same_weights(
    kind: str, at: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    seed = int(rng.integers(1 << 31))
    train(kind, tmp_path / "whole", seed)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(kind, stopped, seed, stop_after=at)
    assert not (stopped / "cfg.json").exists()
    with open(stopped / "metrics.jsonl", "a") as file:  # as of steps that a killed process logged past its checkpoint
        file.write('{"step": 23, "loss": 0.0}\n')
    train(kind, stopped, seed)
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "whole") == metrics(stopped)
    before = (stopped / "sae.json").read_bytes()
    train(kind, stopped, seed)
    assert (stopped / "sae.json").read_bytes() == before, "what is there is left alone"


@pytest.mark.filterwarnings("ignore")
def test_a_name_that_another_training_has_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    with pytest.raises(KeyboardInterrupt):
        train("standard", tmp_path / "a", 1, stop_after=3)
    with pytest.raises(CrateError, match=r"checkpoint with other settings \(expansion 4 -> 2\).*--name"):
        train("standard", tmp_path / "a", 1, expansion=2)
    train("standard", tmp_path / "a", 1)
    with pytest.raises(CrateError, match=r"autoencoder with other settings \(l1 None -> 9\.0\).*--name"):
        train("standard", tmp_path / "a", 1, l1=9.0)
    with pytest.raises(CrateError, match="loss must be finite, got nan at step"):
        train("standard", tmp_path / "b", int(rng.integers(99)), learning_rate=1e25, log_every=1)


@pytest.mark.filterwarnings("ignore")
def test_activations_that_are_all_zero_teach_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    with pytest.raises(CrateError, match="all zero"):
        train_sae(
            small("standard"), PLACE, lambda _: iter([torch.zeros(BATCH, D_IN)]), tmp_path / "a", tokens=STEPS * BATCH,
            device=torch.device("cpu"), bar=hidden_bar(),
        )  # fmt: skip


def test_the_schedules_are_those_that_are_described() -> None:
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
    ("settings", "said"),
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
def test_invalid_settings_raise_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CrateError, match=said):
        SaeConfig(**settings)


def make_run(folder: Path, rng: np.random.Generator, arch: Architecture = "crate") -> tuple[Path, Path]:
    """A run with a random model, and its tokens."""
    data = make_tokens(folder / "tokens", rng, documents=60)
    model = random_model(tiny_config(arch, vocab_size=data.vocab_size), rng)
    save_model(model, folder / "run" / "model", data.tokenizer())
    return folder / "run", data.path


FEW = ("--tokens", "900", "--batch-tokens", "64", "--buffer-tokens", "128", "--k", "4", "--log-every", "5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "tap"), [("crate", "neurons"), ("gpt2", "residual"), ("gpt2", "heads")])
def test_the_command_trains_on_any_tap_and_goes_on_to_evaluate(
    arch: Architecture, tap: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    run, data = make_run(tmp_path, rng, arch)
    command = ["sae", "train", str(run), "--data", str(data), "--tap", tap, "--layer", "0", "1", "--kind", "topk", *FEW]
    assert cli.main([*command, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "14 steps of 64" in said
    assert "B of memory besides the model" in said
    assert not (run / "saes").exists()
    assert cli.main(command) == 0
    names = [sae_name(SaeConfig(kind="topk"), tap, layer) for layer in (0, 1)]
    assert sorted(path.name for path in (run / "saes").iterdir()) == sorted(names)
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().err.count("is trained already") == 2
    assert cli.main(["sae", "evaluate", str(run), "--data", str(data), "--tokens", "300"]) == 0
    sae = load_sae(run, names[1])
    assert (sae.tap, sae.layer, sae.d_in) == (tap, 1, 64 if tap == "neurons" else 16)
    assert sae.description["settings"]["model_hash"] == cratelm.model.weights.weights_hash(cratelm.load(run)[0])


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_model_gets_an_autoencoder(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-all)")
    data = make_tokens(tmp_path / "tokens", rng, documents=60)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=data.vocab_size,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    data.tokenizer().save(str(tmp_path / "llama" / "tokenizer.json"))
    tap, out = "model.layers.{layer}.mlp.down_proj:input", tmp_path / "run"
    command = ["sae", "train", str(tmp_path / "llama"), "--data", str(data.path), "--layer", "1", "--tap", tap, *FEW]
    assert cli.main(command) == 2
    assert "--out runs/llama" in capsys.readouterr().err
    assert cli.main([*command, "--out", str(out), "--name", "mine"]) == 0
    assert cli.main(["sae", "evaluate", str(out), "--data", str(data.path), "--tokens", "200"]) == 0
    found = json.loads((out / "saes" / "mine" / "evaluation.json").read_text())
    assert (found["d_in"], found["layer"], found["context"]) == (24, 1, 32)


@pytest.mark.filterwarnings("ignore")
def test_wrong_input_of_the_command_is_one_line(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    run, data = make_run(tmp_path, rng)

    def refused(*more: str) -> str:
        assert cli.main(["sae", "train", str(run), "--data", str(data), "--layer", "0", *more]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--tokens must be at least --batch-tokens (4096), got 900" in refused("--tokens", "900")
    assert "the model has no layer 7 at this tap (there are 0, 1)" in refused("--layer", "7", *FEW)
    assert "no module 'nowhere'" in refused("--tap", "nowhere", *FEW)
    assert "--tokens is all" in refused("--tokens", "all")
    assert "--name is '../a'" in refused("--name", "../a", *FEW)
    assert "--name is 'a'" in refused("--name", "a", "--layer", "0", "1", *FEW)
    assert "--k must be at most 256, the number of latents, got 5000" in refused("--kind", "topk", *FEW, "--k", "5000")
    assert not (run / "saes").exists()


BROKEN = {
    "raise ModuleNotFoundError('none', name='sae_lens')": r"needs sae-lens. Hint: pip install 'cratelm\[sae\]'",
    "raise RuntimeError('its own\\nfault')": r"cannot be imported \(RuntimeError: its own fault\)",
    "from transformer_lens import gone": r"cannot be imported \(ImportError: cannot import name 'gone'",
}


@pytest.mark.parametrize("code", BROKEN)
def test_without_sae_lens_only_training_says_so(code: str, tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "sae_lens.py").write_text(code)
    (tmp_path / "transformer_lens.py").write_text("")
    run, data = make_run(tmp_path, rng)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import cratelm
from cratelm import cli
import cratelm.sae.loading, cratelm.sae.evaluation, cratelm.sae.latents, cratelm.commands.sae_evaluate
assert cli.main(["--help"]) == 0
assert "sae_lens" not in sys.modules
raise SystemExit(cli.main(["sae", "train", {str(run)!r}, "--data", {str(data)!r}, "--layer", "0"]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert re.search(BROKEN[code], result.stderr)
