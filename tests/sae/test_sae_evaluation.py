"""The numbers of `cratelm sae evaluate` against brute force in float64."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.autoencoders import write_run_sae, write_sae
from fixtures.tiny import make_tokens, random_model, tiny_config

import cratelm
from cratelm import cli
from cratelm.commands.sae_evaluate import notes, table_lines
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.weights import save_model, weights_hash
from cratelm.sae.evaluation import (
    HeldOutRows,
    Reconstruction,
    costs,
    histogram,
    nearest_cosine,
    standard_error,
    unigram_loss,
)
from cratelm.sae.loading import load_sae


def test_the_numbers_of_a_reconstruction_are_their_formulas(rng: np.random.Generator) -> None:
    x, out = rng.normal(size=(40, 5)) + 3, rng.normal(size=(40, 5)) + 3
    x[7], out[9] = 0, 0
    latents = rng.normal(size=(40, 6)).clip(0)
    latents[:, 2] = 0
    seen = Reconstruction(5, 6, torch.device("cpu"))
    for part in (slice(0, 13), slice(13, 40)):
        seen.update(*(torch.from_numpy(values[part]).float() for values in (x, latents, out)))
    x, out = x.astype(np.float32).astype(float), out.astype(np.float32).astype(float)
    norm, norm_out, product = np.linalg.norm(x, axis=1), np.linalg.norm(out, axis=1), (x * out).sum(1)
    both = (norm > 0) & (norm_out > 0)
    expected = {
        "l0": (latents > 0).sum(1).mean(), "fvu": ((x - out) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "explained_variance": 1 - (x - out).var(0).sum() / x.var(0).sum(),
        "cosine": (product[both] / norm[both] / norm_out[both]).mean(),
        "norm_ratio": (norm_out[norm > 0] / norm[norm > 0]).mean(),
        "relative_bias": (norm_out**2).mean() / product.mean(), "dead_share": 1 / 6,
    }  # fmt: skip
    assert seen.result() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(seen.mean.numpy(), x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen.density, (latents > 0).mean(0))


def test_activations_that_never_change_have_no_variance_to_explain() -> None:
    seen = Reconstruction(2, 3, torch.device("cpu"))
    seen.update(torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(4, 2))
    measured = seen.result()
    assert [measured[name] for name in ("fvu", "explained_variance", "cosine", "norm_ratio")] == [None] * 4
    assert (measured["l0"], measured["dead_share"]) == (0.0, 1.0)


def test_costs_and_shares_recovered_of_a_case_worked_by_hand() -> None:
    losses = {
        "clean": np.array([2.0, 3.0, 4.0, 3.0]), "sae": np.array([2.5, 3.5, 4.5, 3.5]),
        "zero": np.array([7.0, 8.0, 9.0, 8.0]), "mean": np.array([5.0, 5.0, 6.0, 4.0]),
    }  # fmt: skip
    result = costs(losses, np.array([0, 0, 1, 1]), unigram=6.0)
    assert (result["ce"], result["ce_sae"], result["ce_zero"], result["ce_mean"]) == (3.0, 3.5, 8.0, 5.0)
    assert (result["ce_added"], result["ce_added_error"]) == (0.5, 0.0)
    assert (result["recovered_zero"], result["recovered_mean"]) == (0.9, 0.75)
    assert result["kept_model"] == pytest.approx(2.5 / 3)
    assert costs(losses, np.array([0, 0, 0, 0]), unigram=2.9)["kept_model"] is None


def test_the_standard_error_is_that_of_a_ratio_over_documents(rng: np.random.Generator) -> None:
    sizes = rng.integers(5, 40, 300)
    owner = np.repeat(np.arange(300) * 2, sizes)
    values = rng.normal(size=300)[owner // 2] + rng.normal(size=len(owner))
    result = standard_error(values, owner)
    picks = rng.integers(300, size=(1500, 300))
    sums = np.bincount(owner // 2, values)
    bootstrap = (sums[picks].sum(1) / sizes[picks].sum(1)).std()
    assert result == pytest.approx(bootstrap, rel=0.15)
    assert standard_error(values, np.zeros(len(values), dtype=int)) is None


def test_unigram_histogram_and_cosine(rng: np.random.Generator) -> None:
    counts = np.array([3, 0, 5])
    by_hand = -np.mean([np.log(4 / 11), np.log(1 / 11), np.log(6 / 11), np.log(6 / 11)])
    assert unigram_loss(counts, np.array([0, 1, 2, 2], dtype=np.uint16)) == pytest.approx(by_hand)
    result = histogram(np.array([0.0, 1e-9, 1e-3, 0.0011, 1.0]))
    assert (result["dead"], sum(result["counts"])) == (1, 4)
    assert (result["counts"][0], result["counts"][-1]) == (1, 1)
    directions = rng.normal(size=(1500, 7))
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    np.testing.assert_allclose(nearest_cosine(torch.from_numpy(directions)).numpy(), cosines.max(1), atol=1e-9)


def test_rows_predict_each_token_once() -> None:
    tokens = np.arange(35).astype(np.uint16)
    rows = HeldOutRows(tokens=tokens, context=8, at_once=3)
    batches = list(rows)
    assert rows.predicted == 32
    assert [tuple(batch.shape) for batch in batches] == [(3, 9), (1, 9)]
    assert torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist() == list(range(1, 33))
    short = HeldOutRows(tokens=tokens[:5], context=8, at_once=3)
    assert [batch.tolist() for batch in short] == [[[0, 1, 2, 3, 4]]]


def make_run(folder: Path, rng: np.random.Generator, arch: Architecture = "crate") -> tuple[Path, TokenDirectory, Any]:
    """A run with a random model, its tokens and its model."""
    data = make_tokens(folder / "tokens", rng, documents=60)
    model = random_model(tiny_config(arch, vocab_size=data.vocab_size), rng)
    save_model(model, folder / "run" / "model", data.tokenizer())
    return folder / "run", data, cratelm.load(folder / "run")[0]


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_an_evaluation_is_what_a_plain_loop_over_the_text_finds(
    arch: Architecture, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data, model = make_run(tmp_path, rng, arch)
    write_run_sae(run, "a", "standard", rng, layer=1, kind="paper")
    command = ["sae", "evaluate", str(run), "--data", str(data.path), "--tokens", "600", "--batch-rows", "5"]
    assert cli.main(command) == 0
    result = json.loads((run / "saes" / "a" / "evaluation.json").read_text())
    sae, place = load_sae(run, "a"), model.neuron_taps[1]
    tokens = torch.from_numpy(data.tokens("val")[:593].astype(np.int64))
    x, losses = [], {}
    for row in range(37):
        piece = tokens[16 * row : 16 * row + 17]
        with torch.no_grad(), cratelm.capture(model, [place]) as codes:
            model(piece[None, :-1])
        x.append(codes[place][0])
    mean = torch.cat(x).mean(0)
    edits: dict[str, Any] = {
        "ce": lambda x: x,
        "ce_sae": sae,
        "ce_zero": lambda x: 0 * x,
        "ce_mean": lambda x: 0 * x + mean,
    }
    for name, change in edits.items():
        total = 0.0
        for row in range(37):
            piece = tokens[16 * row : 16 * row + 17]
            with torch.no_grad(), cratelm.edit(model, {place: change}):
                logits = model(piece[None, :-1])[0].double()
            total -= float(torch.log_softmax(logits, -1).gather(1, piece[1:, None]).sum())
        losses[name] = total / (37 * 16)
    assert {name: result[name] for name in losses} == pytest.approx(losses, rel=1e-4)
    assert result["ce_added"] == pytest.approx(losses["ce_sae"] - losses["ce"], abs=1e-4)
    assert result["l0"] == pytest.approx(float((sae.encode(torch.cat(x)) > 0).sum()) / 592)
    assert (result["tokens"], result["model_hash"], result["kind"]) == (592, weights_hash(model), "paper")
    counts = np.bincount(data.tokens("train"), minlength=data.vocab_size)
    assert result["ce_unigram"] == pytest.approx(unigram_loss(counts, data.tokens("val")[1:593]))
    assert all((run / "saes" / "a" / f"density.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))
    output = capsys.readouterr().out
    assert "592 tokens of" in output
    assert f"{result['ce_added']:.4f}" in output
    assert max(map(len, output.splitlines())) < 100


def test_an_autoencoder_that_loses_nothing_costs_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    run, data, _ = make_run(tmp_path, rng)
    state = write_run_sae(run, "a", "standard", rng, layer=0, d_in=64, width=64)
    from safetensors.torch import save_file

    identity = {"W_enc": torch.eye(64), "W_dec": torch.eye(64), "b_enc": torch.zeros(64), "b_dec": torch.zeros(64)}
    assert identity.keys() == state.keys()
    save_file(identity, run / "saes" / "a" / "sae_weights.safetensors")
    assert cli.main(["sae", "evaluate", str(run), "--data", str(data.path), "--tokens", "400"]) == 0
    result = json.loads((run / "saes" / "a" / "evaluation.json").read_text())
    assert result["fvu"] < 1e-12
    assert abs(result["ce_added"]) < 1e-6
    for ablated in ("zero", "mean"):  # zeros may help a model with random weights; then there is nothing to recover
        helps = result[f"ce_{ablated}"] <= result["ce"]
        assert result[f"recovered_{ablated}"] == (None if helps else pytest.approx(1, abs=1e-4))


def test_the_table_says_where_shares_are_inflated() -> None:
    row = {
        "l0": 3.0, "fvu": 0.1, "cosine": 0.9, "relative_bias": None, "dead_share": 0.25, "ce_added": 0.1, "ce": 3.0,
        "recovered_zero": 0.98, "recovered_mean": 0.95, "kept_model": 0.97, "ce_zero": 8.0, "ce_unigram": 6.0,
        "tokens": 1000, "documents": 9,
    }  # fmt: skip
    assert "inflated" in " ".join(notes({"a": row}))
    assert "inflated" not in " ".join(notes({"a": row | {"ce_zero": 5.0}}))
    lines = table_lines({"a": row, "a-longer-name": row})
    assert lines[1].split() == ["a", "3.0", "0.100", "0.900", "-", "25.0%", "0.1000", "0.980", "0.950", "0.970"]
    assert len({len(line) for line in lines}) == 1


def test_invalid_input_raises_one_line(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    run, data, model = make_run(tmp_path, rng)

    def refused(*more: str) -> str:
        assert cli.main(["sae", "evaluate", str(run), "--data", str(data.path), *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        return error

    assert "must have an autoencoder, got none. Hint: cratelm sae train" in refused()
    write_run_sae(run, "wide", "standard", rng, layer=0, d_in=65)
    write_run_sae(run, "deep", "standard", rng, layer=5)
    write_run_sae(run, "old", "standard", rng, settings={"model_hash": "0123456789abcdef"})
    assert "must have the width 64 (tap neurons, layer 0), got 65" in refused("--sae", "wide")
    assert "must be at a layer of the model (0, 1), got 5" in refused("--sae", "deep")
    assert f"of {run} ({weights_hash(model)[:12]}), got 0123456789ab" in refused("--sae", "old")
    assert "got other. Hint: use one of them (deep, old, wide)" in refused("--sae", "other")
    write_sae(tmp_path / "wide", "standard", rng, d_in=64)
    assert "must not have the name of an autoencoder in" in refused(
        "--sae", str(tmp_path / "wide"), "--tap", "neurons", "--layer", "0"
    )
    assert "--batch-rows must be at least 1, got 0" in refused("--batch-rows", "0")
    assert cli.main(["sae"]) == 2
    assert "cratelm sae train or cratelm sae evaluate" in capsys.readouterr().err
    assert not (run / "saes" / "wide" / "evaluation.json").exists()


def test_nothing_to_predict_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    from cratelm.activations.observe import observe
    from cratelm.activations.subject import Corpus
    from cratelm.sae.evaluation import evaluate_sae

    model = random_model(tiny_config(), rng)
    write_run_sae(tmp_path, "a", "standard", rng)
    corpus = Corpus(tokens=np.zeros(1, np.uint16), documents=np.array([0, 1]), end_of_text=0, identity={})
    subject = observe(model, model_hash="")
    from fixtures.tiny import hidden_bar

    with pytest.raises(CrateError, match="must leave at least 2 tokens to evaluate, got 1"):
        evaluate_sae(
            model, load_sae(tmp_path, "a"), subject, replace(corpus), max_tokens=None, at_once=2, bar=hidden_bar(),
            unigram=lambda _: 0.0,
        )  # fmt: skip
