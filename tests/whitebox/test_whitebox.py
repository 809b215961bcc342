"""The white-box view: coding rates, sparse coding and dictionaries against hand-computed cases and brute force."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fixtures.tiny import hidden_bar, random_model, tiny_config
from torch import Tensor

from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.language_model import LanguageModel
from cratelm.report.results.whitebox import objective_share
from cratelm.whitebox.coding_rate import (
    check_tokens,
    coding_rate,
    normalised_rate,
    orthonormal,
    penalty_per_token,
    projections,
    sparse_objective,
    subspace_rate,
    tokens_needed,
)
from cratelm.whitebox.measure import MeasureConfig, logged_numbers, measure
from cratelm.whitebox.sparse_coding import (
    codes_by_step,
    dictionary_of,
    hoyer,
    least_objective,
    objective,
    overlap,
    penalties,
    reconstruction_error,
)

both = pytest.mark.parametrize("arch", get_args(Architecture))
VARIANTS: list[dict[str, Any]] = [
    {}, {"learned_step_size": True, "learned_penalty": True, "ista_steps": 3}, {"ista_residual": True},
    {"untied_decoder": True, "ista_residual": True}, {"dictionary": "complete", "expansion": 1}, {"attention": "qkv"},
]  # fmt: skip


def test_the_normalised_rate_is_the_published_conformance_value() -> None:
    h, t, d = np.meshgrid(np.arange(2), np.arange(3), np.arange(2), indexing="ij")
    first = np.sin(1 + 7 * h + 3 * t + d)
    batch = np.stack([first, 1.5 * first[:, ::-1] + 0.3])  # (sets, heads, tokens, p)
    rates = normalised_rate(torch.from_numpy(batch))
    assert float(rates.mean()) == pytest.approx(6.0236204158, abs=1e-9)
    assert float(rates.std()) == pytest.approx(0.0457904424, abs=1e-9)


def test_coding_rates_of_orthogonal_tokens_by_hand() -> None:
    """N tokens along the first N axes, of length s: N equal eigenvalues, R = N/2 log(1 + d s^2 / (N eps^2))."""
    for tokens, width in ((2, 5), (4, 4)):
        z = 3.0 * torch.eye(tokens, width).double()[None]
        by_hand = tokens / 2 * math.log(1 + width * 9 / (tokens * 0.25))
        assert coding_rate(z, epsilon=0.5).tolist() == pytest.approx([by_hand])
    twice = torch.cat([3.0 * torch.eye(2, 5)] * 2).double()[None]  # each token twice: half the weight, twice the sum
    assert coding_rate(twice, epsilon=0.5).tolist() == pytest.approx([math.log(1 + 5 * 18 / (4 * 0.25))])


def test_the_rate_reduction_and_the_sparse_objective_by_hand() -> None:
    """Two tokens along the first two axes of four, each in a subspace of its own, or both in two that overlap."""
    z, weight = 3.0 * torch.eye(2, 4).double()[None], 9 / (2 * 0.25)
    rate = coding_rate(z, epsilon=0.5)
    assert rate.tolist() == pytest.approx([math.log(1 + 4 * weight)])
    apart = 7.0 * torch.eye(4).double()[[0, 2, 1, 3]].view(2, 2, 4)  # axes 0 and 2, axes 1 and 3
    reduction = rate - subspace_rate(z, orthonormal(apart), epsilon=0.5)
    by_hand = math.log(1 + 4 * weight) - math.log(1 + 2 * weight)
    assert reduction.tolist() == pytest.approx([by_hand])
    same = torch.eye(4).double()[[0, 1, 0, 1]].view(2, 2, 4)
    assert float(rate - subspace_rate(z, orthonormal(same), epsilon=0.5)) < 0  # counted twice
    code = torch.tensor([[[0.0, 2, 0], [1, 0, 3]]])
    assert sparse_objective(reduction, code, torch.tensor([0.1])).tolist() == pytest.approx([by_hand - 0.3])
    assert penalty_per_token(code, torch.tensor([0.1])).tolist() == [pytest.approx([0.1, 0.2])]
    own = torch.tensor([0.1, 0.2, 0.4])
    assert sparse_objective(reduction, code, own).tolist() == pytest.approx([by_hand - 0.7])


@pytest.mark.parametrize("tokens", [3, 8, 20])
def test_rates_are_the_formulas_by_brute_force_with_either_gram_matrix(tokens: int, rng: np.random.Generator) -> None:
    z = torch.from_numpy(rng.normal(size=(4, tokens, 8)))
    heads = torch.from_numpy(rng.normal(size=(2, 3, 8)))

    def rate(columns: np.ndarray, epsilon: float) -> float:  # columns are tokens, as in the paper
        width, count = columns.shape
        wide = np.eye(count) + width / (count * epsilon**2) * columns.T @ columns
        return 0.5 * float(np.linalg.slogdet(wide)[1])

    for epsilon in (0.1, 0.5):
        whole = [rate(one.numpy().T, epsilon) for one in z]
        assert coding_rate(z, epsilon=epsilon).tolist() == pytest.approx(whole)
        parts = [sum(rate((head @ one.T).numpy(), epsilon) for head in heads) for one in z]
        assert subspace_rate(z, heads, epsilon=epsilon).tolist() == pytest.approx(parts)
        unit = [sum(rate((head @ one.T / (head @ one.T).norm(dim=0)).numpy(), epsilon) for head in heads) for one in z]
        assert normalised_rate(projections(z, heads), epsilon=epsilon).tolist() == pytest.approx(unit)
    bases = orthonormal(heads)
    assert torch.allclose(bases @ bases.mT, torch.eye(3).double().expand(2, 3, 3))
    assert torch.allclose(heads @ bases.mT @ bases, heads)  # the same span
    small, large = 0.3 * heads, 7.0 * heads
    assert torch.allclose(subspace_rate(z, orthonormal(small)), subspace_rate(z, orthonormal(large)))
    assert torch.allclose(normalised_rate(projections(z, small)), normalised_rate(projections(z, large)))


def test_activations_without_a_rate_are_refused(rng: np.random.Generator) -> None:
    z = torch.from_numpy(rng.normal(size=(2, 9, 5)))
    for wrong in (torch.full_like(z, torch.nan), 1e200 * z):
        with pytest.raises(CrateError, match="a coding rate is undefined"):
            coding_rate(wrong)


def test_a_rate_in_float32_would_not_have_the_digits(rng: np.random.Generator) -> None:
    z = torch.from_numpy(rng.normal(size=(1, 64, 48)) * np.logspace(-4, 3, 48))
    exact = coding_rate(z)
    assert float(coding_rate(z.float()).sub(exact).abs()) < 1e-4  # computed in float64 whatever comes in


@pytest.mark.parametrize(("width", "context", "needed"), [(128, 256, 256), (768, 256, 768), (100, 64, 128)])
def test_a_set_has_as_many_tokens_as_the_model_is_wide(width: int, context: int, needed: int) -> None:
    assert tokens_needed(width, context) == needed
    check_tokens(needed, width, context)
    with pytest.raises(CrateError, match=rf"a model of width {width} needs {needed:,} tokens .* got {needed - 1:,}"):
        check_tokens(needed - 1, width, context)


@pytest.mark.parametrize("changes", VARIANTS[:5])
def test_codes_and_objectives_of_each_step_by_plain_formulas(changes: dict[str, Any], rng: np.random.Generator) -> None:
    model = random_model(tiny_config(**changes), rng).double()
    block: Any = model.blocks[0]
    ista, config = block.ista, model.config
    x = torch.from_numpy(rng.normal(size=(30, 16)))
    with torch.no_grad():
        codes = codes_by_step(ista, x)
        sizes, thresholds = ista.shrinkage(ista.atoms)
        a = x if config.dictionary == "complete" else torch.zeros(30, config.num_neurons).double()
        assert len(codes) == config.ista_steps + 1
        for step in range(config.ista_steps + 1):
            assert torch.allclose(codes[step], a, atol=1e-6)
            value = 0.5 * ((x - a @ ista.atoms) ** 2).sum(1) + (a.abs() * (thresholds[0] / sizes[0])).sum(1)
            assert torch.allclose(objective(x, ista.atoms, penalties(ista), codes[step]), value, atol=1e-5)
            error = (x - a @ ista.atoms).norm(dim=1) / x.norm(dim=1)
            assert torch.allclose(reconstruction_error(x, ista.atoms, codes[step]), error, atol=1e-6)
            if step < config.ista_steps:
                a = torch.relu(a + sizes[step] * (x - a @ ista.atoms) @ ista.atoms.T - thresholds[step])


def test_the_least_objective_is_a_minimum(rng: np.random.Generator) -> None:
    """Against the conditions of a minimum: gradient zero where a neuron is active, not negative where it is not."""
    atoms, penalty = torch.from_numpy(rng.normal(size=(12, 8))), torch.tensor(0.5).double()
    x = torch.from_numpy(rng.normal(size=(6, 8)))
    least = least_objective(x, atoms, penalty, steps=1000)
    step = 1 / float(torch.linalg.eigvalsh(atoms.T @ atoms)[-1])
    code = torch.zeros(6, 12).double()
    for _ in range(5000):
        code = torch.relu(code + step * ((x - code @ atoms) @ atoms.T - penalty))
    slope = -(x - code @ atoms) @ atoms.T + penalty
    assert float(slope[code > 0].abs().max()) < 1e-3
    assert float(slope[code == 0].min()) > -1e-3
    assert torch.allclose(least, objective(x, atoms, penalty, code), atol=1e-6)
    assert bool((least_objective(x, atoms, penalty, steps=3) >= least - 1e-9).all())


def test_dictionary_properties_by_brute_force(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(learned_step_size=True), rng)
    block: Any = model.blocks[1]
    with torch.no_grad():
        block.ista.shrinkage.log_step_sizes.copy_(torch.log(torch.tensor([0.05, 0.2])))
    actual = dictionary_of(block.ista)
    atoms = block.ista.atoms.detach().double().numpy()
    spectral = np.linalg.svd(atoms, compute_uv=False)[0] ** 2
    assert actual.squared_norm == pytest.approx(spectral)
    assert actual.stability == pytest.approx((0.05 * spectral, 0.2 * spectral))
    closest = [
        max(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for j, b in enumerate(atoms) if j != i)
        for i, a in enumerate(atoms)
    ]
    assert actual.coherence == pytest.approx(max(closest))
    assert actual.mean_coherence == pytest.approx(np.mean(closest))
    lengths = np.linalg.norm(atoms, axis=1)
    assert actual.atom_norm == pytest.approx((lengths.min(), lengths.mean(), lengths.max()))


def test_sparseness_and_overlap_by_hand() -> None:
    code = torch.tensor([[1.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [3, 4, 0, 0]])
    assert hoyer(code).tolist() == pytest.approx([1, 0, 1, (2 - 7 / 5) / 1])
    first = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    second = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    assert overlap(first, second).tolist() == pytest.approx([1 / 3, 1, 0])


def by_hand(model: LanguageModel, rows: Tensor, layer: int) -> dict[str, Tensor]:
    """What passes through a layer, its modules called one after the other."""
    x = model.embedding(rows) + model.positions.weight[: rows.shape[1]]
    for index in range(layer):
        x = model.blocks[index](x)
    block: Any = model.blocks[layer]
    normed = block.norm_1(x)
    attended = (block.mssa if hasattr(block, "mssa") else block.attention)(normed)
    return {"normed": normed, "attended": attended, "coded": block.norm_2(x + attended)}


@both
@pytest.mark.parametrize("changes", VARIANTS)
def test_a_layers_measurements_are_what_its_modules_give(
    arch: Architecture, changes: dict[str, Any], rng: np.random.Generator
) -> None:
    if arch == "gpt2" and changes:
        return
    model = random_model(tiny_config(arch, **changes), rng).requires_grad_(False)
    stream = rng.integers(272, size=100).astype(np.uint16)
    actual = measure(model, stream, MeasureConfig(tokens=50), bar=hidden_bar())
    assert (actual["tokens"], actual["sets"], actual["tokens_per_set"], actual["width"]) == (48, 3, 16, 16)
    layer = actual["layers"][1]
    rows = torch.from_numpy(stream[:48].astype(np.int64)).view(3, 16)
    with torch.no_grad():
        seen = by_hand(model, rows, 1)
    rates = coding_rate(seen["normed"])
    assert layer["rate"]["before"] == pytest.approx({"mean": float(rates.mean()), "deviation": float(rates.std())})
    after = coding_rate(seen["normed"] + seen["attended"])
    assert layer["rate"]["after"]["mean"] == pytest.approx(float(after.mean()))
    block: Any = model.blocks[1]
    attention: Any = block.mssa if hasattr(block, "mssa") else block.attention
    shares = hasattr(attention, "subspaces")
    names = ["shared"] if shares else ["query", "key", "value"]
    weights = (attention.subspaces if shares else attention.query_key_value).weight.detach()
    for name, weight in zip(names, weights.chunk(len(names)), strict=True):
        heads = weight.unflatten(0, (2, 8))
        expected = subspace_rate(seen["normed"] + seen["attended"], heads)
        assert layer["subspace_rate"]["after"][name]["mean"] == pytest.approx(float(expected.mean()))
        reductions = [
            coding_rate(z) - subspace_rate(z, orthonormal(heads))
            for z in (seen["normed"], seen["normed"] + seen["attended"])
        ]
        change = reductions[1] - reductions[0]
        for when, values in (("before", reductions[0]), ("after", reductions[1]), ("change", change)):
            wanted = {"mean": float(values.mean()), "deviation": float(values.std())}
            assert layer["rate_reduction"][when][name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        active = layer["active"][max(layer["active"], key=int)]["mean"] * 16 * model.config.num_neurons
        penalty = layer.get("penalty", 0.1)
        if "learned_penalty" not in changes:
            whole = float(reductions[1].mean()) - penalty * active
            assert layer["sparse_objective"][name]["mean"] == pytest.approx(whole, rel=1e-5)
            assert layer["penalty_per_token"]["mean"] == pytest.approx(penalty * active / 16, rel=1e-5)
        unit = normalised_rate(projections(seen["normed"], heads))
        assert layer["normalised_rate"]["before"][name]["mean"] == pytest.approx(float(unit.mean()), rel=1e-5)
    if arch == "crate":
        with torch.no_grad():
            codes = codes_by_step(block.ista, seen["coded"].flatten(0, 1))
        values = objective(seen["coded"].flatten(0, 1), block.ista.atoms, penalties(block.ista), codes[-1])
        last = str(len(codes) - 1)
        zero = 0.5 * float(seen["coded"].double().square().sum(-1).mean())
        assert layer["objective_at_zero"]["mean"] == pytest.approx(zero, rel=1e-5)
        assert (layer["objective"]["0"] == layer["objective_at_zero"]) == (changes.get("dictionary") != "complete")
        relative = dict(logged_numbers(layer))["objective"], objective_share(layer, last)
        assert relative == pytest.approx((float(values.mean()) / zero, 100 * float(values.mean()) / zero), rel=1e-4)
        assert layer["objective"][last]["mean"] == pytest.approx(float(values.mean()), rel=1e-4)
        assert layer["active"][last]["mean"] == pytest.approx(float((codes[-1] != 0).float().mean()), abs=1e-3)
        assert layer["dead"] == pytest.approx(float((codes[-1] == 0).all(0).float().mean()), abs=0.02)
        assert layer["converged"] is not None
    else:
        with torch.no_grad():
            code = block.mlp.activation(block.mlp.up(seen["coded"])).flatten(0, 1)
        assert layer["active"]["1"]["mean"] == pytest.approx(float((code > 0).float().mean()), abs=1e-3)
        assert "objective" not in layer


def test_steps_of_a_stable_size_lower_the_objective_and_come_nearer_with_each(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(ista_step_size=0.005, ista_steps=4), rng)
    stream = rng.integers(272, size=64).astype(np.uint16)
    layer = measure(model, stream, MeasureConfig(), bar=hidden_bar())["layers"][0]
    assert max(layer["dictionary"]["stability"]) < 1
    values = [layer["objective"][str(step)]["mean"] for step in range(5)]
    assert values == sorted(values, reverse=True)
    assert 0 < layer["converged"] < 1
