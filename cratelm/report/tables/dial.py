"""The sparsity dial in a table and a figure: active neurons, loss and lookup score at every setting."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cratelm.report.figures.paper import FAINT, INK, STYLE, handle, looks
from cratelm.report.results.gather import run_titles
from cratelm.report.tables.paper import Cell, Column, Table
from cratelm.rundir import read_json

DIALS = {
    "penalty": "penalty, times the model's", "step_size": "step size, times the model's", "steps": "ISTA steps",
    "threshold": "threshold, times the activations' RMS",
}  # fmt: skip
DASHES: dict[str, Any] = {"penalty": "-", "step_size": ":", "steps": "-.", "threshold": (0, (4, 2))}


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


def dial_table(dials: Sequence[Dial]) -> Table:
    """A row per model and setting."""
    columns = (
        Column("Model"), Column("Dial"), Column("Setting", "0.01"), Column("L0", "0.1", "neurons per token"),
        Column("Active", "0.1", "%"), Column("Loss", "0.001", "nats/token"), Column("Lookup", "0.1", "points"),
        Column("Scored", "0.1", "% of neurons"), Column("Tokens", "human", "of the loss"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for dial in dials:
        for name in DIALS:
            for point in dial.turned(name):
                active, lookup = point["active"], point["lookup"]
                scored = lookup.get("scored")
                rows.append((
                    dial.title, name.replace("_", " "), point[name], None if active is None else float(np.mean(active)),
                    share_active(dial, point), point["loss"] if point["loss"] is not None else "not finite",
                    lookup.get("points"), None if scored is None else 100 * scored,
                    point["tokens"],
                ))  # fmt: skip
    return Table(
        name="dial", caption="Sparsity dial", columns=columns, rows=tuple(rows),
        notes=(
            "The model as it is has penalty 1 and step size 1 (multiples of its own), its own number of steps, and "
            "threshold 0. A penalty or step size turns ISTA itself; a threshold sets activations to 0 that are below "
            "so many times their layer's root mean square. Lookup is the mean score, top-and-random, of some neurons "
            "of each layer on a sample of held-out text.",
        ),
    )  # fmt: skip


def dial_figures(dials: Sequence[Dial]) -> dict[str, Figure]:
    """Loss and lookup score against active neurons, a line for each model and dial; a ring is the model as it is.

    A row of panels for each of the two that was measured; points on other numbers of tokens are other lines.
    """
    look = looks(dials)
    values = [_value(point, "lookup") for dial in dials for point in dial.points]
    rows = [("loss", "nats per token"), *([("lookup", "points")] if any(one is not None for one in values) else [])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 0.8 + 3.4 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(rows), 2, squeeze=False)
        for row, (quantity, unit) in zip(panels, rows, strict=True):
            _draw(row[0], dials, look, quantity, by_activity=True)
            row[0].set_xlabel("active neurons (%)")
            _draw(row[1], dials, look, quantity, by_activity=False)
            row[1].set_xlabel("penalty or threshold, as a multiple")
            row[1].set_xscale("symlog", linthresh=0.25)
            ticks = [0, 0.25, 0.5, 1, 2, 4, 8, 16]
            row[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            row[1].minorticks_off()
            for axes in row:
                axes.set_title("Held-out loss" if quantity == "loss" else "Lookup score")
                axes.set_ylabel(unit)
                if not axes.lines:
                    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=FAINT)
        shown = [name for name in DIALS if any(dial.turned(name) for dial in dials)]
        handles = [handle(look[dial.title].color, look[dial.title].marker, label=dial.title) for dial in dials]
        handles += [handle(INK, "", label=DIALS[name], linestyle=DASHES[name]) for name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return {"dial": figure}


def _value(point: Mapping[str, Any], quantity: str) -> float | None:
    found = point["loss"] if quantity == "loss" else point["lookup"].get("points")
    return None if found is None else float(found)


def _draw(axes: Axes, dials: Sequence[Dial], look: Mapping[str, Any], quantity: str, *, by_activity: bool) -> None:
    heights: list[float] = []
    for dial in dials:
        of_loss = {point["tokens"] for point in dial.points}
        for name, tokens in itertools.product(DIALS if by_activity else ("penalty", "threshold"), of_loss):
            points = [
                (share_active(dial, point) if by_activity else float(point[name]), value)
                for point in dial.turned(name)
                if point["tokens"] == tokens and (value := _value(point, quantity)) is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                heights += y
                axes.plot(x, y, color=look[dial.title].color, linestyle=DASHES[name], linewidth=1.5,
                          marker=look[dial.title].marker, markersize=4, markeredgecolor="white")  # fmt: skip
        own = [
            (point, value) for point in dial.points if is_own(point) and (value := _value(point, quantity)) is not None
        ]
        for point, value in {point["tokens"]: (point, value) for point, value in own}.values() if by_activity else ():
            axes.plot(share_active(dial, point) or 0.0, value, color=look[dial.title].color, markersize=10, zorder=4,
                      marker=look[dial.title].marker, markerfacecolor="none", markeredgewidth=1.5)  # fmt: skip
    if quantity == "loss" and heights:  # a setting that breaks the model would flatten all others
        axes.set_ylim(min(heights) - 0.1, min(max(heights), min(heights) + 4) + 0.1)


def is_own(point: Mapping[str, Any]) -> bool:
    """Whether nothing is turned."""
    return point["penalty"] == point["step_size"] == 1 and point["steps"] is None and point["threshold"] == 0
