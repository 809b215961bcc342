"""The MLP of dense Hugging Face families, found next to convolutions and per-layer embeddings, and its norms."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.dense_families import DENSE, POST_NORM, build_dense

from cratelm.activations.places import decoders, find_places, map_directions
from cratelm.activations.taps import capture
from cratelm.errors import CrateError
from cratelm.steering.readout import find_readout
from cratelm.whitebox.foreign_wiring import foreign_wiring

LAST_MAP = {
    "gpt2": "transformer.h.{}.mlp.c_proj", "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2", "phi": "model.layers.{}.mlp.fc2",
    "falcon_h1": "model.layers.{}.feed_forward.down_proj", "bamba": "model.layers.{}.feed_forward.down_proj",
    "lfm2": "model.layers.{}.feed_forward.w2",
}  # fmt: skip
HEADS = {"lfm2": [1], "bamba": [1]}
"""Layers with an attention, where some have none."""


@pytest.mark.parametrize("family", DENSE)
def test_the_neurons_are_what_the_last_map_of_the_mlp_reads(family: str, rng: np.random.Generator) -> None:
    model = build_dense(family, rng)
    path = LAST_MAP.get(family, "model.layers.{}.mlp.down_proj")
    assert find_places(model, "neurons") == {layer: f"{path.format(layer)}:input" for layer in (0, 1)}
    assert list(find_places(model, "heads")) == HEADS.get(family, [0, 1])
    assert list(find_places(model, "residual")) == [0, 1]


@pytest.mark.parametrize("family", POST_NORM)
def test_a_norm_after_the_mlp_is_part_of_the_decoder_direction(family: str, rng: np.random.Generator) -> None:
    model, tokens = build_dense(family, rng), torch.from_numpy(rng.integers(60, size=(2, 9)))
    places = find_places(model, "neurons")
    directions, maps = decoders(model, places), map_directions(model, places)
    assert directions is not None
    assert maps is not None
    for layer, place in places.items():
        block = f"model.layers.{layer}"
        norm = f"{block}.post_mlp_layernorm" if family == "glm4" else f"{block}.post_feedforward_layernorm"
        with capture(model, [place, norm]) as seen, torch.no_grad():
            model(tokens)
        added, code = seen[norm].flatten(0, -2), seen[place].flatten(0, -2)
        alike = F.cosine_similarity(code @ directions[layer], added, dim=1)
        torch.testing.assert_close(alike, torch.ones_like(alike), rtol=1e-4, atol=1e-4)
        without = F.cosine_similarity(code @ maps[layer], added, dim=1)
        assert float(without.min()) < 0.999


@pytest.mark.parametrize("family", POST_NORM)
def test_directions_of_a_family_with_post_norms_are_right_and_its_ledger_is_refused(
    family: str, rng: np.random.Generator
) -> None:
    model: Any = build_dense(family, rng)
    directions = decoders(model, find_places(model, "neurons"))
    assert directions is not None
    wiring = foreign_wiring(model)
    for layer, weights in enumerate(wiring.layers):
        assert torch.equal(weights.write, directions[layer])
    with pytest.raises(CrateError, match="not sums over neurons|must be a LayerNorm or RMSNorm"):
        find_readout(model)


def test_a_family_without_post_norms_keeps_the_rows_of_its_map(rng: np.random.Generator) -> None:
    model = build_dense("llama", rng)
    places = find_places(model, "neurons")
    directions, maps = decoders(model, places), map_directions(model, places)
    assert directions is not None
    assert maps is not None
    assert all(torch.equal(directions[layer], maps[layer]) for layer in places)
