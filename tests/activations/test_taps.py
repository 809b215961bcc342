"""Reading and editing named places of a model whose `forward` knows nothing of it."""

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fixtures.tiny import random_model, tiny_config
from torch import Tensor, nn

from cratelm.activations.taps import capture, edit
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.language_model import LanguageModel

pytestmark = pytest.mark.usefixtures("no_grad")
both = pytest.mark.parametrize("arch", get_args(Architecture))
INNER = {"crate": "blocks.1.ista.neurons", "gpt2": "blocks.1.mlp.neurons"}


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def tokens(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(272, size=(3, 12)))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def decoded(model: LanguageModel, code: Tensor, layer: int, tokens: Tensor) -> Tensor:
    """What the model makes of a code from that layer on: the rest of it, taken by hand."""
    block: Any = model.blocks[layer]
    if model.config.arch == "crate":
        x = code @ block.ista.atoms
    else:
        with capture(model, [f"blocks.{layer - 1}", f"blocks.{layer}.attention"]) as outputs:
            model(tokens)
        x = outputs[f"blocks.{layer - 1}"] + outputs[f"blocks.{layer}.attention"] + block.mlp.down(code)
    later: Any
    for later in model.blocks[layer + 1 :]:
        x = later(x)
    return model.norm(x) @ model.embedding.weight.T


@both
def test_a_model_names_one_tap_of_its_neurons_per_layer(arch: Architecture) -> None:
    model = LanguageModel(tiny_config(arch, num_layers=3))
    assert model.neuron_taps[1] == INNER[arch]
    assert len(set(model.neuron_taps)) == 3


@both
def test_a_captured_output_is_what_the_module_made(
    arch: Architecture, tokens: Tensor, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch), rng)
    with capture(model, [*model.neuron_taps, "blocks.0", "norm", "embedding"]) as outputs:
        logits = model(tokens)
    assert outputs.keys() == {*model.neuron_taps, "blocks.0", "norm", "embedding"}
    assert outputs[INNER[arch]].shape == (3, 12, 64)
    torch.testing.assert_close(outputs["embedding"], model.embedding.weight[tokens])
    torch.testing.assert_close(outputs["blocks.0"], model.blocks[0](outputs["embedding"] + model.positions.weight[:12]))
    torch.testing.assert_close(outputs["norm"] @ model.embedding.weight.T, logits)
    torch.testing.assert_close(decoded(model, outputs[INNER[arch]], 1, tokens), logits)


@both
def test_capture_changes_nothing_and_leaves_nothing(
    arch: Architecture, tokens: Tensor, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch), rng)
    bare = model(tokens)
    with capture(model, model.neuron_taps) as codes:
        assert codes == {}
        assert torch.equal(model(tokens), bare)
        first = dict(codes)
        model(tokens[:1])
        assert codes[INNER[arch]].shape == (1, 12, 64)
    model(tokens)
    assert codes[INNER[arch]].shape == (1, 12, 64)
    assert first[INNER[arch]].shape == (3, 12, 64)
    assert hooks(model) == 0


@both
def test_an_edit_changes_exactly_what_lies_downstream(
    arch: Architecture, tokens: Tensor, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch), rng)
    neuron, position, tap = int(rng.integers(64)), 5, INNER[arch]

    def turn_up(code: Tensor) -> Tensor:
        code = code.clone()
        code[:, position, neuron] = 4
        return code

    with capture(model, model.neuron_taps) as codes:
        bare = model(tokens)
    with edit(model, {tap: turn_up}), capture(model, model.neuron_taps) as edited:
        turned = model(tokens)
    assert torch.equal(edited[model.neuron_taps[0]], codes[model.neuron_taps[0]])
    assert torch.equal(edited[tap], turn_up(codes[tap]))
    torch.testing.assert_close(turned, decoded(model, turn_up(codes[tap]), 1, tokens))
    elsewhere = [t for t in range(12) if t != position]  # the last layer mixes no tokens
    torch.testing.assert_close(turned[:, elsewhere], bare[:, elsewhere])
    assert not torch.allclose(turned[:, position], bare[:, position], atol=1e-3)
    assert torch.equal(model(tokens), bare)


@both
def test_an_edit_of_an_early_layer_reaches_later_tokens_only(
    arch: Architecture, tokens: Tensor, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch), rng)
    bare = model(tokens)
    with edit(model, {model.neuron_taps[0]: lambda code: torch.cat([code[:, :5], code[:, 5:] + 1], dim=1)}):
        turned = model(tokens)
    torch.testing.assert_close(turned[:, :5], bare[:, :5], rtol=0, atol=1e-6)
    assert ((turned - bare)[:, 5:].abs().amax(dim=2) > 1e-3).all()


def test_a_capture_sees_the_edits_entered_before_it(tokens: Tensor, rng: np.random.Generator) -> None:
    model = random_model(tiny_config("crate"), rng)
    tap = model.neuron_taps[1]
    with (
        capture(model, [tap]) as before,
        edit(model, {tap: lambda code: code * 0}),
        capture(model, [tap]) as between,
        edit(model, {tap: lambda code: code + 1}),
        capture(model, [tap]) as after,
    ):
        model(tokens)
    assert before[tap].any()
    assert not between[tap].any()
    assert (after[tap] == 1).all()


def test_an_edit_may_change_the_code_in_place(tokens: Tensor, rng: np.random.Generator) -> None:
    model = random_model(tiny_config("gpt2"), rng)
    tap = model.neuron_taps[1]
    with edit(model, {tap: lambda code: code * 0}):
        expected = model(tokens)
    with edit(model, {tap: lambda code: code.zero_()}):
        assert torch.equal(model(tokens), expected)


def test_generation_is_steered_by_an_edit(rng: np.random.Generator) -> None:
    model = random_model(tiny_config("crate"), rng)
    prompt = torch.tensor([[1, 2, 3]])
    plain = model.generate(prompt, 8, temperature=0)
    with edit(model, {"norm": lambda x: torch.zeros_like(x) + model.embedding.weight[77] * 100}):
        steered = model.generate(prompt, 8, temperature=0)
    assert steered[0, 3:].tolist() == [int((model.embedding.weight @ model.embedding.weight[77]).argmax())] * 8
    assert torch.equal(model.generate(prompt, 8, temperature=0), plain)


def test_hooks_go_away_whatever_happens(tokens: Tensor, rng: np.random.Generator) -> None:
    model = random_model(tiny_config("crate"), rng)

    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(model, model.neuron_taps), edit(model, {"norm": fail}):
        model(tokens)
    for enter in (capture(model, ["norm", "nowhere"]), edit(model, {"norm": fail, "nowhere": fail})):
        with pytest.raises(CrateError, match="nowhere"), enter:
            pytest.fail("the block was entered")
    assert hooks(model) == 0


def test_an_edit_that_changes_the_shape_is_refused(tokens: Tensor, rng: np.random.Generator) -> None:
    model = random_model(tiny_config("crate"), rng)
    with (
        edit(model, {"blocks.0": lambda x: x[:, :-1]}),
        pytest.raises(CrateError, match=r"edit of blocks.0 must keep the shape \(3, 12, 16\), got \(3, 11, 16\)"),
    ):
        model(tokens)


@pytest.mark.parametrize(
    ("tap", "near"),
    [
        ("blocks.1.ista.neuron", "blocks.1.ista.neurons"),
        ("block.0", "blocks.0"),
        ("blocks.9.ista.neurons", "blocks.1.ista.neurons"),
        ("blocks", "blocks.0"),
        ("?", "embedding"),
        ("", "embedding"),
    ],
)
def test_an_unknown_tap_is_refused_with_the_nearest_names(tap: str, near: str) -> None:
    with (
        pytest.raises(CrateError, match=f"no module '{tap}'".replace("?", r"\?")) as refusal,
        capture(LanguageModel(tiny_config()), [tap]),
    ):
        pytest.fail("the block was entered")
    assert near in str(refusal.value).partition("Similar: ")[2].split(", ")
