"""The figure of consistency against distinctiveness: a curve over thresholds for each model, and both by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cratelm.interpretation.firing.means import Mean, ModelFiring
from cratelm.interpretation.firing.measures import KINDS, STATED, THRESHOLDS
from cratelm.report.figures.form import FAINT, INK, RANDOM_INIT, SHUFFLED, STYLE, Look, looks
from cratelm.report.results.firing import RunFiring

NAMED = (THRESHOLDS[0], THRESHOLDS[STATED], THRESHOLDS[-1])
"""Thresholds that are written beside the first curve."""


def firing_figures(found: Sequence[RunFiring]) -> dict[str, Figure]:
    """`firing`: the curves. `firing_layers`: consistency and distinctiveness by layer. None where nothing is known."""
    kinds = [kind for kind in KINDS if any(kind in one.own.overall for one in found)]
    if not kinds:
        return {}
    look = looks([one.run for one in found if one.run.control is None] or [one.run for one in found])
    return {"firing": _curves(found, kinds, look), "firing_layers": _by_layer(found, kinds, look)}


def _curves(found: Sequence[RunFiring], kinds: Sequence[str], look: dict[str, Look]) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.6 * len(kinds), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(kinds), squeeze=False, sharex=True, sharey=True)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for place, (one, firing, dashes) in enumerate(_lines(found)):
                if kind in firing.overall:
                    _draw_curve(axes, firing.overall[kind], look[_model(one, found)], dashes, named=place == 0)
            axes.set_title(f"{kind} excerpts")
            axes.set_xlabel("distinctiveness (%)")
            axes.grid(visible=True, axis="both")
            axes.set_xlim(0, None)
            axes.set_ylim(0, 103)
        panels[0].set_ylabel("consistency (%)")
        figure.legend(handles=_handles(found, look), loc="outside lower center", ncols=4)
    return figure


def _lines(
    found: Sequence[RunFiring],
) -> Iterator[tuple[RunFiring, ModelFiring, tuple[float, tuple[float, ...]] | None]]:
    """Everything that is drawn, models first: the run, its numbers, its dashes."""
    for one in found:
        yield one, one.own, None if one.run.control is None else RANDOM_INIT
    for one in found:
        if one.shuffled is not None:
            yield one, one.shuffled, SHUFFLED


def _model(one: RunFiring, found: Sequence[RunFiring]) -> str:
    """The title of the model that a run is, or that it controls; its own where that one is not there."""
    for other in found:
        if other.run.random_init is not None and other.run.random_init.title == one.run.title:
            return other.run.title
    return one.run.title


def _draw_curve(
    axes: Axes, mean: Mean, look: Look, dashes: tuple[float, tuple[float, ...]] | None, *, named: bool
) -> None:
    x, y = mean.curve("distinctiveness"), mean.curve("consistency")
    control = dashes is not None
    (line,) = axes.plot(
        x, y, color=look.color, linewidth=1.1 if control else 1.7, alpha=0.5 if control else 1, zorder=2 + (not control)
    )
    if dashes is not None:
        line.set_linestyle(dashes)
    ends = [mean.interval(name) for name in ("distinctiveness", "consistency")]
    if ends[0] is None or ends[1] is None:
        return
    error = [
        [[max(value - low, 0)], [max(high - value, 0)]]
        for value, (low, high) in zip((x[STATED], y[STATED]), (ends[0], ends[1]), strict=True)
    ]
    marker = "x" if dashes == SHUFFLED else look.marker
    axes.errorbar(
        x[STATED], y[STATED], xerr=error[0], yerr=error[1], marker=marker, elinewidth=1.2, zorder=4,
        markersize=4.5 if control else 6, **_colors(look, control=control),
    )  # fmt: skip
    if named:
        for threshold in NAMED:
            place = THRESHOLDS.index(threshold)
            at: dict[str, Any] = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 7.5, "color": INK}
            axes.annotate(f"{threshold:g}", (x[place], y[place]), **at)


def _colors(look: Look, *, control: bool) -> dict[str, Any]:
    """A model's marks are filled and full, a control's hollow and faint."""
    edge, face = (look.color, "none") if control else ("white", look.color)
    return {
        "color": look.color, "alpha": 0.55 if control else 1, "markeredgecolor": edge, "markerfacecolor": face,
        "markeredgewidth": 0.8,
    }  # fmt: skip


def _by_layer(found: Sequence[RunFiring], kinds: Sequence[str], look: dict[str, Look]) -> Figure:
    names = ("consistency", "distinctiveness")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.2 * len(kinds), 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
        lines = list(_lines(found))
        for row, name in zip(panels, names, strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                for place, (one, firing, dashes) in enumerate(lines):
                    if kind in firing.by_layer:
                        shift = 0.05 * (place - (len(lines) - 1) / 2)
                        _draw_layers(axes, firing, kind, name, look[_model(one, found)], dashes, shift)
                axes.set_title(f"{name}, {kind} excerpts")
                axes.set_ylim(bottom=0)
            row[0].set_ylabel("%")
        depth = 1 + max(max(firing.layers, default=0) for _, firing, _ in lines)
        for axes in panels[-1]:
            axes.set_xlabel("layer")
            axes.set_xlim(-0.5, depth - 0.5)
            axes.set_xticks(range(0, depth, 1 + (depth - 1) // 12))
        figure.legend(handles=_handles(found, look, chance=True), loc="outside lower center", ncols=3)
    return figure


def _draw_layers(
    axes: Axes, firing: ModelFiring, kind: str, name: str, look: Look, dashes: tuple[float, tuple[float, ...]] | None,
    shift: float,
) -> None:  # fmt: skip
    means = firing.by_layer[kind]
    values = np.array([np.nan if mean.of(name) is None else mean.of(name) for mean in means], dtype=np.float64)
    ends = np.array([mean.interval(name) or (np.nan, np.nan) for mean in means], dtype=np.float64)
    control, layers = dashes is not None, np.array(firing.layers) + shift
    drawn = axes.errorbar(
        layers, values, yerr=np.abs(ends.T - values), marker="x" if dashes == SHUFFLED else look.marker, elinewidth=1.1,
        markersize=4 if control else 5.5, linewidth=1.1 if control else 1.6, zorder=2 + (not control),
        **_colors(look, control=control),
    )  # fmt: skip
    if dashes is not None:
        drawn[0].set_linestyle(dashes)
        return
    chance = "firing" if name == "consistency" else "relevant"
    heights = [np.nan if mean.of(chance) is None else mean.of(chance) for mean in means]
    axes.plot(
        layers,
        np.array(heights, dtype=np.float64),
        color=look.color,
        marker="_",
        markersize=11,
        linewidth=0,
        markeredgewidth=1.4,
    )


def _handles(found: Sequence[RunFiring], look: dict[str, Look], *, chance: bool = False) -> list[Line2D]:
    def line(color: str, marker: str, label: str, **more: object) -> Line2D:
        return Line2D([], [], color=color, marker=marker, markersize=5, label=label, **more)  # type: ignore[arg-type]

    handles = [line(own.color, own.marker, title, linewidth=1.7) for title, own in look.items()]
    if any(one.run.control is not None for one in found) and any(one.run.control is None for one in found):
        handles.append(line(INK, "o", "random-init model", alpha=0.6, linestyle=RANDOM_INIT, markerfacecolor="none"))
    if any(one.shuffled is not None for one in found):
        handles.append(line(INK, "x", "shuffled explanations", alpha=0.6, linestyle=SHUFFLED))
    if chance:
        handles.append(line(FAINT, "_", "by chance", linewidth=0, markeredgewidth=1.4))
    return handles
