"""The command `cratelm sae train` on any tap, a kind that is added to the table, and error messages."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.tiny import hidden_bar, make_tokens, random_model, tiny_config
from torch import Tensor

import cratelm
from cratelm import cli
from cratelm.commands.sae_train import sae_name
from cratelm.model.config import Architecture
from cratelm.model.weights import save_model, weights_hash
from cratelm.sae.config import SaeConfig
from cratelm.sae.kinds import SAE_KINDS, SaeKind, describe_kinds
from cratelm.sae.loading import load_sae
from cratelm.sae.training import TrainingPlace, train_sae

NEEDED = "sae-lens is not installed (make test-all installs it)"


def make_run(folder: Path, rng: np.random.Generator, arch: Architecture = "crate") -> tuple[Path, Path]:
    """A run with a random model, and its tokens."""
    data = make_tokens(folder / "tokens", rng, documents=60)
    model = random_model(tiny_config(arch, vocab_size=data.vocab_size), rng)
    save_model(model, folder / "run" / "model", data.tokenizer())
    return folder / "run", data.path


FEW = ("--tokens", "900", "--batch-tokens", "64", "--buffer-tokens", "128", "--k", "4", "--log-every", "5")


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
    monkeypatch.setitem(SAE_KINDS, "toy", toy)
    assert "    toy         a toy" in describe_kinds().splitlines()
    run, data = make_run(tmp_path, rng)
    model, _ = cratelm.load(run)
    place = TrainingPlace(
        tap="neurons", layer=0, path="blocks.0.ista.neurons", d_in=64, context=16,
        identity={"model_hash": weights_hash(model)}, model_flops_per_token=1000,
    )  # fmt: skip

    def stream(first: int) -> Iterator[Tensor]:
        return (torch.from_numpy(np.random.default_rng(step).exponential(size=(32, 64))).float()
                for step in range(first, 20))  # fmt: skip

    folder = run / "saes" / "toy"
    train_sae(
        SaeConfig(kind="toy", batch_tokens=32, log_every=4), place, stream, folder, tokens=20 * 32,
        device=torch.device("cpu"), bar=hidden_bar(),
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["toy"] < lines[0]["toy"]
    assert {line["learning_rate"] for line in lines} == {1e-2}
    sae = load_sae(run, "toy")
    assert (sae.architecture, sae.description["kind"], sae.width) == ("standard", "toy", 256)
    assert cli.main(["sae", "evaluate", str(run), "--data", str(data), "--tokens", "200"]) == 0
    assert "toy " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arch", "tap"), [("crate", "neurons"), ("gpt2", "residual"), ("gpt2", "heads")])
def test_the_command_trains_on_any_tap_and_evaluates(
    arch: Architecture, tap: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    run, data = make_run(tmp_path, rng, arch)
    command = ["sae", "train", str(run), "--data", str(data), "--tap", tap, "--layer", "0", "1", "--kind", "topk", *FEW]
    assert cli.main([*command, "--dry-run"]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "14 steps of 64" in output
    assert "B in addition to the model" in output
    assert not (run / "saes").exists()
    assert cli.main(command) == 0
    names = [sae_name(SaeConfig(kind="topk"), tap, layer) for layer in (0, 1)]
    assert sorted(path.name for path in (run / "saes").iterdir()) == sorted(names)
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().err.count(": already trained") == 2
    assert cli.main(["sae", "evaluate", str(run), "--data", str(data), "--tokens", "300"]) == 0
    sae = load_sae(run, names[1])
    assert (sae.tap, sae.layer, sae.d_in) == (tap, 1, 64 if tap == "neurons" else 16)
    assert sae.description["settings"]["model_hash"] == weights_hash(cratelm.load(run)[0])


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
    result = json.loads((out / "saes" / "mine" / "evaluation.json").read_text())
    assert (result["d_in"], result["layer"], result["context"]) == (24, 1, 32)


@pytest.mark.filterwarnings("ignore")
def test_invalid_input_of_the_command_raises_one_line(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sae_lens", reason=NEEDED)
    run, data = make_run(tmp_path, rng)

    def refused(*more: str) -> str:
        assert cli.main(["sae", "train", str(run), "--data", str(data), "--layer", "0", *more]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--tokens must be at least --batch-tokens (4096), got 900" in refused("--tokens", "900")
    assert "--layer must be a layer with this tap (0, 1), got 7" in refused("--layer", "7", *FEW)
    assert "no module 'nowhere'" in refused("--tap", "nowhere", *FEW)
    assert "--tokens must be a number such as 2M, got all" in refused("--tokens", "all")
    assert "--name must be letters, digits, - and _, and go with a single --layer, got '../a'" in refused(
        "--name", "../a", *FEW
    )
    assert "with a single --layer, got 'a'" in refused("--name", "a", "--layer", "0", "1", *FEW)
    assert "--k must be at most 256, the number of latents, got 5000" in refused("--kind", "topk", *FEW, "--k", "5000")
    assert not (run / "saes").exists()


BROKEN = {
    "raise ModuleNotFoundError('none', name='sae_lens')": r"needs sae-lens. Hint: pip install 'cratelm\[sae\]'",
    "raise RuntimeError('its own\\nfault')": r"cannot be imported \(RuntimeError: its own fault\)",
    "from transformer_lens import gone": r"cannot be imported \(ImportError: cannot import name 'gone'",
}


@pytest.mark.parametrize("code", BROKEN)
def test_without_sae_lens_only_training_fails(code: str, tmp_path: Path, rng: np.random.Generator) -> None:
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
