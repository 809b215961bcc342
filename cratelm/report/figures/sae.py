"""The figure of an autoencoder: how often its latents fire."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cratelm.report.figures.form import FAINT, INK, PALETTE, drawing, write_figures

BAR = PALETTE["crate"][1]


def write_density(evaluation: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw the histogram of an evaluation.json as density.svg and density.png."""
    return write_figures({"density": log_density(evaluation)}, out)


def log_density(evaluation: Mapping[str, Any]) -> Figure:
    """Number of latents by the share of tokens on which they fire (logarithmic), with a separate bar for dead ones."""
    density = evaluation["log_density"]
    edges, counts = np.array(density["edges"]), np.array(density["counts"])
    occupied = np.flatnonzero(counts)
    first = max(0, int(occupied[0]) - 2) if len(occupied) else len(counts) - 8
    lowest, width = edges[first], edges[1] - edges[0]
    with drawing(5.4, 2.9) as figure:
        axes = figure.subplots()
        axes.bar(edges[first:-1], counts[first:], width=0.9 * width, align="edge", color=BAR)
        dead_bar = lowest - 3 * width
        axes.bar([dead_bar], [density["dead"]], width=0.9 * width, align="edge", color=FAINT)
        decades = np.arange(np.ceil(lowest), 0.5)
        axes.set_xticks([dead_bar + width / 2, *decades], ["never", *(_percent(decade) for decade in decades)])
        axes.set_xlim(dead_bar - width / 2, 0.1)
        axes.set_title(f"{evaluation['name']}: {evaluation['width']} latents")
        axes.set_xlabel(f"share of {evaluation['tokens']:,} held-out tokens on which a latent fires")
        axes.set_ylabel("latents", color=INK)
    return figure


def _percent(decade: float) -> str:
    """-3 -> 0.1 %; a share below 0.001 % as a power of ten."""
    return f"{10 ** (decade + 2):.12g} %" if decade >= -5 else f"1e{decade:.0f}"
