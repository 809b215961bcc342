"""The figure of the sparsity dial: loss and lookup score against active neurons."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cratelm.report.figures.form import FAINT, INK, STYLE, handle, looks
from cratelm.report.results.dial import DIALS, Dial, is_own, share_active

DASHES: dict[str, Any] = {"penalty": "-", "step_size": ":", "steps": "-.", "threshold": (0, (4, 2))}


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
