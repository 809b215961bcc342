"""Each variant against its definition, written out token by token; and its counts against the real module."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cratelm.activations.taps import capture
from cratelm.errors import CrateError
from cratelm.model.attention import Attend
from cratelm.model.config import ModelConfig, sized
from cratelm.model.language_model import LanguageModel

ATTENTION = ("rotary", "shifted_keys", "normalised", "strict_mask")
VARIANTS: list[dict[str, Any]] = [
    *({"arch": arch, name: True} for arch in ("crate", "gpt2") for name in ATTENTION),
    *({"arch": arch, **dict.fromkeys(ATTENTION, True)} for arch in ("crate", "gpt2")),
    {"arch": "crate", "ista_steps": 3},
    {"arch": "crate", "attention": "qkv"},
    {"arch": "crate", "learned_step_size": True},
    {"arch": "crate", "learned_penalty": True},
    {"arch": "crate", "ista_residual": True},
    {"arch": "crate", "ista_residual": True, "untied_decoder": True},
    {"arch": "crate", "dictionary": "complete", "expansion": 1, "ista_steps": 1},
    {"arch": "crate", "expansion": 2},
    {"arch": "gpt2", "activation": "gelu"},
    {"arch": "gpt2", "activation_l1": 0.1},
    {"arch": "gpt2", "top_k_activations": 5},
]


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(
        **{"num_layers": 2, "d_model": 16, "num_heads": 2, "vocab_size": 60, "context_length": 12, **changes}
    )


def shaken(config: ModelConfig, rng: np.random.Generator) -> LanguageModel:
    """A float64 model none of whose weights is at a special value."""
    model = LanguageModel(config).initialise(int(rng.integers(1 << 31))).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.from_numpy(rng.normal(size=parameter.shape))
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameters_and_flops_are_those_of_the_real_module(variant: dict[str, Any]) -> None:
    config = tiny(**variant)
    model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) - model.positions.weight.numel() == config.num_parameters
    tokens = torch.zeros((2, 12), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(tokens)
    assert counter.get_total_flops() == tokens.numel() * config.flops_per_token(12)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_weight_of_every_variant_learns(variant: dict[str, Any], rng: np.random.Generator) -> None:
    model = shaken(tiny(**variant), rng)
    loss, extra = model.objective(*torch.from_numpy(rng.integers(60, size=(2, 3, 12))))
    (loss + extra).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_variant_looks_ahead(variant: dict[str, Any], rng: np.random.Generator) -> None:
    model = shaken(tiny(**variant), rng)
    tokens = torch.from_numpy(rng.integers(60, size=(1, 12)))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 60
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def attended_by_definition(config: ModelConfig, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, one head and one token at a time, in complex numbers for the rotation."""
    length, size = len(q), config.d_model // config.num_heads
    switches: Any = attend.prepare
    if config.shifted_keys:
        mu = switches["shifted_keys"].mix
        k = torch.stack([mu * k[t] + (1 - mu) * (k[t - 1] if t else 0 * k[0]) for t in range(length)])
    result = torch.zeros_like(v)
    for head in range(config.num_heads):
        part = slice(head * size, (head + 1) * size)
        queries, keys = q[:, part], k[:, part]
        if config.normalised:
            s = switches["normalised"].temperature[head]
            queries = torch.stack([s * row / row.norm() * size**0.25 for row in queries])
            keys = torch.stack([row / row.norm() * size**0.25 for row in keys])
        if config.rotary:
            queries, keys = rotated(queries), rotated(keys)
        for t in range(length):
            seen = list(range(t)) or [0] if config.strict_mask else list(range(t + 1))
            scores = torch.stack([queries[t] @ keys[s] / math.sqrt(size) for s in seen])
            result[t, part] = scores.softmax(0) @ v[seen, part]
    return result


def rotated(x: Tensor) -> Tensor:
    """Channels i and i + p/2 as one complex number, times exp(1j * t * 10000^(-2 i / p))."""
    half = x.shape[1] // 2
    turns = torch.tensor([[t * 10_000 ** (-2 * i / x.shape[1]) for i in range(half)] for t in range(len(x))])
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(turns), turns).to(torch.complex128)
    return torch.cat([turned.real, turned.imag], dim=1)


@pytest.mark.parametrize("names", [(), *((name,) for name in ATTENTION), ATTENTION], ids=str)
def test_attention_follows_its_definition(names: tuple[str, ...], rng: np.random.Generator) -> None:
    config = tiny(arch="crate", **dict.fromkeys(names, True))
    attend = Attend(config).double()
    for parameter in attend.parameters():
        parameter.data += 0.3 * torch.from_numpy(rng.normal(size=parameter.shape))
    q, k, v = torch.from_numpy(rng.normal(size=(3, 2, 9, 16)))
    expected = torch.stack([attended_by_definition(config, attend, *parts) for parts in zip(q, k, v, strict=True)])
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-6, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone(rng: np.random.Generator) -> None:
    rotary: Any = Attend(tiny(arch="crate", rotary=True)).prepare["rotary"]
    w = torch.from_numpy(rng.normal(size=8)).expand(1, 1, 10, 8)
    q, k = rotary(w, w, None)
    scores = q @ k.transpose(-1, -2)
    for offset in range(1, 6):
        along = scores[0, 0].diagonal(-offset)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)


def test_penalties_and_step_sizes_begin_at_the_papers_and_reach_the_code(rng: np.random.Generator) -> None:
    fixed = LanguageModel(tiny(arch="crate")).initialise(3)
    learned = LanguageModel(tiny(arch="crate", learned_step_size=True, learned_penalty=True)).initialise(3)
    tokens = torch.from_numpy(rng.integers(60, size=(2, 12)))
    torch.testing.assert_close(learned(tokens), fixed(tokens))
    shrinkage: Any = learned.blocks[0].ista.shrinkage  # type: ignore[union-attr]
    assert shrinkage.log_penalties.shape == (64,)
    assert shrinkage.log_step_sizes.shape == (2,)
    shrinkage.log_penalties.data[5] = 10.0
    with capture(learned, learned.neuron_taps) as codes:
        learned(tokens)
    assert codes[learned.neuron_taps[0]][..., 5].abs().max() == 0


def test_crate_alpha_adds_to_the_stream_and_decodes_with_its_own_matrix(rng: np.random.Generator) -> None:
    model = shaken(tiny(arch="crate", ista_residual=True, untied_decoder=True), rng)
    block: Any = model.blocks[0]
    x = torch.from_numpy(rng.normal(size=(2, 5, 16)))
    z = x + block.mssa(block.norm_1(x))
    with capture(model, model.neuron_taps[:1]) as codes:
        output = block(x)
    torch.testing.assert_close(output, z + codes[model.neuron_taps[0]] @ block.ista.decoder)


def test_a_complete_dictionary_steps_once_from_the_input_and_outputs_the_code(rng: np.random.Generator) -> None:
    config = sized("crate", "1l", dictionary="complete", vocab_size=60)
    assert (config.num_neurons, config.ista_steps) == (128, 1)
    model = shaken(config, rng)
    ista: Any = model.blocks[0].ista
    x = torch.from_numpy(rng.normal(size=(1, 7, 128)))
    dictionary = ista.atoms.T  # D: a column an atom
    expected = [F.relu(t + 0.1 * (dictionary.T @ t - dictionary.T @ (dictionary @ t)) - 0.01) for t in x[0]]
    torch.testing.assert_close(ista(x)[0], torch.stack(expected))
    assert isinstance(model.norm, nn.Identity)
    assert sized("crate", "b", dictionary="complete").num_parameters == 50304 * 768 + 12 * (3 * 768**2 + 5 * 768)


def test_top_k_keeps_the_largest_activations_of_each_token(rng: np.random.Generator) -> None:
    every = shaken(tiny(arch="gpt2"), rng)
    some = LanguageModel(tiny(arch="gpt2", top_k_activations=3)).double()
    some.load_state_dict(every.state_dict())
    tokens, tap = torch.from_numpy(rng.integers(60, size=(2, 12))), every.neuron_taps[0]
    with capture(every, [tap]) as full, capture(some, [tap]) as kept:
        every(tokens), some(tokens)
    for before, after in zip(full[tap].flatten(0, 1), kept[tap].flatten(0, 1), strict=True):
        expected = sorted(before[before > 0].tolist())[-3:]
        assert sorted(after[after > 0].tolist()) == expected


def test_the_l1_term_is_reported_next_to_the_loss(rng: np.random.Generator) -> None:
    model = shaken(tiny(arch="gpt2", activation_l1=0.25), rng)
    tokens, targets = torch.from_numpy(rng.integers(60, size=(2, 3, 12)))
    with capture(model, model.neuron_taps) as codes:
        loss, extra = model.objective(tokens, targets)
    assert loss.item() == pytest.approx(model.loss(tokens, targets).item())
    expected = sum(code.detach().abs().sum(-1).mean() for code in codes.values())
    assert extra.item() == pytest.approx(0.25 * torch.as_tensor(expected).item())
    plain = shaken(tiny(arch="gpt2"), rng)
    assert plain.objective(tokens, targets)[1].item() == 0


def test_the_papers_models_keep_their_names_weights_and_description() -> None:
    crate, gpt2 = (LanguageModel(tiny(arch=arch)) for arch in ("crate", "gpt2"))
    shell = {"embedding.weight", "positions.weight", "norm.weight"}
    inner = {
        "norm_1.weight", "norm_1.bias", "norm_2.weight", "norm_2.bias", "mssa.subspaces.weight", "mssa.output.weight",
        "mssa.output.bias", "ista.atoms",
    }  # fmt: skip
    assert set(crate.state_dict()) == shell | {"norm.bias"} | {f"blocks.{i}.{name}" for i in (0, 1) for name in inner}
    inner = {
        "norm_1.weight", "norm_2.weight", "attention.query_key_value.weight", "attention.output.weight",
        "mlp.up.weight", "mlp.down.weight",
    }  # fmt: skip
    assert set(gpt2.state_dict()) == shell | {f"blocks.{i}.{name}" for i in (0, 1) for name in inner}
    shape = {"num_layers": 2, "d_model": 16, "num_heads": 2, "vocab_size": 60, "context_length": 12, "expansion": 4}
    assert crate.config.as_dict() == {"arch": "crate", **shape, "ista_steps": 2, "ista_step_size": 0.1, "penalty": 0.1}
    assert gpt2.config.as_dict() == {"arch": "gpt2", **shape, "activation": "relu", "bias": False}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_description_gives_the_configuration_back(variant: dict[str, Any]) -> None:
    config = tiny(**variant)
    assert ModelConfig(**config.as_dict()) == config
    assert config.departures.items() <= variant.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "gpt2", "attention": "qkv", "untied_decoder": True}, "attention does not belong to gpt2; untied"),
        ({"arch": "crate", "top_k_activations": 3}, "top_k_activations does not belong to crate"),
        ({"arch": "gpt2", "top_k_activations": 65}, "top_k_activations must be 1 to 64, got 65"),
        ({"arch": "gpt2", "activation_l1": -1.0}, "activation_l1 must be at least 0, got -1.0"),
        ({"arch": "crate", "dictionary": "complete"}, "dictionary complete needs expansion 1, got 4"),
        ({"arch": "crate", "rotary": True, "d_model": 6}, "rotary needs heads of even width, d_model / num_heads is 3"),
        ({"arch": "crate", "ista_step_size": 0.0}, "must be above 0"),
    ],
)
def test_switches_that_do_not_go_together_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CrateError, match=message):
        tiny(**changes)
