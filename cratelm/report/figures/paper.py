"""The paper's figures: loss curves, and scores by layer for every protocol with intervals and controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.report.figures import form
from cratelm.report.results.gather import Curve, Results, RunResult

LONGEST_CURVE = 400
"""Points of a curve; a longer curve is averaged down to this."""


def figures(results: Results) -> dict[str, Figure]:
    """All figures of a report by name, without empty ones."""
    drawn = {"loss": loss_curves(results), "scores": scores_by_layer(results)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def loss_curves(results: Results) -> Figure | None:
    """Loss against tokens seen: training faint, held-out with markers; None if no run logged any."""
    drawn = [model for model in results.models if model.train_curve.tokens or model.held_out_curve.tokens]
    if not drawn:
        return None
    look = form.looks(results.models)
    with form.drawing(6.6, 3.7) as figure:
        axes = figure.add_subplot()
        for model in drawn:
            _draw_curves(axes, model, look[model.title])
        axes.set_title("Loss")
        axes.set_ylabel("nats per token")
        form.training_axis(axes)
        axes.set_ylim(*_loss_range(drawn))
        kinds = [
            form.handle(form.INK, "", alpha=0.45, width=1.2, label="training"),
            form.handle(form.INK, "o", label="held-out"),
        ]
        models = form.legend_handles({model.title: look[model.title] for model in drawn})
        axes.legend(handles=[*models, *kinds], loc="upper right")
    return figure


def scores_by_layer(results: Results) -> Figure | None:
    """Mean score of each layer: one panel per protocol, one row of panels per depth, controls fainter."""
    if not results.protocols:
        return None
    depths = sorted({model.num_layers for model in results.models})
    look = form.looks(results.models)
    with form.drawing(1.0 + 2.9 * len(results.protocols), 0.75 + 2.75 * len(depths)) as figure:
        panels = figure.subplots(len(depths), len(results.protocols), squeeze=False, sharey="row")
        for row, depth in zip(panels, depths, strict=True):
            models = [model for model in results.models if model.num_layers == depth]
            for axes, protocol in zip(row, results.protocols, strict=True):
                _draw_scores(axes, models, protocol, look)
                axes.set_title(protocol if len(depths) == 1 else f"{protocol}, {depth} layers")
            row[0].set_ylabel("score (points)")
        handles = form.legend_handles(
            look,
            random_init=any(model.random_init is not None for model in results.models),
            shuffled=any(model.shuffled for model in results.models),
        )
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _draw_curves(axes: Axes, model: RunResult, look: form.Look) -> None:
    axes.plot(*_shortened(model.train_curve), color=look.color, alpha=0.4, linewidth=1.2)
    held_out = _shortened(model.held_out_curve)
    every = max(1, len(held_out[0]) // 12)
    axes.plot(
        *held_out, color=look.color, linewidth=1.8, marker=look.marker, markersize=4.5, markevery=every,
        markeredgecolor="white", markeredgewidth=0.6,
    )  # fmt: skip


def _shortened(curve: Curve) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """The curve with at most `LONGEST_CURVE` points, each the mean of its neighbours."""
    if not curve.tokens:
        return np.zeros(0), np.zeros(0)
    parts = min(LONGEST_CURVE, len(curve.tokens))
    tokens, loss = (
        np.array_split(np.asarray(values, dtype=np.float64), parts) for values in (curve.tokens, curve.loss)
    )
    return np.array([part.mean() for part in tokens]), np.array([part.mean() for part in loss])


def _loss_range(models: Sequence[RunResult]) -> tuple[float, float]:
    """The range of all losses after the first twentieth of each training, which would flatten the rest."""
    losses = [
        loss
        for model in models
        for curve in (model.train_curve, model.held_out_curve)
        for tokens, loss in zip(curve.tokens, curve.loss, strict=True)
        if tokens >= 0.05 * curve.tokens[-1]
    ]
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _draw_scores(axes: Axes, models: Sequence[RunResult], protocol: str, look: Mapping[str, form.Look]) -> None:
    axes.axhline(0, color=form.FAINT, linewidth=0.8)
    for place, model in enumerate(models):
        shift = 0.09 * (place - (len(models) - 1) / 2)
        color, marker = look[model.title].color, look[model.title].marker
        random_init = model.random_init.scores if model.random_init is not None else {}
        if protocol in model.shuffled:
            _draw_control(axes, model.shuffled[protocol], shift, form.SHUFFLED, color, "x")
        if protocol in random_init:
            _draw_control(axes, random_init[protocol], shift, form.RANDOM_INIT, color, marker)
        if protocol in model.scores:
            _draw_points(
                axes, model.scores[protocol], shift, color=color, marker=marker, markersize=5.5, linewidth=1.6,
                elinewidth=1.3, capsize=2.5, capthick=1.3, markeredgecolor="white", markeredgewidth=0.7, zorder=3,
            )  # fmt: skip
    form.layer_axis(axes, max((model.num_layers for model in models), default=1))


def _draw_control(
    axes: Axes, scores: ModelAggregate, shift: float, dashes: form.Dashes, color: str, marker: str
) -> None:  # fmt: skip
    drawn = _draw_points(
        axes, scores, shift, color=color, marker=marker, markersize=4, linewidth=1.1, elinewidth=0.9,
        markerfacecolor="none", markeredgewidth=0.9, alpha=0.5, zorder=2,
    )  # fmt: skip
    drawn[0].set_linestyle(dashes)


def _draw_points(axes: Axes, scores: ModelAggregate, shift: float, **style: Any) -> ErrorbarContainer:
    """Draw mean and interval of the layers that have a mean."""
    rows = [(layer.layer, layer.points, *layer.interval) for layer in scores.layers if layer.interval is not None]
    layer, points, low, high = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return axes.errorbar(layer + shift, points, yerr=np.maximum([points - low, high - points], 0), **style)
