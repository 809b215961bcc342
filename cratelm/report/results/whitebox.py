"""The white-box view of each run, read from whitebox.json and metrics.jsonl."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cratelm.errors import CrateError
from cratelm.report.results.gather import RunResult, run_titles
from cratelm.rundir import read_json, read_jsonl

FILE = "whitebox.json"

SHOWN = ("shared", "value")
"""Which projection of the heads tables and figures show: MSSA's only one, or what GPT-2's attention moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The white-box view of one run."""

    title: str
    name: str
    arch: str
    of: str | None
    """For a control, the name of the model it controls."""
    found: Mapping[str, Any] = field(repr=False)
    """whitebox.json; empty for a run that has none."""
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(repr=False)
    """Measured along the training: name such as `layer_0.active` -> (tokens seen, values)."""

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        """The measurements of each layer."""
        return self.found.get("layers", ())


def open_views(runs: Sequence[Path]) -> list[View]:
    """The views of run directories that `cratelm whitebox` has measured."""
    descriptions = [read_json(run / "run.json", made_by=f"cratelm train --out {run} --data DIR") for run in runs]
    return [
        _view(run, title, description)
        for run, title, description in zip(runs, run_titles(runs, descriptions), descriptions, strict=True)
    ]


def views_of(rows: Sequence[RunResult]) -> list[View]:
    """The views of the runs of a report, those that have any."""
    first = {run.path: run for run in reversed(rows)}  # a run has a row for each of its taps
    made = [
        _view(run.path, run.title, {"name": run.name, "arch": run.arch, "of": run.of if run.control else None})
        for run in reversed(first.values())
    ]
    return [one for one in made if one.found or one.curves]


def _view(run: Path, title: str, description: Mapping[str, Any]) -> View:
    path = run / FILE
    found = read_json(path, made_by=f"cratelm whitebox {run} --data DIR") if path.exists() else {}
    if found and any("rate" not in layer for layer in found["layers"]):
        raise CrateError(f"{path} lacks a coding rate. Remove it and run: cratelm whitebox {run} --data DIR")
    return View(
        title=title, name=str(description["name"]), arch=str(description["arch"]), of=description.get("of"),
        found=found, curves=_curves(run),
    )  # fmt: skip


def _curves(run: Path) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """What `cratelm train --measure whitebox` logged."""
    if not os.path.exists(run / "metrics.jsonl"):
        return {}
    rows = read_jsonl(run / "metrics.jsonl")
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("whitebox/"))
    found = {}
    for name in names:
        points = [(float(row["tokens"]), float(row[name])) for row in rows if row.get(name) is not None]
        tokens, values = zip(*points, strict=True)
        found[name.removeprefix("whitebox/")] = (tokens, values)
    return found


def shown_rate(layer: Mapping[str, Any], kind: str, when: str) -> float:
    """The mean of a rate of the heads, by the projection that is shown."""
    rates = layer[kind][when]
    return float(next(rates[name] for name in SHOWN if name in rates)["mean"])


def maybe_rate(layer: Mapping[str, Any], *path: str) -> float | None:
    """The mean of a number of the heads at such a path, by the projection that is shown; None in files without it."""
    rates: Any = layer
    for step in path:
        rates = rates.get(step, {})
    return next((float(rates[name]["mean"]) for name in SHOWN if name in rates), None)


def objective_share(layer: Mapping[str, Any], step: str) -> float | None:
    """The LASSO objective after a step over that of a code of zeros, in %; of what it begins from in older files."""
    found = layer.get("objective", {})
    if step not in found:
        return None
    zero = layer.get("objective_at_zero", found["0"])["mean"]
    return 100 * float(found[step]["mean"]) / float(zero) if zero else None
