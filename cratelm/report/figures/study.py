"""The figures of a study: the paper's steadiness over layers against depth, and differences with their intervals."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cratelm.report.figures.form import FAINT, STYLE, Look, looks
from cratelm.report.figures.paper import figures
from cratelm.report.results.study import Difference, Estimate, Group, Quantity, Study, display_variant, over_seeds


def study_figures(study: Study) -> dict[str, Figure]:
    """The figures of a study by name, and those of one run of each group."""
    found = {"steadiness": steadiness(study)} if study.results.protocols else {}
    if study.pairs and study.results.protocols:
        found["differences"] = differences(study)
    return found | figures(study.first_seeds)


def variant_looks(study: Study) -> dict[str, Look]:
    """A colour and a marker for each variant."""
    firsts = {name: next(iter(groups[0].runs.values())) for name, groups in study.variants.items()}
    found = looks(list(firsts.values()))
    return {name: found[run.title] for name, run in firsts.items()}


def steadiness(study: Study) -> Figure:
    """Mean score over layers, and below it the variance over layers, against depth; bars are intervals over seeds."""
    protocols, look = study.results.protocols, variant_looks(study)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 2.9 * len(protocols), 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, len(protocols), squeeze=False, sharex=True, sharey="row")
        for column, protocol in enumerate(protocols):
            for row, name in enumerate((protocol, f"variance, {protocol}")):
                for place, (variant, groups) in enumerate(study.variants.items()):
                    shift = 0.06 * (place - (len(study.variants) - 1) / 2)
                    _line(panels[row, column], groups, study.quantities[name], look[variant], shift, variant)
            panels[0, column].set_title(protocol)
            panels[1, column].set_xlabel("layers of the model")
            panels[1, column].set_xticks(sorted({group.num_layers for group in study.groups}))
        panels[0, 0].set_ylabel("mean over layers (points)")
        panels[1, 0].set_ylabel("variance over layers (points²)")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _line(
    axes: Axes, groups: tuple[Group, ...], of: Quantity, look: Look, shift: float, variant: str
) -> None:  # fmt: skip
    found = [(group.num_layers, one) for group in groups if (one := over_seeds(group, of)) is not None]
    if not found:
        return
    depth = np.array([layers for layers, _ in found], dtype=np.float64)
    axes.errorbar(
        depth + shift, [one.mean for _, one in found], yerr=np.array([_bars(one) for _, one in found]).T,
        color=look.color, marker=look.marker, markersize=5.5, linewidth=1.6, elinewidth=1.3, capsize=2.5,
        capthick=1.3, markeredgecolor="white", markeredgewidth=0.7, label=display_variant(variant),
    )  # fmt: skip


def differences(study: Study) -> Figure:
    """Each difference in points with its interval over seeds: a panel per protocol, a colour per variant."""
    protocols, look = study.results.protocols, variant_looks(study)
    shown = [one for one in study.differences if one.quantity in protocols and one.found is not None]
    labels = list(dict.fromkeys(_label(one) for one in shown))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.0 + 2.4 * len(protocols), 1.1 + 0.3 * max(len(labels), 1)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(protocols), squeeze=False, sharey=True)[0]
        for axes, protocol in zip(panels, protocols, strict=True):
            axes.axvline(0, color=FAINT, linewidth=0.8)
            for one in (one for one in shown if one.quantity == protocol):
                _mark(axes, one, labels.index(_label(one)), look)
            axes.set_title(protocol)
            axes.set_xlabel("difference (points)")
            axes.set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _mark(axes: Axes, one: Difference, place: int, look: Mapping[str, Look]) -> None:
    assert one.found is not None
    own = look[one.group.variant]
    axes.errorbar(
        [one.found.mean], [place], xerr=np.array([_bars(one.found)]).T, color=own.color, marker=own.marker,
        markersize=5, elinewidth=1.3, capsize=2.5, capthick=1.3, linestyle="none",
    )  # fmt: skip


def _label(one: Difference) -> str:
    return f"{one.group.title} − {display_variant(one.other)}, equal {one.basis}"


def _bars(one: Estimate) -> tuple[float, float]:
    return (0.0, 0.0) if one.low is None or one.high is None else (one.mean - one.low, one.high - one.mean)
