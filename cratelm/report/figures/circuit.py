"""A circuit as a graph and as lines of text, from the file that `cratelm circuit` wrote."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cratelm.report.figures.form import FAINT, INK, drawing, handle
from cratelm.report.shown_text import visible

FOR, AGAINST = "#0072B2", "#D55E00"
"""Colours of nodes and edges that raise the target's probability, and that lower it."""
MOST_COLUMNS = 16
"""Longest prompt drawn with all its tokens; a longer prompt is reduced to the positions with nodes and the last."""
MOST_EDGES = 60

Place = tuple[int, int, int]
"""Layer, position, neuron."""
Circuit = Mapping[str, Any]
"""The contents of a circuit file."""


def circuit_figure(circuit: Circuit, model: str) -> Figure:
    """Positions from left to right, layers from bottom to top, the target above its last position."""
    columns = _columns(circuit)
    places, widths = _places(circuit, columns)
    height = len(circuit["layers"]) + 0.1
    width = min(16.0, max(6.0, 1.2 + 0.52 * sum(widths)))
    with drawing(width, 1.7 + 1.35 * len(circuit["layers"]), axes_grid=False) as figure:
        axes = figure.add_subplot()
        centres = _centres(widths)
        target = (centres[-1], height)
        _draw_edges(axes, circuit, places, target)
        _draw_nodes(axes, circuit, places)
        axes.text(*target, f"«{visible(circuit['target'])}»", ha="center", va="center", fontweight="bold",
                  bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": INK})  # fmt: skip
        _label(axes, circuit, columns, centres, height, sum(widths))
        axes.set_title(_title(circuit, model))
        kinds = ((FOR, "raises the token's probability"), (AGAINST, "lowers it"))
        axes.legend(
            handles=[handle(color, "o", label=label) for color, label in kinds], loc="upper left", fontsize=8
        )  # fmt: skip
    return figure


def circuit_lines(circuit: Circuit) -> Iterator[str]:
    """The text for a terminal: the probability, the shares, and the nodes of each layer, strongest first."""
    explained = circuit["explained"]
    yield f"«{visible(circuit['prompt'])}» -> «{visible(circuit['target'])}»"
    yield (
        f"probability {100 * math.exp(explained['log_probability']):.2f} %, log probability "
        f"{explained['log_probability']:.3f}; {explained['none']:.3f} with every neuron ablated"
    )
    yield (
        f"the {len(circuit['nodes'])} nodes below keep {_percent(explained['share_kept'])} of the difference when all "
        "others are ablated;"
    )
    yield f"without these {_percent(explained['share_lost'])} is lost"
    for point in explained["curve"]:
        if point["share"] is not None and point["share"] >= 0.8:
            yield f"{point['nodes']} of the {circuit['ranked']} nodes tried keep {_percent(point['share'])}"
            break
    for layer in reversed(circuit["layers"]):
        yield ""
        yield f"layer {layer}"
        for node in (node for node in circuit["nodes"] if node["layer"] == layer):
            explanation = f"  {visible(node['explanation'])}" if node["explanation"] else ""
            neuron = f"neuron {node['neuron']} at {node['position']} «{visible(node['token'])}»"
            yield f"  {node['effect']:+.3f}  {neuron}, code {node['code']:.3g}{explanation}"


def _percent(share: float | None) -> str:
    return "nothing measurable" if share is None else f"{100 * share:.1f} %"


def _title(circuit: Circuit, model: str) -> str:
    explained = circuit["explained"]
    probability = 100 * math.exp(explained["log_probability"])
    return (
        f"{model}: {probability:.1f} % for «{visible(circuit['target'])}»\nthese nodes alone keep "
        f"{_percent(explained['share_kept'])}, without them {_percent(explained['share_lost'])} is lost"
    )


def _columns(circuit: Circuit) -> list[int]:
    """The positions that are drawn."""
    count = len(circuit["tokens"])
    if count <= MOST_COLUMNS:
        return list(range(count))
    return sorted({node["position"] for node in circuit["nodes"]} | {count - 1})


def _places(circuit: Circuit, columns: Sequence[int]) -> tuple[dict[Place, tuple[float, float]], list[float]]:
    """The place of each node, and the width of each column: that of its fullest row of nodes, or its token."""
    cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for node in circuit["nodes"]:
        cells.setdefault((node["layer"], node["position"]), []).append(node)
    widths = []
    for column in columns:
        fullest = max((len(nodes) for (_, position), nodes in cells.items() if position == column), default=0)
        widths.append(max(0.22 * len(visible(circuit["tokens"][column])) + 0.4, 0.8, fullest + 0.5 if fullest else 0))
    centres = dict(zip(columns, _centres(widths), strict=True))
    places = {}
    for (layer, position), nodes in cells.items():
        level = circuit["layers"].index(layer)
        for i, node in enumerate(sorted(nodes, key=lambda node: -node["effect"])):
            places[layer, position, node["neuron"]] = (centres[position] + i - (len(nodes) - 1) / 2, level + 0.28)
    return places, widths


def _centres(widths: Sequence[float]) -> list[float]:
    return [sum(widths[:i]) + width / 2 for i, width in enumerate(widths)]


def _draw_edges(
    axes: Axes, circuit: Circuit, places: Mapping[Place, tuple[float, float]], target: tuple[float, float]
) -> None:
    """Draw edges between nodes by their effect on the target, and edges from the last layer's nodes to the target."""
    edges = circuit["edges"][:MOST_EDGES]
    lines = [(places[tuple(edge["from"])], places[tuple(edge["to"])], edge["effect"]) for edge in edges]
    final = [
        (places[node["layer"], node["position"], node["neuron"]], target, node["effect"])
        for node in circuit["nodes"] if node["layer"] == circuit["layers"][-1]
    ]  # fmt: skip
    for group in (lines, final):
        largest = max((abs(effect) for _, _, effect in group), default=0) or 1.0
        for (x, y), (to_x, to_y), effect in group:
            share = abs(effect) / largest
            axes.plot([x, to_x], [y, to_y], color=FOR if effect > 0 else AGAINST, linewidth=0.4 + 3 * share,
                      alpha=0.15 + 0.55 * share, zorder=1, solid_capstyle="round")  # fmt: skip


def _draw_nodes(axes: Axes, circuit: Circuit, places: Mapping[Place, tuple[float, float]]) -> None:
    largest = max((abs(node["effect"]) for node in circuit["nodes"]), default=0) or 1.0
    for node in circuit["nodes"]:
        x, y = places[node["layer"], node["position"], node["neuron"]]
        share = abs(node["effect"]) / largest
        axes.scatter([x], [y], s=260 + 340 * share, color=FOR if node["effect"] > 0 else AGAINST, zorder=3,
                     edgecolors="white", linewidths=1)  # fmt: skip
        axes.text(x, y, str(node["neuron"]), ha="center", va="center", color="white", fontsize=7, zorder=4)


def _label(
    axes: Axes, circuit: Circuit, columns: Sequence[int], centres: Sequence[float], height: float, width: float
) -> None:
    layers = circuit["layers"]
    axes.set_xticks(list(centres), [f"{visible(circuit['tokens'][column])}\n{column}" for column in columns])
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([level + 0.28 for level in range(len(layers))], [f"layer {layer}" for layer in layers])
    axes.set_ylim(-0.35, height + 0.45)
    axes.set_xlim(-0.2, width + 0.2)
    for level in range(1, len(layers)):
        axes.axhline(level - 0.22, color=FAINT, linewidth=0.5, alpha=0.4)
