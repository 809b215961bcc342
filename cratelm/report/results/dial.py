"""The sparsity dial of each run, read from dial.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.report.results.gather import run_titles
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

    def turned(self, dial: str) -> list[Mapping[str, Any]]:
        """The points of one dial, from its lowest setting up; those on fewer tokens first."""
        found = [point for point in self.points if point["dial"] == dial]
        return sorted(found, key=lambda point: (point["tokens"] or 0, point[dial]))


def points_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a dial.json; in older files all have the tokens, and lookup or not, that the file says."""
    old = {"tokens": found.get("tokens"), "with_lookup": bool(found.get("lookup"))}
    return [old | point for point in found["points"]]


def open_dials(runs: Sequence[Path]) -> list[Dial]:
    """The dials of run directories that `cratelm dial` has measured."""
    descriptions = [read_json(run / "run.json", made_by=f"cratelm train --out {run} --data DIR") for run in runs]
    found = [read_json(run / "dial.json", made_by=f"cratelm dial {run} --data DIR") for run in runs]
    return [
        Dial(title=title, arch=str(description["arch"]), width=one["width"], points=points_of(one))
        for title, description, one in zip(run_titles(runs, descriptions), descriptions, found, strict=True)
    ]


def share_active(dial: Dial, point: Mapping[str, Any]) -> float | None:
    """Active neurons, in per cent of all, a mean over layers."""
    return None if point["active"] is None else 100 * float(np.mean(point["active"])) / dial.width


def is_own(point: Mapping[str, Any]) -> bool:
    """Whether nothing is turned."""
    return point["penalty"] == point["step_size"] == 1 and point["steps"] is None and point["threshold"] == 0
