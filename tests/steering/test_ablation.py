"""Ablation: the fast methods give the same numbers as forward passes with an edited code."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.autoencoders import write_sae
from fixtures.hugging_face import build
from fixtures.tiny import random_model, tiny_config

from cratelm.activations.taps import capture, edit
from cratelm.errors import CrateError
from cratelm.sae.loading import load_sae
from cratelm.steering.ablation import Ablation, HeldOut, held_out
from cratelm.steering.ablation_file import AblationFile, AblationRow
from cratelm.steering.generate import all_logits
from cratelm.steering.place import SparseCoder, neuron_places
from cratelm.training.document_means import mean_over_documents

COMPLETE = {"dictionary": "complete", "expansion": 1, "ista_steps": 1}
MODELS: list[dict[str, Any]] = [
    {"arch": "crate"}, {"arch": "gpt2", "bias": True}, {"arch": "crate", **COMPLETE},
    {"arch": "crate", "ista_residual": True, "untied_decoder": True},
]  # fmt: skip


def text_of(rng: np.random.Generator, model: Any, vocab: int = 272, tokens: int = 71) -> Any:
    bounds = np.array([0, 9, 30, 44, tokens])
    return held_out(rng.integers(vocab, size=tokens).astype(np.uint16), bounds, model, None)


def by_hand(model: Any, text: Any, layer: int, neurons: list[int], kind: str) -> np.ndarray:
    """Change of every document's loss when these neurons are ablated, one window at a time."""
    place, change = neuron_places(model)[layer], np.zeros(len(text.sizes))
    codes = []
    with torch.no_grad():
        windows = list(text.batches(1))
        for _, inputs, _ in windows:
            with edit(model, {place.tap: lambda code: codes.append(code.flatten(0, -2)) or code}):  # type: ignore[func-returns-value]
                all_logits(model, inputs)
        mean = torch.cat(codes).mean(0) if kind == "mean" else torch.zeros(place.neurons)

        def out(code: torch.Tensor) -> torch.Tensor:
            code = code.clone()
            for neuron in neurons:
                code[..., neuron] = mean[neuron]
            return code

        for first, inputs, targets in windows:
            before = F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none")
            with edit(model, {place.tap: out}):
                after = F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none")
            for offset, one in enumerate((after - before).tolist()):
                change[np.searchsorted(text.documents, first + offset, side="right") - 1] += one
    return change


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("variant", MODELS, ids=str)
def test_the_fast_methods_equal_the_direct_one(variant: dict[str, Any], kind: Any, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(**variant), rng).double()
    text = text_of(rng, model)
    result = Ablation(model, text, [0, 1])
    neurons = rng.choice(result.places[0].neurons, 4, replace=False).tolist()
    for layer in (0, 1):
        fast, direct = (result.each(layer, neurons, kind, method=method) for method in ("auto", "direct"))
        np.testing.assert_allclose(fast, direct, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(fast[2], by_hand(model, text, layer, neurons[2:3], kind), rtol=1e-7, atol=1e-9)
        assert abs(fast).max() > 1e-4
    group = result.together([(1, neuron) for neuron in neurons], kind)
    np.testing.assert_allclose(group, by_hand(model, text, 1, neurons, kind), rtol=1e-7, atol=1e-9)
    loud = int(np.abs(result.each(1, range(result.places[1].neurons), kind)).sum(1).argmax())
    both = result.together([(0, neurons[0]), (1, loud)], kind)
    assert not np.allclose(both, result.each(0, neurons[:1], kind)[0])


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_ablating_hugging_face_models_equals_edited_forward_passes(family: str, rng: np.random.Generator) -> None:
    model = build(family, rng)
    text = text_of(rng, model, vocab=60)
    result = Ablation(model, text, [0, 1])
    for layer, kind in ((0, "zero"), (1, "zero"), (1, "mean")):
        change = result.each(layer, [3, 8], kind)  # type: ignore[arg-type]
        np.testing.assert_allclose(change[1], by_hand(model, text, layer, [8], kind), rtol=1e-3, atol=1e-4)
    assert (result.readout is None) == (family == "opt")


def test_the_losses_of_the_intact_model_equal_those_of_evaluate(rng: np.random.Generator) -> None:
    from fixtures.tiny import hidden_bar

    from cratelm.training.evaluate import document_losses

    model = random_model(tiny_config(), rng)
    text = text_of(rng, model)
    result = Ablation(model, text, [0])
    wanted = document_losses(model, text.tokens, text.documents, batch=2, bar=hidden_bar())
    owner = text.owner(1, len(result.plain))
    np.testing.assert_allclose(np.bincount(owner, result.plain), wanted.nats, rtol=1e-5)
    assert text.sizes.tolist() == wanted.tokens.tolist()


def test_ablating_a_silent_neuron_changes_nothing(rng: np.random.Generator) -> None:
    model: Any = random_model(tiny_config(), rng)
    for layer in (0, 1):
        model.blocks[layer].ista.atoms.data[5] = 0
    result = Ablation(model, text_of(rng, model), [0, 1])
    assert not result.each(0, [5], "zero").any()
    assert not result.each(1, [5], "zero").any()
    assert result.densities[1][5] == 0


def test_a_limit_reads_the_beginnings_of_the_first_documents(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    tokens, bounds = rng.integers(272, size=71), np.array([0, 9, 30, 44, 71])  # the context is 16
    two = held_out(tokens, bounds, model, 10)
    assert two.tokens.tolist() == [*tokens[:9], *tokens[9:24], tokens[29]]
    assert two.documents.tolist() == [0, 9, 25]
    assert held_out(tokens, bounds, model, 9).tokens.tolist() == tokens[:9].tolist()
    assert held_out(tokens, bounds, model, 1000).documents.tolist() == [0, 9, 25, 39, 55]
    assert len(held_out(tokens, bounds, model, None).tokens) == 71
    assert two.real.nonzero()[0].tolist() == [*range(24)]  # the end of the second document, which is truncated
    assert two.sizes.tolist() == [8, 15]
    assert held_out(tokens, bounds, model, None).real.all()
    with pytest.raises(CrateError, match="must have at least 2 tokens, got 1"):
        held_out(tokens[:1], np.array([0, 1]), model, None)


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_the_end_token_of_a_truncated_document_is_not_scored(kind: Any, rng: np.random.Generator) -> None:
    """Compared with the losses of the tokens that the documents really contain."""
    model = random_model(tiny_config(), rng)
    tokens, bounds = rng.integers(1, 272, size=71), np.array([0, 9, 30, 44, 71])  # the context is 16
    tokens[bounds[1:] - 1] = 0
    text = held_out(tokens, bounds, model, 1000)
    scored = [*range(1, 24), *range(25, 39), *range(39, 54)]  # all but the first token and the two inserted ends
    result = Ablation(model, text, [0, 1])
    plain, _ = mean_over_documents(text.by_document(1, result.plain), text.sizes)
    assert text.sizes.sum() == len(scored)
    assert float(plain) == pytest.approx(result.plain[np.array(scored) - 1].mean(), rel=1e-9)
    with torch.no_grad():
        losses = []
        for _, inputs, targets in text.batches(1):
            losses += F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none").tolist()
    assert float(plain) == pytest.approx(np.mean([losses[one - 1] for one in scored]), rel=1e-5)
    whole = HeldOut(tokens=text.tokens, documents=text.documents, context=16, real=np.ones(55, dtype=np.bool_))
    for layer in (0, 1):
        neurons = rng.choice(64, 3, replace=False).tolist()
        for alone in (False, True):
            both = [Ablation(model, one, [0, 1]) for one in (text, whole)]
            ours, every = (
                one.each(layer, neurons, kind)[0] if alone else one.together([(layer, neurons[0])], kind)
                for one in both
            )
            single = per_token(model, text, layer, neurons[0], kind, result.means[layer])
            assert ours.sum() == pytest.approx(single[np.array(scored) - 1].sum(), rel=1e-3, abs=1e-4)
            assert every.sum() == pytest.approx(single.sum(), rel=1e-3, abs=1e-4)


def per_token(model: Any, text: Any, layer: int, neuron: int, kind: str, means: torch.Tensor) -> np.ndarray:
    """Change of the loss of every predicted token when one neuron is ablated."""
    place, level = neuron_places(model)[layer], float(means[neuron]) if kind == "mean" else 0.0

    def out(code: torch.Tensor) -> torch.Tensor:
        code = code.clone()
        code[..., neuron] = level
        return code

    change: list[float] = []
    with torch.no_grad():
        for _, inputs, targets in text.batches(1):
            before = F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none")
            with edit(model, {place.tap: out}):
                after = F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none")
            change += (after - before).tolist()
    return np.array(change)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize(("architecture", "layer", "tap"), [
    ("topk", 1, "neurons"), ("jumprelu", 0, "neurons"), ("gated", 1, "residual"),
])  # fmt: skip
def test_ablating_a_latent_moves_its_tap_by_its_direction(
    architecture: str, layer: int, tap: str, kind: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch="crate"), rng)
    write_sae(tmp_path / "sae", architecture, rng, d_in=64 if tap == "neurons" else 16, width=12)
    sae = load_sae(tmp_path, tmp_path / "sae", tap=tap, layer=layer)
    coder = SparseCoder(
        tap=sae.place(model), layer=layer, directions=sae.W_dec, encode=sae.encode, decode=sae.decode
    )  # fmt: skip
    text = text_of(rng, model)
    result = Ablation(model, text, [layer], coders={layer: coder})
    windows, seen = list(text.batches(1)), []
    with torch.no_grad():
        for _, inputs, _ in windows:
            with capture(model, [coder.tap]) as values:
                all_logits(model, inputs)
            seen.append(sae.encode(values[coder.tap][0]))
    mean = torch.cat(seen).double().mean(0)
    loud = mean.argsort(descending=True)[:3].tolist()

    def by_definition(out: list[int]) -> np.ndarray:
        change = np.zeros(len(text.sizes))
        for (first, inputs, targets), latent in zip(windows, seen, strict=True):
            level = mean[out].float() if kind == "mean" else torch.zeros(len(out))
            move = partial(torch.add, ((level - latent[:, out]) @ sae.W_dec[out])[None])
            with torch.no_grad():
                before = F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none")
                with edit(model, {coder.tap: move}):
                    after = F.cross_entropy(all_logits(model, inputs)[0], targets[0], reduction="none")
            for offset, one in enumerate((after - before).tolist()):
                change[np.searchsorted(text.documents, first + offset, side="right") - 1] += one
        return change

    wanted = np.stack([by_definition([one]) for one in loud])
    assert abs(wanted).max() > 1e-3
    for alone in (result.each(layer, loud, kind), result.each(layer, loud, kind, method="direct")):
        np.testing.assert_allclose(alone, wanted, rtol=1e-3, atol=1e-4)
    together = result.together([(layer, one) for one in loud], kind)
    np.testing.assert_allclose(together, by_definition(loud), rtol=1e-3, atol=1e-4)
    densities = (torch.cat(seen) > 0).double().mean(0).numpy()
    np.testing.assert_allclose(result.densities[layer], densities)


def test_rows_of_an_earlier_version_are_read_and_resumed(tmp_path: Path) -> None:
    settings = {"model_hash": "m", "data_hash": "d", "split": "val", "read": "20k", "tokens": 70, "documents": 4}
    (tmp_path / "ablation.json").write_text(json.dumps({**settings, "run": "crate-2l", "plain": {}, "origin": {}}))
    row = {"neurons": ["1/9"], "kind": "mean", "nats": 0.25, "standard_error": None, "density": 0.5}
    (tmp_path / "ablation.jsonl").write_text(json.dumps(row) + "\n")
    file = AblationFile(tmp_path)
    assert file.open(settings, {}) == {(("1/9",), "mean")}
    (read,) = file.rows()
    assert read == AblationRow(neurons=("1/9",), kind="mean", nats=0.25, standard_error=None, density=0.5)
    with pytest.raises(CrateError, match=r"got other values \(documents"):
        file.open({**settings, "documents": 5}, {})
