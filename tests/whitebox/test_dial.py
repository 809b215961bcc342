"""The sparsity dial: what is turned is what the formula says, nothing else changes, points are kept one by one."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fixtures.tiny import make_tokens, random_model, tiny_config
from torch import Tensor

from cratelm.activations.taps import capture
from cratelm.cli import main
from cratelm.commands import dial as command
from cratelm.data.tokenizer import load_tokenizer
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.weights import save_model
from cratelm.report.figures.dial import dial_figures
from cratelm.report.results.dial import is_unchanged, open_dials, percent_active
from cratelm.report.tables.dial import dial_table
from cratelm.rundir import write_json
from cratelm.whitebox.dial import Setting, activation_scales, active_neurons, dialled

VARIANTS: list[dict[str, Any]] = [
    {}, {"learned_step_size": True, "learned_penalty": True}, {"dictionary": "complete", "expansion": 1},
]  # fmt: skip


def plain_code(ista: Any, x: Tensor, setting: Setting) -> Tensor:
    """ISTA at a setting, written out."""
    sizes, thresholds = (values.detach() for values in ista.shrinkage(ista.atoms))
    penalties = thresholds[0] / sizes[0]
    steps = setting.steps or len(sizes)
    code = x if ista.complete else torch.zeros(*x.shape[:-1], len(ista.atoms)).to(x)
    for step in range(steps):
        size = setting.step_size * sizes[min(step, len(sizes) - 1)]
        residual = x - code @ ista.atoms
        code = torch.relu(code + size * (residual @ ista.atoms.T) - size * setting.penalty * penalties)
    return code.detach()


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(
    "setting",
    [Setting(), Setting(penalty=3.0), Setting(step_size=0.4), Setting(steps=1), Setting(steps=5, penalty=2.0)],
)
def test_a_setting_runs_the_formula(changes: dict[str, Any], setting: Setting, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(**changes), rng).double()
    tokens = torch.from_numpy(rng.integers(272, size=(2, 9)))
    block: Any = model.blocks[1]
    with torch.no_grad():
        before = model(tokens)
        with dialled(model, setting), capture(model, [model.neuron_taps[1], "blocks.1.ista:input"]) as seen:
            turned = model(tokens)
        expected = plain_code(block.ista, seen["blocks.1.ista:input"], setting)
        assert torch.allclose(seen[model.neuron_taps[1]], expected, atol=1e-5)
        assert torch.equal(turned, before) == (setting == Setting())
        assert torch.equal(model(tokens), before)  # nothing stays turned


def test_generation_at_a_setting_is_the_same_with_and_without_a_cache(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    tokens = torch.from_numpy(rng.integers(272, size=(1, 4)))
    plain = model.generate(tokens, 8, temperature=0)
    with dialled(model, Setting(penalty=8.0, steps=3)):
        cached, uncached = (model.generate(tokens, 8, temperature=0, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached)
    assert torch.equal(model.generate(tokens, 8, temperature=0), plain)


@pytest.mark.parametrize("arch", get_args(Architecture))
def test_a_threshold_silences_what_is_below_so_many_times_the_rms(arch: Architecture, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(arch), rng)
    stream = rng.integers(272, size=50).astype(np.uint16)
    rows = torch.from_numpy(stream[:48].astype(np.int64)).view(3, 16)
    with torch.no_grad(), capture(model, model.neuron_taps) as before:
        model(rows)
    scales = activation_scales(model, stream)
    first = model.neuron_taps[0]
    assert scales[first] == pytest.approx(float(before[first].square().mean().sqrt()), rel=1e-5)
    with torch.no_grad(), dialled(model, Setting(threshold=1.5), scales=scales):
        with capture(model, [first]) as seen:
            model(rows)
        active = active_neurons(model, stream)
    code = before[first]
    assert torch.equal(seen[first], torch.where(code.abs() >= 1.5 * scales[first], code, 0))
    assert active[0] == pytest.approx(float((seen[first] != 0).float().sum(-1).mean()))
    assert active_neurons(model, stream)[0] == pytest.approx(float((code != 0).float().sum(-1).mean()))


@pytest.mark.parametrize(
    ("turned", "message"),
    [
        ({"penalty": 0.0}, "penalty must be above 0, got 0.0"),
        ({"penalty": -1.0}, "penalty must be above 0, got -1.0"),
        ({"step_size": float("inf")}, "step_size must be above 0, got inf"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"threshold": -0.1}, "threshold must be 0 or more, got -0.1"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(turned: dict[str, Any], message: str) -> None:
    with pytest.raises(CrateError, match=message):
        Setting(**turned)


def test_what_a_model_does_not_have_cannot_be_turned(rng: np.random.Generator) -> None:
    gpt2, free = random_model(tiny_config("gpt2"), rng), random_model(tiny_config(penalty=0.0), rng)
    with pytest.raises(CrateError, match="no ISTA block"), dialled(gpt2, Setting(steps=3)):
        pass
    with pytest.raises(CrateError, match="this model has a penalty of 0"), dialled(free, Setting(penalty=2.0)):
        pass


@pytest.fixture
def runs(tmp_path: Path, rng: np.random.Generator) -> tuple[list[Path], Path]:
    data = make_tokens(tmp_path / "tokens", rng)
    made = []
    for arch in get_args(Architecture):
        run = tmp_path / f"{arch}-2l"
        model = random_model(tiny_config(arch, vocab_size=data.vocab_size), rng)
        save_model(model, run / "model", load_tokenizer(data.path))
        write_json(run / "run.json", {"name": run.name, "arch": arch, "control": None, "of": None})
        made.append(run)
    return made, data.path


def test_the_command_measures_point_by_point_and_goes_on(
    runs: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, data = runs
    arguments = ["dial", *map(str, result), "--data", str(data), "--device", "cpu", "--tokens", "300", "--loss-only"]
    turned = ["--penalty", "1", "4", "--step-size", "--steps", "1", "--threshold", "0", "1"]
    real = command._point
    calls: list[Any] = []

    def stopped(*given: Any) -> dict[str, Any]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(given[2])
        return real(*given)

    monkeypatch.setattr(command, "_point", stopped)
    assert main([*arguments, *turned]) == 130
    kept = json.loads((result[0] / "dial.json").read_text())["points"]
    assert [(point["dial"], point["penalty"], point["steps"]) for point in kept] == [
        ("penalty", 1, None), ("penalty", 4, None), ("steps", 1, 1),
    ]  # fmt: skip
    calls = [None] * 4

    def counted(*given: Any) -> dict[str, Any]:
        calls.append(given[2])
        return real(*given)

    monkeypatch.setattr(command, "_point", counted)
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert main([*arguments, *turned]) == 0
    assert len(calls) == 4 + 2 + 2  # the two thresholds of CRATE, the two of GPT-2
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 80
    dials = open_dials(result)
    assert [len(dial.points) for dial in dials] == [5, 2]
    unchanged = [point for point in dials[0].points if is_unchanged(point)]
    assert len(unchanged) == 2
    assert unchanged[0]["loss"] == unchanged[1]["loss"]
    assert percent_active(dials[0], unchanged[0]) == pytest.approx(100 * np.mean(unchanged[0]["active"]) / 64)
    sparser = dials[0].settings("penalty")
    assert np.mean(sparser[1]["active"]) < np.mean(sparser[0]["active"])
    assert [row[1] for row in dial_table(dials).rows] == ["penalty", "penalty", "steps", *["threshold"] * 4]
    axes = dial_figures(dials)["dial"].axes
    lines = {tuple(np.asarray(line.get_ydata()).tolist()) for line in axes[0].lines}
    assert tuple(point["loss"] for point in sparser) in lines


def test_points_of_other_calls_stay(
    runs: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run, _), data = runs
    monkeypatch.setattr("cratelm.workflows.measurements.lookup", lambda _: lambda *_: {"points": 5.0})
    calls: list[Any] = []
    real = command._point
    monkeypatch.setattr(command, "_point", lambda *given: calls.append(given[2]) or real(*given))  # type: ignore[func-returns-value]
    base = ["dial", str(run), "--data", str(data), "--device", "cpu", "--step-size", "--steps", "--threshold"]

    def dial(*more: str) -> list[tuple[float, int, bool]]:
        """What there is after another call: penalty, tokens of the loss, whether lookup was measured."""
        assert main([*base, *more]) == 0
        points = json.loads((run / "dial.json").read_text())["points"]
        assert all(point["with_lookup"] == (point["lookup"] == {"points": 5.0}) for point in points)
        return sorted((point["penalty"], point["tokens"], point["with_lookup"]) for point in points)

    whole = [(1.0, 300, True), (4.0, 300, True)]
    assert dial("--tokens", "300", "--penalty", "1", "4") == whole
    assert dial("--tokens", "300", "--penalty", "1", "--loss-only") == whole  # has its loss already
    assert len(calls) == 2
    more = dial("--tokens", "200", "--penalty", "1", "--loss-only")
    assert more == sorted([*whole, (1.0, 200, False)])
    assert dial("--tokens", "200", "--penalty", "1") == sorted([*whole, (1.0, 200, True)])
    assert len(calls) == 4
    dials = open_dials([run])
    assert [row[-1] for row in dial_table(dials).rows] == [200, 300, 300]
    axes = dial_figures(dials)["dial"].axes
    assert len(axes) == 4
    lines = [len(line.get_xdata()) for line in axes[1].lines]  # type: ignore[arg-type]
    assert sorted(lines) == [1, 2]  # one for each number of tokens
    content = json.loads((run / "dial.json").read_text())
    write_json(run / "dial.json", content | {"model_hash": "another"})
    before = (run / "dial.json").read_bytes()
    capsys.readouterr()
    assert main([*base, "--penalty", "1", "--loss-only"]) == 2
    err = capsys.readouterr().err
    assert "is of another model or text (model_hash" in err
    assert err.count("\n") == 1
    assert (run / "dial.json").read_bytes() == before


def test_only_what_was_measured_is_drawn(runs: tuple[list[Path], Path]) -> None:
    (run, _), data = runs
    assert main(["dial", str(run), "--data", str(data), "--device", "cpu", "--tokens", "300", "--loss-only",
                 "--penalty", "1", "2", "--step-size", "--steps", "--threshold"]) == 0  # fmt: skip
    axes = dial_figures(open_dials([run]))["dial"].axes
    assert [one.get_title(loc="left") for one in axes] == ["Held-out loss", "Held-out loss"]
    assert all(one.lines for one in axes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--penalty", "0"], "penalty must be above 0, got 0.0"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--tokens", "no"], "got 'no'"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, runs: tuple[list[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result, data = runs
    assert main(["dial", str(result[0]), "--data", str(data), "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert not (result[0] / "dial.json").exists()
    none = ["--threshold", "--penalty", "2"]
    assert main(["dial", str(result[1]), "--data", str(data), "--device", "cpu", *none]) == 2
    assert "Use --threshold, the only dial of a GPT-2" in capsys.readouterr().err
