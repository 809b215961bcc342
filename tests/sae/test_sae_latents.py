"""Latents as neurons: the records are the autoencoder's activations, and everything after them works by --tap."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.autoencoders import write_run_sae
from fixtures.tiny import make_tokens, random_model, tiny_config

import cratelm
from cratelm import cli
from cratelm.activations.observe import observe
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.weights import save_model
from cratelm.sae.latents import observe_latents
from cratelm.sae.loading import load_sae, saes_folder


def make_run(folder: Path, rng: np.random.Generator, arch: Architecture) -> tuple[Path, Path]:
    """A run with a random model and rows long enough to collect, and its tokens."""
    data = make_tokens(folder / "tokens", rng, documents=300)
    model = random_model(tiny_config(arch, vocab_size=data.vocab_size, context_length=80), rng)
    save_model(model, folder / "run" / "model", data.tokenizer())
    return folder / "run", data.path


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_latents_are_collected_interpreted_and_listed_like_neurons(
    arch: Architecture, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = make_run(tmp_path, rng, arch)
    write_run_sae(run, "a", "topk", rng, layer=1)
    assert cli.main(["collect", str(run), "--data", str(data), "--layer", "0"]) == 0
    assert cli.main(["collect", str(run), "--data", str(data), "--sae", "a"]) == 0
    records = cratelm.read_records(run, 1, tap="sae-a")
    assert records.num_neurons == 24
    model, _ = cratelm.load(run)
    sae, place = load_sae(run, "a"), model.neuron_taps[1]
    corpus, checked = np.memmap(data / "val.bin", np.uint16, mode="r"), 0
    for latent in range(24):
        for excerpt in records[latent].excerpts[64, "score", "top"][:4]:
            # A document's first row is read from the <|endoftext|> before it on.
            start = int(records.windows.document_position[excerpt.document]) - 1
            read = torch.from_numpy(corpus[max(start, 0) : excerpt.position + len(excerpt.tokens)].astype(np.int64))
            if start >= 0 and len(read) <= 68:
                with torch.no_grad(), cratelm.capture(model, [place]) as codes:
                    model(read[None])
                latents = sae.encode(codes[place])[0, -len(excerpt.tokens) :, latent]
                np.testing.assert_allclose(excerpt.activations, latents.numpy(), rtol=1e-3, atol=1e-4)
                checked += 1
    assert checked
    description = json.loads((run / "records" / "fixed" / "records.json").read_text())
    assert description["taps"]["sae-a"]["sae_hash"] == sae.sae_hash
    assert "sae_hash" not in description
    assert cli.main(["interpret", str(run), "--tap", "sae-a"]) == 0
    assert "top-and-random" in capsys.readouterr().out
    assert cli.main(["neurons", str(run), "--tap", "sae-a", "--sort", "score"]) == 0
    assert cli.main(["neurons", str(run), "--tap", "sae-a", "--neuron", "5"]) == 0


def test_a_retrained_autoencoder_is_collected_again(tmp_path: Path, rng: np.random.Generator) -> None:
    run, data = make_run(tmp_path, rng, "crate")
    write_run_sae(run, "a", "standard", rng)
    collect = ["collect", str(run), "--data", str(data), "--sae", "a"]
    file = run / "records" / "fixed" / "sae-a" / "layer_00.safetensors"
    assert cli.main(collect) == 0
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    assert cli.main(collect) == 0
    assert file.stat().st_mtime_ns == written
    for old in (saes_folder(run) / "a").iterdir():
        old.unlink()
    (saes_folder(run) / "a").rmdir()
    write_run_sae(run, "a", "standard", rng)
    assert cli.main(collect) == 0
    assert file.read_bytes() != first


def test_a_latent_writes_through_what_it_decodes_to(tmp_path: Path, rng: np.random.Generator) -> None:
    model = random_model(tiny_config("crate", context_length=80), rng)
    write_run_sae(tmp_path, "code", "standard", rng, layer=1)
    write_run_sae(tmp_path, "stream", "standard", rng, layer=0, tap="residual", d_in=16)
    code, stream = load_sae(tmp_path, "code"), load_sae(tmp_path, "stream")
    result = observe_latents(observe(model, model_hash="m", layers=(1,)), code)
    block: Any = model.get_submodule("blocks.1.ista")
    assert result.decoders is not None
    torch.testing.assert_close(result.decoders[1], code.W_dec @ block.atoms.detach())
    assert (result.tap, dict(result.layers)) == ("sae-code", {1: 24})
    residual = observe(model, model_hash="m", tap="residual", layers=(0,))
    through = observe_latents(residual, stream)
    assert through.decoders is not None
    torch.testing.assert_close(through.decoders[0], stream.W_dec)
    write_run_sae(tmp_path, "wrong", "standard", rng, layer=0, tap="residual", d_in=64)
    wrong = load_sae(tmp_path, "wrong")
    with pytest.raises(CrateError, match="width 16 .*got 64"):
        observe_latents(residual, wrong)


def test_wrong_input_is_one_line(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    run, data = make_run(tmp_path, rng, "gpt2")
    write_run_sae(run, "a", "standard", rng)
    write_run_sae(run, "old", "standard", rng, settings={"model_hash": "0123456789abcdef"})
    for more, output in (
        (["--sae", "b"], "got b. Hint: use one of them (a, old)"),
        (["--sae", "a", "--tap", "residual"], "Use --sae without --tap"),
        (["--sae", "a", "--layer", "0"], "Use --sae without --tap"),
        (["--sae", "old"], "got 0123456789ab"),
    ):
        assert cli.main(["collect", str(run), "--data", str(data), *more]) == 2
        assert output in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "records").exists()
