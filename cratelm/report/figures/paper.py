"""The paper's figures: loss curves, and scores by layer for every protocol with intervals and controls."""

from collections.abc import Iterator, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.report.figures.form import FAINT, INK, RANDOM_INIT, SHUFFLED, STYLE, Look, handle, looks
from cratelm.report.results.gather import Curve, Results, RunResult
from cratelm.runtime import human

LONGEST_CURVE = 400
"""Points of a curve; longer ones are averaged down to this."""


def figures(results: Results) -> dict[str, Figure]:
    """All figures of a report by name. A figure that would be empty is left out."""
    found = {"loss": loss_curves(results), "scores": scores_by_layer(results)}
    return {name: figure for name, figure in found.items() if figure is not None}


def loss_curves(results: Results) -> Figure | None:
    """Loss against tokens seen: training faint, held-out with markers; None if no run logged any."""
    drawn = [model for model in results.models if model.train_curve.tokens or model.held_out_curve.tokens]
    if not drawn:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        look = looks(results.models)
        for model in drawn:
            _draw_curves(axes, model, look[model.title])
        axes.set_title("Loss")
        axes.set_ylabel("nats per token")
        axes.set_xlabel("tokens seen in training")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: human(float(tokens))))
        axes.set_xlim(left=0)
        axes.set_ylim(*_loss_range(drawn))
        kinds = [handle(INK, "", alpha=0.45, width=1.2, label="training"), handle(INK, "o", label="held-out")]
        axes.legend(handles=[*_model_handles(drawn, look), *kinds], loc="upper right")
    return figure


def scores_by_layer(results: Results) -> Figure | None:
    """Mean score of each layer: one panel per protocol, one row of panels per depth, controls fainter."""
    if not results.protocols:
        return None
    depths = sorted({model.num_layers for model in results.models})
    with mpl.rc_context(STYLE):
        width = 1.0 + 2.9 * len(results.protocols)
        figure = Figure(figsize=(width, 0.75 + 2.75 * len(depths)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(depths), len(results.protocols), squeeze=False, sharey="row")
        look = looks(results.models)
        for row, depth in zip(panels, depths, strict=True):
            models = [model for model in results.models if model.num_layers == depth]
            for axes, protocol in zip(row, results.protocols, strict=True):
                _draw_scores(axes, models, protocol, look)
                axes.set_title(protocol if len(depths) == 1 else f"{protocol}, {depth} layers")
            row[0].set_ylabel("score (points)")
        figure.legend(handles=_score_handles(results, look), loc="outside lower center", ncols=4)
    return figure


def _draw_curves(axes: Axes, model: RunResult, look: Look) -> None:
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
    """All losses, but for the first twentieth of each training, whose fall would flatten all that follows."""
    kept = [
        loss
        for model in models
        for curve in (model.train_curve, model.held_out_curve)
        for tokens, loss in zip(curve.tokens, curve.loss, strict=True)
        if tokens >= 0.05 * curve.tokens[-1]
    ]
    low, high = min(kept), max(kept)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _draw_scores(axes: Axes, models: Sequence[RunResult], protocol: str, look: Mapping[str, Look]) -> None:
    axes.axhline(0, color=FAINT, linewidth=0.8)
    for place, model in enumerate(models):
        shift = 0.09 * (place - (len(models) - 1) / 2)
        random_init = model.random_init.scores if model.random_init is not None else {}
        if protocol in model.shuffled:
            _draw_control(axes, model.shuffled[protocol], look[model.title], shift, SHUFFLED, "x")
        if protocol in random_init:
            _draw_control(axes, random_init[protocol], look[model.title], shift, RANDOM_INIT, look[model.title].marker)
        if protocol in model.scores:
            _draw_model(axes, model.scores[protocol], look[model.title], shift)
    depth = max((model.num_layers for model in models), default=1)
    axes.set_xlim(-0.5, depth - 0.5)
    axes.set_xlabel("layer")
    axes.set_xticks(range(0, depth, 1 + (depth - 1) // 12))


def _draw_model(axes: Axes, scores: ModelAggregate, look: Look, shift: float) -> None:
    layer, points, low, high = _points(scores)
    error = np.maximum([points - low, high - points], 0)
    axes.errorbar(
        layer + shift, points, yerr=error, color=look.color, marker=look.marker, markersize=5.5, linewidth=1.6,
        elinewidth=1.3, capsize=2.5, capthick=1.3, markeredgecolor="white", markeredgewidth=0.7, zorder=3,
    )  # fmt: skip


def _draw_control(
    axes: Axes, scores: ModelAggregate, look: Look, shift: float, dashes: tuple[float, tuple[float, float]], marker: str
) -> None:
    layer, points, low, high = _points(scores)
    error = np.maximum([points - low, high - points], 0)
    drawn = axes.errorbar(
        layer + shift, points, yerr=error, color=look.color, marker=marker, markersize=4, linewidth=1.1,
        elinewidth=0.9, markerfacecolor="none", markeredgewidth=0.9, alpha=0.5, zorder=2,
    )  # fmt: skip
    drawn[0].set_linestyle(dashes)


def _points(scores: ModelAggregate) -> tuple[Float[np.ndarray, " layers"], ...]:
    """Layer, mean and interval of the layers that have a mean."""
    rows = [(one.layer, one.points, one.low, one.high) for one in scores.layers if one.points is not None]
    return tuple(np.array(rows, dtype=np.float64).reshape(-1, 4).T)


def _model_handles(models: Sequence[RunResult], look: Mapping[str, Look]) -> Iterator[Line2D]:
    for model in models:
        yield handle(look[model.title].color, look[model.title].marker, label=model.title)


def _score_handles(results: Results, look: Mapping[str, Look]) -> list[Line2D]:
    handles = list(_model_handles(results.models, look))
    if any(model.random_init is not None for model in results.models):
        handles.append(
            handle(
                INK, "o", label="random-init model", alpha=0.6, width=1.1, linestyle=RANDOM_INIT, markerfacecolor="none"
            )
        )
    if any(model.shuffled for model in results.models):
        handles.append(handle(INK, "x", label="shuffled explanations", alpha=0.6, width=1.1, linestyle=SHUFFLED))
    return handles
