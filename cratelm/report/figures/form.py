"""The form of every figure: style, colours and markers of models, and writing as SVG and PNG.

The same results give the same bytes: ids in the SVG are seeded and no date is written.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cratelm.rundir import atomic_path
from cratelm.runtime import human

INK, FAINT = "#333333", "#999999"
"""Colours of text and lines, and of grid and ticks; the page adapts both to a light or dark background."""

PALETTE = {
    "crate": ("#0072B2", "#56B4E9", "#009E73"),
    "gpt2": ("#D55E00", "#E69F00", "#CC79A7"),
    "other": ("#009E73", "#CC79A7", "#333333"),
}
"""Okabe and Ito's colours, distinguishable with any colour vision; cold colours for CRATE, warm colours for GPT-2."""

MARKERS = {"crate": "o^P", "gpt2": "sDv", "other": "X*p"}
"""Distinguishable without colour; the next marker is used after all colours."""

Dashes = tuple[float, tuple[float, ...]]
SHUFFLED: Dashes = (0.0, (1.0, 1.8))
RANDOM_INIT: Dashes = (0.0, (4.0, 2.0))
"""Dashes of the two controls."""

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


@contextmanager
def drawing(width: float, height: float, *, layout: Any = "constrained", **style: Any) -> Iterator[Figure]:
    """A figure of this size in inches, drawn in the common style; `style` replaces settings of it (`axes_grid`)."""
    with mpl.rc_context(STYLE | {name.replace("_", "."): value for name, value in style.items()}):
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def looks(models: Sequence[Any]) -> dict[str, Look]:
    """Title -> colour and marker of each model. A model is any object with an `arch` and a `title`."""
    by_title: dict[str, Look] = {}
    counts: Counter[str] = Counter()
    for model in models:
        family = model.arch if model.arch in PALETTE else "other"
        marker, color = divmod(counts[family], len(PALETTE[family]))
        markers = MARKERS[family]
        by_title[model.title] = Look(color=PALETTE[family][color], marker=markers[marker % len(markers)])
        counts[family] += 1
    return by_title


def handle(color: str, marker: str, *, label: str, alpha: float = 1.0, width: float = 1.8, **more: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, marker=marker, markersize=5, linewidth=width, alpha=alpha, label=label, **more)


def legend_handles(look: Mapping[str, Look], *, random_init: bool = False, shuffled: bool = False) -> list[Line2D]:
    """The legend entries of the models, and of the controls that are drawn."""
    handles = [handle(model.color, model.marker, label=title) for title, model in look.items()]
    control: dict[str, Any] = {"alpha": 0.6, "width": 1.1}
    if random_init:
        hollow = control | {"linestyle": RANDOM_INIT, "markerfacecolor": "none"}
        handles.append(handle(INK, "o", label="random-init model", **hollow))
    if shuffled:
        handles.append(handle(INK, "x", label="shuffled explanations", linestyle=SHUFFLED, **control))
    return handles


def layer_axis(axes: Axes, depth: int) -> None:
    """Format the x axis for layers, with at most 13 ticks."""
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, depth - 0.5)
    axes.set_xticks(range(0, depth, 1 + (depth - 1) // 12))


def training_axis(axes: Axes) -> None:
    """Format the x axis for training tokens."""
    axes.set_xlabel("tokens seen in training")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: human(float(tokens))))
    axes.set_xlim(left=0)


def note(axes: Axes, text: str) -> None:
    """Write a note into the middle of an empty panel."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=FAINT)


def write_figures(figures: Mapping[str, Figure], out: Path) -> list[Path]:
    """Write each figure as SVG and PNG."""
    paths = []
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            paths.append(out / f"{name}.{suffix}")
            with atomic_path(paths[-1]) as temporary:
                _save(figure, temporary, suffix)
    return paths


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for a page.

    The element contains only the elements and attributes on an allow-list: no style, script or address. Colours are
    repeated as classes (`f-0072b2` for fill, `s-0072b2` for stroke), so that the page can adapt them to its background;
    ids begin with `name`, so that one page can have several figures.
    """
    out = io.BytesIO()
    _save(figure, out, "svg", transparent=True)
    source = ElementTree.fromstring(out.getvalue())
    svg = ElementTree.Element("svg", {
        "viewBox": source.get("viewBox", ""), "role": "img", "aria-label": description, "class": f"figure-{name}",
        "stroke-linejoin": "round", "stroke-linecap": "butt",
    })  # fmt: skip
    svg.extend(copy for child in source if (copy := _plain(child, name)) is not None)
    return ElementTree.tostring(svg, encoding="unicode")


def _save(figure: Figure, out: Path | io.BytesIO, suffix: str, *, transparent: bool = False) -> None:
    metadata = {"Date": None, "Creator": "cratelm"} if suffix == "svg" else {"Software": "cratelm"}
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # A model's name may use a script that the font lacks; the figure then shows a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format=suffix, metadata=metadata, dpi=200, transparent=transparent)


_ELEMENTS = {"g", "defs", "path", "use", "clipPath", "rect", "text", "tspan"}

_ATTRIBUTES = {"d", "transform", "x", "y", "width", "height", "fill", "stroke"}

_PROPERTIES = {
    "fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-dashoffset",
    "stroke-linecap", "stroke-linejoin", "opacity", "font-size", "font-weight", "text-anchor",
}  # fmt: skip


def _plain(element: ElementTree.Element, name: str) -> ElementTree.Element | None:
    """A copy with the allowed attributes and children; None for an element that is not allowed."""
    tag = element.tag.rpartition("}")[2]
    if tag not in _ELEMENTS:
        return None
    given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    style = dict(part.split(":", 1) for part in given.get("style", "").split(";") if ":" in part)
    properties = {key.strip(): value.strip() for key, value in style.items()}
    if match := re.search(r"(bold|[67]00)?\s*([\d.]+px)", properties.get("font", "")):
        properties |= {"font-size": match[2]} | ({"font-weight": "bold"} if match[1] else {})
    attributes = {key: value for key, value in given.items() if key in _ATTRIBUTES}
    attributes |= {key: value for key, value in properties.items() if key in _PROPERTIES}
    if "id" in given:
        attributes["id"] = f"{name}-{given['id']}"
    if given.get("href", "").startswith("#"):
        attributes["href"] = f"#{name}-{given['href'][1:]}"
    if match := re.fullmatch(r"url\(#([\w-]+)\)", given.get("clip-path", "")):
        attributes["clip-path"] = f"url(#{name}-{match[1]})"
    colors = [(key[0], attributes[key]) for key in ("fill", "stroke") if attributes.get(key, "").startswith("#")]
    if tag == "text" and "fill" not in attributes:
        colors.append(("f", INK))
    if colors:
        attributes["class"] = " ".join(f"{letter}-{color[1:].lower()}" for letter, color in colors)
    copy = ElementTree.Element(tag, attributes)
    copy.text, copy.tail = element.text, element.tail
    copy.extend(child for original in element if (child := _plain(original, name)) is not None)
    return copy
