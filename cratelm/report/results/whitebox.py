"""The white-box view of each run, read from whitebox.json and metrics.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cratelm.errors import CrateError
from cratelm.report.results.descriptions import described_runs
from cratelm.report.results.gather import RunResult
from cratelm.rundir import read_json, read_jsonl

WHITEBOX_FILE = "whitebox.json"

_SHOWN = ("shared", "value")
"""The projection of the heads in tables and figures: the only one of MSSA, the value projection of GPT-2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The white-box view of one run."""

    title: str
    name: str
    arch: str
    of: str | None
    """For a control, the name of its model."""
    measurements: Mapping[str, Any] = field(repr=False)
    """The contents of whitebox.json; empty for a run without it."""
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(repr=False)
    """Measured during training: name such as `layer_0.active` -> (tokens seen, values)."""

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        """The measurements of each layer."""
        return self.measurements.get("layers", ())


def open_views(runs: Sequence[Path]) -> list[View]:
    """The views of run directories that `cratelm whitebox` has measured."""
    return [_view(*run) for run in described_runs(runs)]


def views_of(rows: Sequence[RunResult]) -> list[View]:
    """The views of the runs of a report, without runs that have none."""
    by_path = {run.path: run for run in reversed(rows)}  # a run has a row for each of its taps
    views = [
        _view(run.path, run.title, {"name": run.name, "arch": run.arch, "of": run.of if run.control else None})
        for run in reversed(by_path.values())
    ]
    return [view for view in views if view.measurements or view.curves]


def _view(run: Path, title: str, description: Mapping[str, Any]) -> View:
    path = run / WHITEBOX_FILE
    measurements = read_json(path, made_by=f"cratelm whitebox {run} --data DIR") if path.exists() else {}
    if measurements and any(layer.get("rate") is None for layer in measurements["layers"]):
        raise CrateError(f"{path} lacks a coding rate. Remove it and run: cratelm whitebox {run} --data DIR")
    for layer in measurements.get("layers", ()):
        _add_penalty(layer, int(measurements["tokens_per_set"]))
    return View(
        title=title, name=str(description["name"]), arch=str(description["arch"]), of=description.get("of"),
        measurements=measurements, curves=_curves(run),
    )  # fmt: skip


def _curves(run: Path) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The measurements that `cratelm train --measure whitebox` logged."""
    rows = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("whitebox/"))
    curves = {}
    for name in names:
        points = [
            (float(row["tokens"]), float(row[name]))
            for row in rows
            if isinstance(row.get(name), int | float) and row.get("tokens") is not None
        ]
        tokens, values = zip(*points, strict=True)
        curves[name.removeprefix("whitebox/")] = (tokens, values)
    return curves


def shown_rate(layer: Mapping[str, Any], *path: str) -> float:
    """The mean of a coding rate of the heads, for the projection that is shown."""
    rate = maybe_rate(layer, *path)
    assert rate is not None, f"no rate {path}"
    return rate


def maybe_rate(layer: Mapping[str, Any], *path: str) -> float | None:
    """The mean of a number of the heads, for the projection that is shown; None in files without it."""
    rates: Any = layer
    for step in path:
        rates = rates.get(step, {})
    return next((float(rates[name]["mean"]) for name in _SHOWN if name in rates), None)


def _add_penalty(layer: dict[str, Any], tokens: int) -> None:
    """lambda ||A||_0 / N of a file without it, from the two numbers whose difference it is part of."""
    reduction, whole = maybe_rate(layer, "rate_reduction", "after"), maybe_rate(layer, "sparse_objective")
    if "penalty_per_token" not in layer and reduction is not None and whole is not None:
        layer["penalty_per_token"] = {"mean": (reduction - whole) / tokens, "deviation": None}


def penalty_term(layer: Mapping[str, Any]) -> float | None:
    """lambda ||A||_0 / N, in nats; None in files without the numbers."""
    penalty = layer.get("penalty_per_token")
    return None if penalty is None else float(penalty["mean"])


def objective_per_token(layer: Mapping[str, Any]) -> float | None:
    """The rate reduction after attention minus lambda ||A||_0 / N, both per token; None in files without them."""
    reduction, penalty = maybe_rate(layer, "rate_reduction", "after"), penalty_term(layer)
    return None if reduction is None or penalty is None else reduction - penalty


def last_step(layer: Mapping[str, Any], name: str) -> float | None:
    """The mean of a number after the last ISTA step; None in files without it."""
    steps = layer.get(name)
    return float(steps[max(steps, key=int)]["mean"]) if steps else None


def objective_share(layer: Mapping[str, Any], step: str) -> float | None:
    """The LASSO objective after a step, in % of the objective at a = 0 (in files without that, at the first code)."""
    objective = layer.get("objective", {})
    if step not in objective:
        return None
    zero = layer.get("objective_at_zero", objective["0"])["mean"]
    return 100 * float(objective[step]["mean"]) / float(zero) if zero else None
