"""Figures of the white-box view: every quantity over layers with its random-init control, and over training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cratelm.report.figures import form
from cratelm.report.results.whitebox import View, last_step, maybe_rate, objective_per_token, objective_share

_Quantity = Callable[[Mapping[str, Any]], float | None]
"""From a layer's measurements to a number; None where the number was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One panel: a quantity, and dotted a second one after attention or after the first ISTA step."""

    title: str
    unit: str
    first: _Quantity
    second: _Quantity | None = None
    line: float | None = None
    """A threshold, drawn as a horizontal line."""
    curve: str = ""
    """Name of the first quantity's curve over training."""
    second_curve: str = ""


def _of_dictionary(name: str) -> _Quantity:
    def read(layer: Mapping[str, Any]) -> float | None:
        value = layer.get("dictionary", {}).get(name)
        return None if value is None else float(max(value) if isinstance(value, list) else value)

    return read


def _objective(step: int | None) -> _Quantity:
    def read(layer: Mapping[str, Any]) -> float | None:
        steps = layer.get("objective")
        return None if steps is None else objective_share(layer, str(step) if step else max(steps, key=int))

    return read


def _rate(*path: str) -> _Quantity:
    return lambda layer: maybe_rate(layer, *path)


def _last(name: str) -> _Quantity:
    return lambda layer: last_step(layer, name)


def _percent(name: str) -> _Quantity:
    def read(layer: Mapping[str, Any]) -> float | None:
        share = layer[name] if isinstance(layer.get(name), float) else last_step(layer, name)
        return None if share is None else 100 * share

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
    Panel(title="Objective ΔR - λ‖A‖₀ / N", unit="nats per token", first=objective_per_token,
          curve="sparse_objective_per_token"),
    Panel(title="Active neurons", unit="%", first=_percent("active"), curve="active"),
    Panel(title="Hoyer sparseness", unit="0 flat, 1 one neuron", first=_last("hoyer"), curve="hoyer"),
    Panel(title="LASSO objective", unit="% of a = 0", first=_objective(None), second=_objective(1), curve="objective"),
    Panel(title="Reconstruction error", unit="of the input's length", first=_last("reconstruction_error"),
          curve="reconstruction_error"),
    Panel(title="Step size × ‖D‖²", unit="unstable above 2", first=_of_dictionary("stability"), line=2.0,
          curve="stability"),
    Panel(title="Coherence", unit="largest |cosine|", first=_of_dictionary("coherence"), curve="coherence"),
    Panel(title="Dead neurons", unit="%", first=_percent("dead"), curve="dead"),
)  # fmt: skip
_SHARES = {"active", "objective", "dead"}
"""Curves that are logged as shares and shown in per cent."""


def whitebox_figures(views: Sequence[View]) -> dict[str, Figure]:
    """`whitebox` over layers and `whitebox_training` over training, each where a run has measurements."""
    measured, trained = [view for view in views if view.measurements], [view for view in views if view.curves]
    figures = {"whitebox": over_layers(measured)} if measured else {}
    return figures | ({"whitebox_training": over_training(trained)} if trained else {})


def over_layers(views: Sequence[View]) -> Figure:
    """Plot every quantity against the layer."""
    look = _looks(views)
    with _panels() as (figure, panels):
        for axes, panel in panels:
            for view in views:
                _draw_layers(axes, panel, view, look[view.title])
            form.layer_axis(axes, max(len(view.layers) for view in views))
        models = {view.title: look[view.title] for view in views if view.of is None}
        handles = form.legend_handles(models, random_init=any(view.of is not None for view in views))
        handles.append(form.handle(form.INK, "", label="after attention; after the first ISTA step", linestyle=":"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def over_training(views: Sequence[View]) -> Figure:
    """Every quantity against tokens seen, a line for each layer, deeper layers lighter."""
    look = _looks(views)
    with _panels() as (figure, panels):
        for axes, panel in panels:
            for view in views:
                _draw_training(axes, panel, view, look[view.title])
            form.training_axis(axes)
        handles = [form.handle(look[view.title].color, "", label=view.title) for view in views]
        handles.append(form.handle(form.INK, "", label="deeper layers: lighter", alpha=0.4))
        handles.append(form.handle(form.INK, "", label="after attention", linestyle=":"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@contextmanager
def _panels() -> Iterator[tuple[Figure, list[tuple[Axes, Panel]]]]:
    """A figure with empty axes for every panel; titles, units and notes are added at the end."""
    with form.drawing(9.4, 10.8) as figure:
        panels = list(zip(figure.subplots(4, 3).flat, PANELS, strict=True))
        yield figure, panels
        for axes, panel in panels:
            if panel.line is not None:
                axes.axhline(panel.line, color=form.FAINT, linewidth=1.0, linestyle="--", zorder=1)
            if not any(len(line.get_xdata()) for line in axes.lines):
                form.note(axes, "not measured")
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
            if panel.unit == "%":
                axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def _draw_layers(axes: Axes, panel: Panel, view: View, look: form.Look) -> None:
    control = view.of is not None
    style: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 4.5 if control else 5.5}
    style |= {"alpha": 0.5, "linewidth": 1.1, "markerfacecolor": "none"} if control else {"linewidth": 1.6}
    for quantity, second in ((panel.first, False), (panel.second, True)):
        if quantity is None:
            continue
        points = [(layer["layer"], value) for layer in view.layers if (value := quantity(layer)) is not None]
        dashes: Any = ":" if second else form.RANDOM_INIT if control else "-"
        more = style | ({"markersize": 3} if second else {})
        axes.plot([layer for layer, _ in points], [value for _, value in points], linestyle=dashes, **more)


def _draw_training(axes: Axes, panel: Panel, view: View, look: form.Look) -> None:
    depths = sorted({int(name.split(".")[0].removeprefix("layer_")) for name in view.curves})
    for depth in depths:
        for curve, dashes in ((panel.curve, "-"), (panel.second_curve, ":")):
            name = f"layer_{depth}.{curve}"
            if curve and name in view.curves:
                tokens, values = view.curves[name]
                scale = 100 if curve in _SHARES else 1
                axes.plot(
                    tokens, [scale * value for value in values], color=look.color, linestyle=dashes, linewidth=1.5,
                    alpha=1 - 0.6 * depth / max(1, len(depths) - 1) if len(depths) > 1 else 1,
                )  # fmt: skip


def _looks(views: Sequence[View]) -> dict[str, form.Look]:
    """Title -> look; a control has the look of its model."""
    models = [view for view in views if view.of is None]
    by_title = form.looks(models)
    by_name = {view.name: by_title[view.title] for view in models}
    by_title |= form.looks([view for view in views if view.of is not None and view.of not in by_name])
    return by_title | {view.title: by_name[view.of] for view in views if view.of in by_name}
