"""The white-box view: coding rates, sparse coding and dictionaries against hand-computed cases and brute force."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from synthetic import make_run
from tiny import hidden_bar, make_tokens, random_model, short_training, tiny_config, train_quietly
from torch import Tensor

from cratelm.cli import main
from cratelm.commands.measurements import measurements
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.language_model import LanguageModel
from cratelm.report.whitebox import open_views, whitebox_tables
from cratelm.report.whitebox_plots import PANELS, whitebox_figures
from cratelm.rundir import write_json
from cratelm.whitebox.coding_rate import (
    check_tokens,
    coding_rate,
    normalised_rate,
    orthonormal,
    projections,
    subspace_rate,
    tokens_needed,
)
from cratelm.whitebox.measure import MeasureConfig, measure, summary
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


def test_a_rate_in_float32_would_not_have_the_digits(rng: np.random.Generator) -> None:
    z = torch.from_numpy(rng.normal(size=(1, 64, 48)) * np.logspace(-4, 3, 48))
    exact = coding_rate(z)
    assert float(coding_rate(z.float()).sub(exact).abs()) < 1e-4  # computed in float64 whatever comes in


@pytest.mark.parametrize(("width", "context", "needed"), [(128, 256, 256), (768, 256, 768), (100, 64, 128)])
def test_a_set_has_as_many_tokens_as_the_model_is_wide(width: int, context: int, needed: int) -> None:
    assert tokens_needed(width, context) == needed
    check_tokens(needed, width, context)
    with pytest.raises(
        CrateError, match=rf"{needed - 1:,} tokens are too few .* {width} wide, so a set needs {needed:,}"
    ):
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
    found = dictionary_of(block.ista)
    atoms = block.ista.atoms.detach().double().numpy()
    spectral = np.linalg.svd(atoms, compute_uv=False)[0] ** 2
    assert found.squared_norm == pytest.approx(spectral)
    assert found.stability == pytest.approx((0.05 * spectral, 0.2 * spectral))
    closest = [
        max(abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for j, b in enumerate(atoms) if j != i)
        for i, a in enumerate(atoms)
    ]
    assert found.coherence == pytest.approx(max(closest))
    assert found.mean_coherence == pytest.approx(np.mean(closest))
    lengths = np.linalg.norm(atoms, axis=1)
    assert found.atom_norm == pytest.approx((lengths.min(), lengths.mean(), lengths.max()))


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
    found = measure(model, stream, MeasureConfig(tokens=50), bar=hidden_bar())
    assert (found["tokens"], found["sets"], found["tokens_per_set"], found["width"]) == (48, 3, 16, 16)
    layer = found["layers"][1]
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
        unit = normalised_rate(projections(seen["normed"], heads))
        assert layer["normalised_rate"]["before"][name]["mean"] == pytest.approx(float(unit.mean()), rel=1e-5)
    if arch == "crate":
        with torch.no_grad():
            codes = codes_by_step(block.ista, seen["coded"].flatten(0, 1))
        values = objective(seen["coded"].flatten(0, 1), block.ista.atoms, penalties(block.ista), codes[-1])
        last = str(len(codes) - 1)
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


@pytest.fixture
def runs(tmp_path: Path, rng: np.random.Generator) -> tuple[list[Path], Path]:
    """A trained CRATE with measurements along the way, its control, and a GPT-2."""
    data = make_tokens(tmp_path / "tokens", rng, documents=300)
    made = []
    for arch in get_args(Architecture):
        run = tmp_path / f"{arch}-2l"
        config = tiny_config(arch, vocab_size=data.vocab_size)
        training = short_training(measure_every=6)
        train_quietly(training, config, data, run, measurements=measurements(("whitebox",), data, run))
        made.append(run)
    from cratelm.training.train import write_control

    write_control(made[0], tmp_path / "crate-2l-random")
    return [*made, tmp_path / "crate-2l-random"], data.path


def test_the_command_writes_measurements_tables_and_figures(
    runs: tuple[list[Path], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, data = runs
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [*map(str, found), "--data", str(data), "--device", "cpu", "--tokens", "256"]
    assert main(["whitebox", *arguments]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "CRATE-2L" in out
    report = found[0].parent / "report"
    names = {path.name for path in report.iterdir()}
    tables = ("compression", "sparsification", "dictionary")
    assert names == {
        *(f"whitebox_{table}.{suffix}" for table in tables for suffix in ("md", "csv", "tex")),
        *(f"{figure}.{suffix}" for figure in ("whitebox", "whitebox_training") for suffix in ("svg", "png")),
    }
    written = json.loads((found[0] / "whitebox.json").read_text())
    assert (written["tokens"], written["tokens_per_set"], written["split"]) == (256, 16, "val")
    assert written["origin"]["command"]
    assert written["data_hash"] == json.loads((data / "tokens.json").read_text())["splits"]["val"]["sha256"]
    views = open_views(found)
    assert [view.of for view in views] == [None, None, "crate-2l"]
    # Along the training: step 0, 6 and 12, of both layers, and the first point is the control's own measurement.
    tokens, values = views[0].curves["layer_1.active"]
    assert tokens == (0, 384, 768)
    assert "layer_1.stability" not in views[1].curves
    assert values[0] == pytest.approx(dict(summary(views[2].layers[1]))["active"], abs=0.05)
    compression, _, dictionary = whitebox_tables(views)
    assert len(compression.rows) == 6
    assert len(dictionary.rows) == 4
    figure = whitebox_figures(views)["whitebox"]
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == [panel.title for panel in PANELS]
    drawn = np.array([line.get_ydata() for line in panels["Active neurons"].lines])
    expected = [[100 * dict(summary(layer))["active"] for layer in view.layers] for view in views]
    assert np.allclose(drawn, expected)


def test_the_report_has_a_section_where_the_file_is(tmp_path: Path, rng: np.random.Generator) -> None:
    run = make_run(tmp_path / "crate-2l", rng)
    assert main(["interpret", str(run)]) == 0
    model = random_model(tiny_config(), rng)
    found = measure(model, rng.integers(272, size=64).astype(np.uint16), MeasureConfig(), bar=hidden_bar())
    write_json(run / "whitebox.json", found)
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "report.html").read_text()
    assert "White-box view: compression by attention" in page
    assert 'class="figure-whitebox"' in page
    assert (run / "report" / "whitebox_dictionary.tex").exists()
    assert (run / "report" / "whitebox.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "15"], "15 tokens are too few for a coding rate: the model is 16 wide, so a set needs 16 tokens"),
        (["--tokens", "0"], "--tokens is '0'"),
        (["--epsilon", "0"], "--epsilon must be above 0"),
        (["--split", "nothing"], "nothing"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    arguments: list[str], said: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.weights import save_model

    data = make_tokens(tmp_path / "tokens", rng)
    run = tmp_path / "run"
    model = random_model(tiny_config(vocab_size=data.vocab_size), rng)
    save_model(model, run / "model", load_tokenizer(data.path))
    capsys.readouterr()
    assert main(["whitebox", str(run), "--data", str(data.path), "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err
    assert not (run / "whitebox.json").exists()
