"""The form of every figure: style, colours and markers of models, and writing as SVG and PNG.

The same results give the same bytes: ids in the SVG are seeded and no date is written.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cratelm.rundir import atomic_path

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


def handle(color: str, marker: str, *, label: str, alpha: float = 1.0, width: float = 1.8, **more: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, marker=marker, markersize=5, linewidth=width, alpha=alpha, label=label, **more)
