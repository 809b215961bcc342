"""The ledger of the last layer adds up to the model's own logit, for `LanguageModel`s and Hugging Face models."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.hugging_face import FAMILIES, build
from fixtures.tiny import random_model, tiny_config
from torch import nn

from cratelm.errors import CrateError
from cratelm.steering.changes import Change
from cratelm.steering.generate import all_logits, next_logits
from cratelm.steering.intervention import Intervention
from cratelm.steering.ledger import ledger
from cratelm.steering.readout import find_readout
from cratelm.steering.steer import steer

COMPLETE = {"dictionary": "complete", "expansion": 1, "ista_steps": 1}
OURS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"arch": "crate"}, ("bias of the final norm",)),
    ({"arch": "crate", "untied_decoder": True}, ("bias of the final norm",)),
    ({"arch": "crate", **COMPLETE}, ()),
    ({"arch": "crate", "ista_residual": True, "untied_decoder": True}, ("residual", "bias of the final norm")),
    ({"arch": "crate", "ista_residual": True, **COMPLETE}, ("residual",)),
    ({"arch": "crate", "attention": "qkv", "ista_residual": True}, ("residual", "bias of the final norm")),
    ({"arch": "gpt2"}, ("residual",)),
    (
        {"arch": "gpt2", "bias": True, "activation": "gelu"},
        ("residual", "bias of the neurons' map", "bias of the final norm"),
    ),
]
HEAD_BIAS = {"phi"}
FLOAT32_INSIDE = {"llama", "mistral", "qwen2", "qwen3", "phi3"}
"""Families whose RMSNorm computes in float32 even in a float64 model."""


@pytest.mark.parametrize(("variant", "named"), OURS, ids=str)
def test_ledgers_of_language_models_add_up(
    variant: dict[str, Any], named: tuple[str, ...], rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(**variant), rng)
    tokens = torch.from_numpy(rng.integers(272, size=(1, 9)))
    token, versus, position = (int(rng.integers(high)) for high in (272, 272, 9))
    narrow = ledger(model, tokens, token=token, position=position)
    assert abs(narrow.remainder) < 1e-5
    model.double()
    result = ledger(model, tokens, token=token, versus=versus, position=position)
    logits = all_logits(model, tokens)[0, position].detach()
    assert result.logit == pytest.approx(float(logits[token] - logits[versus]), abs=1e-12)
    assert abs(result.remainder) < 1e-9
    assert abs(result.contributions).sum() > 0.01
    kinds = tuple(dict.fromkeys(name.split(":")[0].replace("residual stream", "residual") for name in result.terms))
    assert kinds == named
    best = ledger(model, tokens)
    assert best.token == int(all_logits(model, tokens)[0, -1].argmax())
    assert best.position == 8


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_ledgers_of_hugging_face_models_add_up(family: str, rng: np.random.Generator) -> None:
    model = build(family, rng)
    tokens = torch.from_numpy(rng.integers(60, size=(1, 9)))
    narrow = ledger(model, tokens, token=7)
    assert abs(narrow.remainder) < 1e-5
    model.double()
    result = ledger(model, tokens, token=7, versus=8, position=4)
    assert abs(result.remainder) < (1e-6 if family in FLOAT32_INSIDE else 1e-9)
    assert result.terms["residual stream"] != 0
    assert ("bias of the head" in result.terms) == (family in HEAD_BIAS)


def test_a_ledger_equals_a_computation_by_hand(rng: np.random.Generator) -> None:
    model: Any = random_model(tiny_config("crate"), rng).double()
    tokens = torch.from_numpy(rng.integers(272, size=(1, 5)))
    result = ledger(model, tokens, token=3)
    x = model.blocks[0](model.embedding(tokens) + model.positions.weight[:5])
    z = x + model.blocks[1].mssa(model.blocks[1].norm_1(x))
    ista = model.blocks[1].ista
    u = model.blocks[1].norm_2(z)
    first = torch.relu(0.1 * u @ ista.atoms.T - 0.01)
    code = torch.relu(first + 0.1 * (u - first @ ista.atoms) @ ista.atoms.T - 0.01)[0, -1]
    out = code @ ista.atoms
    sigma = ((out - out.mean()).square().mean() + 1e-5).sqrt()
    centred = ista.atoms - ista.atoms.mean(1, keepdim=True)
    wanted = code * ((centred * model.norm.weight) @ model.embedding.weight[3]) / sigma
    np.testing.assert_allclose(result.contributions, wanted.detach().numpy(), rtol=1e-9, atol=1e-12)
    assert result.sigma == pytest.approx(float(sigma.detach()))
    rows = result.as_dict()["neurons"]
    assert sum(row["contribution"] for row in rows) + sum(result.terms.values()) == pytest.approx(result.total)
    assert all(row["activation"] != 0 for row in rows)


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_a_ledger_predicts_the_effect_of_silencing_at_the_same_sigma(arch: Any, rng: np.random.Generator) -> None:
    model: Any = random_model(tiny_config(arch), rng).double()
    tokens = torch.from_numpy(rng.integers(272, size=(1, 5)))
    result = ledger(model, tokens, token=3)
    neuron = int(np.abs(result.contributions).argmax())
    silence = Intervention(changes=[Change(layer=1, index=neuron, how="silence")])
    with steer(model, silence):
        silenced = ledger(model, tokens, token=3)
    linear = result.total - bias(result) - result.contributions[neuron]
    assert silenced.logit == pytest.approx(linear * result.sigma / silenced.sigma + bias(result), abs=1e-9)
    assert find_readout(model).place.layer == 1


def bias(result: Any) -> float:
    return result.terms.get("bias of the final norm", 0.0)


def test_a_model_whose_logits_are_not_sums_over_neurons_is_refused(rng: np.random.Generator) -> None:
    with pytest.raises(CrateError, match="the norm between the last layer of OPTForCausalLM"):
        find_readout(build("opt", rng))
    behind = build("llama", rng)

    class Shrunk(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj
            self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

        def forward(self, x: Any) -> Any:
            return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # fmt: skip

    behind.model.layers[1].mlp = Shrunk(behind.model.layers[1].mlp)
    with pytest.raises(CrateError, match="passes the neurons' output through another map"):
        find_readout(behind)
    gemma = softcapped(rng)
    with pytest.raises(CrateError, match=r"changes its logits after the head|through another map|must be a LayerNorm"):
        find_readout(gemma)
    assert next_logits(gemma, torch.tensor([[1, 2]])).isfinite().all()


def softcapped(rng: np.random.Generator) -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.Gemma2Config(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=40, max_position_embeddings=128, final_logit_softcapping=0.05,
    )  # fmt: skip
    torch.manual_seed(int(rng.integers(1 << 31)))
    return transformers.Gemma2ForCausalLM(config).float().eval()


def test_a_token_or_position_outside_the_text_is_refused(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    tokens = torch.tensor([[1, 2, 3]])
    for options, message in (
        ({"token": 272}, "token must be a token id from 0 to 271, got 272"),
        ({"token": 1, "versus": -1}, "versus must be a token id from 0 to 271, got -1"),
        ({"position": 3}, "position must be -3 to 2 in a text of 3 tokens, got 3"),
        ({"position": -4}, "got -4"),
    ):
        with pytest.raises(CrateError, match=message):
            ledger(model, tokens, **options)  # type: ignore[arg-type]
    with pytest.raises(CrateError, match="17 tokens, the model's context is 16"):
        ledger(model, torch.ones(1, 17, dtype=torch.long))
