"""The figures of a study: mean and variance over layers against depth, and differences with their intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cratelm.report.figures.form import FAINT, Look, drawing, looks
from cratelm.report.figures.paper import figures
from cratelm.report.results.study import Difference, Estimate, Group, Quantity, Study, display_variant, over_seeds


def study_figures(study: Study) -> dict[str, Figure]:
    """The figures of a study by name, and the figures of one run of each group."""
    drawn = {"steadiness": steadiness(study)} if study.results.protocols else {}
    if study.pairs and study.results.protocols:
        drawn["differences"] = differences(study)
    return drawn | figures(study.first_seeds)


def variant_looks(study: Study) -> dict[str, Look]:
    """A colour and a marker for each variant."""
    firsts = {name: next(iter(groups[0].runs.values())) for name, groups in study.variants.items()}
    by_title = looks(list(firsts.values()))
    return {name: by_title[run.title] for name, run in firsts.items()}


def steadiness(study: Study) -> Figure:
    """Mean score over layers, and below it the variance over layers, against depth; bars are intervals over seeds."""
    protocols, look = study.results.protocols, variant_looks(study)
    with drawing(1.0 + 2.9 * len(protocols), 5.6) as figure:
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
    axes: Axes, groups: tuple[Group, ...], quantity: Quantity, look: Look, shift: float, variant: str
) -> None:  # fmt: skip
    points = [(group.num_layers, mean) for group in groups if (mean := over_seeds(group, quantity)) is not None]
    if not points:
        return
    depths, means = zip(*points, strict=True)
    axes.errorbar(
        np.array(depths) + shift, [mean.mean for mean in means], yerr=_error_bars(means),
        color=look.color, marker=look.marker, markersize=5.5, linewidth=1.6, elinewidth=1.3, capsize=2.5,
        capthick=1.3, markeredgecolor="white", markeredgewidth=0.7, label=display_variant(variant),
    )  # fmt: skip


def differences(study: Study) -> Figure:
    """Each difference in points with its interval over seeds: a panel per protocol, a colour per variant."""
    protocols, look = study.results.protocols, variant_looks(study)
    shown = [difference for difference in study.differences if difference.quantity in protocols]
    labels = list(dict.fromkeys(_label(difference) for difference in shown if difference.estimate is not None))
    with drawing(3.0 + 2.4 * len(protocols), 1.1 + 0.3 * max(len(labels), 1)) as figure:
        panels = figure.subplots(1, len(protocols), squeeze=False, sharey=True)[0]
        for axes, protocol in zip(panels, protocols, strict=True):
            axes.axvline(0, color=FAINT, linewidth=0.8)
            for difference in shown:
                if difference.quantity == protocol and difference.estimate is not None:
                    _mark(axes, difference, difference.estimate, labels.index(_label(difference)), look)
            axes.set_title(protocol)
            axes.set_xlabel("difference (points)")
            axes.set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
    return figure


def _mark(axes: Axes, difference: Difference, mean: Estimate, row: int, look: Mapping[str, Look]) -> None:
    variant = look[difference.group.variant]
    axes.errorbar(
        [mean.mean], [row], xerr=_error_bars([mean]), color=variant.color, marker=variant.marker,
        markersize=5, elinewidth=1.3, capsize=2.5, capthick=1.3, linestyle="none",
    )  # fmt: skip


def _label(difference: Difference) -> str:
    return f"{difference.group.title} − {display_variant(difference.other)}, equal {difference.basis}"


def _error_bars(means: Sequence[Estimate]) -> np.ndarray:
    """Lengths of the error bars below and above each mean; 0 where there is no interval."""
    ends = [mean.interval or (mean.mean, mean.mean) for mean in means]
    return np.array([(mean.mean - low, high - mean.mean) for mean, (low, high) in zip(means, ends, strict=True)]).T
