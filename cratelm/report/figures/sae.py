"""The figure of an autoencoder: how often its latents fire."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cratelm.report.figures.form import FAINT, INK, PALETTE, STYLE, write_figures

BAR = PALETTE["crate"][1]


def write_density(evaluation: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw the histogram of an evaluation.json as density.svg and density.png."""
    return write_figures({"density": log_density(evaluation)}, out)


def log_density(evaluation: Mapping[str, Any]) -> Figure:
    """Latents by the share of tokens on which they fire, on a logarithmic axis; dead ones are a bar of their own."""
    found = evaluation["log_density"]
    edges, counts = np.array(found["edges"]), np.array(found["counts"])
    occupied = np.flatnonzero(counts)
    first = max(0, int(occupied[0]) - 2) if len(occupied) else len(counts) - 8
    lowest, width = edges[first], edges[1] - edges[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.bar(edges[first:-1], counts[first:], width=0.9 * width, align="edge", color=BAR)
        at = lowest - 3 * width
        axes.bar([at], [found["dead"]], width=0.9 * width, align="edge", color=FAINT)
        decades = np.arange(np.ceil(lowest), 0.5)
        axes.set_xticks([at + width / 2, *decades], ["never", *(_share(decade) for decade in decades)])
        axes.set_xlim(at - width / 2, 0.1)
        axes.set_title(f"{evaluation['name']}: {evaluation['width']} latents")
        axes.set_xlabel(f"share of {evaluation['tokens']:,} held-out tokens on which a latent fires")
        axes.set_ylabel("latents", color=INK)
    return figure


def _share(decade: float) -> str:
    """-3 -> 0.1 %; what is smaller than a thousandth of a percent as a power."""
    return f"{10 ** (decade + 2):.12g} %" if decade >= -5 else f"1e{decade:.0f}"
