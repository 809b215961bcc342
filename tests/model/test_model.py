"""CRATE and GPT-2 against published vectors, against plain re-implementations, and against the paper's counts."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import jaxtyping
import numpy as np
import pytest
import torch
from fixtures import naive
from fixtures.tiny import random_model, tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cratelm.activations.taps import capture
from cratelm.errors import CrateError
from cratelm.model.config import Architecture, ModelConfig, Size, sized
from cratelm.model.crate import ISTA, MSSA, CrateBlock
from cratelm.model.language_model import LanguageModel

ARCHITECTURES = get_args(Architecture)
VARIANTS: list[dict[str, Any]] = [
    {"arch": "crate"},
    {"arch": "crate", "ista_steps": 1},
    {"arch": "crate", "ista_steps": 4, "expansion": 2},
    {"arch": "gpt2"},
    {"arch": "gpt2", "bias": True},
    {"arch": "gpt2", "activation": "gelu"},
    {"arch": "gpt2", "activation": "gelu", "bias": True},
]
"""Every option that changes what is computed."""


def waves(rows: int, columns: int, phase: float, row_step: float, function: Any) -> torch.Tensor:
    """m[i, j] = function(phase + row_step i + j), in float64."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    return function(phase + row_step * i + j)


SMALL = ModelConfig(arch="crate", num_layers=1, d_model=4, num_heads=2, vocab_size=1)
X = waves(3, 4, 0, 0.5, torch.cos)[None]
DICTIONARY = waves(16, 4, 1, 4, torch.sin)
SUBSPACES = {
    "subspaces.weight": waves(4, 4, 1, 4, torch.cos) / 2,
    "output.weight": waves(4, 4, 2, 4, torch.sin) / 2,
    "output.bias": torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64),
}


def test_ista_gives_the_published_codes_and_outputs() -> None:
    ista = ISTA(SMALL).double()
    ista.load_state_dict({"atoms": DICTIONARY})
    with capture(ista, ["neurons"]) as codes:
        output = ista(X)
    code = [.200032, 0, .111168, .077174, 0, .220371, 0, 0, .254507, 0, 0, .202918, 0, .106869, .081712, 0]  # fmt: skip
    np.testing.assert_allclose(codes["neurons"][0, 0].detach(), code, rtol=0, atol=5.1e-7)
    published = [
        [.936036, .534966, -.357949, -.921768], [.815444, .112077, -.694334, -.862377],
        [.490997, -.29778, -.812779, -.580513],
    ]  # fmt: skip
    np.testing.assert_allclose(output[0].detach(), published, rtol=0, atol=5.1e-7)


def test_mssa_gives_the_published_outputs() -> None:
    mssa = MSSA(SMALL).double()
    mssa.load_state_dict(SUBSPACES)
    published = [
        [.213033, -.205308, .386092, .362032], [.200934, -.226847, .426348, .330944],
        [.172795, -.234608, .464634, .288656],
    ]  # fmt: skip
    np.testing.assert_allclose(mssa(X)[0].detach(), published, rtol=0, atol=5.1e-7)


def test_the_whole_block_gives_the_published_outputs() -> None:
    block = CrateBlock(SMALL).double()
    block.mssa.load_state_dict(SUBSPACES)
    block.ista.load_state_dict({"atoms": DICTIONARY})
    published = [
        [1.109376, .455769, -.61687, -1.122362], [.965076, .157417, -.794971, -1.016466],
        [.589298, -.21703, -.823821, -.673195],
    ]  # fmt: skip
    np.testing.assert_allclose(block(X)[0].detach(), published, rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_model_equals_its_formulas_written_out(variant: dict[str, Any], rng: np.random.Generator) -> None:
    config = tiny_config(**variant, num_heads=int(rng.choice([1, 2, 4])))
    model = random_model(config, rng)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    tokens = rng.integers(config.vocab_size, size=(3, int(rng.integers(2, 17))))
    with torch.no_grad(), capture(model, model.neuron_taps) as codes:
        logits = model(torch.from_numpy(tokens))
    for row in range(3):
        options: dict[str, Any] = {"layers": 2, "heads": config.num_heads}
        if config.arch == "crate":
            expected, layers = naive.crate(weights, tokens[row], **options, steps=config.ista_steps)
        else:
            expected, layers = naive.gpt2(weights, tokens[row], **options, activation=config.activation)
        assert relative_error(logits[row], expected) < 1e-5
        for tap, code in zip(model.neuron_taps, layers, strict=True):
            assert code.shape[1] == config.num_neurons
            assert relative_error(codes[tap][row], code) < 1e-5
            if config.activation == "relu":
                assert (code >= 0).all()
                assert 0.05 < (code > 0).mean() < 0.95


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest value (at least 1)."""
    return float(np.abs(actual.double().numpy() - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_later_token_changes_no_earlier_logit(arch: Architecture, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(arch), rng)
    tokens = torch.from_numpy(rng.integers(272, size=(1, 16)))
    before = model(tokens).detach()
    for at in (0, 7, 15):
        changed = tokens.clone()
        changed[0, at] = (changed[0, at] + 1) % 272
        after = model(changed).detach()
        torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-6)
        assert ((after[:, at:] - before[:, at:]).abs().amax(dim=2) > 1e-4).all()


COUNTS: dict[Size, tuple[int, int]] = {
    "1l": (6_538_112, 6_635_904),
    "2l": (6_637_056, 6_832_768),
    "3l": (6_736_000, 7_029_632),
    "s": (59_891_712, 81_110_784),
    "b": (81_148_416, 123_587_328),
}
"""Parameters of the paper's CRATE and GPT-2, without positions, at a vocabulary of 50304."""
MEGAFLOPS: dict[Size, tuple[str, str]] = {
    "1l": ("13.99", "13.80"),
    "2l": ("15.11", "14.71"),
    "3l": ("16.22", "15.63"),
    "s": ("223.5", "181.1"),
    "b": ("369.8", "284.9"),
}
"""Forward, per token, at a context of 1024; CRATE with four products in ISTA."""


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("column", [0, 1], ids=ARCHITECTURES)
def test_the_papers_sizes_have_the_papers_parameters_and_cost(size: Size, column: int) -> None:
    config = sized(ARCHITECTURES[column], size)
    assert config.num_parameters == COUNTS[size][column]
    printed = MEGAFLOPS[size][column]
    assert f"{config.flops_per_token() / 1e6:.{len(printed.partition('.')[2])}f}" == printed
    with torch.device("meta"):
        assert real_parameters(LanguageModel(config)) == COUNTS[size][column]


def test_gpt2_with_biases_has_eleven_widths_more_per_layer() -> None:
    without = sized("gpt2", "b")
    assert sized("gpt2", "b", bias=True).num_parameters - without.num_parameters == 11 * 768 * 12 + 768


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counts_hold_for_any_configuration(variant: dict[str, Any], rng: np.random.Generator) -> None:
    config = tiny_config(**variant, d_model=8 * int(rng.integers(1, 6)), num_layers=int(rng.integers(1, 5)))
    model = LanguageModel(config)
    assert real_parameters(model) == config.num_parameters
    tokens = torch.zeros((2, 16), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(tokens)
    assert counter.get_total_flops() == tokens.numel() * config.flops_per_token(16)


def real_parameters(model: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) - model.positions.weight.numel()


def test_fresh_crate_weights_follow_the_released_distributions() -> None:
    model = LanguageModel(sized("crate", "2l", vocab_size=4096, context_length=256)).initialise(0)
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if name.endswith("ista.atoms"):
            bound = math.sqrt(6 / 128)
            assert values.abs().max() <= bound
            assert values.std() == pytest.approx(0.125, rel=0.02)
            assert values.norm(dim=1).mean() == pytest.approx(math.sqrt(2), rel=0.02)
            assert 1.72 < 0.1 * torch.linalg.matrix_norm(values, 2) ** 2 < 1.82
            assert (values.abs() > 0.9 * bound).float().mean() == pytest.approx(0.1, rel=0.1)
        else:
            assert_plain(name, values, ends_branch=name.endswith("mssa.output.weight"))
    with torch.no_grad(), capture(model, [*model.neuron_taps, "blocks.1"]) as outputs:
        model(torch.randint(4096, (4, 256)))
    assert outputs["blocks.1"].pow(2).mean().sqrt() == pytest.approx(0.59, abs=0.02)
    for tap in model.neuron_taps:
        assert 0.47 < (outputs[tap] > 0).float().mean() < 0.52


def test_fresh_gpt2_weights_follow_nanogpts_distributions() -> None:
    model = LanguageModel(sized("gpt2", "2l", vocab_size=4096, context_length=256, bias=True)).initialise(0)
    for name, parameter in model.named_parameters():
        ends_branch = name.endswith(("attention.output.weight", "mlp.down.weight"))
        assert_plain(name, parameter.detach(), ends_branch=ends_branch)


def assert_plain(name: str, values: torch.Tensor, *, ends_branch: bool) -> None:
    """Zero biases, unit gains, and for the rest a normal distribution."""
    if name.endswith(".bias"):
        assert not values.any()
    elif values.dim() == 1:
        assert (values == 1).all()
    else:
        assert values.std() == pytest.approx(0.02 / math.sqrt(2 * 2) if ends_branch else 0.02, rel=0.03)
        assert (values.abs() > 2 * values.std()).float().mean() == pytest.approx(0.0455, rel=0.15)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_seed_decides_all_weights(arch: Architecture) -> None:
    first, same, other = (LanguageModel(tiny_config(arch)).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if first[name].dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_the_loss_is_the_mean_of_minus_log_probability(rng: np.random.Generator) -> None:
    model = random_model(tiny_config("crate"), rng)
    tokens, targets = torch.from_numpy(rng.integers(272, size=(2, 3, 9)))
    with torch.no_grad():
        logits = model(tokens).double().numpy()
        expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets.numpy()[..., None], -1)[..., 0]
        np.testing.assert_allclose(model.token_losses(tokens, targets), expected, rtol=1e-5, atol=1e-5)
        assert model.loss(tokens, targets).item() == pytest.approx(expected.mean(), rel=1e-5)


def test_every_weight_learns() -> None:
    for arch in ARCHITECTURES:
        model = random_model(tiny_config(arch, bias=arch == "gpt2"), np.random.default_rng(0))
        model.loss(torch.arange(16)[None], torch.arange(1, 17)[None]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Run as users do, whose annotations are not executed."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "d_model must be a multiple of num_heads 3, got 16"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        (
            {"num_layers": 0, "expansion": -1},
            "num_layers must be at least 1, got 0; expansion must be at least 1",
        ),
        ({"arch": "gpt3"}, "arch must be crate or gpt2, got 'gpt3'"),
        ({"activation": "swish"}, "activation must be relu or gelu, got 'swish'"),
    ],
)
def test_an_impossible_configuration_says_everything_that_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CrateError, match=message):
        tiny_config(**{"arch": "crate", **changes})


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(CrateError, match="size must be one of 1l, 2l, 3l, s, b, got 'xl'"):
        sized("crate", "xl")  # type: ignore[arg-type]


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(CrateError, match="17 tokens is longer than the model's context of 16"):
        LanguageModel(tiny_config())(torch.zeros((1, 17), dtype=torch.int64))
