"""The sparsity dial of each run, read from dial.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.report.results.descriptions import described_runs
from cratelm.rundir import read_json

DIALS = {
    "penalty": "penalty, times the model's", "step_size": "step size, times the model's", "steps": "ISTA steps",
    "threshold": "threshold, times the activations' RMS",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Dial:
    """dial.json of one run."""

    title: str
    arch: str
    width: int
    """Neurons of a layer."""
    points: Sequence[Mapping[str, Any]] = field(repr=False)

    def settings(self, dial: str) -> list[Mapping[str, Any]]:
        """The points of one dial, by number of tokens, then from the lowest setting up."""
        points = [point for point in self.points if point["dial"] == dial]
        return sorted(points, key=lambda point: (point["tokens"] or 0, point[dial]))


def open_dials(runs: Sequence[Path]) -> list[Dial]:
    """The dials of run directories that `cratelm dial` has measured."""
    dials = []
    for run, title, description in described_runs(runs):
        dial = read_json(run / "dial.json", made_by=f"cratelm dial {run} --data DIR")
        dials.append(Dial(title=title, arch=str(description["arch"]), width=dial["width"], points=dial["points"]))
    return dials


def percent_active(dial: Dial, point: Mapping[str, Any]) -> float | None:
    """Active neurons in per cent of all neurons, a mean over layers."""
    return None if point["active"] is None else 100 * float(np.mean(point["active"])) / dial.width


def is_unchanged(point: Mapping[str, Any]) -> bool:
    """Whether every dial has its trained setting."""
    return point["penalty"] == point["step_size"] == 1 and point["steps"] is None and point["threshold"] == 0
