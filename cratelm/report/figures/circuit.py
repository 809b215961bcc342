"""A circuit drawn as a graph, and told in lines: from the file that `cratelm circuit` wrote."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cratelm.report.figures.form import FAINT, INK, STYLE
from cratelm.report.shown_text import visible

FOR, AGAINST = "#0072B2", "#D55E00"
"""Colours of what speaks for the target and what against it."""
MOST_COLUMNS = 16
"""Prompts up to so many tokens are drawn whole; of longer ones the positions with nodes, and the last."""
MOST_EDGES = 60
SHOWN_SHARES = ("share_kept", "share_lost")

Place = tuple[int, int, int]


def circuit_figure(found: Mapping[str, Any], model: str) -> Figure:
    """Positions from left to right, layers from bottom to top, the target above its last position."""
    columns = _columns(found)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        layers = found["layers"]
        places, widths = _places(found, columns)
        width = min(16.0, max(6.0, 1.2 + 0.52 * sum(widths)))
        figure = Figure(figsize=(width, 1.7 + 1.35 * len(layers)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        centres = _centres(widths)
        height = len(layers) + 0.1
        target = (centres[-1], height)
        _draw_edges(axes, found, places, target)
        _draw_nodes(axes, found, places)
        axes.text(*target, f"«{visible(found['target'])}»", ha="center", va="center", fontweight="bold",
                  bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": INK})  # fmt: skip
        _label(axes, found, columns, centres, height, sum(widths))
        axes.set_title(_title(found, model))
        axes.legend(handles=_legend(), loc="upper left", fontsize=8)
    return figure


def circuit_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a terminal shows: the probability, the shares, and the nodes of each layer, the strongest first."""
    explained = found["explained"]
    yield f"«{visible(found['prompt'])}» -> «{visible(found['target'])}»"
    yield (
        f"probability {100 * math.exp(explained['log_probability']):.2f} %, log probability "
        f"{explained['log_probability']:.3f}; {explained['none']:.3f} with every neuron ablated"
    )
    kept, lost = (_percent(explained[name]) for name in SHOWN_SHARES)
    yield f"the {len(found['nodes'])} nodes below keep {kept} of the difference when all others are ablated;"
    yield f"without these {lost} is lost"
    for point in explained["curve"]:
        if point["share"] is not None and point["share"] >= 0.8:
            yield f"{point['nodes']} of the {found['ranked']} nodes tried keep {_percent(point['share'])}"
            break
    for layer in reversed(found["layers"]):
        yield ""
        yield f"layer {layer}"
        for node in (node for node in found["nodes"] if node["layer"] == layer):
            said = f"  {visible(node['explanation'])}" if node["explanation"] else ""
            at = f"neuron {node['neuron']} at {node['position']} «{visible(node['token'])}»"
            yield f"  {node['effect']:+.3f}  {at}, code {node['code']:.3g}{said}"


def _percent(share: float | None) -> str:
    return "nothing measurable" if share is None else f"{100 * share:.1f} %"


def _title(found: Mapping[str, Any], model: str) -> str:
    explained = found["explained"]
    kept, lost = (_percent(explained[name]) for name in SHOWN_SHARES)
    probability = 100 * math.exp(explained["log_probability"])
    head = f"{model}: {probability:.1f} % for «{visible(found['target'])}»"
    return f"{head}\nthese nodes alone keep {kept}, without them {lost} is lost"


def _columns(found: Mapping[str, Any]) -> list[int]:
    """The positions that are drawn."""
    count = len(found["tokens"])
    if count <= MOST_COLUMNS:
        return list(range(count))
    return sorted({node["position"] for node in found["nodes"]} | {count - 1})


def _places(found: Mapping[str, Any], columns: Sequence[int]) -> tuple[dict[Place, tuple[float, float]], list[float]]:
    """Where each node lies, and how wide each column is: as wide as its fullest row of nodes, or its token."""
    cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for node in found["nodes"]:
        cells.setdefault((node["layer"], node["position"]), []).append(node)
    widths = []
    for column in columns:
        fullest = max((len(nodes) for (_, position), nodes in cells.items() if position == column), default=0)
        widths.append(max(0.22 * len(visible(found["tokens"][column])) + 0.4, 0.8, fullest + 0.5 if fullest else 0))
    centres = dict(zip(columns, _centres(widths), strict=True))
    places = {}
    for (layer, position), nodes in cells.items():
        level = found["layers"].index(layer)
        for i, node in enumerate(sorted(nodes, key=lambda node: -node["effect"])):
            places[layer, position, node["neuron"]] = (centres[position] + i - (len(nodes) - 1) / 2, level + 0.28)
    return places, widths


def _centres(widths: Sequence[float]) -> list[float]:
    return [sum(widths[:i]) + width / 2 for i, width in enumerate(widths)]


def _draw_edges(
    axes: Axes, found: Mapping[str, Any], places: Mapping[Place, tuple[float, float]], target: tuple[float, float]
) -> None:
    """Edges between nodes by what they do to the target; the last layer's nodes lead to it."""
    last = found["layers"][-1]
    lines = [(places[tuple(edge["from"])], places[tuple(edge["to"])], edge["effect"]) for edge in found["edges"]]
    lines = lines[:MOST_EDGES]
    final = [
        (places[node["layer"], node["position"], node["neuron"]], target, node["effect"])
        for node in found["nodes"] if node["layer"] == last
    ]  # fmt: skip
    for group in (lines, final):
        largest = max((abs(effect) for _, _, effect in group), default=0) or 1.0
        for (x, y), (to_x, to_y), effect in group:
            share = abs(effect) / largest
            axes.plot([x, to_x], [y, to_y], color=FOR if effect > 0 else AGAINST, linewidth=0.4 + 3 * share,
                      alpha=0.15 + 0.55 * share, zorder=1, solid_capstyle="round")  # fmt: skip


def _draw_nodes(axes: Axes, found: Mapping[str, Any], places: Mapping[Place, tuple[float, float]]) -> None:
    largest = max((abs(node["effect"]) for node in found["nodes"]), default=0) or 1.0
    for node in found["nodes"]:
        x, y = places[node["layer"], node["position"], node["neuron"]]
        share = abs(node["effect"]) / largest
        axes.scatter([x], [y], s=260 + 340 * share, color=FOR if node["effect"] > 0 else AGAINST, zorder=3,
                     edgecolors="white", linewidths=1)  # fmt: skip
        axes.text(x, y, str(node["neuron"]), ha="center", va="center", color="white", fontsize=7, zorder=4)


def _label(
    axes: Axes, found: Mapping[str, Any], columns: Sequence[int], centres: Sequence[float], height: float, width: float
) -> None:
    tokens = [f"{visible(found['tokens'][column])}\n{column}" for column in columns]
    axes.set_xticks(list(centres), tokens)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks(
        [level + 0.28 for level in range(len(found["layers"]))], [f"layer {one}" for one in found["layers"]]
    )
    axes.set_ylim(-0.35, height + 0.45)
    axes.set_xlim(-0.2, width + 0.2)
    for level in range(1, len(found["layers"])):
        axes.axhline(level - 0.22, color=FAINT, linewidth=0.5, alpha=0.4)


def _legend() -> list[Any]:
    kinds = ((FOR, "speaks for the token"), (AGAINST, "against it"))
    return [Line2D([], [], color=color, marker="o", linewidth=2, markersize=7, label=label) for color, label in kinds]
