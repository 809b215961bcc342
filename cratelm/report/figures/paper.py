"""The paper's figures as SVG and PNG: loss curves, and scores by layer for every protocol with intervals and controls.

The same results give the same bytes: ids in the SVG are seeded and no date is written.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.report.results.gather import Curve, Results, RunResult
from cratelm.rundir import atomic_path
from cratelm.runtime import human

INK, FAINT = "#333333", "#999999"
"""Colours of text and lines, and of grid and ticks; the page replaces both to suit its background."""

PALETTE = {
    "crate": ("#0072B2", "#56B4E9", "#009E73"),
    "gpt2": ("#D55E00", "#E69F00", "#CC79A7"),
    "other": ("#009E73", "#CC79A7", "#333333"),
}
"""Okabe and Ito's colours, told apart with any colour vision; cold ones for CRATE, warm ones for GPT-2."""

MARKERS = {"crate": "o^P", "gpt2": "sDv", "other": "X*p"}
"""Told apart without colour too; the next one is taken when the colours are used up."""

SHUFFLED, RANDOM_INIT = (0.0, (1.0, 1.8)), (0.0, (4.0, 2.0))
"""Dashes of the two controls."""
LONGEST_CURVE = 400
"""Points of a curve; longer ones are averaged down to this."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": FAINT, "grid.alpha": 0.3, "grid.linewidth": 0.6, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.major.size": 3,
    "xtick.major.width": 0.6, "ytick.major.size": 0, "lines.solid_capstyle": "round", "legend.frameon": False,
    "legend.fontsize": 9, "legend.handlelength": 2.4, "svg.fonttype": "none", "svg.hashsalt": "cratelm",
    "text.parse_math": False, "figure.dpi": 100, "savefig.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How one model is drawn in every figure."""

    color: str
    marker: str


def figures(results: Results) -> dict[str, Figure]:
    """All figures of a report by name. A figure that would be empty is left out."""
    found = {"loss": loss_curves(results), "scores": scores_by_layer(results)}
    return {name: figure for name, figure in found.items() if figure is not None}


def looks(models: Sequence[Any]) -> dict[str, Look]:
    """A colour and a marker for each model, by its title; a model is whatever has an `arch` and a `title`."""
    found: dict[str, Look] = {}
    numbers: Counter[str] = Counter()
    for model in models:
        family = model.arch if model.arch in PALETTE else "other"
        marker, color = divmod(numbers[family], len(PALETTE[family]))
        markers = MARKERS[family]
        found[model.title] = Look(color=PALETTE[family][color], marker=markers[marker % len(markers)])
        numbers[family] += 1
    return found


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


def write_figures(found: Mapping[str, Figure], out: Path) -> list[Path]:
    """Write each figure as SVG and PNG."""
    paths = []
    for name, figure in found.items():
        for suffix in ("svg", "png"):
            paths.append(out / f"{name}.{suffix}")
            with atomic_path(paths[-1]) as temporary:
                _save(figure, temporary, suffix)
    return paths


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for a page.

    It is built anew from the few elements and attributes a drawing needs, so that nothing else can get in: no style, no
    script, no address. Colours are repeated as classes (`f-0072b2` for fill, `s-0072b2` for stroke), by which the page
    suits them to its background; ids begin with `name`, so that two figures can stand in one page.
    """
    out = io.BytesIO()
    _save(figure, out, "svg", transparent=True)
    source = ElementTree.fromstring(out.getvalue())
    drawing = ElementTree.Element("svg", {
        "viewBox": source.get("viewBox", ""), "role": "img", "aria-label": description, "class": f"figure-{name}",
        "stroke-linejoin": "round", "stroke-linecap": "butt",
    })  # fmt: skip
    drawing.extend(copy for child in source if (copy := _plain(child, name)) is not None)
    return ElementTree.tostring(drawing, encoding="unicode")


def _save(figure: Figure, out: Path | io.BytesIO, suffix: str, *, transparent: bool = False) -> None:
    metadata = {"Date": None, "Creator": "cratelm"} if suffix == "svg" else {"Software": "cratelm"}
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A model may be named in a script that the font does not have; a box in its place is no reason to stop.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format=suffix, metadata=metadata, dpi=200, transparent=transparent)


_ELEMENTS = {"g", "defs", "path", "use", "clipPath", "rect", "text", "tspan"}
_ATTRIBUTES = {"d", "transform", "x", "y", "width", "height", "fill", "stroke"}
_PROPERTIES = {
    "fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-dashoffset",
    "stroke-linecap", "stroke-linejoin", "opacity", "font-size", "font-weight", "text-anchor",
}  # fmt: skip


def _plain(element: ElementTree.Element, name: str) -> ElementTree.Element | None:
    """A copy that holds only what a drawing needs; None for an element that is none of it."""
    tag = element.tag.rpartition("}")[2]
    if tag not in _ELEMENTS:
        return None
    given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    style = dict(part.split(":", 1) for part in given.get("style", "").split(";") if ":" in part)
    properties = {key.strip(): value.strip() for key, value in style.items()}
    if match := re.search(r"(bold|[67]00)?\s*([\d.]+px)", properties.get("font", "")):
        properties |= {"font-size": match[2]} | ({"font-weight": "bold"} if match[1] else {})
    kept = {key: value for key, value in given.items() if key in _ATTRIBUTES}
    kept |= {key: value for key, value in properties.items() if key in _PROPERTIES}
    if "id" in given:
        kept["id"] = f"{name}-{given['id']}"
    if given.get("href", "").startswith("#"):
        kept["href"] = f"#{name}-{given['href'][1:]}"
    if match := re.fullmatch(r"url\(#([\w-]+)\)", given.get("clip-path", "")):
        kept["clip-path"] = f"url(#{name}-{match[1]})"
    colors = [(key[0], kept[key]) for key in ("fill", "stroke") if kept.get(key, "").startswith("#")]
    if tag == "text":
        colors = [*colors, ("f", INK)] if "fill" not in kept else colors
    if colors:
        kept["class"] = " ".join(f"{letter}-{color[1:].lower()}" for letter, color in colors)
    copy = ElementTree.Element(tag, kept)
    copy.text, copy.tail = element.text, element.tail
    copy.extend(child for one in element if (child := _plain(one, name)) is not None)
    return copy


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


def handle(color: str, marker: str, *, label: str, alpha: float = 1.0, width: float = 1.8, **more: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, marker=marker, markersize=5, linewidth=width, alpha=alpha, label=label, **more)


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
