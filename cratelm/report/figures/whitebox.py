"""Figures of the white-box view: every quantity over layers with its random-init control, and over training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cratelm.report.figures.form import FAINT, INK, RANDOM_INIT, STYLE, Look, handle, looks
from cratelm.report.results.whitebox import View, maybe_rate, objective_share
from cratelm.runtime import human

Quantity = Callable[[Mapping[str, Any]], float | None]
"""From a layer's measurements to a number, None where the layer has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One panel: a quantity, and a second one drawn dotted where attention or a further step changes it."""

    title: str
    unit: str
    first: Quantity
    second: Quantity | None = None
    line: float | None = None
    """A value that matters, as a line across."""
    curve: str = ""
    """Name of the curve over training; the second's is `second_curve`."""
    second_curve: str = ""


def _last(layer: Mapping[str, Any], name: str) -> float | None:
    steps = layer.get(name)
    return None if not steps else float(steps[max(steps, key=int)]["mean"])


def _of_dictionary(name: str) -> Quantity:
    def read(layer: Mapping[str, Any]) -> float | None:
        found = layer.get("dictionary", {}).get(name)
        return None if found is None else float(max(found) if isinstance(found, list) else found)

    return read


def _objective(step: int | None) -> Quantity:
    def read(layer: Mapping[str, Any]) -> float | None:
        steps = layer.get("objective")
        return None if steps is None else objective_share(layer, str(step) if step else max(steps, key=int))

    return read


def _rate(*path: str) -> Quantity:
    return lambda layer: maybe_rate(layer, *path)


def _share(name: str) -> Quantity:
    def read(layer: Mapping[str, Any]) -> float | None:
        found = layer[name] if isinstance(layer.get(name), float) else _last(layer, name)
        return None if found is None else 100 * found

    return read


PANELS = (
    Panel(title="R, all tokens", unit="nats", first=lambda layer: float(layer["rate"]["before"]["mean"]),
          second=lambda layer: float(layer["rate"]["after"]["mean"]), curve="rate"),
    Panel(title="Rᶜ, orthonormal bases", unit="nats", first=_rate("orthonormal_rate", "before"),
          second=_rate("orthonormal_rate", "after"), curve="orthonormal_rate_before",
          second_curve="orthonormal_rate_after"),
    Panel(title="Rate reduction ΔR = R - Rᶜ", unit="nats", first=_rate("rate_reduction", "before"),
          second=_rate("rate_reduction", "after"), curve="rate_reduction_before", second_curve="rate_reduction_after"),
    Panel(title="Unit Rᶜ", unit="nats, not those of R", first=_rate("normalised_rate", "before"),
          second=_rate("normalised_rate", "after"), curve="subspace_rate_before", second_curve="subspace_rate_after"),
    Panel(title="Objective ΔR - λ‖A‖₀", unit="nats", first=_rate("sparse_objective"), curve="sparse_objective"),
    Panel(title="Active neurons", unit="%", first=_share("active"), curve="active"),
    Panel(title="Hoyer sparseness", unit="0 flat, 1 one neuron", first=lambda layer: _last(layer, "hoyer"),
          curve="hoyer"),
    Panel(title="LASSO objective", unit="% of a = 0", first=_objective(None), second=_objective(1), curve="objective"),
    Panel(title="Reconstruction error", unit="of the input's length",
          first=lambda layer: _last(layer, "reconstruction_error"), curve="reconstruction_error"),
    Panel(title="Step size × ‖D‖²", unit="unstable above 2", first=_of_dictionary("stability"), line=2.0,
          curve="stability"),
    Panel(title="Coherence", unit="largest |cosine|", first=_of_dictionary("coherence"), curve="coherence"),
    Panel(title="Dead neurons", unit="%", first=_share("dead"), curve="dead"),
)  # fmt: skip
_PERCENT = {"active", "objective", "dead"}
"""Curves that are logged as shares."""


def whitebox_figures(views: Sequence[View]) -> dict[str, Figure]:
    """`whitebox` over layers and `whitebox_training` over training, each where a run has something to show."""
    measured, trained = [view for view in views if view.found], [view for view in views if view.curves]
    found = {}
    if measured:
        found["whitebox"] = over_layers(measured)
    if trained:
        found["whitebox_training"] = over_training(trained)
    return found


def over_layers(views: Sequence[View]) -> Figure:
    """Every quantity against the layer."""
    look = _looks(views)
    with mpl.rc_context(STYLE):
        figure, panels = _grid()
        for axes, panel in zip(panels, PANELS, strict=True):
            for view in views:
                _draw_layers(axes, panel, view, look[view.title])
            depth = max(len(view.layers) for view in views)
            axes.set_xlim(-0.4, depth - 0.6)
            axes.set_xticks(range(0, depth, 1 + (depth - 1) // 12))
            axes.set_xlabel("layer")
            _dress(axes, panel)
        figure.legend(handles=_handles(views, look), loc="outside lower center", ncols=3)
    return figure


def over_training(views: Sequence[View]) -> Figure:
    """Every quantity against tokens seen, a line for each layer, the deeper the lighter."""
    look = _looks(views)
    with mpl.rc_context(STYLE):
        figure, panels = _grid()
        for axes, panel in zip(panels, PANELS, strict=True):
            for view in views:
                _draw_training(axes, panel, view, look[view.title])
            axes.set_xlabel("tokens seen in training")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: human(float(tokens))))
            axes.set_xlim(left=0)
            _dress(axes, panel)
        handles = [handle(look[view.title].color, "", label=view.title) for view in views]
        handles.append(handle(INK, "", label="deeper layers: lighter", alpha=0.4))
        handles.append(handle(INK, "", label="after attention", linestyle=":"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _grid() -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.4, 10.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(4, 3).flat)


def _dress(axes: Axes, panel: Panel) -> None:
    if panel.line is not None:
        axes.axhline(panel.line, color=FAINT, linewidth=1.0, linestyle="--", zorder=1)
    if not axes.lines or all(not len(line.get_xdata()) for line in axes.lines):  # type: ignore[arg-type]
        axes.text(0.5, 0.5, "no model here has it", transform=axes.transAxes, ha="center", color=FAINT)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    if panel.unit == "%":
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def _draw_layers(axes: Axes, panel: Panel, view: View, look: Look) -> None:
    control = view.of is not None
    style: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 4.5 if control else 5.5}
    style |= {"alpha": 0.5, "linewidth": 1.1, "markerfacecolor": "none"} if control else {"linewidth": 1.6}
    for quantity, second in ((panel.first, False), (panel.second, True)):
        if quantity is None:
            continue
        points = [(layer["layer"], quantity(layer)) for layer in view.layers]
        there = [(layer, value) for layer, value in points if value is not None]
        dashes: Any = ":" if second else RANDOM_INIT if control else "-"
        more = style | ({"markersize": 3} if second else {})
        axes.plot([layer for layer, _ in there], [value for _, value in there], linestyle=dashes, **more)


def _draw_training(axes: Axes, panel: Panel, view: View, look: Look) -> None:
    depths = sorted({int(name.split(".")[0].removeprefix("layer_")) for name in view.curves})
    for depth in depths:
        for curve, dashes in ((panel.curve, "-"), (panel.second_curve, ":")):
            name = f"layer_{depth}.{curve}"
            if curve and name in view.curves:
                tokens, values = view.curves[name]
                scale = 100 if curve in _PERCENT else 1
                axes.plot(
                    tokens, [scale * value for value in values], color=look.color, linestyle=dashes, linewidth=1.5,
                    alpha=1 - 0.6 * depth / max(1, len(depths) - 1) if len(depths) > 1 else 1,
                )  # fmt: skip


def _looks(views: Sequence[View]) -> dict[str, Look]:
    """A control has the look of its model."""
    models = [view for view in views if view.of is None]
    found = looks(models)
    by_name = {view.name: found[view.title] for view in models}
    alone = [view for view in views if view.of is not None and view.of not in by_name]
    found |= looks(alone)
    return found | {view.title: by_name[view.of] for view in views if view.of in by_name}


def _handles(views: Sequence[View], look: Mapping[str, Look]) -> list[Any]:
    handles = [handle(look[view.title].color, look[view.title].marker, label=view.title) for view in views
               if view.of is None]  # fmt: skip
    if any(view.of is not None for view in views):
        handles.append(handle(INK, "o", label="random-init model", alpha=0.6, width=1.1, linestyle=RANDOM_INIT,
                              markerfacecolor="none"))  # fmt: skip
    handles.append(handle(INK, "", label="after attention; after the first ISTA step", linestyle=":"))
    return handles
