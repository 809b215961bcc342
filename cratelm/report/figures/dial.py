"""The figure of the sparsity dial: loss and lookup score against active neurons."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cratelm.report.figures.form import INK, drawing, handle, legend_handles, looks, note
from cratelm.report.results.dial import DIALS, Dial, is_unchanged, percent_active

DASHES: dict[str, Any] = {"penalty": "-", "step_size": ":", "steps": "-.", "threshold": (0, (4, 2))}


def dial_figures(dials: Sequence[Dial]) -> dict[str, Figure]:
    """Loss and lookup score against active neurons, a line for each model, dial and number of tokens.

    A row of panels for each quantity that was measured; a ring marks the unchanged model.
    """
    look = looks(dials)
    scores = [_value(point, "lookup") for dial in dials for point in dial.points]
    rows = [("loss", "nats per token"), *([("lookup", "points")] if any(s is not None for s in scores) else [])]
    with drawing(9.4, 0.8 + 3.4 * len(rows)) as figure:
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
                    note(axes, "not measured")
        shown = [name for name in DIALS if any(dial.settings(name) for dial in dials)]
        handles = legend_handles(look)
        handles += [handle(INK, "", label=DIALS[name], linestyle=DASHES[name]) for name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return {"dial": figure}


def _value(point: Mapping[str, Any], quantity: str) -> float | None:
    value = point["loss"] if quantity == "loss" else point["lookup"].get("points")
    return None if value is None else float(value)


def _draw(axes: Axes, dials: Sequence[Dial], look: Mapping[str, Any], quantity: str, *, by_activity: bool) -> None:
    heights: list[float] = []
    for dial in dials:
        style = {"color": look[dial.title].color, "marker": look[dial.title].marker}
        token_counts = {point["tokens"] for point in dial.points}
        for name, tokens in itertools.product(DIALS if by_activity else ("penalty", "threshold"), token_counts):
            points = [
                (percent_active(dial, point) if by_activity else float(point[name]), value)
                for point in dial.settings(name)
                if point["tokens"] == tokens and (value := _value(point, quantity)) is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                heights += y
                axes.plot(
                    x, y, linestyle=DASHES[name], linewidth=1.5, markersize=4, markeredgecolor="white", **style
                )  # fmt: skip
        rings = {
            point["tokens"]: (percent_active(dial, point) or 0.0, value)
            for point in dial.points
            if by_activity and is_unchanged(point) and (value := _value(point, quantity)) is not None
        }
        for place in rings.values():
            axes.plot(*place, markersize=10, zorder=4, markerfacecolor="none", markeredgewidth=1.5, **style)
    if quantity == "loss" and heights:  # a setting that breaks the model would flatten all others
        axes.set_ylim(min(heights) - 0.1, min(max(heights), min(heights) + 4) + 0.1)
