"""Figures of consistency and distinctiveness: a curve over thresholds for each model, and both by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cratelm.interpretation.firing.means import Mean, ModelFiring
from cratelm.interpretation.firing.measures import KINDS, STATED, THRESHOLDS
from cratelm.report.figures import form
from cratelm.report.results.firing import RunFiring

LABELLED = (THRESHOLDS[0], THRESHOLDS[STATED], THRESHOLDS[-1])
"""Thresholds that are written next to the first curve."""


def firing_figures(entries: Sequence[RunFiring]) -> dict[str, Figure]:
    """`firing`: the curves. `firing_layers`: both numbers by layer. Empty without measurements."""
    kinds = [kind for kind in KINDS if any(kind in entry.own.overall for entry in entries)]
    if not kinds:
        return {}
    look = form.looks([entry.run for entry in entries if entry.run.control is None] or [entry.run for entry in entries])
    return {"firing": _curves(entries, kinds, look), "firing_layers": _by_layer(entries, kinds, look)}


def _curves(entries: Sequence[RunFiring], kinds: Sequence[str], look: dict[str, form.Look]) -> Figure:
    with form.drawing(1.0 + 3.6 * len(kinds), 4.2) as figure:
        panels = figure.subplots(1, len(kinds), squeeze=False, sharex=True, sharey=True)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            for place, (title, firing, dashes) in enumerate(_lines(entries)):
                if kind in firing.overall:
                    _draw_curve(axes, firing.overall[kind], look[title], dashes, labelled=place == 0)
            axes.set_title(f"{kind} excerpts")
            axes.set_xlabel("distinctiveness (%)")
            axes.grid(visible=True, axis="both")
            axes.set_xlim(0, None)
            axes.set_ylim(0, 103)
        panels[0].set_ylabel("consistency (%)")
        figure.legend(handles=_handles(entries, look), loc="outside lower center", ncols=4)
    return figure


def _lines(entries: Sequence[RunFiring]) -> Iterator[tuple[str, ModelFiring, form.Dashes | None]]:
    """Title of the model, numbers and dashes of every line, models first."""
    for entry in entries:
        yield _model(entry, entries), entry.own, None if entry.run.control is None else form.RANDOM_INIT
    for entry in entries:
        if entry.shuffled is not None:
            yield _model(entry, entries), entry.shuffled, form.SHUFFLED


def _model(entry: RunFiring, entries: Sequence[RunFiring]) -> str:
    """Title of the model that a control belongs to; the run's title if it is not a control or its model is missing."""
    controls = ((other.run.title, other.run.random_init) for other in entries)
    models = (title for title, control in controls if control is not None and control.title == entry.run.title)
    return next(models, entry.run.title)


def _draw_curve(axes: Axes, mean: Mean, look: form.Look, dashes: form.Dashes | None, *, labelled: bool) -> None:
    x, y = mean.curve("distinctiveness"), mean.curve("consistency")
    control = dashes is not None
    (line,) = axes.plot(
        x, y, color=look.color, linewidth=1.1 if control else 1.7, alpha=0.5 if control else 1, zorder=2 + (not control)
    )
    if dashes is not None:
        line.set_linestyle(dashes)
    x_ends, y_ends = (mean.interval(name) for name in ("distinctiveness", "consistency"))
    if x_ends is None or y_ends is None:
        return
    x_error, y_error = (
        [[max(value - low, 0)], [max(high - value, 0)]]
        for value, (low, high) in ((x[STATED], x_ends), (y[STATED], y_ends))
    )
    axes.errorbar(
        x[STATED], y[STATED], xerr=x_error, yerr=y_error, elinewidth=1.2, zorder=4,
        markersize=4.5 if control else 6, **_mark(look, dashes),
    )  # fmt: skip
    if labelled:
        for threshold in LABELLED:
            place = THRESHOLDS.index(threshold)
            label: dict[str, Any] = {
                "xytext": (5, 5),
                "textcoords": "offset points",
                "fontsize": 7.5,
                "color": form.INK,
            }
            axes.annotate(f"{threshold:g}", (x[place], y[place]), **label)


def _mark(look: form.Look, dashes: form.Dashes | None) -> dict[str, Any]:
    """Marks of a model are filled and opaque, marks of a control hollow and faint."""
    control = dashes is not None
    edge, face = (look.color, "none") if control else ("white", look.color)
    return {
        "marker": "x" if dashes == form.SHUFFLED else look.marker, "color": look.color, "alpha": 0.55 if control else 1,
        "markeredgecolor": edge, "markerfacecolor": face, "markeredgewidth": 0.8,
    }  # fmt: skip


def _by_layer(entries: Sequence[RunFiring], kinds: Sequence[str], look: dict[str, form.Look]) -> Figure:
    lines = list(_lines(entries))
    with form.drawing(1.0 + 3.2 * len(kinds), 5.4) as figure:
        panels = figure.subplots(2, len(kinds), squeeze=False, sharex=True, sharey="row")
        for row, name in zip(panels, ("consistency", "distinctiveness"), strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                for place, (title, firing, dashes) in enumerate(lines):
                    if kind in firing.by_layer:
                        layers = np.array(firing.layers) + 0.05 * (place - (len(lines) - 1) / 2)
                        _draw_layers(axes, layers, firing.by_layer[kind], name, look[title], dashes)
                axes.set_title(f"{name}, {kind} excerpts")
                axes.set_ylim(bottom=0)
            row[0].set_ylabel("%")
        for axes in panels[-1]:
            form.layer_axis(axes, 1 + max(max(firing.layers, default=0) for _, firing, _ in lines))
        chance = form.handle(form.FAINT, "_", label="by chance", width=0.0, markeredgewidth=1.4)
        figure.legend(handles=[*_handles(entries, look), chance], loc="outside lower center", ncols=3)
    return figure


def _draw_layers(
    axes: Axes, layers: np.ndarray, means: Sequence[Mean], name: str, look: form.Look, dashes: form.Dashes | None
) -> None:
    values = _values(means, name)
    ends = np.array([mean.interval(name) or (np.nan, np.nan) for mean in means], dtype=np.float64)
    control = dashes is not None
    drawn = axes.errorbar(
        layers, values, yerr=np.abs(ends.T - values), elinewidth=1.1, markersize=4 if control else 5.5,
        linewidth=1.1 if control else 1.6, zorder=2 + (not control), **_mark(look, dashes),
    )  # fmt: skip
    if dashes is not None:
        drawn[0].set_linestyle(dashes)
        return
    chance = _values(means, "firing" if name == "consistency" else "relevant")
    axes.plot(layers, chance, color=look.color, marker="_", markersize=11, linewidth=0, markeredgewidth=1.4)


def _values(means: Sequence[Mean], name: str) -> np.ndarray:
    return np.array([np.nan if mean.of(name) is None else mean.of(name) for mean in means], dtype=np.float64)


def _handles(entries: Sequence[RunFiring], look: dict[str, form.Look]) -> list[Line2D]:
    controls = {entry.run.control is not None for entry in entries}
    return form.legend_handles(
        look, random_init=controls == {True, False}, shuffled=any(entry.shuffled is not None for entry in entries)
    )
