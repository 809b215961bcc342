"""`cratelm steer` with latents of an autoencoder: error kept, error dropped, and the reconstruction alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.autoencoders import write_run_sae
from fixtures.synthetic import make_tokenizer
from fixtures.tiny import random_model, tiny_config

from cratelm import cli
from cratelm.model.weights import save_model

Run = Callable[..., tuple[str, str]]
PROMPT = "7: a crate holds rain."


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder of a run that has only a model."""
    model = random_model(tiny_config(vocab_size=320, context_length=32), np.random.default_rng(4))
    save_model(model, tmp_path / "runs" / "bare" / "model", make_tokenizer())
    return tmp_path / "runs"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that must exit with `code`; return its output."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == code
        return capsys.readouterr()

    return run


def written(folder: Path) -> Any:
    """The newest JSON file."""
    return json.loads(max(folder.glob("steer-*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


def test_latents_of_a_saved_autoencoder_are_steered(runs: Path, tmp_path: Path, command: Run) -> None:
    rng = np.random.default_rng(6)
    write_run_sae(runs / "bare", "stream", "standard", rng, layer=1, tap="residual", d_in=16)
    write_run_sae(runs / "bare", "wide", "jumprelu", rng, layer=1, tap="residual", d_in=20)
    words = ("steer", runs / "bare", "--prompt", PROMPT, "--tokens", 4, "--out", tmp_path / "out", "--neuron")
    results = {}
    for more in ((), ("--drop-error",)):
        out, _ = command(*words, "sae:1/3=set:2", "--sae", "stream", *more)
        results[more] = written(tmp_path / "out")
        assert "autoencoder reconstruction: largest change of a logit" in out
        assert "  loss of the prompt" in out
    _, err = command(*words, "sae:1/3=set:2x", "--sae", "stream", code=2)
    assert f"cratelm collect {runs / 'bare'} --data DIR --sae stream" in err
    kept, dropped = results.values()
    assert kept["reconstruction_logit_change"] == dropped["reconstruction_logit_change"] > 0
    assert kept["prompt_loss"] == dropped["prompt_loss"] != kept["prompt_loss_reconstructed"]
    assert kept["prompts"]["rows"][0]["moved"] != dropped["prompts"]["rows"][0]["moved"] > 0
    for change, sae, message in (
        ("sae:1/24=set:2", "stream", "layer 1 has latents of a --sae 0 to 23, got 24"),
        ("sae:1/3=set:2", "wide", "reads a width of 20, but blocks.1 of this model has 16"),
        ("sae:1/3=set:2", "none", "got none. Hint: "), ("sae:1/3=set:2x", "stream", "--sae stream"),
    ):  # fmt: skip
        assert message in command(*words, change, "--sae", sae, code=2)[1]


@pytest.mark.parametrize("kind", ["topk", "standard"])
def test_strength_0_of_a_latent_changes_nothing_and_the_reconstruction_has_a_separate_row(
    kind: str, runs: Path, tmp_path: Path, command: Run
) -> None:
    write_run_sae(runs / "bare", f"zero-{kind}", kind, np.random.default_rng(8), layer=1, d_in=64, width=20)
    options = ("--prompt", PROMPT, "--tokens", 4, "--out", tmp_path / "out", "--sae", f"zero-{kind}")
    words = ("steer", runs / "bare", *options)
    out, _ = command(*words, "--neuron", "sae:1/5=add:0", "--drop-error")
    result = written(tmp_path / "out")
    *rows, alone = result["prompts"]["rows"]
    assert [row["name"] for row in rows][::2] == ["steered", "opposite sign"]
    assert len(rows) == 4
    assert all(row["moved"] == row["on_tokens"] == row["divergence"] == 0 for row in rows)
    assert alone["name"] == "reconstruction alone"
    assert alone["moved"] > 0 < alone["divergence"]
    assert result["strength_0_is_exact"] is True
    assert result["strength_0_logit_change"] == 0 < result["reconstruction_logit_change"]
    assert f"logit {result['reconstruction_logit_change']:.2g}" in out
    assert result["texts"][0]["without"] == result["texts"][0]["with"]
    command(*words, "--neuron", "sae:1/5=set:3", "--drop-error")
    steered = written(tmp_path / "out")
    assert steered["strength_0_logit_change"] == 0  # at any requested strength
    assert steered["prompts"]["rows"][0]["moved"] > 0
    assert steered["prompts"]["rows"][-1]["moved"] == alone["moved"]
    command(*words, "--neuron", "sae:1/5=add:0")
    kept = written(tmp_path / "out")
    assert len(kept["prompts"]["rows"]) == 4
    assert kept["strength_0_logit_change"] == kept["prompts"]["rows"][0]["moved"] == 0


def test_an_inexact_change_at_strength_0_is_reported(
    runs: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cratelm.steering import steer

    exact = steer._new_value
    monkeypatch.setattr(steer, "_new_value", lambda change, old: exact(change, old) + 1e-2)
    out, _ = command(
        "steer", runs / "bare", "--neuron", "1/9=set:3", "--prompt", PROMPT, "--tokens", 4, "--out", tmp_path / "out"
    )
    assert "strength 0: the logits change" in out
    assert written(tmp_path / "out")["strength_0_logit_change"] > 0
