"""Reading autoencoders: the formulas against float64 by hand and against sae-lens itself, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.autoencoders import ARCHITECTURES, write_run_sae, write_sae
from fixtures.tiny import random_model, tiny_config
from torch import Tensor

import cratelm
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.sae.loading import load_sae, sae_names


def by_hand(
    architecture: str, state: dict[str, Tensor], x: np.ndarray, *, centres: bool = True, by_norm: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstruction of one activation, latent by latent, in float64."""
    weights = {name: tensor.double().numpy() for name, tensor in state.items()}
    centred = x - weights["b_dec"] if centres else x
    width = weights["W_enc"].shape[1]
    latents = np.zeros(width)
    norms = np.sqrt((weights["W_dec"] ** 2).sum(1))
    for i in range(width):
        product = sum(c * w for c, w in zip(centred, weights["W_enc"][:, i], strict=True))
        if architecture == "gated":
            opened = product + weights["b_gate"][i] > 0
            latents[i] = max(product * np.exp(weights["r_mag"][i]) + weights["b_mag"][i], 0) if opened else 0
            continue
        before = (product + weights["b_enc"][i]) * (norms[i] if by_norm else 1)
        floor = weights["threshold"][i] if architecture == "jumprelu" else 0
        latents[i] = before if before > max(floor, 0) else 0
    if architecture == "topk":
        latents[np.argsort(-latents)[3:]] = 0
    decoder = weights["W_dec"] / norms[:, None] if by_norm else weights["W_dec"]
    return latents, latents @ decoder + weights["b_dec"]


@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_decode_are_the_formulas(
    architecture: str, centres: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    by_norm = architecture == "topk" and centres
    extra = {"rescale_acts_by_decoder_norm": True} if by_norm else {}
    state = write_sae(tmp_path / "s", architecture, rng, fields={"apply_b_dec_to_input": centres} | extra)
    sae = load_sae(tmp_path, tmp_path / "s", tap="residual", layer=0)
    x = rng.normal(size=(2, 5, 6)) * 2
    latents = sae.encode(torch.from_numpy(x).float())
    out = sae.decode(latents)
    assert latents.shape == (2, 5, 10)
    fired = 0
    for b, t in np.ndindex(2, 5):
        f, back = by_hand(architecture, state, x[b, t], centres=centres, by_norm=by_norm)
        np.testing.assert_allclose(latents[b, t].numpy(), f, atol=2e-5)
        np.testing.assert_allclose(out[b, t].numpy(), back, atol=5e-5)
        fired += int((f > 0).sum())
    assert fired > 10
    assert torch.equal(sae(torch.from_numpy(x).float()), out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_sae_lens_reads_the_same_numbers(architecture: str, tmp_path: Path, rng: np.random.Generator) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (make test-all installs it)")
    write_sae(tmp_path / "s", architecture, rng)
    ours = load_sae(tmp_path, tmp_path / "s", tap="residual", layer=0)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "s")
    x = torch.from_numpy(rng.normal(size=(3, 7, 6))).float()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours(x), theirs(x))


def test_an_old_file_of_sae_lens_has_other_names(tmp_path: Path, rng: np.random.Generator) -> None:
    state = write_sae(
        tmp_path / "s", "topk", rng, fields={
            "architecture": None, "k": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3},
            "normalize_activations": False, "hook_point": "blocks.2.hook_resid_post", "metadata": None,
        },
    )  # fmt: skip
    sae = load_sae(tmp_path, tmp_path / "s")
    assert (sae.architecture, sae.tap, sae.layer) == ("topk", "residual", 2)
    x = rng.normal(size=(1, 6))
    np.testing.assert_allclose(
        sae.encode(torch.from_numpy(x).float())[0].numpy(), by_hand("topk", state, x[0])[0], atol=2e-5
    )


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.3.mlp.hook_post", ("neurons", 3)),
        ("blocks.0.attn.hook_z", ("heads", 0)),
        ("blocks.5.hook_resid_pre", ("residual", 4)),
        ("model.layers.7", ("model.layers.7", 7)),
    ],
)
def test_the_hook_name_of_sae_lens_says_where_it_belongs(
    hook: str, place: tuple[str, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    write_sae(tmp_path / "s", "standard", rng, fields={"metadata": {"hook_name": hook}})
    sae = load_sae(tmp_path, tmp_path / "s")
    assert (sae.tap, sae.layer) == place


def test_without_tap_and_layer_in_the_files_the_error_asks_for_them(tmp_path: Path, rng: np.random.Generator) -> None:
    for hook in ("blocks.0.hook_resid_pre", "blocks.2.hook_mlp_out", "somewhere"):
        write_sae(tmp_path / hook, "standard", rng, fields={"metadata": {"hook_name": hook}})
        with pytest.raises(CrateError, match=rf"{hook}.*--tap"):
            load_sae(tmp_path, tmp_path / hook)
        assert load_sae(tmp_path, tmp_path / hook, tap="residual", layer=1).layer == 1


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_an_autoencoder_is_spliced_into_its_model(arch: Architecture, tmp_path: Path, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(arch), rng)
    write_run_sae(tmp_path, "a", "standard", rng, layer=1)
    sae = load_sae(tmp_path, "a")
    place = sae.place(model)
    assert place == model.neuron_taps[1]
    tokens = torch.from_numpy(rng.integers(0, 272, size=(2, 9)))
    with torch.no_grad():
        with cratelm.capture(model, [place]) as before:
            model(tokens)
        with cratelm.edit(model, {place: sae}), cratelm.capture(model, [place]) as after:
            model(tokens)
    torch.testing.assert_close(after[place], sae(before[place]))
    assert (sae.d_in, sae.width, sae.tap, sae.layer) == (64, 24, "neurons", 1)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, rng: np.random.Generator) -> None:
    write_run_sae(tmp_path, "good", "standard", rng)
    write_run_sae(tmp_path, "fine", "gated", rng)
    assert sae_names(tmp_path) == ["fine", "good"]
    with pytest.raises(CrateError, match=r"got bad\. Hint: use one of them \(fine, good\)"):
        load_sae(tmp_path, "bad")
    with pytest.raises(CrateError, match=r"got good\. Hint: cratelm sae train"):
        load_sae(tmp_path / "other", "good")
    broken: list[tuple[dict[str, Any], str]] = [
        ({"architecture": "transcoder"}, r"must be one of standard, topk, jumprelu, gated, got 'transcoder'"),
        ({"normalize_activations": "layer_norm"}, r"must be none, got layer_norm"),
        ({"architecture": "jumprelu"}, r"threshold of .* must have the shape \(10,\)"),
        ({"architecture": "topk"}, r"must have k, got none"),
        ({"d_sae": 11}, r"W_enc of .* must have the shape \(6, 11\) of its cfg.json, got \(6, 10\)"),
        ({"d_in": None}, r"has a missing or invalid field"),
    ]
    for number, (fields, output) in enumerate(broken):
        write_sae(tmp_path / f"b{number}", "standard", rng, fields=fields)
        with pytest.raises(CrateError, match=output):
            load_sae(tmp_path, tmp_path / f"b{number}", tap="residual", layer=0)
    (tmp_path / "saes" / "good" / "cfg.json").write_text("{")
    with pytest.raises(CrateError, match="cfg.json is not readable JSON"):
        load_sae(tmp_path, "good")
    (tmp_path / "saes" / "fine" / "sae_weights.safetensors").write_bytes(b"1234567890")
    with pytest.raises(CrateError, match="is damaged"):
        load_sae(tmp_path, "fine")


def test_another_width_or_layer_than_the_models_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    write_run_sae(tmp_path, "a", "standard", rng, layer=7)
    sae = load_sae(tmp_path, "a")
    with pytest.raises(CrateError, match=r"at a layer of the model \(0, 1\), got 7"):
        sae.place(model)
    with pytest.raises(CrateError, match=r"width 16 \(.*layer 7\), got 64"):
        sae.check_width(16)


def test_a_description_of_a_newer_cratelm_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    write_run_sae(tmp_path, "a", "standard", rng, format_version=2)
    assert json.loads((tmp_path / "saes" / "a" / "sae.json").read_text())["format_version"] == 2
    with pytest.raises(CrateError, match="format version 2"):
        load_sae(tmp_path, "a")
