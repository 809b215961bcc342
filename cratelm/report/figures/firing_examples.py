"""The best examples of two models as a figure: neurons side by side, each token on the colour of its activation.

Each token is placed separately on a grid of monospaced letters, so that text and background match in any font.
"""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len, set_cell_size

from cratelm.report.figures.form import INK, drawing
from cratelm.report.results.firing import FiringExample, RunFiring, shown_examples
from cratelm.report.results.gather import matched_pairs
from cratelm.report.shown_text import visible
from cratelm.report.tables.form import points

HEAT = ("#fff6dd", "#ffedbd", "#ffe19a", "#ffd377", "#ffc353", "#fbb135", "#f49d1f", "#ea8a0c")
"""Background of a token, by the activation in eighths of the neuron's maximum; the page has the same colours."""
NEGATIVE, PREDICTED, SOFT = "#d9e4f2", "#0b5f95", "#5b636d"
SIZE, LINE, GAP = 7.6, 0.19, 0.25
"""Size of the text (points); height of a line and gap between columns and between neurons (inches)."""
LETTER = 0.602 * SIZE / 72
"""Width of a letter of DejaVu Sans Mono (inches)."""
LETTERS, EXPLANATION_LINES, EXCERPTS = 72, 2, 3
"""Letters per line; lines per explanation; excerpts per neuron, one line each."""
COLUMN = LETTERS * LETTER + GAP
CARD = (EXPLANATION_LINES + EXCERPTS + 2) * LINE + GAP


def firing_panel(entries: Sequence[RunFiring]) -> dict[str, Figure]:
    """`firing_examples`: the first pair of models that are compared, or the only model; empty without examples."""
    shown = shown_examples(entries)
    runs = {entry.run.title: entry.run for entry in entries if entry.run.title in shown}
    if not runs:
        return {}
    pairs = matched_pairs(list(runs.values()))
    titles = [run.title for run in pairs[0]] if pairs else list(runs)[:1]
    wide = GAP + len(titles) * COLUMN
    high = 3 * LINE + max(len(shown[title]) for title in titles) * CARD + 2 * LINE
    with drawing(wide, high, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(high, 0))
        axes.set_axis_off()
        for column, title in enumerate(titles):
            left = GAP + column * COLUMN
            axes.text(left, 1.5 * LINE, visible(title), fontsize=12, fontweight="bold")
            for row, example in enumerate(shown[title]):
                _draw_example(axes, example, runs[title].token_strings, left, 3 * LINE + row * CARD)
        key = (
            "Colour: activation, up to the neuron's largest. Bar: prediction, up to its largest; pale: not relevant.",
            f"Points: 100 x the correlation of activation and prediction ({entries[0].protocol}).",
        )
        for line, text in enumerate(key):
            axes.text(GAP, high - (1.6 - line) * LINE, text, fontsize=7.5, color=SOFT)
    return {"firing_examples": figure}


def _draw_example(axes: Axes, example: FiringExample, strings: Sequence[str], left: float, top: float) -> None:
    """A neuron: its score, its explanation, its excerpts, and how it fires on random text."""
    head = f"Layer {example.layer}, neuron {example.index}: {points(100 * example.score)} points"
    axes.text(left, top, head, fontsize=9, fontweight="bold")
    explanation = visible(example.explanation)
    lines = textwrap.wrap(explanation, LETTERS, max_lines=EXPLANATION_LINES, placeholder="…", drop_whitespace=False)
    for number, line in enumerate(lines, 1):
        _write(axes, left, top + number * LINE, line)
    base = top + (1 + EXPLANATION_LINES) * LINE
    for place in range(min(EXCERPTS, len(example.excerpts))):
        _draw_excerpt(axes, example, place, strings, left, base + place * LINE)
    both = f"consistency {100 * example.consistency:.0f} %, distinctiveness {100 * example.distinctiveness:.0f} %"
    axes.text(left, base + EXCERPTS * LINE, f"{both} on random text", fontsize=7.5, color=SOFT)


def _draw_excerpt(
    axes: Axes, example: FiringExample, place: int, strings: Sequence[str], left: float, base: float
) -> None:  # fmt: skip
    """The tokens around the strongest, each on the colour of its activation and above a bar for its prediction."""
    excerpt = example.excerpts[place]
    texts = [cut(visible(strings[token])) for token in excerpt.tokens.tolist()]
    heat = np.nan_to_num(excerpt.activations / (example.maximum if example.maximum > 0 else 1.0), posinf=0, neginf=0)
    first, last = window([cell_len(text) for text in texts], int(heat.argmax()))
    for token in range(first, last):
        wide, predicted = cell_len(texts[token]) * LETTER, float(example.predicted[place][token])
        if heat[token] != 0:
            level = min(len(HEAT), max(1, math.ceil(len(HEAT) * heat[token])))
            color = HEAT[level - 1] if heat[token] > 0 else NEGATIVE
            axes.add_patch(Rectangle((left, base - 0.095), wide, 0.125, facecolor=color, linewidth=0))
        if predicted > 0:
            alpha, thick = 1.0 if example.relevant[place][token] else 0.35, 0.005 + 0.025 * predicted
            bar = Rectangle((left, base + 0.034), wide, thick, facecolor=PREDICTED, alpha=alpha, linewidth=0)
            axes.add_patch(bar)
        _write(axes, left, base, texts[token])
        left += wide


def cut(text: str) -> str:
    """The token, cut to the length of a line."""
    return set_cell_size(text, LETTERS) if cell_len(text) > LETTERS else text


def window(widths: Sequence[int], strongest: int) -> tuple[int, int]:
    """First and last (exclusive) token of the line around the strongest, which starts in the line's first third."""
    first, last = strongest, strongest + 1
    while first > 0 and sum(widths[first - 1 : strongest]) <= min(LETTERS // 3, LETTERS - widths[strongest]):
        first -= 1
    while last < len(widths) and sum(widths[first : last + 1]) <= LETTERS:
        last += 1
    while first > 0 and sum(widths[first - 1 : last]) <= LETTERS:
        first -= 1
    return first, last


def _write(axes: Axes, x: float, y: float, text: str) -> None:
    """Write a piece of text with no-break spaces, since SVG drops other spaces at both ends."""
    text = text.replace(" ", "\N{NO-BREAK SPACE}")
    axes.text(x, y, text, fontsize=SIZE, family="DejaVu Sans Mono", color=INK, parse_math=False)
