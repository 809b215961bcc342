"""The best examples as a figure of their own, as the paper's shows them: two models' neurons side by side.

Text stands on a grid of letters (a letter of DejaVu Sans Mono is 0.602 of its size wide), so that the colour behind a
token and the bar below it are where the token is, whatever font shows the SVG.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from cratelm.interpretation.firing.measures import STATED, THRESHOLDS
from cratelm.report.figures.form import INK, STYLE
from cratelm.report.results.firing import FiringExample, RunFiring, shown_examples
from cratelm.report.results.gather import matched_pairs
from cratelm.report.shown_text import visible
from cratelm.report.tables.form import points

HEAT = ("#fff6dd", "#ffedbd", "#ffe19a", "#ffd377", "#ffc353", "#fbb135", "#f49d1f", "#ea8a0c")
"""Behind a token, by the activation in eighths of the neuron's maximum; the page's colours."""
NEGATIVE, PREDICTED, SOFT, LINE = "#d9e4f2", "#0b5f95", "#5b636d", "#d8d4cc"
SIZE, ADVANCE = 7.6, 0.602
"""Points of the text, and the width of a letter in units of it."""
LETTER, ROW = SIZE * ADVANCE / 72, 0.175
"""Width of a letter and height of a line of an excerpt, in inches."""
LETTERS = 64
"""On a line."""
SAID_LINES, EXCERPT_LINES, EXCERPTS = 4, 3, 2
"""At most so many lines of an explanation and of an excerpt, and excerpts of a neuron."""
PAD, GAP, HEAD = 0.14, 0.18, 0.26
"""Inside a card, between cards, and the height of a card's head, in inches."""
CARD = LETTERS * LETTER + 2 * PAD


@dataclass(frozen=True, slots=True)
class Token:
    """A token, or the part of one that stands on one line."""

    text: str
    heat: float
    """The activation as a share of the neuron's maximum; may be below 0."""
    predicted: float
    """As a share of the largest prediction."""
    relevant: bool
    at: int = 0
    """Letters before it on its line."""


@dataclass(frozen=True, slots=True)
class Card:
    """What one neuron shows, in lines."""

    example: FiringExample
    said: tuple[str, ...]
    excerpts: tuple[tuple[tuple[Token, ...], ...], ...] = field(repr=False)

    @property
    def height(self) -> float:
        """Inches."""
        lines = sum(map(len, self.excerpts))
        return 2 * PAD + HEAD + 0.15 * len(self.said) + ROW * lines + 0.1 * len(self.excerpts) + 0.2


def firing_panel(found: Sequence[RunFiring]) -> dict[str, Figure]:
    """`firing_examples`: the first pair of models that are compared, or the one there is; nothing without examples."""
    shown = shown_examples(found)
    runs = {one.run.title: one.run for one in found if one.run.title in shown}
    if not runs:
        return {}
    pairs = matched_pairs(list(runs.values()))
    titles = [run.title for run in pairs[0]] if pairs else list(runs)[:1]
    columns = [[_card(one, runs[title].token_strings) for one in shown[title]] for title in titles]
    return {"firing_examples": _draw(titles, columns, found[0].protocol)}


def _card(one: FiringExample, strings: Sequence[str]) -> Card:
    return Card(
        one, tuple(_wrapped(visible(one.explanation), LETTERS, SAID_LINES)),
        tuple(
            tuple(_lines(list(_tokens(one, place, strings)))) for place in range(min(EXCERPTS, len(one.excerpts)))
        ),
    )  # fmt: skip


def _tokens(one: FiringExample, place: int, strings: Sequence[str]) -> Iterator[Token]:
    excerpt, maximum = one.excerpts[place], one.maximum if one.maximum > 0 else 1.0
    for token, activation, predicted, relevant in zip(
        excerpt.tokens.tolist(), excerpt.activations.tolist(), one.predicted[place].tolist(),
        one.relevant[place].tolist(), strict=True,
    ):  # fmt: skip
        heat = activation / maximum if np.isfinite(activation) else 0.0
        yield Token(visible(strings[token]), heat, predicted, relevant)


def _lines(tokens: Sequence[Token]) -> list[tuple[Token, ...]]:
    """The tokens around the strongest, as many as the lines hold, a third of them before it; dots for the rest."""
    room, widths = EXCERPT_LINES * LETTERS - 2, [width(one.text) for one in tokens]
    strongest = max(range(len(tokens)), key=lambda place: tokens[place].heat)
    first, last = strongest, strongest + 1
    while first > 0 and sum(widths[first - 1 : strongest]) <= room // 3:
        first -= 1
    while last < len(tokens) and sum(widths[first : last + 1]) <= room:
        last += 1
    while first > 0 and sum(widths[first - 1 : last]) <= room:
        first -= 1
    dots = Token("…", 0.0, 0.0, False)
    kept = [*([dots] if first > 0 else []), *tokens[first:last], *([dots] if last < len(tokens) else [])]
    lines, at = list[list[Token]]([[]]), 0
    for token in kept:
        for part in _parts(token.text, LETTERS - at):
            if at + width(part) > LETTERS and at:
                lines.append([])
                at = 0
            lines[-1].append(replace(token, text=part, at=at))
            at += width(part)
    return [tuple(line) for line in lines]


def _parts(text: str, room: int) -> Iterator[str]:
    """A text in parts, the first of which fits into the room and each other one on a line."""
    part = ""
    for letter in text:
        if width(part + letter) > max(room, 0) and part:
            yield part
            part, room = "", LETTERS
        part += letter
    if part:
        yield part


def width(text: str) -> int:
    """Letters of the grid that a text takes: two for a wide one, none for an accent."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _wrapped(text: str, letters: int, lines: int) -> list[str]:
    """Cut at spaces where that is possible; dots at the end of what is too long."""
    found, rest = list[str](), text
    while rest:
        end = len(rest)
        while width(rest[:end]) > letters:
            end -= 1
        cut = rest.rfind(" ", 1, end) if end < len(rest) else end
        cut = cut if cut > letters // 2 else end
        found.append(rest[:cut])
        rest = rest[cut:].removeprefix(" ")
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1][: letters - 1] + "…"]
    return found


def _draw(titles: Sequence[str], columns: Sequence[Sequence[Card]], protocol: str) -> Figure:
    """Cards in a grid: the n-th neuron of each model in one row, of one height."""
    rows = max(map(len, columns))
    heights = [max(cards[row].height for cards in columns if row < len(cards)) for row in range(rows)]
    wide, title, foot = GAP + len(columns) * (CARD + GAP), 0.42, 0.62
    high = title + sum(heights) + GAP * rows + foot
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(wide, high))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, wide)
        axes.set_ylim(high, 0)
        for column, (name, cards) in enumerate(zip(titles, columns, strict=True)):
            left, top = GAP + column * (CARD + GAP), title
            axes.text(left, 0.28, visible(name), fontsize=12, fontweight="bold", va="baseline")
            for card, height in zip(cards, heights, strict=False):
                _draw_card(axes, card, left, top, height)
                top += height + GAP
        _draw_key(axes, high - foot + 0.1, protocol, narrow=len(columns) == 1)
    return figure


def _draw_card(axes: Axes, card: Card, left: float, top: float, height: float) -> None:
    one = card.example
    axes.add_patch(FancyBboxPatch(
        (left, top), CARD, height, boxstyle="round,pad=0,rounding_size=0.06", facecolor="white", edgecolor=LINE,
        linewidth=0.8,
    ))  # fmt: skip
    left, y = left + PAD, top + PAD + 0.12
    axes.text(left, y, f"Layer {one.layer}, neuron {one.index}", fontsize=9, fontweight="bold", va="baseline")
    score = f"{points(100 * one.score)} points"
    right = left + LETTERS * LETTER
    axes.text(right, y, score, fontsize=11, fontweight="bold", va="baseline", ha="right")
    y += HEAD - 0.02
    for line in card.said:
        _write(axes, left, y, line, color=INK)
        y += 0.15
    y += 0.06
    for excerpt in card.excerpts:
        for tokens in excerpt:
            _draw_line(axes, tokens, left, y)
            y += ROW
        y += 0.1
    both = f"consistency {100 * one.consistency:.0f} %, distinctiveness {100 * one.distinctiveness:.0f} %"
    axes.text(left, top + height - PAD, f"{both} on random text", fontsize=7.5, color=SOFT, va="baseline")


def _draw_line(axes: Axes, line: Sequence[Token], left: float, base: float) -> None:
    """Colours first, then the letters, then the bars below them: neighbours do not cover each other."""
    for one in line:
        x, wide = left + one.at * LETTER, width(one.text) * LETTER
        if one.heat != 0:
            level = min(len(HEAT), max(1, int(np.ceil(len(HEAT) * one.heat))))
            color = HEAT[level - 1] if one.heat > 0 else NEGATIVE
            axes.add_patch(Rectangle((x, base - 0.095), wide, 0.125, facecolor=color, linewidth=0))
        if one.predicted > 0:
            deep = 0.005 + 0.025 * one.predicted
            alpha = 1.0 if one.relevant else 0.35
            axes.add_patch(Rectangle((x, base + 0.034), wide, deep, facecolor=PREDICTED, linewidth=0, alpha=alpha))
    for one in line:
        _write(axes, left + one.at * LETTER, base, one.text, color=INK)


def _write(axes: Axes, x: float, y: float, text: str, *, color: str) -> None:
    """A piece of text whose spaces stay: at the ends of a piece SVG drops all but the unbreakable ones."""
    text = text.replace(" ", "\N{NO-BREAK SPACE}")
    axes.text(x, y, text, fontsize=SIZE, family="DejaVu Sans Mono", color=color, va="baseline", parse_math=False)


def _draw_key(axes: Axes, top: float, protocol: str, *, narrow: bool) -> None:
    """What colours, bars and numbers are."""
    box = 0.11

    def swatches(x: float, y: float, what: str, *, bars: bool) -> float:
        for place, color in enumerate(HEAT):
            share = (place + 1) / len(HEAT)
            deep = 0.005 + 0.025 * share if bars else box
            axes.add_patch(Rectangle(
                (x + place * box, y - 0.09 + (box - deep)), box, deep, facecolor=PREDICTED if bars else color,
                linewidth=0, alpha=1.0 if share >= THRESHOLDS[STATED] or not bars else 0.35,
            ))  # fmt: skip
        axes.text(x + len(HEAT) * box + 0.08, y, what, fontsize=7.5, color=SOFT, va="baseline")
        return x + CARD + GAP

    below = swatches(GAP, top + 0.08, "activation, up to the neuron's largest", bars=False)
    place = (GAP, top + 0.25) if narrow else (below, top + 0.08)
    swatches(*place, "prediction, up to its largest; pale: too little to be relevant", bars=True)
    said = f"Points: 100 x the correlation of activation and prediction ({protocol})."
    axes.text(GAP, top + (0.42 if narrow else 0.25), said, fontsize=7.5, color=SOFT, va="baseline")
